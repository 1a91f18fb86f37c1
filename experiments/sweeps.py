"""What trials.py trains: networks by name, and sweeps, each of them some trials of a network."""
from records import HERE                               # noqa: F401: minitf is importable with it

from minitf import resolve

SHAPE = dict(depth=36, width=256, heads=4, length=256, batch=32, steps=300)

# What trials of one sweep may differ in: they are trained side by side.
VARIED = ("learning_rate", "lr_mult_embed", "lr_mult_qk", "lr_mult_vo", "weight_decay",
          "orthogonal_pull", "gamma", "seed")


def network(name):
    """The flags that a name stands for: preset, attention where it is another, optimizer."""
    kind, optimizer = name.replace("Pre-LN", "preln").split(", ")
    preset, *attn = kind.split()
    return dict(preset=preset, optimizer=optimizer.lower(), **{"attn": each for each in attn})


NETWORKS = {name: network(name) for name in (
    "isometric, Muon", "isometric, AdamW", "isometric uspa, Muon", "isometric vskip, Muon",
    "isometric softmax, Muon", "identity-skip, Muon", "identity-skip, AdamW", "normless, Muon",
    "normless, AdamW", "normless softmax, Muon", "paper, Muon", "paper, AdamW", "paper uspa, AdamW",
    "paper vskip, AdamW", "paper softmax, AdamW", "Pre-LN, Muon", "Pre-LN, AdamW",
    "Pre-LN espa, Muon")}

# A sweep trains a network as run.py does by default, with the sweep's flags, for each of its
# seeds, (0,) where none are named; with `values` also with other values, and with `times` with
# these multiples of the network's own.
ALL_SEEDS, LONGER, WIDE = (0, 1, 2), dict(steps=1200), dict(width=512, heads=8)
GRIDS = {
    "learning-rate": dict(times=[dict(learning_rate=factor) for factor in (0.5, 0.7, 1.4, 2)]),
    "multiples": dict(times=[
        *({name: factor} for name in VARIED[1:4] for factor in (0.5, 2)),
        dict(learning_rate=0.5, lr_mult_embed=2, lr_mult_qk=2, lr_mult_vo=2)]),
    "decay-and-pull": dict(values=[
        *(dict(weight_decay=decay) for decay in (0.0, 0.03, 0.3)),
        *(dict(orthogonal_pull=pull) for pull in (0.0, 0.05, 0.5))]),
    "gamma": dict(values=[dict(gamma=gamma) for gamma in (0.025, 0.05, 0.1, 0.2)]),
}
SWEEPS = {
    "defaults": dict(seeds=ALL_SEEDS),
    "defaults-1200": dict(flags=LONGER, seeds=ALL_SEEDS),
    "defaults-6000": dict(flags=dict(steps=6000)),
    "defaults-wide": dict(flags=WIDE, seeds=ALL_SEEDS),
    "defaults-wide-1200": dict(flags=WIDE | LONGER),
    **GRIDS,
    **{name + "-1200": grid | dict(flags=LONGER) for name, grid in GRIDS.items()},
}


def trials(sweep, network):
    """[flags of resolve] for each trial."""
    sweep = SWEEPS[sweep]
    flags = SHAPE | NETWORKS[network] | sweep.get("flags", {})
    default, changes = resolve(**flags), [{}, *sweep.get("values", ())]
    for times in sweep.get("times", ()):
        changes.append({name: getattr(default.training, name) * times[name] for name in times})
    return [flags | change | dict(seed=seed)
            for change in changes for seed in sweep.get("seeds", (0,))]
