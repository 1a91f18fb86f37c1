"""The headline experiments: which deep networks train without shortcuts, and at whose pace.

    python experiments/headline.py run STAGE [NAME ...] --data DIR    trains the runs of a stage, adds them to headline.jsonl
    python experiments/headline.py report                             results.md's tables and the curves, from that file

DIR is a folder that data/prepare.py made. Runs that differ in rates, gamma and seed alone are trained side by side, as lanes
of one program (vmap): each sees what it would see alone. A run that is in headline.jsonl is not repeated.
"""
import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

METRICS = HERE / "headline.jsonl"
SHAPE = dict(depth=36, width=256, heads=4, length=256, batch=32, steps=300)
CONTENDERS = {                                            # name: flags; "paper": the published initialisation and activation
    "vanilla espa Muon": dict(block="vanilla", own=False),
    "vanilla own Muon": dict(block="vanilla", own=True),  # espa, with a matrix of its own for what a token keeps of itself
    "vanilla espa AdamW": dict(block="vanilla", own=False, optimizer="adamw"),
    "vanilla own AdamW": dict(block="vanilla", own=True, optimizer="adamw"),
    "vanilla softmax Muon": dict(block="vanilla", attn="softmax"),
    "paper espa Muon": dict(block="paper", optimizer="muon"),
    "paper espa AdamW": dict(block="paper"),
    "paper uspa AdamW": dict(block="paper", attn="uspa"),
    "paper vskip AdamW": dict(block="paper", attn="vskip"),
    "paper softmax AdamW": dict(block="paper", attn="softmax"),
    "weighted espa Muon": dict(block="weighted"),
    "weighted softmax Muon": dict(block="weighted", attn="softmax"),
    "weighted espa AdamW": dict(block="weighted", optimizer="adamw"),
    "Pre-LN Muon": dict(block="preln", optimizer="muon"),
    "Pre-LN AdamW": dict(block="preln"),
    "Pre-LN espa Muon": dict(block="preln", attn="espa", optimizer="muon"),
}
SAME = {"Pre-LN espa Muon": "Pre-LN Muon"}                # not tuned: takes the other's best trial

# What a lane may have of its own: flags of run.py, here with the values of those trials that do not say.
LANE = dict(learning_rate=None, ends=1.0, qk=1.0, vo=1.0, orthogonality=0.0, gamma=0.2, far=0, gamma_far=0.00125, balance=0.0, seed=0)
OF_ATTENTION = "gamma", "far", "gamma_far", "balance"


def lane(learning_rate, ends=1.0, qk=1.0, **others):
    return LANE | dict(learning_rate=learning_rate, ends=ends, qk=qk, **others)


def grid(rates, ends, qk=(1.0,)):
    return [lane(rate, end, q) for rate in rates for end in ends for q in qk]


def around(center, *changes):
    """A trial, and what changes one or two things in it."""
    return [center | change for change in ({}, *changes)]


