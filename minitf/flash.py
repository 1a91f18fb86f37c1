"""Exponential signal-preserving attention without a T x T array: a kernel for NVIDIA GPUs, in Pallas.

A row of log A, less a constant of the row, is a decay with distance, -slope |i - j|, and two exceptions: the first key
and the own one (spa.exponential_decay). So the bias is made where it is used, and memory is O(T). The decay also says
which keys are too far away to be seen in float32, whatever their logits: those are not visited (`reach`).

model.attend is the specification; the tests hold both equal, forward and gradients. Blocks and the recomputation of
the backward pass follow FlashAttention-2 (Dao 2023, arXiv 2307.08691). Logarithms are to base 2 in here.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:                                       # deprecated in jax 0.11: model.attend does without
    triton = None

BLOCK = 64                                                # keys in a block, and queries in the backward pass
QUERIES = 128                                             # in a block of the forward pass
LOG2E = float(np.log2(np.e))
UNSEEN = 24.0                                             # a weight of 2**-24 is half a unit of float32's last place


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q, k, v, decay, rescale, interpret=False):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V: q, k, v (B, T, H, k), decay (3,) and rescale D (T,) -> as q.

    Differentiable in q, k, v. `interpret` runs it anywhere, slowly: for tests.
    """
    return forward(q, k, v, decay, rescale, interpret)[0]


def reach(q, k, decay):
    """How many tokens back a key can weigh 2**-24 of a row or more, at most: (B, H) of int32.

    Key j has at most exp(2 M - slope (i - j)) times the weight of the own one, where |logits| <= M = |q| |k| / sqrt(d_k)
    for the longest query and key; all those further back than n have together exp(2 M - slope n) / (1 - exp(-slope)).
    """
    longest = lambda x: jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), -1), 1))    # (B, H)
    slope, first, _ = decay
    logits = 2 * longest(q) * longest(k) / np.sqrt(q.shape[-1])
    tail = jnp.logaddexp(-jnp.log(-jnp.expm1(-slope)), first)
    return jnp.minimum((logits + tail + UNSEEN / LOG2E) / slope + 1, 2.0**30).astype(jnp.int32)


def logits(x, y, begin, keys, decay_ref, scale, masked):
    """Blocks of queries x, from position `begin`, and keys y at positions `keys` -> logits to base 2, with B + slope (i - begin)."""
    slope, first, own = decay_ref[0], decay_ref[1], decay_ref[2]
    bias = slope * (keys - begin).astype(jnp.float32) + jnp.where(keys == 0, first, 0.0)
    z = jnp.dot(x, y.T, preferred_element_type=jnp.float32) * scale + bias[None, :]
    if masked:
        lag = (begin + jnp.arange(len(x)))[:, None] - keys[None, :]
        z = jnp.where(lag > 0, z, jnp.where(lag == 0, z + own, -jnp.inf))
    return z


