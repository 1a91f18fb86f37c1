"""Decoding with a cache equals the forward pass; samples are what it makes of them."""
import os
from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from networks import EPS32, decoded

from minitf import attention_constants, forward, init, resolve
from minitf.cli import use
from minitf.config import Sampling
from minitf.network import decode
from minitf.training import checkpoint, encoding as encodings

VOCABULARY = 11
SMALL = dict(depth=2, width=8, heads=2, length=6, act="tanh", transform="none", init="orthogonal",
             mlp_init="orthogonal", head_init="gaussian", norm="rms", alpha=0.6)
forward = jax.jit(forward, static_argnames="config")


@lru_cache
def make(**flags):
    """(params, constants, config) of a tiny network, each parameter away from its start."""
    run = resolve(collision_rate=0.1, **{**SMALL, **flags})
    config, key = run.model, jax.random.key(run.training.seed)
    params = jax.jit(init, static_argnums=(1, 2))(key, config, VOCABULARY)
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 0.3 * np.random.default_rng(seed).standard_normal(leaf.shape, np.float32)
             for seed, leaf in enumerate(leaves)]
    return structure.unflatten(moved), attention_constants(config), config


# Every kind of attention and of positions; MINITF_THOROUGH=1 tries all combinations of the two.
ATTENTION = {
    "espa": dict(attn="espa", gamma=(0.8, 0.1)),
    "identity_skip": dict(attn="espa", gamma=(0.8, 0.1), identity_skip=True, alpha=0.0),
    "uspa": dict(attn="uspa", extra_heads=1, mlp_ratio=3.0),
    "vskip": dict(attn="vskip"),
    "softmax": dict(attn="softmax"),
}
KINDS = [("espa", "rope"), ("identity_skip", "rope"), ("uspa", "rope"), ("vskip", "learned"),
         ("softmax", "none")]
if os.environ.get("MINITF_THOROUGH"):
    KINDS = list(product(*map(dict.fromkeys, zip(*KINDS))))


@pytest.mark.parametrize("attn, position", KINDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_decoding_equals_the_forward_pass(attn, position, data):
    """Some tokens at once, padded, then one by one: the logits of the forward pass, to rounding.

    A block is six sums of up to 4 d terms. What arrives of their rounding depends on the
    parameters: as much as of an equal noise in the embeddings.
    """
    params, constants, config = make(position=position,
                                     norm="none" if position == "rope" else "layer",
                                     **ATTENTION[attn])
    tokens = np.array(data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=6, max_size=6)),
                      np.int32)
    at_once = data.draw(st.integers(1, 5))
    expected = forward(params, constants, tokens, config)
    got = decoded(params, constants, tokens, config, at_once, spare=3)
    error = config.depth * 6 * np.sqrt(4 * config.width) * EPS32
    sign = np.random.default_rng(0).choice([-1, 1], params["embed"].shape)
    noisy = {**params, "embed": params["embed"] * np.float32(1 + error * sign)}
    shaken = np.abs(forward(noisy, constants, tokens, config) - expected).max()
    tolerance = 2 * shaken + error * np.abs(expected).max()
    assert tolerance < 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attn", ["espa", "identity_skip"])
def test_sample_is_that_of_forward_passes_also_beyond_the_training_length(attn):
    """Three programs are compiled: for the prompt, half a context, and one token."""
    params, constants, config = make(seed=1, **ATTENTION[attn])
    compiled = decode.decode._cache_size()
    context, expected = [1, 2], []
    for _ in range(15):
        if len(context) == config.length:
            context = context[-(config.length // 2):]
        padded = np.zeros(config.length, np.int32)
        padded[:len(context)] = context
        logits = forward(params, constants, padded, config)
        context.append(int(logits[len(context) - 1].argmax()))
        expected.append(context[-1])
    assert len(set(expected)) > 1
    drawn = decode.sample(params, constants, [1, 2], 15, config, temperature=0.0)
    assert list(drawn) == expected
    assert decode.decode._cache_size() == compiled + 3


def test_draw():
    """The likeliest at temperature 0; else among the top k, in proportion to exp(logit)."""
    logits = jnp.array([0.0, 3.0, 2.0, -1.0])
    key = jax.random.key(0)
    assert all(int(decode.draw(key, step, logits, 0.0)) == 1 for step in range(3))
    drawn = jax.vmap(lambda step: decode.draw(key, step, logits, 1.0, 2))(jnp.arange(200))
    assert set(drawn.tolist()) == {1, 2}
    share = float((drawn == 1).mean())
    assert abs(share - np.e / (1 + np.e)) < 0.1


def test_an_empty_prompt_is_refused():
    params, constants, config = make()
    with pytest.raises(ValueError, match="at least one token"):
        decode.sample(params, constants, [], 1, config)


def test_the_end_of_text_ends_a_sample_and_begins_one(monkeypatch, capsys):
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = encodings.make_encoding("bytes", ranks, r"\s|\S", {encodings.END: 256})
    asked = []

    def sample(params, constants, tokens, *_):
        asked.append(tokens)
        yield from [*b"to be", 256, *b"unseen"]

    monkeypatch.setattr(decode, "sample", sample)
    for prompt, begun, said in ([], [256], "to be"), ([*b"a ", 256], [*b"a ", 256], "a to be"):
        use.show_sample(checkpoint.Model(None, None, None, encoding), prompt, Sampling())
        assert asked.pop() == begun and capsys.readouterr().out.strip() == said