# A first grid, and where its best was at an edge, what lies beyond.
TRIALS = {
    "vanilla espa Muon": grid((2e-4, 3.5e-4, 6e-4), (44.0,), (16.0, 48.0))
    + [lane(3.5e-4, 128.0, 16.0), lane(3.5e-4, 16.0, 16.0), lane(3.5e-4, 44.0, 4.0)]
    + around(lane(3.5e-4, 44.0, 16.0, orthogonality=0.2), dict(learning_rate=6e-4), dict(learning_rate=1e-3),
             dict(learning_rate=6e-4, orthogonality=0.5), dict(learning_rate=6e-4, orthogonality=1.0), dict(orthogonality=0.05),
             dict(gamma=0.1), dict(gamma=0.05), dict(gamma=0.02), dict(gamma=0.05, learning_rate=6e-4), dict(qk=48.0), dict(vo=2.0), dict(vo=0.5))
    + around(lane(3.5e-4, 44.0, 16.0, orthogonality=0.2, gamma=0.05, vo=0.5), dict(vo=0.25), dict(learning_rate=5e-4), dict(learning_rate=2.5e-4),
             dict(qk=32.0), dict(qk=8.0), dict(orthogonality=0.5), dict(orthogonality=0.0), dict(ends=88.0), dict(ends=22.0))
    + around(lane(5e-4, 62.0, 16.0, orthogonality=0.2, gamma=0.1, vo=0.5), dict(ends=124.0), dict(ends=88.0, qk=11.0), dict(ends=88.0, vo=0.25),
             dict(ends=88.0, gamma=0.05), dict(learning_rate=3.5e-4, ends=88.0), dict(learning_rate=3.5e-4, ends=176.0),
             dict(learning_rate=7e-4, ends=88.0, vo=0.25)),
    "vanilla own Muon": around(lane(5e-4, 88.0, 16.0, orthogonality=0.2, gamma=0.1, vo=4.0), dict(vo=1.0), dict(vo=2.0), dict(vo=8.0),
                               dict(learning_rate=2.5e-4, ends=176.0, qk=32.0, vo=8.0), dict(gamma=0.05), dict(qk=32.0),
                               dict(orthogonality=0.05))
    + around(lane(2.5e-4, 176.0, 32.0, orthogonality=0.2, gamma=0.1, vo=16.0), dict(vo=32.0), dict(learning_rate=1.25e-4, ends=352.0, qk=64.0),
             dict(qk=64.0, vo=8.0), dict(ends=352.0, vo=8.0), dict(gamma=0.05, vo=8.0), dict(orthogonality=0.4, vo=8.0),
             dict(learning_rate=3.5e-4, ends=128.0, vo=8.0))
    + around(lane(2.5e-4, 176.0, 64.0, orthogonality=0.2, gamma=0.1, vo=16.0), dict(qk=128.0), dict(qk=128.0, vo=8.0), dict(gamma=0.2, vo=8.0),
             dict(ends=352.0, vo=8.0), dict(orthogonality=0.5, vo=8.0), dict(learning_rate=3.5e-4, ends=128.0, qk=46.0, vo=8.0),
             dict(learning_rate=3.5e-4, ends=128.0, qk=46.0)),
    "vanilla own AdamW": around(lane(1e-4, 512.0, 16.0, orthogonality=0.2, gamma=0.1, vo=4.0), dict(vo=1.0), dict(vo=8.0), dict(vo=16.0),
                                dict(gamma=0.05), dict(qk=32.0, vo=8.0), dict(learning_rate=5e-5, ends=1024.0, qk=32.0, vo=8.0),
                                dict(learning_rate=1.6e-4, ends=256.0, qk=8.0)),
    "vanilla espa AdamW": grid((5e-5, 1e-4, 2e-4), (64.0,), (8.0, 32.0)) + [lane(1e-4, 256.0, 16.0), lane(1e-4, 64.0, 2.0), lane(2e-4, 16.0, 16.0)]
    + around(lane(1e-4, 256.0, 16.0, orthogonality=0.2, gamma=0.05, vo=0.5), dict(learning_rate=1.6e-4), dict(ends=512.0), dict(qk=8.0),
             dict(orthogonality=0.5), dict(vo=1.0)),
    "vanilla softmax Muon": grid((2e-4, 3.5e-4), (44.0,)),
    "paper espa Muon": grid((2.5e-4, 5e-4, 1e-3), (1.0, 4.0, 16.0)),
    "paper espa AdamW": grid((5e-5, 1e-4, 2e-4), (1.0, 4.0, 16.0)),
    "paper uspa AdamW": grid((5e-5, 1e-4), (16.0,)),
    "paper vskip AdamW": grid((5e-5, 1e-4), (16.0,)),
    "paper softmax AdamW": grid((5e-5, 1e-4), (16.0,)),
    "weighted espa Muon": grid((2e-3, 4e-3), (8.0,), (1.0, 4.0)) + [lane(1e-3, 16.0, 4.0)]
    + around(lane(2e-3, 16.0, 4.0, gamma=0.05), dict(qk=8.0), dict(ends=32.0), dict(vo=0.5), dict(orthogonality=0.02)),
    "weighted softmax Muon": grid((1.5e-3, 3e-3), (8.0,), (1.0, 4.0)) + [lane(3e-3, 24.0)],
    "weighted espa AdamW": grid((5e-4, 1e-3, 2e-3), (8.0,))
    + around(lane(1e-3, 64.0, 4.0, gamma=0.05), dict(qk=1.0), dict(learning_rate=2e-3), dict(ends=128.0), dict(vo=0.5)),
    "Pre-LN Muon": grid((2e-3, 4e-3, 8e-3), (1.0, 4.0, 16.0)) + [lane(8e-3, 64.0), lane(1.6e-2, 16.0), lane(8e-3, 16.0, 4.0), lane(4e-3, 64.0)]
    + around(lane(6e-3, 16.0), dict(learning_rate=1.1e-2), dict(learning_rate=8e-3, ends=32.0), dict(learning_rate=8e-3, ends=8.0),
             dict(learning_rate=8e-3, qk=0.5), dict(learning_rate=8e-3, vo=0.5), dict(learning_rate=8e-3, vo=2.0),
             dict(learning_rate=8e-3, orthogonality=0.02)),
    "Pre-LN AdamW": grid((1e-3, 2e-3, 4e-3), (1.0, 4.0, 16.0)) + [lane(5e-4, 16.0), lane(5e-4, 64.0), lane(1e-3, 64.0), lane(1e-3, 16.0, 4.0)]
    + around(lane(1e-3, 128.0), dict(ends=256.0), dict(vo=2.0), dict(vo=0.5), dict(learning_rate=1.5e-3)),
}

