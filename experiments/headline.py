"""The headline experiments: which deep networks train without shortcuts, and at whose pace.

    python experiments/headline.py run STAGE --data DIR     trains the runs of a stage; one metrics file a run
    python experiments/headline.py report                   results.md's tables and the curves, from those files

DIR is a folder that data/prepare.py made. Runs that differ in their learning rate and seed alone are trained side by
side, as lanes of one program (vmap): each sees what it would see alone. They stop and go on where they were when the
command is given again: a run whose file is there is not repeated.
"""
import argparse
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

METRICS = HERE / "headline"
SHAPE = dict(depth=36, width=256, heads=4, length=256, batch=32, steps=500)
LARGE = dict(depth=36, width=512, heads=8, length=256, batch=64, steps=600)
CONTENDERS = {                                            # name: (flags, middle of the grid of learning rates)
    "vanilla espa Muon": (dict(attn="espa", optimizer="muon"), 5e-4),
    "Pre-LN AdamW": (dict(block="preln", optimizer="adamw"), 2e-3),
    "Pre-LN Muon": (dict(block="preln", optimizer="muon"), 4e-3),
    "vanilla espa AdamW": (dict(attn="espa", optimizer="adamw"), 1e-4),
    "weighted espa Muon": (dict(block="weighted", optimizer="muon"), 2e-3),
    "weighted espa AdamW": (dict(block="weighted", optimizer="adamw"), 1e-3),
    "vanilla softmax AdamW": (dict(attn="softmax", optimizer="adamw"), 1e-4),
    "vanilla vskip AdamW": (dict(attn="vskip", optimizer="adamw"), 1e-4),
    "vanilla uspa AdamW": (dict(attn="uspa", optimizer="adamw"), 1e-4),
}
GRID = 2.0 ** np.arange(-3, 3)                            # times the middle: the same number of trials for every contender


# --- Stages: which runs there are ---------------------------------------------------------------------------------------

def stage_runs(stage):
    """[(name, flags, lanes)] of a stage; a lane is (learning rate, its multiple for embeddings and head, seed).

    Rates come from the tuning before it.
    """
    if stage == "ends":
        return [(name, SHAPE | flags | dict(steps=300), [(middle * factor, ends, 0) for factor in (0.5, 1, 2) for ends in ENDS])
                for name, (flags, middle) in CONTENDERS.items() if name in ENDS_TUNED]
    if stage == "tune":
        return [(name, SHAPE | flags, [(middle * factor, best_ends(name), 0) for factor in GRID])
                for name, (flags, middle) in CONTENDERS.items()]
    if stage == "seeds":
        return [(name, SHAPE | flags, [(best(name), best_ends(name), seed) for seed in (1, 2)])
                for name, (flags, _) in CONTENDERS.items()]
    if stage == "longer":                                 # how many steps until the standard transformer's final loss?
        return [(name, SHAPE | CONTENDERS[name][0] | dict(steps=steps),
                 [(best(name) * factor, best_ends(name), 0) for factor in (0.5, 1)])
                for name, multiples in {"vanilla espa Muon": (1.3, 2, 4), "vanilla espa AdamW": (2, 5)}.items()
                for steps in [round(SHAPE["steps"] * multiple) for multiple in multiples]]
    narrower = (SHAPE["width"] / LARGE["width"])**0.5
    return [(name, LARGE | CONTENDERS[name][0], [(best(name) * narrower, best_ends(name), seed) for seed in range(3)])
            for name in ("Pre-LN AdamW", "vanilla espa Muon", "Pre-LN Muon", "weighted espa Muon")]


STAGES = ("ends", "tune", "seeds", "longer", "large")
ENDS = (1.0, 4.0, 16.0)
ENDS_TUNED = ("vanilla espa Muon", "vanilla espa AdamW", "Pre-LN Muon", "Pre-LN AdamW")


def tuned(stage, name):
    """The run of a stage with the least held-out loss."""
    return min((run for run in read_runs() if run["stage"] == stage and run["name"] == name), key=lambda run: run["held_out"])


def best(name):
    return tuned("tune", name)["learning_rate"]


def best_ends(name):
    """Tuned for one contender of a kind, and taken for the others."""
    kind = ("vanilla espa " if name.startswith("vanilla") else "Pre-LN ") + name.split()[-1]
    return tuned("ends", kind)["ends"]