def forward_kernel(decay_ref, reach_ref, rescale_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, scale):
    """One block of queries: out, and the log of the sum of the row's weights, relative to the own key's distance 0."""
    size, block = q_ref.shape[0], BLOCK
    begin = pl.program_id(0) * size
    q = q_ref[...]

    def step(masked, number, carry):
        out, top, total = carry
        here = pl.ds(number * block, block)
        z = logits(q, k_ref[here, :], begin, number * block + jnp.arange(block), decay_ref, scale, masked)
        new = jnp.maximum(top, jnp.max(z, 1))
        weights, shrink = jnp.exp2(z - new[:, None]), jnp.exp2(top - new)
        v = v_ref[here, :]
        out = out * shrink[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out, new, total * shrink + jnp.sum(weights, 1)

    # The diagonal first: every row then has a finite largest logit.
    carry = jnp.zeros(q.shape, jnp.float32), jnp.full(size, -jnp.inf), jnp.zeros(size, jnp.float32)
    diagonal = begin // block
    carry = jax.lax.fori_loop(diagonal, diagonal + size // block, partial(step, True), carry)
    farthest = jnp.maximum(begin - reach_ref[0], 0) // block
    out, top, total = jax.lax.fori_loop(farthest, diagonal, partial(step, False), carry)
    out_ref[...] = (out * (rescale_ref[...] / total)[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total) - decay_ref[0] * jnp.arange(size).astype(jnp.float32)


def key_kernel(decay_ref, reach_ref, rescale_ref, lse_ref, dot_ref, q_ref, k_ref, v_ref, g_ref, dk_ref, dv_ref, *, scale):
    """One block of keys: the gradients of keys and values, over all blocks of queries that can see it."""
    block, count = BLOCK, q_ref.shape[0] // BLOCK
    number = pl.program_id(0)
    keys, k, v = number * block + jnp.arange(block), k_ref[...], v_ref[...]

    def step(masked, other, carry):
        dk, dv = carry
        here = pl.ds(other * block, block)
        q = q_ref[here, :]
        g = (g_ref[here, :] * rescale_ref[here][:, None]).astype(q.dtype)
        weights, dz = backward(q, k, v, g, other * block, keys, lse_ref[here], dot_ref[here], decay_ref, scale, masked)
        return (dk + jnp.dot(dz.T, q, preferred_element_type=jnp.float32),
                dv + jnp.dot(weights.T, g, preferred_element_type=jnp.float32))

    carry = step(True, number, (jnp.zeros(k.shape, jnp.float32),) * 2)
    last = jnp.minimum((number * block + block - 1 + reach_ref[0]) // block + 1, count)
    dk, dv = jax.lax.fori_loop(number + 1, last, partial(step, False), carry)
    dk_ref[...], dv_ref[...] = (dk * (scale / LOG2E)).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def query_kernel(decay_ref, reach_ref, rescale_ref, lse_ref, dot_ref, q_ref, k_ref, v_ref, g_ref, dq_ref, *, scale):
    """One block of queries: their gradient, over all blocks of keys that they can see."""
    block, number = BLOCK, pl.program_id(0)
    begin, q = number * block, q_ref[...]
    lse, dot = lse_ref[...], dot_ref[...]
    g = (g_ref[...] * rescale_ref[...][:, None]).astype(q.dtype)

    def step(masked, other, dq):
        here = pl.ds(other * block, block)
        k, keys = k_ref[here, :], other * block + jnp.arange(block)
        _, dz = backward(q, k, v_ref[here, :], g, begin, keys, lse, dot, decay_ref, scale, masked)
        return dq + jnp.dot(dz, k, preferred_element_type=jnp.float32)

    dq = step(True, number, jnp.zeros(q.shape, jnp.float32))
    dq = jax.lax.fori_loop(jnp.maximum(begin - reach_ref[0], 0) // block, number, partial(step, False), dq)
    dq_ref[...] = (dq * (scale / LOG2E)).astype(dq_ref.dtype)


def backward(q, k, v, g, begin, keys, lse, dot, decay_ref, scale, masked):
    """A block's (P, gradient of its logits), from the gradient g of its output before D; dot: sum of g times that output."""
    z = logits(q, k, begin, keys, decay_ref, scale, masked)
    weights = jnp.exp2(z - (lse + decay_ref[0] * jnp.arange(len(q)).astype(jnp.float32))[:, None])
    dz = weights * (jnp.dot(g, v.T, preferred_element_type=jnp.float32) - dot[:, None])
    return weights.astype(q.dtype), dz.astype(q.dtype)


def padded(x, shape):
    """x with zeros at the end of axes, up to a shape."""
    return jnp.pad(x, [(0, size - old) for size, old in zip(shape, x.shape)])


def specifications(shape, block):
    """Block specifications: of decay, reach, rescale (in blocks, whole); of a (B, T, H, k) array and a (B, H, T) one, both ways."""
    _, length, _, features = shape
    return dict(
        decay=pl.BlockSpec((3,), lambda i, b, h: (0,)),
        reach=pl.BlockSpec((None, 1), lambda i, b, h: (b, h)),
        rescale=pl.BlockSpec((block,), lambda i, b, h: (i,)),
        rescales=pl.BlockSpec((length,), lambda i, b, h: (0,)),
        features=pl.BlockSpec((None, block, None, features), lambda i, b, h: (b, i, h, 0)),
        all_features=pl.BlockSpec((None, length, None, features), lambda i, b, h: (b, 0, h, 0)),
        row=pl.BlockSpec((None, None, block), lambda i, b, h: (b, h, i)),
        rows=pl.BlockSpec((None, None, length), lambda i, b, h: (b, h, 0)),
    )


def call(kernel, shape, block, inputs, outputs, interpret, stages, warps):
    """A pallas_call over blocks of positions, sequences and heads; inputs, outputs: names of specifications."""
    named = specifications(shape, block)
    batch, length, heads, _ = shape
    return pl.pallas_call(
        kernel, grid=(length // block, batch, heads), in_specs=[named[name] for name in inputs.split()],
        out_specs=[named[name] for name, _ in outputs], out_shape=[shape for _, shape in outputs], interpret=interpret,
        compiler_params=triton and triton.CompilerParams(num_warps=warps, num_stages=stages))


def forward(q, k, v, decay, rescale, interpret):
    """(out, what the backward pass needs): arrays are padded to what the kernels' blocks need, and kept so."""
    batch, length, heads, features = q.shape
    size = -(-length // QUERIES) * QUERIES
    whole = batch, size, heads, max(16, pl.next_power_of_2(features))
    constants = decay * LOG2E, reach(q, k, decay), padded(rescale, (size,))
    q, k, v = (padded(x, whole) for x in (q, k, v))
    outputs = [("features", jax.ShapeDtypeStruct(whole, v.dtype)),
               ("row", jax.ShapeDtypeStruct((batch, heads, size), jnp.float32))]
    kernel = call(partial(forward_kernel, scale=LOG2E / features**0.5), whole, QUERIES,
                  "decay reach rescale features all_features all_features", outputs, interpret, 3, 4)
    out, lse = kernel(*constants, q, k, v)
    out = out[:, :length, :, :features]
    return out, (constants, q, k, v, out, lse)


def gradients(interpret, saved, g):
    """The gradients of q, k, v; decay and rescale are constants."""
    constants, q, k, v, out, lse = saved
    _, length, _, features = g.shape
    scale = LOG2E / features**0.5
    dot = padded(jnp.einsum("bthk,bthk->bht", g, out, preferred_element_type=jnp.float32), lse.shape)
    like = [("features", jax.ShapeDtypeStruct(q.shape, q.dtype))]
    by_key = call(partial(key_kernel, scale=scale), q.shape, BLOCK,
                  "decay reach rescales rows rows all_features features features all_features", like * 2, interpret, 2, 4)
    by_query = call(partial(query_kernel, scale=scale), q.shape, BLOCK,
                    "decay reach rescale row row features all_features all_features features", like, interpret, 2, 4)
    arguments = *constants, lse, dot, q, k, v, padded(g, q.shape)
    dk, dv = by_key(*arguments)
    dq, = by_query(*arguments)
    return *(x[:, :length, :, :features] for x in (dq, dk, dv)), None, None


attend.defvjp(forward, gradients)
