"""The kernel that makes no T x T array against the specification: forward and gradients, and the reach of a decay.

The kernel runs in the interpreter here, in float32; shapes are few, values are drawn.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import Config, flash, model, spa, theory

EPS32 = np.finfo(np.float32).eps
exponential_pairs = st.tuples(st.floats(-5, 1), st.one_of(st.just(np.inf), st.floats(-6, 3))).map(
    lambda logs: (10**logs[0] * (1 + 10**logs[1]), 10**logs[0]))             # (gamma_in, gamma_out), from close to far apart
SHAPES = [(2, 200, 2, 16), (1, 64, 1, 20)]                       # (B, T, H, k): several blocks; padded positions and features


@partial(jax.jit, static_argnums=0)
def value_and_gradient(attend, qkv, g, decay, rescale):
    out, back = jax.vjp(lambda qkv: attend(qkv, dict(decay=decay, rescale=rescale)), qkv)
    return out, *jnp.moveaxis(back(g)[0], -3, 0)


def kernel(qkv, constants):
    return flash.attend(qkv, **constants, interpret=True)


def specification(qkv, constants):
    return model.softmax_attention(*model.unstack(qkv), **constants)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(st.one_of(st.lists(exponential_pairs, min_size=2, max_size=2), st.none()), st.integers(0, 2**31 - 1), st.floats(0, 10))
def test_the_kernel_computes_what_the_specification_says(shape, gammas, seed, size):
    """Out and gradients, whatever the decay of each head, or without one, and the size of the logits (up to about size sqrt(k)).

    Both round logits and bias: within a block these reach (slope 128 + |z|) EPS32, which is the relative error of each
    weight, and so that of the sums, times the largest value (or gradient of a logit) that is summed.
    """
    rng = np.random.default_rng(seed)
    q, k, v, g = rng.normal(size=(4, *shape)).astype(np.float32)
    q = np.float32(size) * q
    heads = shape[2]
    decay = np.array([spa.exponential_decay(*pair) if pair else (0, 0, 0) for pair in (gammas or [None] * heads)[:heads]], np.float32)
    rescale = rng.uniform(0.5, 2, (heads, shape[1])).astype(np.float32)
    z = np.max(np.linalg.norm(q, axis=-1)) * np.max(np.linalg.norm(k, axis=-1)) / np.sqrt(shape[-1])
    relative = (2 * decay[:, 0].max() * flash.ROWS + np.sum(np.abs(decay[:, 1:]), 1).max() + 2 * z + np.sqrt(shape[1])) * EPS32
    dz = 2 * np.max(np.linalg.norm(v, axis=-1)) * np.max(np.linalg.norm(g, axis=-1)) * 2     # sum_j P_ij |dP_ij - dot|, at most
    rows = shape[1]                                              # that a key's gradient may sum over
    sizes = [2 * np.max(np.abs(v)), dz * np.max(np.abs(k)), dz * rows * np.max(np.abs(q)), rows * 2 * np.max(np.abs(g))]
    qkv = np.stack([q, k, v], 2)
    pairs = zip(value_and_gradient(kernel, qkv, g, decay, rescale),
                value_and_gradient(specification, qkv, g, decay, rescale), sizes)
    for got, expected, largest in pairs:
        assert np.all(np.isfinite(got))
        assert np.max(np.abs(got - expected)) <= 2 * relative * largest + 1e-30       # what is flushed to zero


@given(exponential_pairs, st.integers(0, 2**31 - 1), st.floats(0, 10))
def test_what_lies_beyond_the_reach_weighs_nothing(gammas, seed, size):
    """In float64, all keys further back than `reach` have less than 2**-24 of each row's weight."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 1, 300, 1, 4))
    decay, q = np.array(spa.exponential_decay(*gammas)), size * q
    reach = int(flash.reach(jnp.float32(np.stack([q, k, k], 2)), jnp.float32(decay)[None])[0, 0])
    lag = np.arange(300)[:, None] - np.arange(300)
    with np.errstate(over="ignore"):
        z = q[0, :, 0] @ k[0, :, 0].T / 2 - decay[0] * lag + decay[1] * (np.arange(300) == 0) + decay[2] * (lag == 0)
    z = np.where(lag >= 0, z, -np.inf)
    weights = np.exp(z - z.max(1, keepdims=True))
    beyond = np.where(lag > reach, weights, 0).sum(1) / weights.sum(1)
    assert np.all(beyond <= 2.0**-24)


@given(exponential_pairs, st.integers(1, 64))
def test_the_decay_is_the_prescribed_attention(gammas, length):
    """Its softmax, rescaled by the row sums, is A; and both are what multiplies in O(T)."""
    bias, = np.asarray(model.decay_bias(np.array([spa.exponential_decay(*gammas)]), 0, length, length), float)
    log_a = spa.exponential_log_attention(*gammas, length)
    attention, rows = np.exp(log_a), spa.exponential_attend(*gammas, np.ones((length, 1)))
    made = rows * np.exp(bias - bias.max(1, keepdims=True))
    made /= np.exp(bias - bias.max(1, keepdims=True)).sum(1, keepdims=True)
    largest = np.max(np.abs(np.where(np.isfinite(bias), bias, 0)))
    assert np.allclose(made, attention, rtol=0, atol=4 * attention.max() * (1 + largest) * EPS32)
    assert np.allclose(rows[:, 0], attention.sum(1), rtol=1e-9)
    x = np.random.default_rng(length).normal(size=(length, 3))
    assert np.allclose(spa.exponential_attend(*gammas, x), attention @ x, rtol=0, atol=1e-9 * attention.sum(1).max())


def test_the_kernel_can_be_lowered_for_a_gpu():
    """The interpreter runs more than the GPU's compiler takes: the first stage of that one needs no GPU."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip("this jax cannot lower for a device that is not there")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    qkv = array(3, 2, 200, 3, 2, 64, dtype=jnp.bfloat16)
    loss = lambda qkv, *constants: jnp.sum(flash.attend(qkv, *constants).astype(jnp.float32))
    gradient = jax.vmap(jax.grad(loss), (0, None, None))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(gradient).trace(qkv, array(2, 3), array(2, 200)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("forward_kernel") and lowered.as_text().count("backward_kernel")


@pytest.mark.parametrize("attn, far", [("espa", 1), ("softmax", 0)])
def test_the_network_gives_the_kernel_what_it_gives_the_specification(attn, far, monkeypatch):
    """As on a GPU, but in float32 and interpreted: two sequences through four blocks, with parameters that all matter.

    Each block rounds sums of up to 4 d terms a few times; nothing in a chain at mean square 1 makes that grow much.
    """
    config = Config(depth=4, width=64, heads=2, length=72, attn=attn, far=far, own=bool(far), repeat_rate=0.01, dtype="float32")
    key = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda w: w + 0.3 / np.sqrt(config.width) * jax.random.normal(next(key), w.shape), model.init(next(key), config, 50))
    tokens, constants = jax.random.randint(next(key), (2, config.length), 0, 50), theory.constants(config)
    expected = model.forward(params, constants, tokens, config)
    calls = []
    attend = flash.attend
    monkeypatch.setattr(flash, "attend", lambda *inputs, **constants: calls.append(1) or attend(*inputs, **constants, interpret=True))
    monkeypatch.setattr(model, "attends_fused", lambda config: True)
    got = model.forward(params, constants, tokens, config)
    assert calls and np.max(np.abs(expected)) > 0.1
    assert np.max(np.abs(got - expected)) <= 16 * config.depth * 2 * np.sqrt(config.width) * EPS32 * np.max(np.abs(expected))