def read_runs():
    """What every metrics file says: its first line, the run; with the training losses at "steps"."""
    runs = []
    for path in sorted(METRICS.glob("*.jsonl")):
        head, *lines = map(json.loads, path.read_text().splitlines())
        runs.append(head | {"at": [line["step"] for line in lines], "loss": [line["loss"] for line in lines]})
    return runs


def file_of(stage, name, flags, rate, ends, seed):
    name = name.replace(" ", "-").lower()
    return METRICS / f"{stage}-{name}-{flags['width']}-{flags['steps']}-{rate:.2e}-{ends:g}-{seed}.jsonl"


# --- Training lanes side by side ----------------------------------------------------------------------------------------

def run_stage(stage, folder):
    import jax
    from minitf import Config, data
    corpus = data.load(str(folder), None, SHAPE["length"])
    vocabulary = data.vocabulary(corpus.encoding)
    bits = len(corpus.held_out) / (corpus.held_out_counts @ data.byte_lengths(corpus.encoding)) / math.log(2)
    METRICS.mkdir(exist_ok=True)
    for name, flags, lanes in stage_runs(stage):
        lanes = [lane for lane in lanes if not file_of(stage, name, flags, *lane).exists()]
        if not lanes:
            continue
        config = Config(**flags, repeat_rate=data.repeat_rate(corpus.train_counts))
        begin = time.perf_counter()
        at, losses, held_out = train_lanes(config, lanes, corpus, vocabulary)
        seconds = time.perf_counter() - begin
        for lane, (rate, ends, seed) in enumerate(lanes):
            head = dict(stage=stage, name=name, learning_rate=rate, ends=ends, seed=seed, held_out=held_out[lane],
                        bits_per_byte=held_out[lane] * bits, flags=flags, device=jax.devices()[0].device_kind)
            lines = [dict(step=int(step), loss=round(float(loss), 4)) for step, loss in zip(at, losses[:, lane])]
            file_of(stage, name, flags, rate, ends, seed).write_text("\n".join(map(json.dumps, [head, *lines])) + "\n")
        print(f"{stage} {name} {config.steps} steps, {seconds:.0f} s: " + ", ".join(
            f"{rate:.2g}x{ends:g}/{seed} {value:.3f}" for (rate, ends, seed), value in zip(lanes, held_out)), flush=True)


def train_lanes(config, lanes, corpus, vocabulary, every=10, windows=512):
    """Trains one network a lane: (steps, mean training losses up to them (n, lanes), final held-out losses), in nats a token.

    The optimizer runs at a rate of 1 and each lane scales its updates: one program for all rates.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from minitf import data, model, train
    rates, ends, seeds = zip(*lanes)
    rates, ends = jnp.array(rates), jnp.array(ends)
    config = replace(config, learning_rate=1.0)
    optimizer, constants = train.make_optimizer(config), model.constants(config)

    def step(params, state, batch, rate, ends):
        value, gradient = jax.value_and_grad(train.loss)(params, constants, batch, config)
        updates, state = optimizer.update(gradient, state, params)
        updates = {name: jax.tree.map(lambda u: (rate if name == "blocks" else rate * ends) * u, part)
                   for name, part in updates.items()}
        return optax.apply_updates(params, updates), state, value

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    params = jax.jit(lambda keys: jax.lax.map(lambda key: model.init(key, config, vocabulary), keys))(keys)
    state = jax.vmap(optimizer.init)(params)
    step = jax.jit(jax.vmap(step), donate_argnums=(0, 1))
    losses = []
    for number in range(config.steps):
        batches = {seed: data.batch(corpus.train, config.length, config.batch, seed, number) for seed in set(seeds)}
        params, state, values = step(params, state, np.stack([batches[seed] for seed in seeds]), rates, ends)
        losses.append(values)
    losses = np.asarray(jnp.stack(losses))[:config.steps // every * every]
    del state
    test = data.spread_windows(corpus.held_out, config.length, windows)
    test = test[:len(test) // config.batch * config.batch].reshape(-1, config.batch, config.length + 1)
    loss = jax.jit(jax.vmap(lambda params, batch: train.loss(params, constants, batch, config), (0, None)))
    held_out = np.mean([np.asarray(loss(params, batch)) for batch in test], 0)
    return (np.arange(len(losses) // every) + 1) * every, losses.reshape(-1, every, len(lanes)).mean(1), held_out.tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("stage", nargs="*", choices=(*STAGES, []))
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    for stage in arguments.stage:
        run_stage(stage, arguments.data)
