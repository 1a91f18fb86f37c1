"""The headline experiments: which deep networks train without shortcuts, and at whose pace.

    python experiments/headline.py run STAGE [NAME ...] --data DIR    trains the runs of a stage, adds them to headline.jsonl
    python experiments/headline.py report                             results.md's tables and the curves, from that file

DIR is a folder that data/prepare.py made. Runs that differ in rates, gamma and seed alone are trained side by side, as lanes
of one program (vmap): each sees what it would see alone. A run that is in headline.jsonl is not repeated. What is run: headline_runs.py.
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

from headline_runs import CONTENDERS, LANE, OF_ATTENTION, SAME, SHAPE, STAGES, TRIALS, at_width           # noqa: E402

METRICS = HERE / "headline.jsonl"


def stage_runs(stage, name):
    """[(flags, lanes)] of a contender in a stage: from its best trial, or where the stage's name ends in "default" as run.py does it."""
    shape = SHAPE | CONTENDERS[name]
    if stage == "tune":
        return [(shape, TRIALS.get(name, []))]
    if name not in STAGES[stage]:
        return []
    how = STAGES[stage][name]
    shape = shape | how.get("flags", {})
    best = default_lane(shape) if stage.endswith("default") else at_width(tuned(name), shape["width"])
    lanes = [best | change | dict(seed=seed) for change in how.get("changes", ({},)) for seed in how.get("seeds", (0,))]
    return [(shape | dict(steps=round(shape["steps"] * multiple)), lanes) for multiple in how.get("steps", (1,))]


def tuned(name):
    """The trial with the least held-out loss."""
    runs = [run for run in read_runs() if run["stage"] == "tune" and run["name"] == SAME.get(name, name) and math.isfinite(run["held_out"])]
    return lane_of(min(runs, key=lambda run: run["held_out"]))


def default_lane(shape):
    """What run.py does with these flags; LANE's values of what has no effect there."""
    from minitf import Config
    config = Config(**shape)
    used = dict(gamma=config.attn == "espa", gamma_far=config.far > 0)
    return {name: getattr(config, name) if used.get(name, True) else value for name, value in LANE.items()}


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
    balance = jnp.stack([theory.balance(each) for each in configs])                         # (lanes, L, 1, 1)
    steering |= {name: steering[name][:, None, None, None] * balance for name in ("qk", "vo")}
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
            axes.plot(run.get("at", []), run.get("loss", []), style, lw=1, label=f"{run['name']}, {steps} steps: {run['held_out']:.3f}")
            axes.plot(steps, run["held_out"], style.strip("-.:") + "o", ms=4)
        axes.set(xlabel="step", ylabel="nats a token: training (lines), held out (dots)")
        axes.legend(fontsize="small", loc="upper right")
    panels[0].set(ylim=(2.3, 7.6), title="the pace at first")
    panels[1].set(ylim=(1.6, 4.5), title="four times the steps and more")
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
    elif not arguments.stage or not arguments.data or not set(arguments.names) <= set(CONTENDERS):
        parser.error("run needs a stage, --data, and names among " + ", ".join(CONTENDERS))
    else:
        run_stage(arguments.stage, arguments.names, arguments.data)
