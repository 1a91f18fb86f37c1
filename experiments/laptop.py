"""The whole story on two CPU cores: run.py's default job beside its controls, three seeds each.

    python experiments/laptop.py run [NAME ...]     trains what is not yet in laptop.jsonl, about two minutes a run
    python experiments/laptop.py report             prints the table of the README, draws laptop.png
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
METRICS = HERE / "laptop.jsonl"
EVERY = 10
RUNS = {  # flags: (skips, norms, optimizer, line)
    "--attn espa": ("no", "no", "Muon", "k-"),
    "--attn espa --optimizer adamw": ("no", "no", "AdamW", "k--"),
    "--attn espa --no-own": ("no", "no", "Muon", "C2-"),
    "--attn espa --no-own --optimizer adamw": ("no", "no", "AdamW", "C2--"),
    "--attn vskip": ("no", "no", "Muon", None),
    "--attn uspa": ("no", "no", "Muon", None),
    "--attn softmax": ("no", "no", "Muon", "k:"),
    "--block paper --optimizer muon": ("no", "no", "Muon", "C3-"),
    "--block paper": ("no", "no", "AdamW", "C3--"),
    "--block weighted": ("weighted", "no", "Muon", "C0-"),
    "--block weighted --optimizer adamw": ("weighted", "no", "AdamW", "C0--"),
    "--block preln --optimizer muon": ("yes", "yes", "Muon", "C7-"),
    "--block preln": ("yes", "yes", "AdamW", "C7--"),
}


def read():
    return [json.loads(line) for line in METRICS.read_text().splitlines()] if METRICS.exists() else []


def run(names, seeds):
    """One process a run; its metrics.jsonl is kept as means over EVERY steps."""
    done = {(each["flags"], each["seed"]) for each in read()}
    for seed, name in [(seed, name) for seed in seeds for name in names if (name, seed) not in done]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, HERE.parent / "run.py", *name.split(), "--seed", str(seed), "--out", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = np.array([line["loss"] for line in lines if "loss" in line]).reshape(-1, EVERY).mean(1).round(3)
        held_out = lines[-1]["val_loss"]
        with open(METRICS, "a") as file:
            file.write(json.dumps(dict(flags=name, seed=seed, held_out=held_out, loss=losses.tolist())) + "\n")
        print(f"{name} --seed {seed}: {held_out:.3f}", flush=True)


def report():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    runs = {name: [each for each in read() if each["flags"] == name] for name in RUNS}
    runs = {name: each for name, each in runs.items() if each}
    mean = lambda name: np.mean([each["held_out"] for each in runs[name]])
    print("| `python run.py ...` | skips | norms | optimizer | held out | seeds, spread |\n| --- | --- | --- | --- | --- | --- |")
    for name in sorted(runs, key=mean):
        values, (skips, norms, optimizer, line) = [each["held_out"] for each in runs[name]], RUNS[name]
        print(f"| `{name}` | {skips} | {norms} | {optimizer} | {mean(name):.2f} | {len(values)}, {max(values) - min(values):.2f} |")
        if line:
            losses = np.mean([each["loss"] for each in runs[name]], 0)
            axes.plot((np.arange(len(losses)) + 1) * EVERY, losses, line, label=f"{name}: {mean(name):.2f}")
    axes.set(xlabel="step", ylabel="training loss, nats a token", ylim=(3.5, 6.5))
    figure.suptitle("36 blocks on two CPU cores. Black: no skips, no norms; green: the same with --no-own. Red: with the published\n"
                    "initialisation. Blue: weighted skips. Grey: the standard transformer. Numbers: held out", fontsize="medium")
    axes.legend(fontsize="small", title="python run.py ...", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(HERE / "laptop.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, or some of: '" + "' '".join(RUNS) + "'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    run(arguments.names or RUNS, arguments.seeds) if arguments.what == "run" else report()
