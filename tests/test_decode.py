"""Decoding with a cache equals the forward pass; samples are what it makes of them."""
import os
from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minitf import Config, constants, decode, forward, init

VOCABULARY = 11
forward = jax.jit(forward, static_argnames="config")


@lru_cache
def make(**flags):
    """(params, constants, config) of a tiny network, moved away from its initialisation in every parameter."""
    config = Config(**{**dict(depth=2, width=8, heads=2, length=6, act="tanh", transform="none", init="orthogonal", norm="rms", alpha=0.6,
                              repeat_rate=0.1, dtype="float32"), **flags})
    params = jax.jit(init, static_argnums=(1, 2))(jax.random.key(config.seed), config, VOCABULARY)
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 0.3 * np.random.default_rng(seed).standard_normal(leaf.shape, np.float32)
             for seed, leaf in enumerate(leaves)]
    return structure.unflatten(moved), constants(config), config


# Every attention and position encoding once; MINITF_THOROUGH=1 tries all combinations of the two.
KINDS = [("espa", "rope"), ("uspa", "sinusoidal"), ("vskip", "learned"), ("softmax", "none")]
if os.environ.get("MINITF_THOROUGH"):
    KINDS = list(product(*map(dict.fromkeys, zip(*KINDS))))


@pytest.mark.parametrize("attn, position", KINDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_decoding_equals_the_forward_pass(attn, position, data):
    params, fixed, config = make(attn=attn, far=int(attn == "espa"), own=attn == "espa", position=position, norm="none" if position == "rope" else "layer", alpha=0.6)
    tokens = np.array(data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=6, max_size=6)), np.int32)
    given_at_once = data.draw(st.integers(1, 5))
    expected = forward(params, fixed, tokens, config)
    padded = np.where(np.arange(6) < given_at_once, tokens, 3).astype(np.int32)
    logits, cache = decode.decode(params, fixed, decode.empty_cache(config), padded, 0, config)
    got = list(logits[:given_at_once])
    for place in range(given_at_once, 6):
        logits, cache = decode.decode(params, fixed, cache, tokens[place:place + 1], place, config)
        got.append(logits[0])
    np.testing.assert_allclose(jnp.stack(got), expected, atol=2e-5, rtol=2e-5)


def test_sample_is_that_of_forward_passes_also_beyond_the_training_length():
    params, fixed, config = make(attn="espa", seed=1)
    compiled = decode.decode._cache_size()
    context, expected = [1, 2], []
    for _ in range(15):
        if len(context) == config.length:
            context = context[-(config.length // 2):]
        padded = np.zeros(config.length, np.int32)
        padded[:len(context)] = context
        context.append(int(forward(params, fixed, padded, config)[len(context) - 1].argmax()))
        expected.append(context[-1])
    assert list(decode.sample(params, fixed, [1, 2], 15, config, temperature=0.0)) == expected
    assert decode.decode._cache_size() == compiled + 2                      # for the prompt, and for all tokens after it


def test_draw():
    logits = jnp.array([0.0, 3.0, 2.0, -1.0])
    key = jax.random.key(0)
    assert all(int(decode.draw(key, step, logits, 0.0)) == 1 for step in range(3))
    drawn = jax.vmap(lambda step: decode.draw(key, step, logits, 1.0, 2))(jnp.arange(200))
    assert set(drawn.tolist()) == {1, 2}
    share = float((drawn == 1).mean())
    assert abs(share - np.e / (1 + np.e)) < 0.1


def test_an_empty_prompt_is_refused():
    params, fixed, config = make()
    with pytest.raises(ValueError, match="prompt"):
        next(decode.sample(params, fixed, [], 1, config))
