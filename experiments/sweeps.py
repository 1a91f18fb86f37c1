"""What headline.py runs: the contenders, their trials at the first length, and the stages that follow."""
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

WIDE = dict(width=512, heads=8)
BEFORE = {"muon": lane(2e-4, 200.0, 40.0, vo=16.0, orthogonality=0.2, gamma=0.1, far=1, gamma_far=0.02),
          "adamw": lane(1e-4, 512.0, 24.0, vo=16.0, orthogonality=0.2, gamma=0.1, far=1, gamma_far=0.02)}


def at_width(lane, width):
    """At another width, the rate changes as config.default_rates says."""
    return lane | dict(learning_rate=lane["learning_rate"] * (SHAPE["width"] / width)**0.5)


WIDE_BEFORE = {optimizer: at_width(lane, WIDE["width"]) | dict(far=2) for optimizer, lane in BEFORE.items()}


# Stages but the first: {contender: how}. How: steps, times SHAPE's; seeds, (0,) where not said; flags, beside the contender's;
# changes to its best trial, or in a stage called default to what run.py does, each of them a run. Trials that were added later moved
# the best: of "longer", "pace", "wide", "why" and "far" some rows in headline.jsonl are from the best of then.
CHAINS = dict(learning_rate=5e-4, ends=88.0, qk=16.0, vo=0.25)   # the rates of the chain with Muon
OWN_FIRST = lane(2.5e-4, 176.0, 64.0, orthogonality=0.2, gamma=0.1, vo=8.0)
OWN_LATER = OWN_FIRST | dict(learning_rate=1.25e-4, ends=352.0, vo=16.0)
STAGES = {
    "tune": {},
    "seeds": {name: dict(seeds=(1, 2)) for name in CONTENDERS},
    "longer": {
        "vanilla espa Muon": dict(steps=(4, 5.2)), "vanilla own Muon": dict(steps=(4, 5.2)), "vanilla espa AdamW": dict(steps=(4,)),
        "Pre-LN Muon": dict(steps=(4,)), "Pre-LN AdamW": dict(steps=(4,)), "weighted espa Muon": dict(steps=(4,)),
        "paper espa Muon": dict(steps=(1.3, 2)), "paper espa AdamW": dict(steps=(2, 5))},
    "tune longer": {
        "vanilla espa Muon": dict(steps=(4,), changes=(
            dict(gamma=0.03), dict(learning_rate=2.5e-4), dict(learning_rate=1e-3), dict(qk=48.0), dict(ends=30.0), dict(vo=1.0),
            dict(orthogonality=1.0), dict(gamma=0.03, qk=48.0))),
        "vanilla own Muon": dict(steps=(4,), changes=(
            *around(OWN_FIRST, dict(gamma=0.2), dict(orthogonality=0.5), dict(far=1, gamma_far=0.01), dict(qk=32.0, vo=16.0),
                    dict(learning_rate=1.25e-4), dict(learning_rate=1.25e-4, ends=352.0, vo=16.0),
                    dict(learning_rate=1.25e-4, ends=352.0, qk=128.0, vo=16.0)),
            *around(OWN_LATER | dict(far=1, gamma_far=0.01), dict(gamma_far=0.02), dict(far=2), dict(gamma=0.2)),
            *around(BEFORE["muon"], dict(far=2), dict(gamma_far=0.04), dict(gamma_far=0.01), dict(gamma=0.2, gamma_far=0.04),
                    dict(orthogonality=0.5), dict(learning_rate=3e-4, ends=133.0, qk=27.0, vo=10.7), dict(learning_rate=1.4e-4),
                    dict(ends=100.0), dict(qk=80.0), dict(vo=8.0))[1:])),
        "vanilla own AdamW": dict(steps=(4,), changes=around(
            BEFORE["adamw"], dict(learning_rate=7e-5), dict(learning_rate=1.4e-4), dict(learning_rate=7e-5, ends=730.0, qk=34.0, vo=23.0),
            dict(vo=32.0), dict(ends=256.0), dict(qk=48.0))[1:]),
        "Pre-LN Muon": dict(steps=(4,), changes=(
            dict(learning_rate=4e-3), dict(learning_rate=4e-3, ends=32.0), dict(learning_rate=2e-3, ends=64.0), dict(learning_rate=1.2e-2),
            dict(vo=1.0), dict(vo=4.0), dict(learning_rate=4e-3, vo=4.0), dict(orthogonality=0.02),
            dict(learning_rate=5.6e-3), dict(learning_rate=2.8e-3), dict(learning_rate=4e-3, ends=8.0), dict(learning_rate=4e-3, vo=1.0))),
        "Pre-LN AdamW": dict(steps=(4,), changes=(
            dict(learning_rate=7e-4), dict(learning_rate=1.4e-3), dict(ends=32.0), dict(learning_rate=7e-4, ends=91.0)))},
    "longer pace": {
        "vanilla own Muon": dict(steps=(5.2,), changes=around(
            OWN_LATER, dict(far=1, gamma_far=0.01), dict(gamma=0.05), dict(qk=32.0, vo=32.0),
            dict(learning_rate=6.25e-5, ends=704.0, vo=32.0)))},
    "pace": {"vanilla espa Muon": dict(steps=(1.3,), seeds=(0, 1, 2))},
    "wide": {name: dict(seeds=(0, 1, 2), flags=WIDE) for name in CONTENDERS},
    "wide pace": {"vanilla espa Muon": dict(steps=(1.3,), seeds=(0, 1, 2), flags=WIDE)},
    # What long training asks for: Pre-LN's rates, its attention without decay, or the arithmetic?
    "why": {
        "Pre-LN Muon": dict(steps=(2,), changes=(
            {}, CHAINS, CHAINS | dict(learning_rate=2e-3, qk=4.0), dict(learning_rate=4e-3), dict(learning_rate=5.6e-3))),
        "Pre-LN espa Muon": dict(steps=(2,), changes=(dict(gamma=0.1), dict(gamma=0.025))),
        "vanilla espa Muon": dict(steps=(2,)), "vanilla own Muon": dict(steps=(2,))},
    "precision": {"vanilla espa Muon": dict(steps=(4,), flags=dict(dtype="float32"))},
    # Heads that look far back.
    "far": {
        "vanilla espa Muon": dict(steps=(2,), changes=[
            dict(far=1, gamma=gamma, gamma_far=far) for gamma in (0.1, 0.2, 0.4, 0.8) for far in (0.00125, 0.01)]),
        "vanilla own Muon": dict(steps=(2,), changes=(
            dict(far=1), dict(far=1, gamma_far=0.01), dict(far=2), dict(far=2, gamma=0.4),
            dict(gamma=0.05), dict(gamma=0.025), dict(gamma=0.0125))),
        "Pre-LN espa Muon": dict(steps=(2,), changes=[dict(far=1, gamma=gamma) for gamma in (0.1, 0.4)])},
    # As run.py trained them by default before heads' rates were balanced over the blocks.
    "before balance": {
        "vanilla own Muon": dict(steps=(1, 4, 5.2, 2), seeds=(0, 1, 2), changes=(BEFORE["muon"],)),
        "vanilla own AdamW": dict(steps=(1, 4), seeds=(0, 1, 2), changes=(BEFORE["adamw"],))},
    "wide, before balance": {
        "vanilla own Muon": dict(seeds=(0, 1, 2), flags=WIDE, changes=(WIDE_BEFORE["muon"],)),
        "vanilla own AdamW": dict(seeds=(0, 1, 2), flags=WIDE, changes=(WIDE_BEFORE["adamw"],))},
    "wide longer": {
        "vanilla own Muon": dict(steps=(4,), flags=WIDE, changes=(WIDE_BEFORE["muon"],)),
        "Pre-LN Muon": dict(steps=(4,), flags=WIDE, changes=(at_width(lane(4e-3, 16.0, vo=2.0), WIDE["width"]),))},
    # As run.py trains them when no rate is given.
    "default": {name: dict(seeds=(0, 1, 2)) for name in CONTENDERS},
    "longer default": {name: dict(steps=(4,), seeds=(0, 1, 2)) for name in CONTENDERS},
    "longer pace default": {name: dict(steps=(5.2,), seeds=(0, 1, 2)) for name in CONTENDERS},
    "wide default": {name: dict(seeds=(0, 1, 2), flags=WIDE) for name in CONTENDERS},
    "wide longer default": {name: dict(steps=(4,), flags=WIDE) for name in CONTENDERS},
}
