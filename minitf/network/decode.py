"""Decoding: one token after the other, with a cache of the keys and values of those before.

Shapes as in model.py. S new tokens stand at positions start to start + S - 1, S <= T.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Sampling
from ..errors import require
from ..theory.families import family
from . import model, operations
from .operations import REFERENCE


def empty_cache(config):
    """{"k", "v"}: keys and values of every block and position, (L, T, H, k), not made yet."""
    shape = config.depth, config.length, config.all_heads, config.features
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


layers = jax.jit(model.layers, static_argnames="config")


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode(params, layers, cache, tokens, start, config):
    """tokens (S,) -> (logits (S, V), cache): what `forward` gives at their positions, to rounding.

    layers: those of `layers(params, constants, config)`, made once for all tokens. The cache must
    hold all positions before `start`. It gains the new ones; what it holds beyond them is not
    looked at, so tokens may be padded. The old cache is given up.
    """
    weights, constants = layers
    x = model.embed(params, tokens, config, start)                                     # (S, d)
    constants = of_positions(constants, start, len(tokens))
    step = lambda carry, layer: (block(*carry, *layer, start, config), None)
    (x, cache), _ = jax.lax.scan(step, (x, cache), (weights, constants, jnp.arange(config.depth)))
    x = REFERENCE.normalise(x, params.get("norm"), config)
    return model.unembed(params, x).astype(jnp.float32), cache


def of_positions(constants, start, count):
    """Constants whose last axis is positions, for `count` positions; those of B stay whole."""
    return {name: jax.lax.dynamic_slice_in_dim(table, start, count, table.ndim - 1)
            if name.endswith("_scale") else table for name, table in constants.items()}


def block(x, cache, weights, constants, layer, start, config):
    """One block for new tokens: (x (S, d), cache) -> the same, after the block.

    The cache is that of all layers, changed in place.
    """
    y = REFERENCE.normalise(x, weights.get("norm1"), config)
    q, k, v = operations.split_qkv(model.project_qkv(y, weights, config, REFERENCE))  # (S, H, k)
    q, k = (operations.apply_rope(each, config, start) for each in (q, k))
    cache = {name: jax.lax.dynamic_update_slice(cache[name], new[None], (layer, start, 0, 0))
             for name, new in (("k", k), ("v", v))}
    keys, values = cache["k"][layer], cache["v"][layer]                                # (T, H, k)
    attended = operations.softmax_attention(q, keys, values, constants, config, start)
    mean = None
    if family(config).centred:
        mean = operations.slice_positions(operations.causal_mean(values), start, len(x))
    branch = model.output_projection(v, attended, mean, weights, config, REFERENCE)
    after = model.add_residual(x, branch, ("alpha", "beta"), weights, config,
                               constants.get("skip_scale"))
    return model.after_attention(x, after, weights, config, REFERENCE), cache


@partial(jax.jit, static_argnames="top_k")
def draw(key, step, logits, temperature, top_k=None, known=True):
    """A known token by logits (V,), among the top_k likeliest; the likeliest at temperature 0."""
    logits = jnp.where(known, logits, -jnp.inf)
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.random.categorical(jax.random.fold_in(key, step), scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def sample(params, constants, tokens, count, config, seed=0, temperature=1.0, top_k=None,
           known=True):
    """An iterator of `count` tokens drawn after the given ones (a list, not empty).

    temperature: at least 0. top_k: None: all. known: which tokens may be drawn, (V,) of bool.
    ValueError for what is not allowed. No position beyond the training length is used: neither
    learned positions nor what attention has learned is known there. A context that fills it is cut
    to its last half and encoded anew, one forward pass in T / 2 tokens.
    """
    tokens = model.check_tokens(tokens, len(params["embed"]))
    require(tokens.ndim == 1, "sampling goes on with one sequence, not with several")
    require(config.objective == "clm", "a network with objective mlm fills gaps: it draws no text")
    Sampling(tokens=count, temperature=temperature, top_k=top_k, seed=seed)    # ValueError

    def drawn(context, cache, start=0):
        key, made = jax.random.key(seed), layers(params, constants, config)
        for step in range(count):
            if len(context) >= config.length:
                context, start = context[-(config.length // 2):], 0
            new = context[start:]                     # what the cache lacks
            padded = np.zeros(min(2 ** (len(new) - 1).bit_length(), config.length), np.int32)
            padded[:len(new)] = new                   # few lengths, so few programs
            logits, cache = decode(params, made, cache, padded, start, config)
            start = len(context)
            context.append(int(draw(key, step, logits[len(new) - 1], temperature, top_k, known)))
            yield context[-1]

    return drawn(tokens.tolist(), empty_cache(config))
