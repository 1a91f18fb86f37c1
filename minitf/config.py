"""Settings: frozen dataclasses for model, training and data; `resolve` states every default."""
from dataclasses import MISSING, dataclass, field, fields
from math import inf, isfinite, sqrt
from typing import get_args

from .errors import as_flag, look_up, require, require_one_of
from .presets import DEFAULTS, PRESETS, SUCCESSORS, gammas_by_length, scaled
from .theory.activations import NAMES, TRANSFORMS
from .theory.families import FAMILIES
from .theory.kernels import INIT_SCALES, NOT_NORMS

SECTIONS = ("method", "additions", "successors", "training", "data")   # of flags, as in --help
LARGEST = 1e30                                         # number: what is made of it fits a float32


def flag(group, text, *names, default=MISSING, **limits):
    """A field: its group and text in --help, and what it allows.

    One of the names, or of `choices` as they are when checked, or a range, closed (low, high) or
    open (above, below).
    """
    free = dict(choices=names, low=-inf, high=inf, above=-inf, below=inf)
    return field(default=default, metadata=dict(group=group, text=text) | free | limits)


def kind(each):
    """The type of a field's values other than None."""
    return next(t for t in (*get_args(each.type), each.type) if t is not type(None))


def check(each, value):
    """ValueError unless a value is of a field's type and within its limits."""
    name, limits, of = as_flag(each.name), each.metadata, kind(each)
    if value is None and type(None) in get_args(each.type):
        return
    if of in (int, float, tuple):
        parts = value if of is tuple and isinstance(value, (tuple, list)) else [value]
        require(parts, f"{name} must be one number or more, not none")
        for part in parts:
            check_number(name, limits, int if of is int else float, part)
    else:
        require(isinstance(value, of), f"{name} must be of type {of.__name__}, not {value!r}")
        if limits["choices"]:
            require_one_of(limits["choices"], value, name)


def check_number(name, limits, number, value):
    """ValueError unless a value is an int, or with number = float any, within limits."""
    require(isinstance(value, (int, number)) and not isinstance(value, bool),
            f"{name} must be of type {number.__name__}, not {value!r}")
    words = {"at least": "low", "at most": "high", "above": "above", "below": "below"}
    bounds = " and ".join(f"{word} {limits[bound]:g}" for word, bound in words.items()
                          if isfinite(limits[bound]))
    fine = limits["low"] <= value <= limits["high"] and limits["above"] < value < limits["below"]
    require(fine, f"{name} must be {bounds or 'finite'}, not {value}")
    require(abs(value) <= LARGEST, f"{name} must be at most {LARGEST:g}, not {value}")


