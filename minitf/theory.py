"""What theory says of a network at initialisation: its activation, its attention's constants, its kernels. float64 NumPy.

Section 4's recursion serves twice: to choose D, and as the prediction that measurements are held against.
"""
from functools import partial
from math import ceil

import jax.numpy as jnp
import numpy as np

from . import activations, spa

EXACT_LENGTH = 1024                       # positions over which the recursion, O(T^2) or more a layer, is run


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


def log_attentions(config, length):
    """The blocks' log A at initialisation, one (T, T) after the other; empty for softmax, whose A depends on the input."""
    if config.attn == "espa":
        return [spa.exponential_log_attention(*pair, length) for pair in schedule(config)]
    if config.attn == "uspa":
        return [spa.uniform_log_attention(*pair, length) for pair in schedule(config)]
    if config.attn == "vskip":
        with np.errstate(divide="ignore"):
            return [np.log(np.eye(length))] * config.depth
    return []


def schedule(config):
    """The kernel parameters before and after each block: [(gamma_in, gamma_out)] of espa, [(rho_in, rho_out)] of uspa."""
    values = spa.exponential_schedule(config.gamma, config.depth) if config.attn == "espa" else \
        spa.uniform_schedule(config.rho, config.depth)
    return list(zip(values, values[1:]))


def initial_kernel(config, length, equal=None):
    """E Sigma_0, (T, T): tokens repeat with config.repeat_rate, or as `equal`, (T, T), says; additive positions are half."""
    tokens = spa.repeat_kernel(config.repeat_rate or 0.0, length) if equal is None else equal.astype(float)
    if config.position == "sinusoidal":
        positions = sinusoids(length, config.width).astype(float)
        return (tokens + positions @ positions.T / config.width) / 2
    return (tokens + np.eye(length)) / 2 if config.position == "learned" else tokens


def predict(config, kernel):
    """Section 4's recursion for this network from Sigma_0 = kernel: [(n, Sigma)] after each block; [] for softmax."""
    attentions = [partial(spa.exponential_attend, *pair) for pair in schedule(config)] if config.attn == "espa" else \
        log_attentions(config, len(kernel))
    return list(spa.propagate(attentions, kernel, correlation_map(config),
                              config.alpha, config.beta, config.norm != "none", config.rescale == "expected"))


def constants(config):
    """What `forward` scans beside the blocks, in float32: {"rescale": (L, T)} and for uspa {"bias": (L, T, T)}, for espa
    {"decay": (L, 3)}; {} for softmax, vskip.
    """
    if config.attn not in ("uspa", "espa"):
        return {}
    length, exact = config.length, min(config.length, EXACT_LENGTH)
    if config.attn == "espa":
        rows = [spa.exponential_attend(*pair, np.ones((length, 1)))[:, 0] for pair in schedule(config)]
        made = {"decay": np.array([spa.exponential_decay(*pair) for pair in schedule(config)])}
        # What a position sees is level, to exp(-16) = 1e-7; where EXACT_LENGTH comes first, to a percent of D or so over the depth.
        if config.position != "sinusoidal":
            exact = min(exact, ceil(16 / config.gamma))
    else:
        rows, bias = zip(*(spa.rescale_and_bias(log_a) for log_a in log_attentions(config, length)))
        made = {"bias": np.array(bias)}
    n = np.array([n for n, _ in predict(config, initial_kernel(config, exact))])
    made["rescale"] = np.array(rows) / np.pad(n, ((0, 0), (0, length - exact)), mode="edge")
    return {name: jnp.asarray(table, jnp.float32) for name, table in made.items()}
