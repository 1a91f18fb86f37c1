"""What a training step costs against depth, width and length: runs bench.py for each shape, on an accelerator.

    python experiments/curves.py run [--only depth width length]      adds to curves.jsonl what is not in it
    python experiments/curves.py report                               prints the table, draws curves.png

32,768 tokens a step but in the last, AdamW, 50,304 tokens in the vocabulary; one process a shape, so that each has its own peak of memory.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METRICS = HERE / "curves.jsonl"
TOKENS = 32768
BASE = dict(depth=36, width=512, heads=8, length=512)
CURVES = {  # curve: shapes, each BASE with changes
    "depth": [dict(depth=depth) for depth in (12, 36, 144)],
    "width": [dict(width=width, heads=width // 64) for width in (256, 512, 1024)],
    "length": [dict(depth=16, length=length, attn=attn) for length in (512, 2048, 8192, 32768) for attn in ("espa", "softmax")],
    "remat": [dict(depth=144, width=1024, heads=16, length=2048, remat=True, batch=batch) for batch in (16, 32)],
}


def read():
    return [json.loads(line) for line in METRICS.read_text().splitlines()] if METRICS.exists() else []


def shapes(curve):
    return [dict(batch=TOKENS // (BASE | change)["length"]) | BASE | change for change in CURVES[curve]]


def run(curves):
    for shape in [shape for curve in curves for shape in shapes(curve)]:
        if shape in [each["shape"] for each in read()]:
            continue
        flags = [part for name, value in shape.items() for part in (["--" + name] if value is True else ["--" + name, str(value)])]
        command = [sys.executable, HERE / "bench.py", *flags, "--no-own", "--optimizer", "adamw", "--timed", "8"]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ            # of the card's; jax takes 0.75
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            print(f"{shape}: {result.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        line = dict(shape=shape, **{f"bench_{name}": value for name, value in json.loads(result.stdout).items()})
        with open(METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{shape}: {line['bench_ms_per_step']} ms, {line['bench_peak_gib']} GiB", flush=True)


def report():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    runs = sorted(read(), key=lambda each: [each["shape"][name] for name in BASE])
    print("| depth | width | batch | length | attention | ms a step | tokens/s | utilisation | memory, GiB | first step, s | constants, s |")
    print("| --- |" + " --- |" * 10)
    for each in runs:
        shape, bench = each["shape"], {name[6:]: value for name, value in each.items() if name.startswith("bench_")}
        print(f"| {shape['depth']} | {shape['width']} | {shape['batch']} | {shape['length']} | {bench['attn']}{', --remat' * ('remat' in shape)} | "
              f"{bench['ms_per_step']} | {bench['tokens_per_second']:,} | {bench['utilisation']} | {bench['peak_gib']} | "
              f"{bench['seconds_first_step']} | {bench['seconds_constants']} |")
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), layout="constrained", sharex="col")
    for column, curve in zip(axes.T, ("depth", "width", "length")):
        for attn, style in (("espa", "ko-"), ("softmax", "C7s--")):
            lines = [each for each in runs if each["shape"] in shapes(curve) and each["bench_attn"] == attn]
            for axis, (name, label) in zip(column, (("ms_per_step", "ms a step"), ("peak_gib", "memory, GiB"))):
                axis.plot([each["shape"][curve] for each in lines], [each["bench_" + name] for each in lines], style, label=attn)
                axis.set(ylabel=label)
        if curve == "length":
            column[-1].set_xscale("log", base=2)
        for axis in column:
            axis.set_ylim(bottom=0)
        column[-1].set(xlabel=curve + ", 16 blocks" * (curve == "length"))
    axes[0][2].legend()
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--only", nargs="+", choices=tuple(CURVES), default=tuple(CURVES))
    arguments = parser.parse_args()
    run(arguments.only) if arguments.what == "run" else report()
