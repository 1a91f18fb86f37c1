"""What a training step costs against depth, width and length, on an accelerator: bench.py's runs.

    python experiments/costs.py run [depth width ...]     adds what costs.jsonl lacks
    python experiments/costs.py report                    prints a table, draws costs.png

32,768 tokens a step but in the last, AdamW, 50,304 tokens in the vocabulary; one process a shape,
so that each has its own peak of memory.
"""
import json
import os
import subprocess
import sys

from records import HERE, add, command, header, read, row

from minitf.cli.pictures import figure, save

RECORDS, TOKENS = HERE / "costs.jsonl", 32768
SHARE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}    # of the card's memory; jax takes 0.75
BASE = dict(depth=36, width=512, heads=8, length=512)
CURVES = {  # curve: shapes, each BASE with changes
    "depth": [dict(depth=depth) for depth in (12, 36, 144)],
    "width": [dict(width=width, heads=width // 64) for width in (256, 512, 1024)],
    "length": [dict(depth=16, length=length, attn=attn)
               for length in (512, 2048, 8192, 32768) for attn in ("espa", "softmax")],
    "remat": [dict(depth=144, width=1024, heads=16, length=2048, remat=True, batch=batch)
              for batch in (16, 32)],
}
COLUMNS = ("depth", "width", "batch", "length", "attn", "ms_per_step", "tokens_per_second",
           "utilisation", "peak_gib", "seconds_first_step", "seconds_constants")


def shapes(curve):
    return [dict(batch=TOKENS // (BASE | change)["length"]) | BASE | change
            for change in CURVES[curve]]


def run(names):
    for shape in [shape for curve in names or CURVES for shape in shapes(curve)]:
        if shape in [each["shape"] for each in read(RECORDS)]:
            continue
        flags = [f"--{name}" + f"={value}" * (value is not True) for name, value in shape.items()]
        command = [sys.executable, HERE / "bench.py", *flags, "--optimizer=adamw", "--timed=8"]
        result = subprocess.run(command, capture_output=True, text=True, env=SHARE | os.environ)
        if result.returncode:
            print(f"{shape}: {result.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        bench = json.loads(result.stdout)
        add(RECORDS, shape=shape, **{f"bench_{name}": value for name, value in bench.items()})
        print(f"{shape}: {bench['ms_per_step']} ms, {bench['peak_gib']} GiB", flush=True)


def report():
    runs = sorted(read(RECORDS), key=lambda each: [each["shape"][name] for name in BASE])
    print(header(*COLUMNS, "--remat"))
    for each in runs:
        print(row(*(each["bench_" + name] for name in COLUMNS), each["shape"].get("remat", False)))
    picture, axes = figure((10, 5.5), 2, 3, sharex="col")
    for column, curve in zip(axes.T, ("depth", "width", "length")):
        for attn, style in (("espa", "ko-"), ("softmax", "C7s--")):
            lines = [each for each in runs
                     if each["shape"] in shapes(curve) and each["bench_attn"] == attn]
            for axis, name in zip(column, ("ms_per_step", "peak_gib")):
                axis.plot([each["shape"][curve] for each in lines],
                          [each["bench_" + name] for each in lines], style, label=attn)
                axis.set(ylabel=name)
        column[-1].set(xlabel=curve + ", 16 blocks" * (curve == "length"))
    axes[0][2].set_xscale("log", base=2)
    axes[0][2].legend()
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    save(picture, HERE / "costs.png")


if __name__ == "__main__":
    command(__doc__, CURVES, run, report)
