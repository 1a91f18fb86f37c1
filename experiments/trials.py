"""Trials: which deep networks train without shortcuts, and how fast.

    python experiments/trials.py run SWEEP [NETWORK ...] --data DIR [--together 8]
    python experiments/trials.py report          prints tables, draws trials.png

DIR is a folder that data/prepare.py made. sweeps.py says what sweeps there are; without networks,
all are trained. Trials that differ in rates, gamma and seed alone are trained side by side, up to
8 in one program (vmap): each sees what it would see alone. Each is added to trials.jsonl when it
has ended; what is there is not repeated. `flags` in a record are those of its revision, and so is
what a network's name stands for.
"""
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from records import HERE, add, command, figure, header, read, row
from sweeps import NETWORKS, SHAPE, SWEEPS, VARIED, trials

import minitf
from minitf.config import DataConfig
from minitf.network import fast
from minitf.training import data as corpora
from minitf.training import encoding, optimizer, train

RECORDS, WINDOWS = HERE / "trials.jsonl", 512
STATED = (*VARIED, "decay_groups", "pull_groups")       # of a trial, besides its flags

# --- Training ---------------------------------------------------------------------------

def run(names, data, together):
    """Trains trials of the sweeps and networks of these names, `together` of them at a time."""
    corpus = corpora.load(DataConfig(data=data, val_data=None, encoding=None), SHAPE["length"])
    where = dict(collision_rate=corpora.token_collision_rate(corpus.train_counts),
                 backend=fast.hardware())
    size = corpus.validation_counts @ encoding.byte_lengths(corpus.encoding)
    bits = len(corpus.validation) / size / math.log(2)            # per byte, of a nat per token
    networks = [name for name in names if name in NETWORKS] or NETWORKS
    for sweep, name in product([name for name in names if name in SWEEPS], networks):
        settings = [minitf.resolve(**where, **flags) for flags in trials(sweep, name)]
        missing = {identity(name, each.flags, stated(each)): each for each in settings}
        for record in read(RECORDS):
            missing.pop(identity(record["name"], record["flags"], record), None)
        for first in range(0, len(missing), together):
            group = [*missing.values()][first:first + together]
            ended = train_together(group, corpus, encoding.vocabulary(corpus.encoding))
            for each, result in zip(group, ended):
                record = stated(each) | summary(*result, bits)
                add(RECORDS, sweep=sweep, name=name, **record, device=jax.devices()[0].device_kind,
                    flags=dict(preset=each.preset, **each.flags), revision=minitf.__version__)
                norms = [f"{when} {norm:.3g}" for when, norm in record["grad_norm"].items()]
                print(f"{name}, {each.training.steps} steps, {rates(record)}, "
                      f"seed {record['seed']}: validation loss {loss(record)}; gradient norm "
                      + ", ".join(norms), flush=True)


def stated(settings):
    """{name: value} of what a record states; only espa has a gamma."""
    values = vars(settings.model) | vars(settings.training)
    return {name: values[name] for name in STATED if name != "gamma" or values["attn"] == "espa"}


def identity(name, flags, values):
    """Alike for trials that are the same, be they settings or records."""
    return json.dumps([name, *map(flags.get, SHAPE), *map(values.get, STATED)])


def start(settings, vocabulary):
    """(params, optimizer state, constants, rates): what the first training step is given."""
    model, how = settings.model, settings.training
    params = initialise(jax.random.key(how.seed), config=model, vocabulary=vocabulary)
    fixed = minitf.attention_constants(model), optimizer.group_rates(how, model)
    state = optimizer.make_optimizer(how.optimizer).init(params)
    return params, state, *jax.tree.map(jnp.asarray, fixed)


initialise = jax.jit(minitf.init, static_argnames=("config", "vocabulary"))


@partial(jax.jit, static_argnums=(6, 7), donate_argnums=(0, 1))
def step_together(*arguments):
    """train_step, where all but config and optimizer has a first axis of trials."""
    return jax.vmap(lambda *trees: train.train_step.__wrapped__(*trees, *arguments[6:]))(
        *arguments[:6])


def train_together(settings, corpus, vocabulary):
    """Trains networks that differ in VARIED alone, a single one by run.py's own program.

    Yields for each (losses, gradient norms, validation losses by position): (steps,) twice, (T,).
    """
    settings, alone = of_one_structure(settings), len(settings) == 1
    model, how = settings[0].model, settings[0].training

    def stack(trees, join=jnp.stack):
        return trees[0] if alone else jax.tree.map(lambda *leaves: join(leaves), *trees)

    params, state, constants, rates = zip(*(start(each, vocabulary) for each in settings))
    state, fixed = stack(state), (stack(constants), stack(rates))
    params, history = stack(params), []
    for step in range(how.steps):
        fed = [(optimizer.learning_rate(each, step),
                corpora.batch(corpus.train, model.length, how.batch, each.seed, step))
               for each in (each.training for each in settings)]
        params, state, metrics = (train.train_step if alone else step_together)(
            params, state, *fixed, *stack(fed, np.stack), model, how.optimizer)
        history.append((metrics["loss"], metrics["grad_norm"]))
    history = np.array(jax.device_get(history)).reshape(how.steps, 2, -1)
    del state
    windows = corpora.spread_windows(corpus.validation, model.length, WINDOWS)
    batches = np.split(windows, range(how.batch, len(windows), how.batch))
    for number in range(len(settings)):
        own = params if alone else jax.tree.map(lambda leaf: leaf[number], params)
        losses = [train.evaluate_tokens(own, constants[number], batch, model) for batch in batches]
        yield *history[:, :, number].T, np.concatenate(losses).mean(0, dtype=float)


