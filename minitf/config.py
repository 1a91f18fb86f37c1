"""The configuration: one frozen dataclass, whose fields are run.py's flags."""
from dataclasses import dataclass, field, fields
from math import inf, isfinite, sqrt
from typing import get_args

from . import activations, spa
from .errors import require

# What a kind of block brings along; any flag given beside it wins. paper: vanilla as He et al. have it.
BLOCKS = {
    "vanilla": dict(attn="espa", alpha=0.0, beta=1.0, norm="none", act="relu", transform="none",
                    init="looks_linear", optimizer="muon", orthogonality=0.2),
    "paper": dict(attn="espa", alpha=0.0, beta=1.0, norm="none", act="leaky_relu", transform="tat",
                  init="orthogonal", optimizer="adamw", orthogonality=0.0),
    "weighted": dict(attn="espa", alpha=0.98, beta=sqrt(1 - 0.98**2), norm="none", act="relu", transform="none",
                     init="orthogonal", optimizer="muon", orthogonality=0.0),
    "preln": dict(attn="softmax", alpha=1.0, beta=1.0, norm="layer", act="gelu", transform="none",
                  init="gaussian", optimizer="adamw", orthogonality=0.0),
}


def flag(default, text, *choices, low=-inf, high=inf, above=-inf, below=inf):
    """A field with what run.py's help says of it, its allowed values or its range (closed: low, high; open: above, below)."""
    limits = dict(text=text, choices=choices, low=low, high=high, above=above, below=below)
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Config:
    """A model, its data and its training. None: chosen by `block`, or by what is measured (see each).

    Raises ValueError, with one line that says what is allowed, for any value out of its range.
    """
    depth: int = flag(36, "blocks", low=1)
    width: int = flag(64, "features of a token (d)", low=1)
    heads: int = flag(4, "attention heads", low=1)
    length: int = flag(64, "tokens of context (T)", low=2)
    block: str = flag("vanilla", "no skips and no norms; the same as published; weighted skips, no norms; or the standard "
                      "transformer", *BLOCKS)
    attn: str | None = flag(None, "attention", "softmax", "vskip", "uspa", "espa")
    gamma: float | None = flag(None, "espa: the last kernel's decay, gamma_L; default: 25.6 / length, at most 0.8", above=0)
    own: bool | None = flag(None, "espa: what a token keeps of itself passes a matrix of its own, so that values and outputs may learn "
                            "fast; default: for vanilla")
    far: int | None = flag(None, "espa: how many of the heads look far back, with gamma_far in gamma's place; default: with own a "
                           f"quarter, where the context has 256 to {spa.EXACT_LENGTH:,} tokens, else 0", low=0)
    gamma_far: float | None = flag(None, "espa: their gamma_L; default: a fifth of gamma", above=0)
    rho: float = flag(0.8, "uspa: the last kernel's correlation, rho_L", above=0, below=1)
    rescale: str = flag("expected", "positions' mean square: held at 1, or the paper's row sums alone", "expected", "plain")
    repeat_rate: float | None = flag(None, "chance that two tokens are equal; default: that of the training tokens",
                                     low=0, below=1)
    alpha: float | None = flag(None, "weight of the skips", low=0, high=100)
    beta: float | None = flag(None, "weight of the branches; with alpha alone: sqrt(1 - alpha^2)", low=0, high=100)
    norm: str | None = flag(None, "normalisation before each branch", "none", "layer", "rms")
    act: str | None = flag(None, "activation", *activations.NAMES)
    transform: str | None = flag(None, "its transformation", *activations.TRANSFORMS)
    eta: float = flag(0.9, "TAT of leaky ReLU: C_f(0)", above=0, below=1)
    zeta: float = flag(1.5, "DKS: slope of C_f at 1", above=1)
    tau: float = flag(0.3, "TAT of smooth activations: curvature of C_f at 1", above=0)
    init: str | None = flag(None, "initialisation of weights", "looks_linear", "orthogonal", "gaussian")
    position: str = flag("rope", "position encoding", "rope", "sinusoidal", "learned", "none")
    batch: int = flag(16, "sequences a step", low=1)
    steps: int = flag(400, "training steps", low=1, high=2**31 - 1)
    save_every: int | None = flag(None, "steps between checkpoints; default: a fifth of the steps", low=1)
    optimizer: str | None = flag(None, "optimizer", "muon", "adamw")
    learning_rate: float | None = flag(None, "peak learning rate; default: what suits block, optimizer and size",
                                       above=0)
    ends: float | None = flag(None, "multiplies it for embeddings, positions, final gain and head; default: likewise", above=0)
    qk: float | None = flag(None, "multiplies it for queries and keys; default: likewise", above=0)
    vo: float | None = flag(None, "multiplies it for values and outputs; default: likewise", above=0)
    balance: float | None = flag(None, "own: qk and vo are divided by this power of 1 - c^2, what tokens take over from others in a block; "
                                 "default: 0.5 for vanilla, else 0", low=0, high=1)
    warmup: int | None = flag(None, "steps of linear warm-up; default: a twentieth of the steps", low=0)
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices", low=0)
    orthogonality: float | None = flag(None, "share by which a step brings the matrices but queries' and keys' back to orthogonal "
                                       "ones; default: 0.2 for vanilla, else 0", low=0, high=1)
    dtype: str | None = flag(None, "arithmetic; default: bfloat16 on an accelerator, float32 on a CPU",
                             "float32", "bfloat16")
    remat: bool = flag(False, "compute activations again in the backward pass, block by block: less memory, more time")
    seed: int = flag(0, "of initialisation and order of the data", low=0, high=2**31 - 1)
    data: str | None = flag(None, "UTF-8 text: files, folders or globs, comma-separated, or a folder that data/prepare.py "
                            "made; default: Shakespeare")
    val_data: str | None = flag(None, "held-out text, as data; default: what was set aside, or the last tenth of data")
    encoding: str | None = flag(None, "a tiktoken encoding's name, or a rank file; default: the prepared folder's, or 1,024 byte pairs")

    def __post_init__(self):
        for each in fields(self):
            validate(self, each)
        preset = dict(BLOCKS[self.block])
        if self.alpha is not None and self.beta is None:
            require(self.alpha <= 1, f"alpha must be at most 1 when beta is left to it, not {self.alpha:g}")
            preset["beta"] = sqrt(1 - self.alpha**2)
        complete(self, preset)
        complete(self, dict(own=self.attn == "espa" and family(self) == "vanilla"))
        far = self.heads // 4 if self.own and self.rescale == "expected" and 256 <= self.length <= spa.EXACT_LENGTH else 0
        complete(self, dict(far=far, gamma=min(0.8, 25.6 / self.length), warmup=self.steps // 20,
                            save_every=max(self.steps // 5, 1)))
        complete(self, dict(gamma_far=self.gamma / 5) | default_rates(self))
        require(self.width % self.heads == 0,
                f"width must be a multiple of heads: {self.width} is not one of {self.heads}")
        require(self.far <= self.heads, f"far must be at most heads, {self.heads}, not {self.far}")
        require(self.far == 0 or self.rescale == "expected", "far needs rescale expected: plain takes all heads to be alike")
        require(self.far == 0 or self.length <= spa.EXACT_LENGTH,
                f"far must be 0 beyond {spa.EXACT_LENGTH} tokens, where D is not known, not {self.far}")
        require(not self.own or self.attn == "espa", f"own needs attn espa, not {self.attn}")
        require(self.position != "rope" or self.width // self.heads % 2 == 0,
                f"rope needs an even number of features a head, not {self.width // self.heads}")
        require(self.position != "sinusoidal" or self.width % 2 == 0,
                f"sinusoidal positions need an even width, not {self.width}")
        require(self.warmup < self.steps, f"warmup must be below steps, {self.steps}, not {self.warmup}")
        require(self.init != "looks_linear" or self.act in activations.SLOPES or
                self.act in activations.LOOK_LINEAR and self.transform == "none",
                f"init looks_linear needs act {', '.join(activations.SLOPES)}, or with transform none "
                f"{', '.join(activations.LOOK_LINEAR)}, not {self.act} with {self.transform}; init orthogonal takes all")
        require(self.norm != "none" and self.transform == "none" or abs(self.alpha**2 + self.beta**2 - 1) < 0.01,
                f"without norms or with a transform alpha^2 + beta^2 must be 1, not {self.alpha**2 + self.beta**2:.4g}")
        require(self.beta > 0, "beta must be above 0: the branches are all that there is to train")


@dataclass(frozen=True)
class Sampling:
    """How text is drawn from a trained model; raises ValueError as Config does."""
    prompt: str = flag("\n", "what the text begins with; default: a line break")
    tokens: int = flag(120, "how many to draw", low=1)
    temperature: float = flag(0.8, "divides the logits; 0: always the most likely token", low=0)
    top_k: int | None = flag(None, "draws among the most likely K only", low=1)
    seed: int = flag(0, "of what is drawn", low=0, high=2**31 - 1)

    def __post_init__(self):
        for each in fields(self):
            validate(self, each)


def complete(configuration, values):
    """Gives the fields that are None these values, {name: value}."""
    for name, value in values.items():
        if getattr(configuration, name) is None:
            object.__setattr__(configuration, name, value)


def kind(each):
    """The type of a field's values other than None."""
    return (get_args(each.type) or [each.type])[0]


def validate(configuration, each):
    """ValueError unless the value of the field is of its type and within its limits."""
    name, value, limits = each.name, getattr(configuration, each.name), each.metadata
    if value is None and each.default is None:
        return
    allowed_types = (int, float) if kind(each) is float else kind(each)
    require(isinstance(value, allowed_types) and (allowed_types is bool or not isinstance(value, bool)),
            f"{name} must be of type {kind(each).__name__}, not {value!r}")
    if limits["choices"]:
        require(value in limits["choices"], f"{name} must be one of {', '.join(limits['choices'])}, not {value!r}")
    elif not isinstance(value, (str, bool)):
        bounds = {"at least": limits["low"], "at most": limits["high"], "above": limits["above"], "below": limits["below"]}
        allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if isfinite(bound))
        fine = limits["low"] <= value <= limits["high"] and limits["above"] < value < limits["below"]
        require(fine, f"{name} must be {allowed or 'finite'}, not {value}")


def family(config):
    """Which of BLOCKS a network is like, whatever its flags were: by its norms, its skips, its initialisation."""
    skipless = "vanilla" if config.init == "looks_linear" else "paper"
    return "preln" if config.norm != "none" else "weighted" if config.alpha > 0 else skipless


# Tuned at depth 36, as at width 64: learning_rate, ends, qk, vo. Those of own with balance 0.5, of paper with one rate for all.
RATES = {
    "vanilla": dict(muon=(6e-4, 64.0, 16.0, 0.5), adamw=(1.5e-4, 256.0, 16.0, 0.5)),
    "vanilla own": dict(muon=(3e-4, 270.0, 16.0, 11.0), adamw=(2e-4, 512.0, 18.0, 12.0)),
    "paper": dict(muon=(1e-3, 1.0, 1.0, 1.0), adamw=(3e-4, 1.0, 1.0, 1.0)),
    "weighted": dict(muon=(2e-3, 32.0, 4.0, 0.5), adamw=(2e-3, 64.0, 4.0, 0.5)),
    "preln": dict(muon=(8e-3, 16.0, 1.0, 2.0), adamw=(2e-3, 48.0, 1.0, 1.0)),
}


def default_rates(config):
    """{flag: value} of the tuned rates, carried over to other sizes.

    An update of one size an entry has a spectral norm that grows as sqrt(width): the rate falls with it. Without skips
    the relative changes of all blocks add up in their product: the rate falls with the depth as well; its root fits 6 to
    72 blocks. The ends' own does not: they stand once in the network, however deep.
    """
    kind = family(config)
    own = kind == "vanilla" and config.own
    rate, ends, qk, vo = RATES["vanilla own" if own else kind][config.optimizer]
    rate *= (64 / config.width) ** 0.5
    if kind in ("vanilla", "paper"):
        by_depth = (36 / config.depth) ** 0.5
        rate *= by_depth
        ends /= by_depth if kind == "vanilla" else 1                        # paper has one rate for all
    return dict(learning_rate=rate, ends=ends, qk=qk, vo=vo, balance=0.5 if own else 0.0)
