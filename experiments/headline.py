"""The headline experiments: which deep networks train without shortcuts, and at whose pace.

    python experiments/headline.py run STAGE [NAME ...] --data DIR    trains the runs of a stage, adds them to headline.jsonl
    python experiments/headline.py report                             results.md's tables and the curves, from that file

DIR is a folder that data/prepare.py made. Runs that differ in their learning rate and seed alone are trained side by
side, as lanes of one program (vmap): each sees what it would see alone. A run that is in headline.jsonl is not repeated.
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
    "vanilla espa Muon": dict(block="vanilla", orthogonality=0.0),
    "vanilla espa Muon, pulled": dict(block="vanilla"),
    "vanilla espa AdamW": dict(block="vanilla", optimizer="adamw", orthogonality=0.0),
    "vanilla softmax Muon": dict(block="vanilla", attn="softmax", orthogonality=0.0),
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
}


def grid(rates, ends, qk=(1.0,)):
    return [(rate, end, q) for rate in rates for end in ends for q in qk]


# (learning rate of the blocks, its multiple for embeddings and head, for queries and keys): a first grid, and where its best
# was at an edge, what lies beyond.
TRIALS = {
    "vanilla espa Muon": grid((2e-4, 3.5e-4, 6e-4), (44.0,), (16.0, 48.0)) + [(3.5e-4, 128.0, 16.0), (3.5e-4, 16.0, 16.0), (3.5e-4, 44.0, 4.0)],
    "vanilla espa Muon, pulled": grid((3.5e-4, 6e-4), (44.0,), (16.0, 32.0)),
    "vanilla espa AdamW": grid((5e-5, 1e-4, 2e-4), (64.0,), (8.0, 32.0)) + [(1e-4, 256.0, 16.0), (1e-4, 64.0, 2.0), (2e-4, 16.0, 16.0)],
    "vanilla softmax Muon": grid((2e-4, 3.5e-4), (44.0,), (1.0,)),
    "paper espa Muon": grid((2.5e-4, 5e-4, 1e-3), (1.0, 4.0, 16.0)),
    "paper espa AdamW": grid((5e-5, 1e-4, 2e-4), (1.0, 4.0, 16.0)),
    "paper uspa AdamW": grid((5e-5, 1e-4), (16.0,)),
    "paper vskip AdamW": grid((5e-5, 1e-4), (16.0,)),
    "paper softmax AdamW": grid((5e-5, 1e-4), (16.0,)),
    "weighted espa Muon": grid((2e-3, 4e-3), (8.0,), (1.0, 4.0)) + [(1e-3, 16.0, 4.0)],
    "weighted softmax Muon": grid((1.5e-3, 3e-3), (8.0,), (1.0, 4.0)) + [(3e-3, 24.0, 1.0)],
    "weighted espa AdamW": grid((5e-4, 1e-3, 2e-3), (8.0,)),
    "Pre-LN Muon": grid((2e-3, 4e-3, 8e-3), (1.0, 4.0, 16.0)) + [(8e-3, 64.0, 1.0), (1.6e-2, 16.0, 1.0), (8e-3, 16.0, 4.0), (4e-3, 64.0, 1.0)],
    "Pre-LN AdamW": grid((1e-3, 2e-3, 4e-3), (1.0, 4.0, 16.0)) + [(5e-4, 16.0, 1.0), (5e-4, 64.0, 1.0), (1e-3, 64.0, 1.0), (1e-3, 16.0, 4.0)],
}

LONGER = {"vanilla espa Muon": (1.3, 4), "vanilla espa Muon, pulled": (1.3, 4), "Pre-LN Muon": (4,), "vanilla espa AdamW": (2,),
          "paper espa AdamW": (2, 5)}                     # times the steps


# --- Stages: which runs there are ---------------------------------------------------------------------------------------

def stage_runs(stage, names):
    """[(name, flags, lanes)] of a stage; a lane is (learning rate, its multiples for the ends and for queries and keys, seed)."""
    if stage == "tune":
        return [(name, SHAPE | CONTENDERS[name], [(*trial, 0) for trial in TRIALS[name]]) for name in names]
    if stage == "seeds":
        return [(name, SHAPE | CONTENDERS[name], [(*tuned(name), seed) for seed in (1, 2)]) for name in names]
    if stage == "wide":
        lanes = lambda name: [(rate * 2**-0.5, ends, qk, seed) for rate, ends, qk in [tuned(name)] for seed in (0, 1, 2)]
        return [(name, SHAPE | CONTENDERS[name] | dict(width=512, heads=8), lanes(name)) for name in names]
    return [(name, SHAPE | CONTENDERS[name] | dict(steps=round(SHAPE["steps"] * multiple)), [(*tuned(name), 0)])
            for name in names for multiple in LONGER[name]]


STAGES = ("tune", "seeds", "wide", "longer")


def tuned(name):
    """(learning rate, multiples) with the least held-out loss."""
    runs = [run for run in read_runs() if run["stage"] == "tune" and run["name"] == name and math.isfinite(run["held_out"])]
    run = min(runs, key=lambda run: run["held_out"])
    return run["learning_rate"], run["ends"], run["qk"]


def read_runs():
    """Every line of headline.jsonl: a run, with its training losses up to steps "at" where they were kept."""
    return [json.loads(line) for line in METRICS.read_text().splitlines()] if METRICS.exists() else []


def lane_of(run):
    return run["learning_rate"], run["ends"], run["qk"], run["seed"]


# --- Training lanes side by side ----------------------------------------------------------------------------------------

def run_stage(stage, names, folder):
    import jax
    from minitf import Config, data, model
    corpus = data.load(str(folder), None, SHAPE["length"])
    bits = len(corpus.held_out) / (corpus.held_out_counts @ data.byte_lengths(corpus.encoding)) / math.log(2)
    model.UNROLLED = 0                                    # many short programs: a loop, which compiles sooner
    done = {(run["stage"], run["name"], run["flags"]["steps"], lane_of(run)) for run in read_runs()}
    for name, flags, lanes in stage_runs(stage, names):
        lanes = [lane for lane in lanes if (stage, name, flags["steps"], lane) not in done]
        if not lanes:
            continue
        config, begin = Config(**flags, repeat_rate=data.repeat_rate(corpus.train_counts)), time.perf_counter()
        at, losses, held_out = train_lanes(config, lanes, corpus, data.vocabulary(corpus.encoding))
        seconds = time.perf_counter() - begin
        with open(METRICS, "a") as file:
            for lane, (rate, ends, qk, seed) in enumerate(lanes):
                file.write(json.dumps(dict(
                    stage=stage, name=name, learning_rate=rate, ends=ends, qk=qk, seed=seed, held_out=held_out[lane],
                    bits_per_byte=held_out[lane] * bits, flags=flags, device=jax.devices()[0].device_kind,
                    at=at.tolist(), loss=losses[:, lane].astype(float).round(3).tolist())) + "\n")
        print(f"{stage} {name} {config.steps} steps, {seconds:.0f} s: " + ", ".join(
            f"{rate:.2g}x{ends:g},{qk:g}/{seed} {value:.3f}" for (rate, ends, qk, seed), value in zip(lanes, held_out)), flush=True)


def train_lanes(config, lanes, corpus, vocabulary, every=10, windows=512):
    """Trains one network a lane: (steps, mean training losses up to them (n, lanes), final held-out losses), in nats a token.

    The optimizer runs at a rate of 1 and each lane scales its updates: one program for all rates.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from minitf import data, model, train
    *rates, seeds = zip(*lanes)
    rates = jnp.array(rates, jnp.float32)
    plain = replace(config, learning_rate=1.0, ends=1.0, qk=1.0, orthogonality=0.0)
    optimizer, constants = train.make_optimizer(plain), model.constants(config)

    def step(params, state, batch, rates):
        value, gradient = jax.value_and_grad(train.loss)(params, constants, batch, config)
        updates, state = optimizer.update(gradient, state, params)
        updates = train.steer(updates, params, *rates, config.orthogonality)
        return optax.apply_updates(params, updates), state, value

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    params = jax.jit(lambda keys: jax.lax.map(lambda key: model.init(key, config, vocabulary), keys))(keys)
    state = jax.vmap(optimizer.init)(params)
    step = jax.jit(jax.vmap(step, (0, 0, 0, 1)), donate_argnums=(0, 1))
    losses = []
    for number in range(config.steps):
        batches = {seed: data.batch(corpus.train, config.length, config.batch, seed, number) for seed in set(seeds)}
        params, state, values = step(params, state, np.stack([batches[seed] for seed in seeds]), rates)
        losses.append(values)
    losses = np.asarray(jnp.stack(losses))[:config.steps // every * every]
    del state
    test = data.spread_windows(corpus.held_out, config.length, windows)
    held_out = [train.evaluate(jax.tree.map(lambda leaf: leaf[lane], params), constants, test, config) for lane in range(len(lanes))]
    return (np.arange(len(losses) // every) + 1) * every, losses.reshape(-1, every, len(lanes)).mean(1), held_out


# --- What came out ------------------------------------------------------------------------------------------------------

def report():
    """Replaces what follows TABLES in results.md, and draws headline.png."""
    runs = read_runs()
    lines = ["", "| contender | trials | best: blocks' rate, ends, queries and keys | held out |", "| --- | --- | --- | --- |"]
    trials = {name: [run for run in runs if run["stage"] == "tune" and run["name"] == name] for name in CONTENDERS}
    trials = {name: tuning for name, tuning in trials.items() if tuning}
    for name, tuning in trials.items():
        best = next(run for run in tuning if (run["learning_rate"], run["ends"], run["qk"]) == tuned(name))
        lines.append(f"| {name} | {len(tuning)} | {rates(best)} | {loss(best)} |")
    lines += ["", "Other seeds, widths and lengths, at the best rates (divided by sqrt(2) at width 512):", "",
              "| run | steps | width | seed | held out |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {run['name']} | {run['flags']['steps']} | {run['flags']['width']} | {run['seed']} | {loss(run)} |"
              for run in runs if run["stage"] != "tune"]
    lines += ["", "Every trial, nats a token:", ""]
    lines += [f"- {name}: " + "; ".join(f"{rates(run)}: {run['held_out']:.3f}" for run in tuning) for name, tuning in trials.items()]
    results = HERE / "results.md"
    results.write_text(results.read_text().split(TABLES)[0] + TABLES + "\n" + "\n".join(lines) + "\n")
    draw([min(tuning, key=lambda run: (rates(run) != rates_of(tuned(name)), run["seed"])) for name, tuning in trials.items()])


TABLES = "## All runs"


def rates_of(trial):
    return "{:.3g} x {:g}, {:g}".format(*trial)


def rates(run):
    return rates_of((run["learning_rate"], run["ends"], run["qk"]))


def loss(run):
    return f"{run['held_out']:.3f} ({run['bits_per_byte']:.3f})"


DRAWN = {"vanilla espa Muon": "k-", "vanilla espa AdamW": "k--", "vanilla softmax Muon": "k:", "paper espa Muon": "C3-",
         "paper espa AdamW": "C3--", "Pre-LN Muon": "C7-", "Pre-LN AdamW": "C7--"}


def draw(runs):
    """The best trial of each: its training losses where they were kept, and in any case where it ended, on held-out text."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for run in sorted((run for run in runs if run["name"] in DRAWN), key=lambda run: run["held_out"]):
        style = DRAWN[run["name"]]
        axes.plot(run.get("at", []), run.get("loss", []), style, label=f"{run['name']}: {run['held_out']:.3f}")
        axes.plot(run["flags"]["steps"], run["held_out"], style.strip("-.:") + "o", ms=4)
    axes.set(xlabel="step", ylabel="nats a token: training (lines), held out (dots)", ylim=(2.4, 6),
             title="36 blocks, width 256, Python source. vanilla: no skips, no norms.\npaper: the same, with the published initialisation. "
             "Pre-LN: the standard transformer")
    axes.legend()
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