class Checked:
    """A dataclass whose fields are checked: ValueError, in one line, for what is not allowed."""

    def __post_init__(self):
        for each in fields(self):
            check(each, getattr(self, each.name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A network. Frozen and hashable: what a compiled function sees as static."""
    depth: int = flag("method", "blocks (default: 36)", low=1, high=10_000)
    width: int = flag("method", "features of a token, d (default: 64)", low=1)
    heads: int = flag("method", "attention heads (default: 4)", low=1, high=10_000)
    length: int = flag("method", "tokens of context, T (default: 64)", low=2)
    attn: str = flag("method", "attention family", choices=FAMILIES)
    objective: str = flag("method", "what is predicted: the next token (clm), or 15 % of the "
                          "tokens, masked, from both sides (mlm; default: clm)", "clm", "mlm")
    gamma: tuple = flag("method", "espa: decay of the last kernel, gamma_L, one number or one for "
                        "each head, as 0.1,0.1,0.02 (default: 25.6 / length, at most 0.8; from 256 "
                        "to 1,024 tokens a fifth for a quarter of the heads)", above=0, high=100)
    rho: float = flag("method", "uspa: correlation of the last kernel, rho_L (default: 0.8)",
                      above=0, below=1)
    rho_first: float = flag("method", "uspa: that of the first kernel, rho_0 (default: the chance "
                            "that two tokens are equal)", low=0, below=1)
    act: str = flag("method", "activation", *NAMES)
    transform: str = flag("method", "what it is solved for; none: a mean square of 1 alone, "
                          "beneath a norm nothing", *TRANSFORMS)
    eta: float = flag("method", "TAT of a leaky ReLU: C_f(0) (default: 0.9)", above=0, below=1)
    zeta: float = flag("method", "DKS: slope of C_f at 1 (default: 1.5)", above=1, high=1e6)
    tau: float = flag("method", "TAT of a smooth activation: curvature of C_f at 1 (default: 0.3)",
                      above=0, high=1e6)
    alpha: float = flag("method", "weight of the skips", low=0, high=100)
    beta: float = flag("method", "weight of the branches (default: with alpha alone, "
                       "sqrt(1 - alpha^2))", above=0, high=100)
    norm: str = flag("method", "normalisation before each branch; dyt, derf: in place of one",
                     "none", "layer", "rms", "dyt", "derf")
    position: str = flag("method", "position encoding (default: rope)", "rope", "learned", "none")
    row_scale: str = flag("additions", "D: holds every position at mean square 1, or the paper's "
                          "row sums (default: unit)", "unit", "row-sum")
    identity_skip: bool = flag("additions", "espa: c of A = c I + P is a skip, attention P alone")
    extra_heads: int = flag("additions", "more heads, of as many features, with ordinary "
                            "attention: B = 0, D = i / (i + 1), W^O zero at the start (default: "
                            "the preset's, or 0)", default=0, low=0, high=10_000)
    mlp_ratio: float = flag("additions", "hidden features of the MLPs over the width (default: 4, "
                            "less what extra heads take)", default=4.0, low=2, high=1000)
    init: str = flag("additions", "initial W^V and W^O", "orthogonal", "gaussian", "orthogonal-3")
    mlp_init: str = flag("additions", "initial MLPs; orthogonal is the paper's",
                         "looks_linear", "orthogonal", "gaussian")
    head_init: str = flag("additions", "initial head", "zero", "gaussian")
    token_collision_rate: float = flag("additions", "chance that two tokens are equal (default: "
                                       "that of the training tokens)", low=0, high=1)
    query_init: str = flag("successors", "initialisation of W^Q and W^K (default: W^Q zero, but "
                           "for attn softmax)", "zero", "gaussian", "near-identity")
    identity_values: bool = flag("successors", "no W^V and W^O")
    qk_norm: bool = flag("successors", "RMS norm of each head's queries and keys")
    mlp_alpha: float = flag("successors", "of the MLPs' skips (default: alpha)", low=0, high=100)
    mlp_beta: float = flag("successors", "of the MLPs' branches (default: beta)", above=0, high=100)
    trained_weights: bool = flag("successors", "alpha and beta of each block are trained, but for "
                                 "those that are 0")
    parallel: bool = flag("successors", "attention and MLP read the same input, their outputs are "
                          "added; without skips")
    dtype: str = flag("training", "arithmetic (default: bfloat16 on TPUs and NVIDIA GPUs of "
                      "compute capability 8.0 or more, else float32)", "float32", "bfloat16")
    remat: bool = flag("training", "of each block keep its input alone for the backward pass: "
                       "less memory, more time (default: attention's output too; on a GPU up to "
                       "48 blocks everything)")

    @property
    def features(self):
        """Of a head, k."""
        return self.width // self.heads

    @property
    def all_heads(self):
        """Extra ones too, which stand last."""
        return self.heads + self.extra_heads

    @property
    def attention_width(self):
        """Features of all heads, n: the width, but with extra heads."""
        return self.all_heads * self.features

    @property
    def hidden(self):
        """Features within an MLP."""
        return round(self.mlp_ratio * self.width)

    def __post_init__(self):
        super().__post_init__()
        require(self.width % self.heads == 0,
                f"width must be a multiple of heads: {self.width} is not one of {self.heads}")
        require(len(self.gamma) == self.heads,
                f"gamma must be one number or {self.heads}, one a head, not {len(self.gamma)}")
        require(self.position != "rope" or self.features % 2 == 0,
                f"rope needs an even number of features a head, not {self.features}")
        require(abs(self.mlp_ratio * self.width - self.hidden) < 1e-6 and self.hidden % 2 == 0,
                "mlp-ratio times width must be an even integer, not "
                f"{self.mlp_ratio * self.width:.9g}")
        require(not self.identity_skip or self.attn == "espa" and self.alpha == 0,
                "identity-skip needs attn espa and alpha 0")
        exactly = self.transform != "none"
        for alpha, beta in (self.alpha, self.beta), (self.mlp_alpha, self.mlp_beta):
            total, near = alpha**2 + beta**2, 0.01 if exactly else 0.05
            require(self.norm != "none" and not exactly or abs(total - 1) < near,
                    f"without norms or with a transform alpha^2 + beta^2 must be 1, to {near}, "
                    f"not {total:.4g}")
        self.check_what_goes_together()

    def check_what_goes_together(self):
        """ValueError where a flag contradicts another."""
        family, both_sides = FAMILIES[self.attn], self.objective == "mlm"
        prescribed = family.row_sums is not None
        require(not prescribed or self.norm not in NOT_NORMS,
                f"attn {self.attn} needs norm none, layer or rms, not {self.norm}")
        require(not prescribed or not self.parallel, f"parallel does not go with attn {self.attn}")
        require(not self.parallel or self.alpha == self.mlp_alpha == 0,
                "parallel needs alpha 0 and mlp-alpha 0")
        require(family.kernel_maps is None or self.query_init == "zero",
                f"attn {self.attn} needs query-init zero, not {self.query_init}")
        require(not self.qk_norm or self.query_init != "zero",
                "qk-norm needs a query-init that is not zero")
        require(self.init not in INIT_SCALES or self.norm in ("layer", "rms"),
                f"init {self.init} needs norm layer or rms, not {self.norm}")
        require(not self.extra_heads or not self.identity_values and not family.parameters,
                "extra-heads go neither with identity-values nor with attn vskip or shaped")
        require(not self.identity_skip or not (self.identity_values or self.trained_weights),
                "identity-skip goes neither with identity-values nor with trained-weights")
        require(not both_sides or not self.identity_skip and not family.centred,
                "objective mlm goes neither with identity-skip nor with attn shaped")
        require(not both_sides or not prescribed or self.length <= 1024,
                f"objective mlm with attn {self.attn} needs a length of at most 1024")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked):
    """How a network is trained: steps, optimizer, rates."""
    steps: int = flag("training", "training steps (default: 400)", low=1, high=2**31 - 1)
    batch: int = flag("training", "sequences a step (default: 16)", low=1)
    accumulate: int = flag("training", "parts that a step's batch is computed in, one after the "
                           "other: less memory (default: 1)", low=1)
    seed: int = flag("training", "of all that is drawn (default: 0)", low=0, high=2**31 - 1)
    optimizer: str = flag("training", "optimizer", "muon", "adamw")
    learning_rate: float = flag("training", "peak learning rate (default: the preset's, for width, "
                                "depth and steps)", above=0)
    warmup: int = flag("training", "steps of linear warm-up (default: a twentieth)", low=0)
    save_every: int = flag("training", "steps between checkpoints (default: a fifth)", low=1)
    lr_mult_embed: float = flag("additions", "times the learning rate: embeddings, positions, "
                                "final gain and head", above=0)
    lr_mult_qk: float = flag("additions", "times the learning rate: queries and keys", above=0)
    lr_mult_vo: float = flag("additions", "times the learning rate: values and outputs", above=0)
    weight_decay: float = flag("additions", "decoupled, times the group's learning rate", low=0)
    decay_groups: str = flag("additions", "whose matrices decay, of qk,vo,mlp")
    lr_mult_path: float = flag("additions", "times the learning rate: what changes the products "
                               "W^V W^O and W_1 W_2, decay included; changes that leave them "
                               "alone keep theirs (default: the preset's, or 1)", low=0)
    orthogonal_pull: float = flag("additions", "share by which each step, whatever its learning "
                                  "rate, brings these products back to rotations of their size "
                                  "at the start", low=0, high=1)
    pull_groups: str = flag("additions", "which products both are about, of vo,mlp (default: vo "
                             "without identity-skip, mlp with mlp-init looks_linear)")
    unit_embeddings: bool = flag("additions", "each token's vector is brought back to mean square "
                                 "1 after each step, as theory takes it (default: the preset's)",
                                 default=False)      # of earlier checkpoints

    @property
    def at_once(self):
        """Sequences that are computed together."""
        return self.batch // self.accumulate

    def __post_init__(self):
        super().__post_init__()
        require(self.warmup < self.steps,
                f"warmup must be below steps, {self.steps}, not {self.warmup}")
        require(self.batch % self.accumulate == 0,
                f"accumulate must divide batch, {self.batch}, not be {self.accumulate}")
        allowed = dict(decay_groups=("qk", "vo", "mlp"), pull_groups=("vo", "mlp"))
        for name, groups in allowed.items():
            for group in filter(None, getattr(self, name).split(",")):
                require_one_of(groups, group, as_flag(name))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Text to train on and to validate on. None: what is included, what was set aside."""
    data: str | None = flag("data", "UTF-8 text: files, folders or globs, comma-separated, or a "
                            "folder that data/prepare.py made (default: Shakespeare)")
    val_data: str | None = flag("data", "validation text, as data (default: what was set aside, "
                                "or the last tenth)")
    encoding: str | None = flag("data", "a tiktoken encoding's name, or a rank file (default: the "
                                "prepared folder's, or 1,024 byte pairs)")


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How text is drawn from a trained model."""
    prompt: str = flag("data", "--sample: its beginning (default: a line break)", default="\n")
    tokens: int = flag("data", "--sample: how many to draw (default: 120)", default=120, low=1)
    temperature: float = flag("data", "--sample: divides the logits; 0: always the likeliest "
                              "(default: 0.8)", default=0.8, low=0)
    top_k: int | None = flag("data", "--sample: draw among the K likeliest only (default: all)",
                             default=None, low=1)
    seed: int = flag("data", "", default=0, low=0, high=2**31 - 1)


FIELDS = (*fields(ModelConfig), *fields(TrainingConfig), *fields(DataConfig))

@dataclass(frozen=True)
class Settings:
    """All of a run: the preset, what was chosen beside it, and what follows from both."""
    preset: str
    flags: dict
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig

    @property
    def values(self):
        """{name: value} of the preset and of all fields."""
        return vars(self.model) | vars(self.training) | vars(self.data) | {"preset": self.preset}

    def replace(self, **flags):
        """Settings with other flags. Every default is made anew, none is kept from before.

        What follows from the data and the machine, not from flags, is as it was.
        """
        backend = "cpu" if self.model.dtype == "float32" else "gpu"
        return resolve(collision_rate=self.model.token_collision_rate, backend=backend,
                       **{"preset": self.preset, **self.flags, **flags})


def resolve(preset: str = "isometric", collision_rate: float = 0.0, backend: str = "cpu",
            **flags) -> Settings:
    """The Settings of a preset with flags beside it: each flag, or the preset's value, or this.

    Args:
      preset: a name of PRESETS.
      collision_rate: the chance that two of the training tokens are equal; run.py gives that of
        its text, and 0 is that of no text.
      backend: where it will run, as fast.hardware names it.
      flags: any field of the three dataclasses. gamma may be one number.
    Raises ValueError, in one line, for anything that is not allowed.
    """
    carried = look_up(PRESETS, preset, "preset")
    known = {each.name: each for each in FIELDS}
    for name, value in flags.items():
        check(look_up(known, name, "setting"), value)
    if "alpha" in flags and "beta" not in flags:
        require(flags["alpha"] < 1, f"alpha without beta must be below 1, not {flags['alpha']:g}")
        carried = carried | dict(beta=sqrt(1 - flags["alpha"]**2))
    switches = {each.name: False for each in FIELDS if kind(each) is bool}
    values = switches | DEFAULTS | carried | flags

    # What follows from all that, where it is not chosen.
    rates = scaled(look_up(carried["rates"], values["optimizer"], "optimizer"), values["width"],
                   values["depth"], values["steps"], carried.get("rate_power", 0.0))
    values = dict(
        gamma=gammas_by_length(values["heads"], values["length"], values["row_scale"]),
        token_collision_rate=collision_rate,
        dtype="bfloat16" if backend in ("gpu", "tpu") else "float32",
        **rates._asdict(),
        query_init=look_up(FAMILIES, values["attn"], "attn").query_init,
        mlp_alpha=values["alpha"], mlp_beta=values["beta"],
        extra_heads=max(values["heads"] // 2, 1) if "half_extra" in carried else 0,
        pull_groups=",".join(
            ["vo"] * (not values["identity_skip"] and not values["identity_values"])
            + ["mlp"] * (values["mlp_init"] == "looks_linear")),
        warmup=values["steps"] // 20, save_every=max(values["steps"] // 5, 1)) | values
    # As many parameters with extra heads, 4 d k each, as without: 2 k hidden features less.
    values.setdefault("mlp_ratio", max(4 - 2 * values["extra_heads"] / values["heads"], 2.0))
    values.setdefault("rho_first", min(values["token_collision_rate"], 0.999))
    gamma = values["gamma"] if isinstance(values["gamma"], (tuple, list)) else (values["gamma"],)
    values["gamma"] = tuple(gamma) * (values["heads"] if len(gamma) == 1 else 1)
    require(not values["identity_values"] or "vo" not in values["pull_groups"].split(","),
            "pull-groups vo does not go with identity-values: there is no W^V and no W^O")
    parts = [part(**{each.name: values[each.name] for each in fields(part)})
             for part in (ModelConfig, TrainingConfig, DataConfig)]
    return Settings(preset, flags, *parts)


# What rates are tuned for, beside sizes and gamma.
TUNED_FOR = ("attn", "objective", "act", "transform", "alpha", "beta", "norm", "init", "mlp_init",
             "position", "query_init", "identity_values", "qk_norm", "mlp_alpha", "mlp_beta",
             "trained_weights", "parallel", "unit_embeddings", "extra_heads", "mlp_ratio",
             "identity_skip")


def untuned(preset, flags):
    """A note where a preset's rates were tuned for something else than these flags; else None."""
    if "learning_rate" in flags:
        return None
    if preset in SUCCESSORS:
        return f"note: the learning rates of preset {preset} are those of preln"
    optimizer = flags.get("optimizer", PRESETS[preset]["optimizer"])
    if not PRESETS[preset]["rates"][optimizer].tuned:
        return f"note: preset {preset} was not tuned with {optimizer}, and may diverge in long runs"
    sizes = {name: flags[name] for name in ("heads", "width") if name in flags}
    usual = resolve(preset, **sizes).values
    others = [f"{as_flag(name)} {flags[name]}" for name in TUNED_FOR
              if name in flags and flags[name] != usual[name]]
    if others:
        return (f"note: the learning rates of preset {preset} were not tuned with "
                f"{', '.join(others)}; --learning-rate and the --lr-mult-... flags set others")
