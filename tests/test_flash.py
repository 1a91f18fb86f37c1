"""The kernel that makes no T x T array against the formula: forward, gradients and its window.

The kernel runs in the interpreter here, in float32; shapes are few, values are drawn. What the
network gives it: tests/test_fast.py.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import resolve
from minitf.network import flash, operations
from minitf.theory import spa
from minitf.theory.families import FAMILIES

EPS32 = np.finfo(np.float32).eps
CONFIG = resolve().model
NAMES = "slope", "first_key_bias", "self_bias"
exponential_pairs = st.tuples(                     # (gamma_in, gamma_out), from close to far apart
    st.floats(-5, 1), st.one_of(st.just(np.inf), st.floats(-6, 3))).map(
    lambda logs: (10**logs[0] * (1 + 10**logs[1]), 10**logs[0]))
# (B, T, H, k) and whether they turn: several blocks; padded positions and features
SHAPES = [((2, 200, 2, 16), False), ((1, 72, 1, 20), True)]


@pytest.fixture(autouse=True)
def windows_at_any_length(monkeypatch):
    monkeypatch.setattr(flash, "ALL_SEEN", 0)


@partial(jax.jit, static_argnums=(0, 5))
def value_and_gradient(attend, qkv, g, bias, row_scale, rope):
    out, back = jax.vjp(lambda qkv: attend(qkv, bias, row_scale, rope), qkv)
    return out, *jnp.moveaxis(back(g)[0], -3, 0)


def kernel(qkv, bias, row_scale, rope):
    return flash.attend(qkv, bias, row_scale, rope, interpret=True)


def reference(qkv, bias, row_scale, rope):
    q, k, v = operations.split_qkv(qkv)
    if rope:
        angles = operations.rope_angles(*q.shape[1::2])[:, None]
        q, k = operations.rotate(q, angles), operations.rotate(k, angles)
    constants = dict(zip(NAMES, bias.T), row_scale=row_scale)
    return operations.softmax_attention(q, k, v, constants, CONFIG)


@pytest.mark.parametrize("shape, rope", SHAPES, ids=str)
@given(st.one_of(st.lists(exponential_pairs, min_size=2, max_size=2), st.none()),
       st.integers(0, 2**31 - 1), st.floats(0, 10))
def test_the_kernel_computes_what_the_formula_says(shape, rope, gammas, seed, size):
    """Out and gradients, whatever the bias of each head, or without one.

    And whatever the size of the logits (up to about size sqrt(k)). Both round logits and bias:
    within a block these reach (slope 128 + |z|) EPS32, which is the relative error of each weight,
    and so that of the sums, times the largest value (or gradient of a logit) that is summed.
    """
    rng = np.random.default_rng(seed)
    q, k, v, g = rng.normal(size=(4, *shape)).astype(np.float32)
    q = np.float32(size) * q
    rows, heads = shape[1:3]                         # a key's gradient may sum over so many rows
    of_heads = (gammas or [None] * heads)[:heads]
    bias = np.array([spa.espa_bias(*pair) if pair else (0, 0, 0) for pair in of_heads], np.float32)
    row_scale = rng.uniform(0.5, 2, (heads, rows)).astype(np.float32)
    longest = lambda x: np.max(np.linalg.norm(x, axis=-1))
    z = longest(q) * longest(k) / np.sqrt(shape[-1])
    relative = EPS32 * (2 * bias[:, 0].max() * flash.ROWS + np.sum(np.abs(bias[:, 1:]), 1).max()
                        + 2 * z + np.sqrt(rows))
    dz = 2 * longest(v) * longest(g) * 2             # sum_j P_ij |dP_ij - dot|, at most
    sizes = [2 * np.max(np.abs(v)), dz * np.max(np.abs(k)), dz * rows * np.max(np.abs(q)),
             rows * 2 * np.max(np.abs(g))]
    qkv = np.stack([q, k, v], 2)
    both = [value_and_gradient(attend, qkv, g, bias, row_scale, rope)
            for attend in (kernel, reference)]
    for got, expected, largest in zip(*both, sizes):
        assert np.all(np.isfinite(got))
        tolerance = 2 * relative * largest + 1e-30   # what is flushed to zero
        assert np.max(np.abs(got - expected)) <= tolerance


@given(exponential_pairs, st.integers(0, 2**31 - 1), st.floats(0, 10))
def test_what_lies_beyond_the_window_weighs_nothing(gammas, seed, size):
    """In float64, all keys further back than the window have less than 2**-24 of a row's weight."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 1, 300, 1, 4))
    bias, q = np.array(spa.espa_bias(*gammas)), size * q
    window = int(flash.attention_window(jnp.float32(np.stack([q, k, k], 2)),
                                        jnp.float32(bias)[None])[0, 0])
    position = np.arange(300)
    lag = position[:, None] - position
    with np.errstate(over="ignore"):
        z = q[0, :, 0] @ k[0, :, 0].T / 2 - bias[0] * lag + bias[1] * (position == 0) \
            + bias[2] * (lag == 0)
    z = np.where(lag >= 0, z, -np.inf)
    weights = np.exp(z - z.max(1, keepdims=True))
    beyond = np.where(lag > window, weights, 0).sum(1) / weights.sum(1)
    assert np.all(beyond <= 2.0**-24)


@given(exponential_pairs, st.integers(1, 64))
def test_three_numbers_are_the_prescribed_attention(gammas, length):
    """The softmax of E-SPA's bias rows, times the row sums, is A.

    And both are what multiplies in O(T).
    """
    position = np.arange(length)
    numbers = {name: jnp.float32([number]) for name, number in zip(NAMES, spa.espa_bias(*gammas))}
    rows = FAMILIES["espa"].bias_rows(numbers, position[:, None], position)[0]
    bias = np.where(np.tri(length, dtype=bool), np.asarray(rows, float), -np.inf)
    log_a = spa.exponential_log_attention(*gammas, length)
    attention, sums = np.exp(log_a), spa.espa_matvec(*gammas, np.ones((length, 1)))
    made = sums * np.exp(bias - bias.max(1, keepdims=True))
    made /= np.exp(bias - bias.max(1, keepdims=True)).sum(1, keepdims=True)
    largest = np.max(np.abs(np.where(np.isfinite(bias), bias, 0)))
    assert np.allclose(made, attention, rtol=0, atol=4 * attention.max() * (1 + largest) * EPS32)
    assert np.allclose(sums[:, 0], attention.sum(1), rtol=1e-9)
    x = np.random.default_rng(length).normal(size=(length, 3))
    assert np.allclose(spa.espa_matvec(*gammas, x), attention @ x, rtol=0,
                       atol=1e-9 * attention.sum(1).max())


def test_the_kernel_can_be_lowered_for_a_gpu():
    """The interpreter runs more than the GPU's compiler takes.

    The first stage of that one needs no GPU.
    """
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip("this jax cannot lower for a device that is not there")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132,
                                         platform="cuda")
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    qkv = array(3, 2, 200, 3, 2, 64, dtype=jnp.bfloat16)
    loss = lambda qkv, *constants: jnp.sum(flash.attend(qkv, *constants, True).astype(jnp.float32))
    gradient = jax.vmap(jax.grad(loss), (0, None, None))
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradient).trace(qkv, array(2, 3), array(2, 200))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("forward_kernel") and text.count("backward_kernel")
