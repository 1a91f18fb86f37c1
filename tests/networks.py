"""Small networks, shared by the tests of what a network is at initialisation."""
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from hypothesis import strategies as st

from minitf import resolve
from minitf.cli import inspection
from minitf.network import decode, model
from minitf.network.init import init as make_parameters
from minitf.network.operations import REFERENCE
from minitf.theory import kernels as theory, spa

EPS32 = np.finfo(np.float32).eps
T, D, V = 16, 32, 64
SMALL = resolve("paper", depth=4, width=D, heads=4, length=T, eta=0.2, gamma=0.8)
SILENT = ("espa", "uspa", "vskip", "identity_skip")        # W^Q = 0
PRESCRIBED = ("espa", "uspa", "identity_skip")

seeds = st.integers(0, 2**31 - 1)
init = jax.jit(make_parameters, static_argnums=(1, 2))
forward = jax.jit(model.forward, static_argnums=3)
states = jax.jit(inspection.states, static_argnums=3)


@partial(jax.jit, static_argnums=(3, 4))
def attention_stack(weights, constants, x, config, part=model.attention_sublayer):
    """Attention alone, layer after layer: x (T, d) -> (L, T, d)."""
    step = lambda x, layer: (part(x, *layer, config, REFERENCE),) * 2
    return jax.lax.scan(step, x, model.layers({"blocks": weights}, constants, config))[1]


block_stack = partial(attention_stack, part=model.block)


def small(attn, **flags):
    """The small ModelConfig of a family; "identity_skip" is that of espa."""
    family = dict(attn="espa", identity_skip=True) if attn == "identity_skip" else dict(attn=attn)
    return SMALL.replace(**family, **flags).model


def compiled_as(config, **others):
    """A ModelConfig of the same program: what the constants are made of is data to it."""
    return replace(config, gamma=(0.8,) * others.get("heads", config.heads), rho=0.8,
                   rho_first=0.0, row_scale="unit", token_collision_rate=0.0, **others)


def network(attn, seed, **flags):
    """(config, parameters, constants). The number of heads is none of the parameters' business."""
    config = small(attn, **flags)
    params = init(jax.random.key(seed), compiled_as(config, heads=4), V)
    return config, params, theory.attention_constants(config)


def stirred(params, seed, size=0.3):
    """Every parameter moved at random, so that Q and K, vskip's scalars and the head matter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, moved)


def decoded(params, constants, tokens, config, at_once=5, spare=0):
    """Logits (T, V) by decoding: the first ones together, padded with `spare`, then one by one."""
    cache, layers = decode.empty_cache(config), decode.layers(params, constants, config)
    padded = np.where(np.arange(len(tokens)) < at_once, tokens, spare).astype(np.int32)
    logits, cache = decode.decode(params, layers, cache, padded, 0, config)
    got = [*logits[:at_once]]
    for place in range(at_once, len(tokens)):
        one = tokens[place:place + 1]
        logits, cache = decode.decode(params, layers, cache, one, place, config)
        got.append(logits[0])
    return np.array(got)


def random_tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape or T).astype(np.int32)


def orthonormal_tokens(seed):
    """x (T, D) with x x^T / D = I."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    return np.float32(np.sqrt(D) * q[:T])


def prescribed_kernels(config):
    """Sigma_1, ..., Sigma_L of espa with one gamma, or of uspa."""
    if config.attn == "espa":
        schedule, kernel = spa.exponential_schedule(config.gamma[0], config.depth), \
            spa.exponential_kernel
    else:
        schedule, kernel = spa.uniform_schedule(config.rho, config.depth), spa.uniform_kernel
    return [kernel(parameter, config.length) for parameter in schedule[1:]]
