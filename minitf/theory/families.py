"""Attention families, one entry each in FAMILIES.

To add one, add an entry: `prescribed` makes it from a kernel and a schedule alone. Formulas are
for NumPy and JAX alike. `config` is a ModelConfig. L = depth, H = heads, T = length.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Callable

import numpy as np

from . import spa


@dataclass(frozen=True)
class Family:
    """softmax(Q K^T / sqrt(d_k) + B) times D, and what is made of it.

    bias: config -> {name: (L, H, ...)}, the constants that B is made of; 1 for H: for all heads.
    bias_rows: (those of one layer, queries (S, 1), keys (T,)) -> B (H, S, T), both positions.
    row_sums: config -> D of the paper, (L, H, T); None: there is no D.
    kernel_maps: config -> for each layer, Sigma -> the mean over heads of A Sigma A^T, at the
        start; None: A depends on the input.
    by_head: (config, f) -> f(parameter before, after) of each layer and head, (L, H, ...).
    parameters: {name: value at the start}, trained, one for each layer and head.
    mix: (a layer's parameters, values, attended, their mean), (..., H, k) -> what the heads give;
        the mean is that of the values up to each position, made where `centred`.
    query_init: of network/init.py's QUERY_INITS, where none is chosen.
    both_sides: the Family of tokens that see what is before and after them; None: the same one.
    """
    bias: Callable = lambda config: {}
    bias_rows: Callable = lambda constants, queries, keys: 0.0
    row_sums: Callable | None = None
    kernel_maps: Callable | None = None
    by_head: Callable | None = None
    parameters: dict = field(default_factory=dict)
    mix: Callable = lambda weights, values, attended, mean: attended
    centred: bool = False
    query_init: str = "zero"
    both_sides: "Family | None" = None


def prescribed(schedules, kernel, log_attention=None, **fast):
    """A family whose kernels are prescribed. Kernel and schedules suffice: A = L_out L_in^-1.

    From both sides it is A = Sigma_out^(1/2) Sigma_in^(-1/2).
    schedules: config -> the kernel's parameter by depth, (L + 1,), of each head, or one for all.
    kernel: (parameter, length) -> Sigma (T, T). What makes the same, but fast: log_attention
    (before, after, length) -> log A (T, T); matvec (before, after, x (T, n)) -> A x; bias (before,
    after) -> one number for each of bias_names, and the bias_rows that they make.
    """
    def by_definition(before, after, length):
        attention = spa.cholesky_attention(kernel(before, length), kernel(after, length))
        with np.errstate(divide="ignore"):
            return np.log(spa.non_negative(np.tril(attention)))

    @lru_cache(maxsize=80)                             # of a network, each is asked for four times
    def from_both_sides(before, after, length):
        attention = spa.symmetric_attention(kernel(before, length), kernel(after, length))
        return np.log(np.maximum(attention, 1e-14))    # what rounding made 0 can be attended to

    def distinct(config):
        """The schedules, or one where all heads have the same: B is T x T numbers of each."""
        each = schedules(config)
        return each[:1] if all(np.array_equal(each[0], other) for other in each) else each

    return replace(made_of(schedules, log_attention or by_definition, **fast),
                   both_sides=made_of(distinct, from_both_sides))


def own_rows(constants, queries, keys):
    """The bias_rows of a B that is kept whole."""
    return constants["bias"][:, queries[:, 0]]


def made_of(schedules, log_attention, matvec=None, bias=None, bias_names=("bias",),
            bias_rows=own_rows):
    """The Family of these, as `prescribed` has them."""
    matvec = matvec or (lambda before, after, x: np.exp(log_attention(before, after, len(x))) @ x)

    def pairs(config):
        """For each layer, each head's parameter before and after it."""
        return list(zip(*(zip(values, values[1:]) for values in schedules(config))))

    def by_head(config, make):
        make = cache(make)                             # heads that are alike: computed once
        return np.array([[make(*pair) for pair in heads] for heads in pairs(config)])

    def kernel_maps(config):
        def kernel_map(heads, sigma):
            images = (count * matvec(*pair, matvec(*pair, sigma).T)
                      for pair, count in Counter(heads).items())
            return sum(images) / len(heads)
        return [partial(kernel_map, heads) for heads in pairs(config)]

    def row_sums(config):
        ones = np.ones((config.length, 1))
        return by_head(config, lambda *pair: matvec(*pair, ones)[:, 0])

    def stacked_bias(config):
        def dense(*pair):
            return [spa.row_scale_and_bias(log_attention(*pair, config.length))[1]]
        return dict(zip(bias_names, np.moveaxis(by_head(config, bias or dense), 2, 0)))

    return Family(stacked_bias, bias_rows, row_sums, kernel_maps, by_head)


def unchanged(config):
    """The kernel_maps of an attention that is the identity at the start."""
    return [lambda sigma: sigma] * config.depth


FAMILIES = {
    "softmax": Family(query_init="gaussian"),
    # Value-SkipInit: A <- alpha I + beta A(X).
    "vskip": Family(
        kernel_maps=unchanged,
        parameters={"vskip_alpha": 1.0, "vskip_beta": 0.0},
        mix=lambda weights, values, attended, mean: (weights["vskip_alpha"][:, None] * values
                                                     + weights["vskip_beta"][:, None] * attended)),
    # Shaped attention (He and Hofmann 2023, arXiv 2311.01906, after Noci et al. 2023): alpha I +
    # beta A(X) - gamma C, C the mean over all positions so far, which A(X) is while W^Q = 0.
    "shaped": Family(
        kernel_maps=unchanged,
        parameters={"shaped_alpha": 1.0, "shaped_beta": 1.0, "shaped_gamma": 1.0},
        mix=lambda weights, values, attended, mean: (
            weights["shaped_alpha"][:, None] * values + weights["shaped_beta"][:, None] * attended
            - weights["shaped_gamma"][:, None] * mean),
        centred=True),
    "uspa": prescribed(
        lambda config: [spa.uniform_schedule(config.rho, config.depth, config.rho_first)],
        spa.uniform_kernel, spa.uniform_log_attention),
    "espa": prescribed(
        lambda config: [spa.exponential_schedule(gamma, config.depth) for gamma in config.gamma],
        spa.exponential_kernel, spa.exponential_log_attention,
        matvec=spa.espa_matvec, bias=spa.espa_bias,
        bias_names=("slope", "first_key_bias", "self_bias"),
        bias_rows=lambda constants, queries, keys: (
            -constants["slope"][:, None, None] * (queries - keys)
            + constants["first_key_bias"][:, None, None] * (keys == 0)
            + constants["self_bias"][:, None, None] * (queries == keys))),
}


def family(config):
    """The Family of a ModelConfig."""
    entry = FAMILIES[config.attn]
    return entry.both_sides or entry if config.objective == "mlm" else entry


def identity_parts(config):
    """c, (L,), of E-SPA's A = c I + P: the least over a layer's heads; lambda, (L, H)."""
    c, diagonal = np.moveaxis(FAMILIES["espa"].by_head(config, spa.espa_identity_part), -1, 0)
    return c.min(1), diagonal