def of_one_structure(settings):
    """Settings whose decay and pull are all above 0, or all 0: then `rates` are alike.

    1e-30 of a weight is less than the last place of any update.
    """
    for name in ("weight_decay", "orthogonal_pull"):
        least = 1e-30 * any(getattr(each.training, name) for each in settings)
        changed = [{name: max(getattr(each.training, name), least)} for each in settings]
        settings = [replace(each, training=replace(each.training, **change))
                    for each, change in zip(settings, changed)]
    return settings


def summary(losses, norms, by_position, bits):
    """What is kept of a trial."""
    parts = np.array_split(losses, min(max(len(losses) // 10, 1), 120))
    tenths, value = np.array_split(norms, 10), float(by_position.mean())
    octaves = np.split(by_position, 2**np.arange(1, len(by_position).bit_length()) - 1)[:-1]
    return dict(
        validation_loss=value, bits_per_byte=value * bits,
        grad_norm=dict(early=float(tenths[0].mean()), largest=float(norms.max()),
                       last=float(tenths[-1].mean())),
        loss_by_position=[float(part.mean()) for part in octaves],     # 1, 2 and 3, 4 to 7, ...
        at=np.cumsum([*map(len, parts)]).tolist(),                # steps, each the last of a part
        loss=[round(float(part.mean()), 3) for part in parts])


# --- What came out ----------------------------------------------------------------------

LABELS = {"lr_mult_embed": "embed {:.3g}", "lr_mult_qk": "qk {:.3g}", "lr_mult_vo": "vo {:.3g}",
          "weight_decay": "decay {:.3g} of {decay_groups}",
          "orthogonal_pull": "pull {:.3g} of {pull_groups}", "balance": "balance {:.3g}"}
COLOURS = {"isometric": "k", "isometric softmax": "C8", "identity-skip": "C2", "normless": "C0",
           "paper": "C3", "Pre-LN": "C7", "own matrix (removed)": "C4",
           "paper initialisation, unit rows": "C1"}


def rates(record):
    """3.5e-4 (embed 44, qk 16): multiples of 1 and shares of 0 are not said."""
    said = [label.format(record[name], **record) for name, label in LABELS.items()
            if record.get(name, 0) != name.startswith("lr_mult")]
    heads = Counter(f"{gamma:g}" for gamma in record.get("gamma", ()))
    gammas = [f"{count} x {gamma}" for gamma, count in heads.items()] if len(heads) > 1 else heads
    said += ["gamma " + " and ".join(gammas)] * bool(heads)
    return f"{record['learning_rate']:.3g}" + f" ({', '.join(said)})" * bool(said)


def loss(record):
    return f"{record['validation_loss']:.3f} ({record['bits_per_byte']:.3f})"


def order(record):
    """The validation loss; NaN counts as the largest."""
    return record["validation_loss"] if math.isfinite(record["validation_loss"]) else math.inf


def report():
    """Prints all tables as Markdown, and draws trials.png."""
    records, tuning, others = read(RECORDS), {}, {}    # others: seeds of one setting share a row
    for record in records:
        name, steps, width = record["name"], record["flags"]["steps"], record["flags"]["width"]
        if (steps, width, record["seed"]) == (SHAPE["steps"], SHAPE["width"], 0):
            tuning.setdefault(name, []).append(record)
        else:
            key = record["sweep"], name, rates(record), steps, width
            others.setdefault(key, []).append(record)
    print("Validation loss in nats a token, in brackets in bits a byte.\n")
    print(header("network", "trials", "best: learning rate, times it", "validation loss"))
    for best in sorted((min(group, key=order) for group in tuning.values()), key=order):
        print(row(best["name"], len(tuning[best["name"]]), rates(best), loss(best)))
    print("\nOther lengths, widths and seeds:\n")
    print(header("sweep", "network", "learning rate, times it", "steps", "width", "seeds",
                 "validation loss"))
    for key, group in others.items():
        seeds = [str(record["seed"]) for record in group]
        print(row(*key, ", ".join(seeds), ", ".join(map(loss, group))))
    print(f"\nEvery trial of {SHAPE['steps']} steps:\n")
    for name, group in tuning.items():
        print(f"- {name}: " + "; ".join(f"{rates(each)}: {loss(each)}" for each in group))
    draw([record for record in sorted(records, key=order, reverse=True)
          if record["flags"]["width"] == SHAPE["width"]])


def draw(records):
    """A panel for each length: training losses of each network's last record, its best seed's."""
    lengths = sorted({record["flags"]["steps"] for record in records} & {300, 1200, 6000})
    picture, panels = figure((6 * len(lengths), 5.5), 1, len(lengths), squeeze=False)
    for axes, steps in zip(panels[0], lengths):
        best = {record["name"]: record for record in records if record["flags"]["steps"] == steps}
        for record in sorted(best.values(), key=order):
            kind, method = record["name"].rsplit(", ", 1)
            if kind in COLOURS:
                style = dict(color=COLOURS[kind], lw=1, ls="-" if method == "Muon" else "--")
                axes.plot(record.get("at", []), record.get("loss", []), **style,
                          label=f"{record['name']}: {loss(record)}")
                axes.plot(steps, record["validation_loss"], "o", ms=4, color=COLOURS[kind])
        least = min(map(order, best.values()))
        axes.set(xlabel="step", ylim=(least - 0.2, least + 3), title=f"{steps:,} steps, width 256",
                 ylabel="nats a token: training (lines), validation (dots)")
        axes.legend(fontsize="small", loc="upper right")
    picture.savefig(HERE / "trials.png", dpi=110)


if __name__ == "__main__":
    command(__doc__, [*SWEEPS, *NETWORKS], run, report, data="", together=8)