CHAINS = dict(learning_rate=5e-4, ends=88.0, qk=16.0, vo=0.25)   # the rates of the chain with Muon

WIDE = dict(width=512, heads=8)
BEFORE = {"muon": lane(2e-4, 200.0, 40.0, vo=16.0, orthogonality=0.2, gamma=0.1, far=1, gamma_far=0.02),
          "adamw": lane(1e-4, 512.0, 24.0, vo=16.0, orthogonality=0.2, gamma=0.1, far=1, gamma_far=0.02)}


def wide(lane):
    """At another width, the rate changes as config.default_rates says."""
    return lane | dict(learning_rate=lane["learning_rate"] * (SHAPE["width"] / WIDE["width"])**0.5)


# Stages but the first take a contender's best trial, or those called default what run.py does, with other seeds, widths and
# lengths (times the steps of a shorter run), and with changes to it.
STAGES = {
    "tune": {},
    "seeds": {name: dict(seeds=(1, 2)) for name in CONTENDERS},
    "longer": {"vanilla espa Muon": dict(steps=(4, 5.2), seeds=(0,)), "vanilla own Muon": dict(steps=(4, 5.2), seeds=(0,)), "Pre-LN Muon": dict(steps=(4,), seeds=(0,)),
               "paper espa Muon": dict(steps=(1.3, 2), seeds=(0,)), "paper espa AdamW": dict(steps=(2, 5), seeds=(0,)),
               "Pre-LN AdamW": dict(steps=(4,), seeds=(0,)), "vanilla espa AdamW": dict(steps=(4,), seeds=(0,)),
               "weighted espa Muon": dict(steps=(4,), seeds=(0,))},
    "tune longer": {"vanilla espa Muon": dict(steps=(4,), seeds=(0,), changes=(
        dict(gamma=0.03), dict(learning_rate=2.5e-4), dict(learning_rate=1e-3), dict(qk=48.0), dict(ends=30.0), dict(vo=1.0),
        dict(orthogonality=1.0), dict(gamma=0.03, qk=48.0))),
        "vanilla own Muon": dict(steps=(4,), seeds=(0,), changes=[lane(2.5e-4, 176.0, 64.0, orthogonality=0.2, gamma=0.1, vo=8.0) | change for change in (
            {}, dict(gamma=0.2), dict(orthogonality=0.5), dict(far=1, gamma_far=0.01), dict(qk=32.0, vo=16.0),
            dict(learning_rate=1.25e-4), dict(learning_rate=1.25e-4, ends=352.0, vo=16.0), dict(learning_rate=1.25e-4, ends=352.0, qk=128.0, vo=16.0),
            *around(dict(learning_rate=1.25e-4, ends=352.0, vo=16.0, far=1, gamma_far=0.01), dict(gamma_far=0.02), dict(far=2), dict(gamma=0.2)))] + around(
            BEFORE["muon"], dict(far=2), dict(gamma_far=0.04), dict(gamma_far=0.01),
            dict(gamma=0.2, gamma_far=0.04), dict(orthogonality=0.5), dict(learning_rate=3e-4, ends=133.0, qk=27.0, vo=10.7),
            dict(learning_rate=1.4e-4), dict(ends=100.0), dict(qk=80.0), dict(vo=8.0))[1:]),
        "vanilla own AdamW": dict(steps=(4,), seeds=(0,), changes=around(
            BEFORE["adamw"], dict(learning_rate=7e-5), dict(learning_rate=1.4e-4),
            dict(learning_rate=7e-5, ends=730.0, qk=34.0, vo=23.0), dict(vo=32.0), dict(ends=256.0), dict(qk=48.0))[1:]),
        "Pre-LN Muon": dict(steps=(4,), seeds=(0,), changes=(
            dict(learning_rate=4e-3), dict(learning_rate=4e-3, ends=32.0), dict(learning_rate=2e-3, ends=64.0), dict(learning_rate=1.2e-2),
            dict(vo=1.0), dict(vo=4.0), dict(learning_rate=4e-3, vo=4.0), dict(orthogonality=0.02),
            dict(learning_rate=5.6e-3), dict(learning_rate=2.8e-3), dict(learning_rate=4e-3, ends=8.0), dict(learning_rate=4e-3, vo=1.0))),
        "Pre-LN AdamW": dict(steps=(4,), seeds=(0,), changes=(
            dict(learning_rate=7e-4), dict(learning_rate=1.4e-3), dict(ends=32.0), dict(learning_rate=7e-4, ends=91.0)))},
    "longer pace": {"vanilla own Muon": dict(steps=(5.2,), seeds=(0,), changes=[lane(1.25e-4, 352.0, 64.0, orthogonality=0.2, gamma=0.1, vo=16.0) | change for change in (
        {}, dict(far=1, gamma_far=0.01), dict(gamma=0.05), dict(qk=32.0, vo=32.0), dict(learning_rate=6.25e-5, ends=704.0, vo=32.0))])},
    "pace": {"vanilla espa Muon": dict(steps=(1.3,), seeds=(0, 1, 2))},
    "wide": {name: dict(seeds=(0, 1, 2), flags=WIDE) for name in CONTENDERS},
    "wide pace": {"vanilla espa Muon": dict(steps=(1.3,), seeds=(0, 1, 2), flags=WIDE)},
    # Why long training favours Pre-LN: its rates, its attention without decay, or the arithmetic?
    "why": {"Pre-LN Muon": dict(steps=(2,), seeds=(0,), changes=(
                {}, CHAINS, CHAINS | dict(learning_rate=2e-3, qk=4.0), dict(learning_rate=4e-3), dict(learning_rate=5.6e-3))),
            "Pre-LN espa Muon": dict(steps=(2,), seeds=(0,), changes=(dict(gamma=0.1), dict(gamma=0.025))),
            "vanilla espa Muon": dict(steps=(2,), seeds=(0,)), "vanilla own Muon": dict(steps=(2,), seeds=(0,))},
    # Do heads that look far back mend it?
    "far": {"vanilla espa Muon": dict(steps=(2,), seeds=(0,), changes=[
                dict(far=1, gamma=gamma, gamma_far=far) for gamma in (0.1, 0.2, 0.4, 0.8) for far in (0.00125, 0.01)]),
            "vanilla own Muon": dict(steps=(2,), seeds=(0,), changes=[
                dict(far=1), dict(far=1, gamma_far=0.01), dict(far=2), dict(far=2, gamma=0.4), dict(gamma=0.05), dict(gamma=0.025), dict(gamma=0.0125)]),
            "Pre-LN espa Muon": dict(steps=(2,), seeds=(0,), changes=[dict(far=1, gamma=gamma) for gamma in (0.1, 0.4)])},
    "precision": {"vanilla espa Muon": dict(steps=(4,), seeds=(0,), flags=dict(dtype="float32"))},
    # As run.py trained them by default before heads' rates were balanced over the blocks.
    "before balance": {"vanilla own Muon": dict(steps=(1, 4, 5.2, 2), seeds=(0, 1, 2), changes=(BEFORE["muon"],)),
                       "vanilla own AdamW": dict(steps=(1, 4), seeds=(0, 1, 2), changes=(BEFORE["adamw"],))},
    "wide, before balance": {name: dict(seeds=(0, 1, 2), flags=WIDE, changes=(wide(BEFORE[kind]) | dict(far=2),))
                             for name, kind in (("vanilla own Muon", "muon"), ("vanilla own AdamW", "adamw"))},
    "wide longer": {"vanilla own Muon": dict(steps=(4,), seeds=(0,), flags=WIDE, changes=(wide(BEFORE["muon"]) | dict(far=2),)),
                    "Pre-LN Muon": dict(steps=(4,), seeds=(0,), flags=WIDE, changes=(wide(lane(4e-3, 16.0, vo=2.0)),))},
    # As run.py trains them when no rate is given.
    "default": {name: dict(seeds=(0, 1, 2)) for name in CONTENDERS},
    "longer default": {name: dict(steps=(4,), seeds=(0, 1, 2)) for name in CONTENDERS},
    "longer pace default": {name: dict(steps=(5.2,), seeds=(0, 1, 2)) for name in CONTENDERS},
    "wide default": {name: dict(seeds=(0, 1, 2), flags=WIDE) for name in CONTENDERS},
    "wide longer default": {name: dict(steps=(4,), seeds=(0,), flags=WIDE) for name in CONTENDERS},
}


