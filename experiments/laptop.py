"""The whole story on two CPU cores: run.py's default job beside its controls, three seeds each.

    python experiments/laptop.py run ["FLAGS" ...] [--seeds 3]     trains what laptop.jsonl lacks
    python experiments/laptop.py report                            prints a table, draws laptop.png

A run takes minutes. Seed 0 of all runs comes first.
"""
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from records import HERE, add, command, figure, header, read, row

RECORDS, EVERY = HERE / "laptop.jsonl", 10
RUNS = {  # flags: line in the picture
    "--preset isometric": "k-", "--preset isometric --optimizer adamw": "k--",
    "--preset isometric --attn uspa": None, "--preset isometric --attn vskip": None,
    "--preset isometric --attn softmax": "k:", "--preset identity-skip": "C2-",
    "--preset normless": "C0-", "--preset normless --optimizer adamw": "C0--",
    "--preset preln": "C7--", "--preset preln --optimizer muon": "C7-",
    "--preset paper": "C3--", "--preset paper --attn uspa": None,
    "--preset paper --attn vskip": None, "--preset paper --attn softmax": "C3:",
}


def run(names, seeds):
    """One process a run; of its metrics.jsonl means over EVERY steps are kept."""
    done = {(each["seed"], each["flags"]) for each in read(RECORDS)}
    for seed, name in [pair for pair in product(range(seeds), names or RUNS) if pair not in done]:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, HERE.parent / "run.py", *name.split(), f"--seed={seed}",
                    f"--out={folder}"]
            process = subprocess.run(call, capture_output=True, text=True)
            lines = read(Path(folder) / "metrics.jsonl")
        if process.returncode:
            print(f"{name} --seed {seed}: {process.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        losses = np.array([line["loss"] for line in lines if "loss" in line]).reshape(-1, EVERY)
        add(RECORDS, flags=name, seed=seed, validation_loss=lines[-1]["val_loss"],
            loss=losses.mean(1).round(3).tolist())
        print(f"{name} --seed {seed}: validation loss {lines[-1]['val_loss']:.3f}", flush=True)


def report():
    picture, axes = figure((9, 4.6))
    lines = dict.fromkeys(each["flags"] for each in read(RECORDS)) | RUNS
    groups = {name: [each for each in read(RECORDS) if each["flags"] == name] for name in lines}
    mean = lambda name: np.mean([each["validation_loss"] for each in groups[name]])
    print(header("`python run.py ...`", "validation loss", "of seeds 0, 1, ..."))
    for name in sorted(filter(groups.get, lines), key=mean):
        values = ", ".join(f"{each['validation_loss']:.2f}" for each in groups[name])
        print(row(f"`{name}`", f"{mean(name):.2f}", values))
        if lines[name]:
            losses = np.mean([each["loss"] for each in groups[name]], 0)
            steps = np.arange(EVERY, EVERY * len(losses) + 1, EVERY)
            axes.plot(steps, losses, lines[name], label=f"{name}: {mean(name):.2f}")
    axes.set(xlabel="step", ylabel="training loss, nats a token", ylim=(3.5, 6.5))
    axes.legend(fontsize="small", title="run.py ...", loc="upper left", bbox_to_anchor=(1, 1))
    picture.savefig(HERE / "laptop.png", dpi=110)


if __name__ == "__main__":
    command(__doc__, RUNS, run, report, seeds=3)
