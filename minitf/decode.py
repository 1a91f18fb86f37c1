"""Decoding: one token after the other, with a cache of the keys and values of those before.

Shapes as in model.py; S new tokens stand at positions start to start + S - 1, S <= T = config.length.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from . import model
from .errors import require


def empty_cache(config):
    """{"k", "v"}: the keys and values of every block and position, (L, T, H, k) each, none of them made yet."""
    shape = config.depth, config.length, config.heads, config.width // config.heads
    return {name: jnp.zeros(shape, model.compute_dtype(config)) for name in ("k", "v")}


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode(params, constants, cache, tokens, start, config):
    """tokens (S,) -> (logits (S, V), cache): what the full forward pass gives at their positions, to rounding.

    The cache must hold all positions before `start`. It gains the new ones; what it holds beyond them is not looked at,
    so tokens may be padded. The old cache is given up.
    """
    x = model.embed(params, tokens, config, start)                                          # (S, d)
    rows = {name: table if name == "decay" else jax.lax.dynamic_slice_in_dim(table, start, len(tokens), 2)
            for name, table in constants.items()}                                           # the new positions'
    layers = *model.layers(params, rows, config), jnp.arange(config.depth)
    (x, cache), _ = jax.lax.scan(lambda state, layer: (block(*state, *layer, start, config), None), (x, cache), layers)
    return model.unembed(params, model.norm(x, params, "norm", config)).astype(jnp.float32), cache


def block(x, cache, weights, constants, layer, start, config):
    """One block for new tokens: (x (S, d), cache) -> the same, after the block.

    constants: bias (H, S, T) or decay (H, 3), rescale (H, S) and own (1, S). The cache is that of all layers, changed in place.
    """
    y = model.norm(x, weights, "norm1", config)
    q, k, v = model.unstack(model.project(y, weights, config))                              # (S, H, k) each
    q, k = (model.turn(each, config, start) for each in (q, k))
    cache = {name: jax.lax.dynamic_update_slice(cache[name], new[None], (layer, start, 0, 0))
             for name, new in (("k", k), ("v", v))}
    attended = model.softmax_attention(q, cache["k"][layer], cache["v"][layer], **model.of_softmax(constants), start=start)
    x = model.skip(x, model.merge(y, v, attended, weights, constants, config), config)
    return model.second_half(x, weights, config), cache


@partial(jax.jit, static_argnames="top_k")
def draw(key, step, logits, temperature, top_k=None):
    """A token from logits (V,), among the top_k most likely; the most likely one at temperature 0."""
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(key, step), logits / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def sample(params, constants, tokens, count, config, seed=0, temperature=1.0, top_k=None, known=True):
    """Yields `count` tokens drawn after the given ones (a list, not empty), among those known, (V,) of bool.

    No position beyond the training length is ever used: neither learned positions nor what attention has learned is
    known there. A context that fills it is cut to its last half and encoded anew from position 0, which holds for
    every attention and position encoding, and costs one forward pass in T / 2 tokens.
    """
    require(len(tokens), "sampling needs a token to begin with: the prompt must not be empty")
    key, context, cache = jax.random.key(seed), list(tokens), None
    for step in range(count):
        if cache is None or len(context) == config.length:
            context = context if len(context) < config.length else context[-(config.length // 2):]
            padded = np.zeros(config.length, np.int32)
            padded[:len(context)] = context
            logits, cache = decode(params, constants, empty_cache(config), padded, 0, config)
            logits = logits[len(context) - 1]
        else:
            logits, cache = decode(params, constants, cache, np.array(context[-1:], np.int32), len(context) - 1, config)
            logits = logits[0]
        context.append(int(draw(key, step, jnp.where(known, logits, -jnp.inf), temperature, top_k)))
        yield context[-1]