def stage_runs(stage, name):
    """[(flags, lanes)] of a contender in a stage."""
    shape = SHAPE | CONTENDERS[name]
    if stage == "tune":
        return [(shape, TRIALS.get(name, []))]
    how = STAGES[stage].get(name, dict(seeds=()))
    shape = shape | how.get("flags", {})
    if stage.endswith("default"):
        best = default_lane(shape)
    else:
        best = wide(tuned(name)) if shape["width"] == WIDE["width"] else tuned(name)
    lanes = [best | change | dict(seed=seed) for change in how.get("changes", ({},)) for seed in how["seeds"]]
    return [(shape | dict(steps=round(shape["steps"] * multiple)), lanes) for multiple in how.get("steps", (1,))]


def tuned(name):
    """The trial with the least held-out loss."""
    runs = [run for run in read_runs() if run["stage"] == "tune" and run["name"] == SAME.get(name, name) and math.isfinite(run["held_out"])]
    return lane_of(min(runs, key=lambda run: run["held_out"]))


def default_lane(shape):
    from minitf import Config
    config = Config(**shape)
    return {name: value if name in OF_ATTENTION and config.attn != "espa" else getattr(config, name) for name, value in LANE.items()}


def read_runs():
    """Every line of headline.jsonl: a run, with its training losses up to steps "at" where they were kept."""
    return [LANE | json.loads(line) for line in METRICS.read_text().splitlines()] if METRICS.exists() else []


