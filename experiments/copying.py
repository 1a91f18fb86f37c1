"""Which networks learn to copy: to go on with a sequence that repeats itself, by looking back to where it was last at this point.

    python experiments/copying.py run [NAME ...]        trains what copying.jsonl lacks, about a minute each on two cores
    python experiments/copying.py report                prints the table, draws copying.png

Every sequence of 65 tokens is 16 to 32 random ones out of 16, over and over. The first time round costs log 16 = 2.77 nats a token at
best. What follows is known to whoever finds the same few tokens further back, but for the first token of it: 0.07 nats in the mean.
Six blocks of width 64, 32 sequences a step, the rates run.py takes by default; without --own where a name does not say so.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
METRICS = HERE / "copying.jsonl"
TOKENS, EVERY = 16, 25
SHAPE = dict(depth=6, batch=32, steps=400, repeat_rate=1 / TOKENS, own=False, gamma_far=0.005)
RUNS = {                                                  # name: (flags, line in the picture)
    "Pre-LN, softmax": (dict(block="preln", optimizer="muon"), "C7:"),
    "Pre-LN, espa": (dict(block="preln", optimizer="muon", attn="espa"), "C7--"),
    "Pre-LN, espa, one head of four far": (dict(block="preln", optimizer="muon", attn="espa", far=1), "C7-"),
    "no skips, espa": (dict(), "k--"),
    "no skips, espa, gamma 0.05": (dict(gamma=0.05), None),
    "no skips, espa, gamma 0.005": (dict(gamma=0.005), None),
    "no skips, uspa": (dict(attn="uspa"), None),
    "no skips, espa, one head of four far": (dict(far=1), "k-"),
    "no skips, espa, own matrix, gamma 0.05": (dict(own=True, gamma=0.05), None),
    "no skips, espa, own matrix, one head of four far": (dict(own=True, far=1), "C3-"),
    "weighted skips, softmax": (dict(block="weighted", attn="softmax"), "C0:"),
    "weighted skips, espa": (dict(block="weighted"), "C0--"),
    "weighted skips, espa, one head of four far": (dict(block="weighted", far=1), "C0-"),
    "36 blocks, no skips, espa": (dict(depth=36), "C2--"),
    "36 blocks, no skips, espa, one head of four far": (dict(depth=36, far=1), "C2-"),
    "36 blocks, no skips, espa, gamma 0.05": (dict(depth=36, gamma=0.05), None),
    "36 blocks, no skips, espa, own matrix, gamma 0.05": (dict(depth=36, own=True, gamma=0.05), None),
    "36 blocks, no skips, espa, own matrix, one head of four far": (dict(depth=36, own=True, far=1), "C1-"),
}


def read():
    return [json.loads(line) for line in METRICS.read_text().splitlines()] if METRICS.exists() else []


def sequences(count, length, seed):
    """(count, length) of tokens, and which of them, but for the first, are of a repetition: (count, length - 1)."""
    random = np.random.default_rng(seed)
    periods = random.integers(length // 4, length // 2 + 1, count)
    tokens = np.array([np.resize(random.integers(0, TOKENS, period), length) for period in periods], np.int32)
    return tokens, np.arange(1, length) >= periods[:, None]


def run(name):
    """The loss on what repeats, every EVERY steps, on sequences that were not trained on."""
    import jax
    from minitf import Config, model, theory, train
    config = Config(**SHAPE | RUNS[name][0])
    params, constants = model.init(jax.random.key(config.seed), config, TOKENS), theory.constants(config)
    state = train.make_optimizer(config).init(params)
    test, repeats = sequences(256, config.length + 1, 10**6)
    losses = []
    for step in range(config.steps):
        params, state, _ = train.train_step(params, state, constants, sequences(config.batch, config.length + 1, step)[0], config)
        if (step + 1) % EVERY == 0:
            losses.append(float(np.asarray(train.evaluate_tokens(params, constants, test, config))[repeats].mean()))
    with open(METRICS, "a") as file:
        file.write(json.dumps(dict(name=name, flags=RUNS[name][0], loss=losses)) + "\n")
    print(f"{name}: {losses[-1]:.3f}", flush=True)


def report():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    steps = np.arange(EVERY, SHAPE["steps"] + 1, EVERY)
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    print("| | after 100 steps | 200 | 400 |\n| --- | --- | --- | --- |")
    for each in sorted(read(), key=lambda each: list(RUNS).index(each["name"])):
        name, loss = each["name"], dict(zip(steps.tolist(), each["loss"]))
        print(f"| {name} | {loss[100]:.2f} | {loss[200]:.2f} | {loss[400]:.2f} |")
        if RUNS[name][1]:
            axes.plot(loss.keys(), loss.values(), RUNS[name][1], label=name)
    axes.set(xlabel="step", ylabel="nats a token, where the sequence repeats", ylim=(0, 2.9))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "copying.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("names", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    arguments = parser.parse_args()
    if arguments.what == "report":
        report()
    else:
        for name in arguments.names:
            if name not in [each["name"] for each in read()]:
                run(name)
