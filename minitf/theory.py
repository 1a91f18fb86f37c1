"""What theory says of a network at initialisation: its activation, its attention's constants, its kernels. float64 NumPy.

Section 4's recursion serves twice: to choose D, and as the prediction that measurements are held against.
"""
from functools import partial
from math import ceil

import jax.numpy as jnp
import numpy as np

from . import activations, spa


def activation(config):
    """The configuration's Activation, solved for its depth and skips; raises OutOfReach where there is none."""
    if config.norm != "none" and config.transform == "none":
        return activations.Activation(config.act, activations.SLOPES.get(config.act, 1.0))  # as it is
    return activations.solve(config.act, config.transform, config.depth, config.alpha, config.beta,
                             config.eta, config.zeta, config.tau)


def correlation_map(config):
    """C of the MLPs at initialisation: the activation's, or the identity where they look linear."""
    return (lambda c: c) if config.init == "looks_linear" else activation(config).correlation_map


def sinusoids(length, width):
    """Sinusoidal positions (Vaswani et al. 2017), (T, d) in float32, scaled to mean square 1."""
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(np.float32)


def kinds(config):
    """The kinds of heads, in their order: [(how many, [(kernel parameter before a block, after it)] of all blocks)], gamma of
    espa, near before far, rho of uspa; [] for softmax and vskip."""
    espa = [(config.heads - config.far, config.gamma), (config.far, config.gamma_far)]
    schedules = {"espa": [(count, spa.exponential_schedule(gamma, config.depth)) for count, gamma in espa if count],
                 "uspa": [(config.heads, spa.uniform_schedule(config.rho, config.depth))]}.get(config.attn, [])
    return [(count, list(zip(values, values[1:]))) for count, values in schedules]


def attentions(config, make):
    """What propagate is given: for each block [(share of the heads, make(kernel parameter before it, after it))]."""
    heads = kinds(config)
    return [[(count / config.heads, make(*pairs[layer])) for count, pairs in heads] for layer in range(config.depth)]


def log_attentions(config, length):
    """The same with log A at initialisation, (T, T); [] for softmax, whose A depends on the input."""
    if config.attn == "vskip":
        with np.errstate(divide="ignore"):
            return [[(1.0, np.log(np.eye(length)))]] * config.depth
    closed_form = {"espa": spa.exponential_log_attention, "uspa": spa.uniform_log_attention}.get(config.attn)
    return attentions(config, partial(closed_form, length=length)) if closed_form else []


def made_attentions(config, constants):
    """The same as the network makes it, D softmax(B) with the D in its constants, over all of the length. With --own the row
    sums of c I and of the rest make up D."""
    total = np.asarray(constants["rescale"], float) + np.asarray(constants.get("own", 0.0), float)
    rescale, first = np.log(total), np.cumsum([0] + [count for count, _ in kinds(config)])
    return [[(share, spa.rescale_and_bias(log_a)[1] + rescale[layer, head][:, None]) for head, (share, log_a) in zip(first, heads)]
            for layer, heads in enumerate(log_attentions(config, config.length))]


def initial_kernel(config, length, equal=None):
    """E Sigma_0, (T, T): tokens repeat with config.repeat_rate, or as `equal`, (T, T), says; additive positions are half."""
    tokens = spa.repeat_kernel(config.repeat_rate or 0.0, length) if equal is None else equal.astype(float)
    if config.position == "sinusoidal":
        positions = sinusoids(length, config.width).astype(float)
        return (tokens + positions @ positions.T / config.width) / 2
    return (tokens + np.eye(length)) / 2 if config.position == "learned" else tokens


def predict(config, kernel):
    """Section 4's recursion for this network from Sigma_0 = kernel: [(n, Sigma)] after each block; [] for softmax."""
    blocks = attentions(config, lambda *pair: partial(spa.exponential_attend, *pair)) if config.attn == "espa" else \
        log_attentions(config, len(kernel))
    return list(spa.propagate(blocks, kernel, correlation_map(config),
                              config.alpha, config.beta, config.norm != "none", config.rescale == "expected"))


def constants(config):
    """What `forward` scans beside the blocks, in float32: {"rescale": (L, H, T)} and for espa {"decay": (L, H, 3)}, for uspa
    {"bias": (L, H, T, T)}, with 1 for H where heads are alike; {} for softmax, vskip. With --own also {"own": (L, 1, T)}: c, of
    which each head's A has so much less.
    """
    if config.attn not in ("uspa", "espa"):
        return {}
    length, exact = config.length, min(config.length, spa.EXACT_LENGTH)
    if config.attn == "espa":
        rows = of_heads(config, lambda *pair: spa.exponential_attend(*pair, np.ones((length, 1)))[:, 0])
        made = {"decay": of_heads(config, spa.exponential_decay)}
        # What a position sees is level, to exp(-16) = 1e-7; where spa.EXACT_LENGTH comes first, to a percent of D or so over the depth.
        if config.position != "sinusoidal":
            exact = ceil(min(exact, 16 / float(min(pairs[-1][1] for _, pairs in kinds(config)))))
    else:
        rows, bias = zip(*(spa.rescale_and_bias(log_a) for (_, log_a), in log_attentions(config, length)))
        rows, made = np.array(rows)[:, None], {"bias": np.array(bias)[:, None]}
    n = np.array([n for n, _ in predict(config, initial_kernel(config, exact))])
    n = np.pad(n, ((0, 0), (0, length - exact)), mode="edge")[:, None]                      # (L, 1, T)
    if config.own:                                        # the least that any head's token keeps; the others' rest stays in their softmax
        least, diagonal = kept(config)
        made["decay"][..., 2] += np.log1p(-least / diagonal)
        rows, made["own"] = rows - least[..., None], least[..., None] / n
    made["rescale"] = rows / n
    return {name: jnp.asarray(table, jnp.float32) for name, table in made.items()}


def balance(config):
    """(1 - c^2)^-balance, (L, 1, 1): what multiplies qk and vo in each block (--own).

    Of its mean square a token keeps c^2 in A = c I + P; the rest is all of it in the first block and least in the last (of 36, 4 %
    at 64 tokens). So heads of all blocks may change it by more equal parts.
    """
    c = kept(config)[0] if config.own else np.zeros((config.depth, 1))
    return np.float32((1 - c**2) ** -config.balance)[..., None]


def kept(config):
    """c, (L, 1), of A = c I + P (--own), before D: the least of a block's heads; and the diagonals of their A, (L, H)."""
    c, diagonal = np.moveaxis(of_heads(config, spa.exponential_own), -1, 0)                # (L, H)
    return c.min(1, keepdims=True), diagonal


def of_heads(config, make):
    """(L, H, ...): what `make` gives for the kernel parameters before and after a block, of each head; once if they are alike."""
    heads = kinds(config)
    heads = heads if len(heads) > 1 else [(1, heads[0][1])]
    return np.array([[made for count, pairs in heads for made in [make(*pairs[layer])] * count] for layer in range(config.depth)])