def lane_of(run):
    return {name: run[name] for name in LANE}


# --- Training lanes side by side ----------------------------------------------------------------------------------------

def run_stage(stage, names, folder):
    import jax
    from minitf import Config, data, model
    corpus = data.load(str(folder), None, SHAPE["length"])
    bits = len(corpus.held_out) / (corpus.held_out_counts @ data.byte_lengths(corpus.encoding)) / math.log(2)
    model.STRAIGHT = 0                                    # many short programs: a loop, which compiles sooner
    for name, flags, lanes in [(name, *each) for name in names for each in stage_runs(stage, name)]:
        done = [lane_of(run) for run in read_runs() if (run["stage"], run["name"], run["flags"]["steps"]) == (stage, name, flags["steps"])]
        lanes = [lane for lane in lanes if lane not in done]
        if not lanes:
            continue
        config, begin = Config(**flags, repeat_rate=data.repeat_rate(corpus.train_counts)), time.perf_counter()
        at, losses, by_position = train_lanes(config, lanes, corpus, data.vocabulary(corpus.encoding))
        held_out, seconds = by_position.mean(1).tolist(), time.perf_counter() - begin
        with open(METRICS, "a") as file:
            for number, lane in enumerate(lanes):
                octaves = [float(by_position[number][2**k - 1:2**(k + 1) - 1].mean()) for k in range(config.length.bit_length() - 1)]
                file.write(json.dumps(dict(
                    stage=stage, name=name, **lane, held_out=held_out[number], bits_per_byte=held_out[number] * bits, flags=flags, octaves=octaves,
                    device=jax.devices()[0].device_kind, at=at.tolist(), loss=losses[:, number].astype(float).round(3).tolist())) + "\n")
        print(f"{stage} {name} {config.steps} steps, {seconds:.0f} s: " + "; ".join(
            f"{rates(lane)}, seed {lane['seed']}: {value:.3f}" for lane, value in zip(lanes, held_out)), flush=True)


def train_lanes(config, lanes, corpus, vocabulary, every=10, windows=512):
    """Trains one network a lane: (steps, mean training losses up to them (n, lanes), final held-out losses by position
    (lanes, T)), in nats a token.

    The optimizer runs at a rate of 1 and each lane steers its updates: one program for all.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from minitf import data, model, theory, train
    optimizer = train.make_optimizer(replace(config, learning_rate=1.0, ends=1.0, qk=1.0, vo=1.0, orthogonality=0.0, balance=0.0))
    configs = [replace(config, **{name: lane[name] for name in OF_ATTENTION}) for lane in lanes]
    own = [name for name in LANE if name not in (*OF_ATTENTION, "seed") and (name != "orthogonality" or any(lane[name] for lane in lanes))]
    steering = {name.replace("learning_rate", "rate"): jnp.array([lane[name] for lane in lanes], jnp.float32) for name in own}
    heads = jnp.stack([theory.balance(each) for each in configs])                           # (lanes, L, 1, 1)
    steering |= {name: steering[name][:, None, None, None] * heads for name in ("qk", "vo")}
    constants = [theory.constants(each) for each in configs]
    if any(lane["far"] for lane in lanes):                # heads that are alike have one row: here as many as the others
        each_head = lambda table: jnp.broadcast_to(table, (len(table), config.heads, *table.shape[2:]))
        constants = jax.tree.map(each_head, constants)

    def step(params, state, batch, constants, steering):
        value, gradient = jax.value_and_grad(train.loss)(params, constants, batch, config)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, train.steer(updates, params, **{"orthogonality": None} | steering)), state, value

    keys = jnp.stack([jax.random.key(lane["seed"]) for lane in lanes])
    params = jax.jit(lambda keys: jax.lax.map(lambda key: model.init(key, config, vocabulary), keys))(keys)
    state, stacked = jax.vmap(optimizer.init)(params), jax.tree.map(lambda *tables: jnp.stack(tables), *constants)
    step = jax.jit(jax.vmap(step), donate_argnums=(0, 1))
    losses = []
    for number in range(config.steps):
        batches = {seed: data.batch(corpus.train, config.length, config.batch, seed, number) for seed in {lane["seed"] for lane in lanes}}
        params, state, values = step(params, state, np.stack([batches[lane["seed"]] for lane in lanes]), stacked, steering)
        losses.append(values)
    losses = np.asarray(jnp.stack(losses))[:config.steps // every * every]
    del state
    test = data.spread_windows(corpus.held_out, config.length, windows).reshape(-1, config.batch, config.length + 1)
    by_position = []
    for number, fixed in enumerate(constants):
        own = jax.tree.map(lambda leaf: leaf[number], params)
        by_position.append(np.mean([train.evaluate_tokens(own, fixed, batch, config) for batch in test], (0, 1)))
    return (np.arange(len(losses) // every) + 1) * every, losses.reshape(-1, every, len(lanes)).mean(1), np.array(by_position)


# --- What came out ------------------------------------------------------------------------------------------------------

def report():
    """Replaces what follows TABLES in results.md, and draws headline.png."""
    runs = read_runs()
    lines = ["", "| contender | trials | best: blocks' rate, multiples | held out |", "| --- | --- | --- | --- |"]
    trials = {name: [run for run in runs if run["stage"] == "tune" and run["name"] == name] for name in CONTENDERS}
    trials = {name: tuning for name, tuning in trials.items() if tuning}
    best = {name: next(run for run in tuning if lane_of(run) == tuned(name)) for name, tuning in trials.items()}
    lines += [f"| {name} | {len(tuning)} | {rates(best[name])} | {loss(best[name])} |" for name, tuning in trials.items()]
    lines += ["", "Other seeds, widths and lengths (at width 512, rates divided by sqrt(2)):", "",
              "| stage | run | rates | steps | width | seeds | held out |", "| --- |" + " --- |" * 6]
    others = {}                                           # seeds of one setting share a row
    for run in runs:
        if run["stage"] != "tune":
            row = run["stage"], run["name"], rates(run), run["flags"]["steps"], run["flags"]["width"]
            others.setdefault(row, []).append(run)
    lines += ["| " + " | ".join(map(str, row)) + f" | {', '.join(str(run['seed']) for run in same)} | {', '.join(map(loss, same))} |"
              for row, same in others.items()]
    lines += ["", "Every trial, nats a token:", ""]
    lines += [f"- {name}: " + "; ".join(f"{rates(run)}: {run['held_out']:.3f}" for run in tuning) for name, tuning in trials.items()]
    results = HERE / "results.md"
    results.write_text(results.read_text().split(TABLES)[0] + TABLES + "\n" + "\n".join(lines) + "\n")
    first = {}                                            # the best of each contender and length, of seed 0
    for run in sorted((run for run in runs if math.isfinite(run["held_out"])), key=lambda run: run["held_out"]):
        if run["flags"]["width"] == SHAPE["width"] and run["seed"] == 0 and "dtype" not in run["flags"]:
            first.setdefault((run["name"], run["flags"]["steps"]), run)
    draw([run for (_, steps), run in first.items() if steps == SHAPE["steps"]],
         [run for (_, steps), run in first.items() if steps >= 4 * SHAPE["steps"]])


TABLES = "## All runs"


def rates(lane):
    """3.5e-4 (ends 44, qk 16): what differs from the values in LANE is said."""
    others = ", ".join(f"{name} {lane[name]:g}" for name in LANE if name not in ("learning_rate", "seed") and lane[name] != LANE[name])
    return f"{lane['learning_rate']:.3g}" + f" ({others})" * bool(others)


def loss(run):
    return f"{run['held_out']:.3f} ({run['bits_per_byte']:.3f})"


DRAWN = {"vanilla espa Muon": "k-", "vanilla espa AdamW": "k--", "vanilla softmax Muon": "k:", "vanilla own Muon": "C0-",
         "vanilla own AdamW": "C0--", "paper espa Muon": "C3-", "paper espa AdamW": "C3--", "Pre-LN Muon": "C7-", "Pre-LN AdamW": "C7--"}


def draw(best, longer):
    """Two panels: the best run of each, and the best of those four times as long or more. Training losses where they were
    kept, and in any case where a run ended, on held-out text."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axes, runs in zip(panels, (best, longer)):
        for run in sorted((run for run in runs if run["name"] in DRAWN), key=lambda run: run["held_out"]):
            style, steps = DRAWN[run["name"]], run["flags"]["steps"]
            axes.plot(run.get("at", []), run.get("loss", []), style, label=f"{run['name']}, {steps} steps: {run['held_out']:.3f}")
            axes.plot(steps, run["held_out"], style.strip("-.:") + "o", ms=4)
        axes.set(xlabel="step", ylabel="nats a token: training (lines), held out (dots)")
        axes.legend(fontsize="small", loc="upper right")
    panels[0].set(ylim=(2.4, 7.4), title="the pace at first")
    panels[1].set(ylim=(1.7, 4.5), title="four times the steps and more")
    figure.suptitle("36 blocks, width 256, Python source. vanilla: no skips, no norms (own: as it is by default). paper: the same, with the published "
                    "initialisation.\nPre-LN: the standard transformer")
    figure.savefig(HERE / "headline.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("names", nargs="*", default=list(CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "report":
        report()
    else:
        run_stage(arguments.stage, arguments.names, arguments.data)
