"""Attention of E-SPA without a T x T array: kernels for NVIDIA GPUs, in Pallas.

A row of log A, less a constant of the row, is a decay with distance, -slope (i - j), with two
exceptions: the first key and the query's own (spa.espa_bias). So the bias is made where it is used,
and memory is O(T). The decay also says which keys are too far away to be seen in float32, whatever
their logits: those are not visited (`attention_window`). Without a decay it is plain attention.

Queries, keys and values come as the one array that a matrix product made, and their gradients go
back as one, turned back by the kernel that made them. operations.attend is the reference. Blocks
and the recomputation of the backward pass follow FlashAttention-2 (Dao 2023, arXiv 2307.08691).
Logarithms are to base 2.
"""
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from . import operations

BLOCK = 64                             # keys in a block, and queries in the backward pass
ROWS = 128                             # queries in a block of the forward pass
LOG2E = float(np.log2(np.e))
UNSEEN = 24.0                          # a weight of 2**-24 is half of float32's last place
ALL_SEEN = 256                         # up to so many tokens all keys are visited
QUERY, KEY, VALUE = range(3)


@cache
def triton():
    """JAX's module for NVIDIA GPUs, or None: it is deprecated in jax 0.11, and slow to import."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(qkv, bias, row_scale, rope=False, interpret=False):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V: (B, T, 3, H, k) -> (B, T, H, k).

    Args:
      qkv: differentiable in this alone.
      bias: (H, 3), slope, first_key_bias and self_bias of each head, which make B.
      row_scale: D > 0, (H, T).
      rope: whether queries and keys are turned by their positions.
      interpret: runs it anywhere, slowly: for tests.
    """
    return forward(qkv, bias, row_scale, rope, interpret)[0]


def attention_window(qkv, bias):
    """How many tokens back a key can weigh 2**-24 of a row, at most: (B, H) of int32.

    Key j has at most exp(2 M - slope (i - j)) times the weight of the query's own, where |logits|
    <= M = |q| |k| / sqrt(d_k) for the longest query and key. All those further back than n have
    together exp(2 M - slope n) / (1 - exp(-slope)). Without a slope all are seen.
    """
    vectors = qkv[:, :, :VALUE].astype(jnp.float32)
    squares = jnp.max(jnp.sum(jnp.square(vectors), -1), 1)                             # (B, 2, H)
    slope, first_key_bias, _ = bias.T                                                  # (H,) each
    product = jnp.sqrt(squares[:, QUERY]) * jnp.sqrt(squares[:, KEY])
    tail = jnp.logaddexp(-jnp.log(-jnp.expm1(-slope)), first_key_bias)
    window = (2 * product / np.sqrt(qkv.shape[-1]) + tail + UNSEEN / LOG2E) / slope + 1
    return jnp.minimum(window, 2.0**30).astype(jnp.int32)


# --- The kernels: a block of positions of one head; qkv_ref is (T, 3, k) ----------------

def logits(q, k, begin, keys, bias_ref, scale, masked):
    """Queries from position `begin`, keys at positions `keys` -> logits to base 2.

    They have B + slope (i - begin) in them.
    """
    slope, first_key_bias, self_bias = bias_ref[0], bias_ref[1], bias_ref[2]
    bias = slope * (keys - begin).astype(jnp.float32) + jnp.where(keys == 0, first_key_bias, 0.0)
    z = dot(q, k.T) * scale + bias[None, :]
    if masked:
        lag = (begin + jnp.arange(len(q)))[:, None] - keys[None, :]
        z = jnp.where(lag > 0, z, jnp.where(lag == 0, z + self_bias, -jnp.inf))
    return z


dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def forward_kernel(bias_ref, window_ref, row_scale_ref, qkv_ref, out_ref, lse_ref, *, scale):
    """A block of queries: out, and the log of each row's sum of weights over D."""
    size, block = out_ref.shape[0], BLOCK
    begin = pl.program_id(0) * size
    q = qkv_ref[pl.ds(begin, size), QUERY, :]

    def step(masked, number, carry):
        out, top, total = carry
        here = pl.ds(number * block, block)
        keys = number * block + jnp.arange(block)
        z = logits(q, qkv_ref[here, KEY, :], begin, keys, bias_ref, scale, masked)
        new = jnp.maximum(top, jnp.max(z, 1))
        weights, shrink = jnp.exp2(z - new[:, None]), jnp.exp2(top - new)
        out = out * shrink[:, None] + dot(weights.astype(q.dtype), qkv_ref[here, VALUE, :])
        return out, new, total * shrink + jnp.sum(weights, 1)

    # The diagonal first: every row then has a finite largest logit.
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    carry = zeros(out_ref.shape), jnp.full(size, -jnp.inf), zeros(size)
    diagonal = begin // block
    carry = jax.lax.fori_loop(diagonal, diagonal + size // block, partial(step, True), carry)
    farthest = jnp.maximum(begin - window_ref[0], 0) // block
    out, top, total = jax.lax.fori_loop(farthest, diagonal, partial(step, False), carry)
    total = total / row_scale_ref[...]
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total) - bias_ref[0] * jnp.arange(size).astype(jnp.float32)


def backward_kernel(bias_ref, window_ref, lse_ref, inner_ref, qkv_ref, g_ref, *refs, scale, half):
    """The gradients of one block of positions: as keys and values over the blocks of queries that
    can see it, as queries over the blocks of keys that they can see.

    inner: the product of g and out over D, for each query. refs: cosines and sines of the rotary
    encoding of `half` pairs of features, where there is one; the result.
    """
    *turn_refs, d_ref = refs
    block, count, number = BLOCK, qkv_ref.shape[0] // BLOCK, pl.program_id(0)

    def queries(other):
        """(their block's first position, q, g, lse, inner)"""
        here = pl.ds(other * block, block)
        lse = lse_ref[here] + bias_ref[0] * jnp.arange(block).astype(jnp.float32)
        return other * block, qkv_ref[here, QUERY, :], g_ref[here, :], lse, inner_ref[here]

    def keys(other):
        """(positions, k, v)"""
        here = pl.ds(other * block, block)
        return other * block + jnp.arange(block), qkv_ref[here, KEY, :], qkv_ref[here, VALUE, :]

    def pair(masked, of_queries, of_keys):
        """(D P, the gradient of the logits) between two blocks."""
        (begin, q, g, lse, inner), (positions, k, v) = of_queries, of_keys
        z = logits(q, k, begin, positions, bias_ref, scale, masked)
        weights = jnp.exp2(z - lse[:, None])
        d_logits = weights * (dot(g, v.T) - inner[:, None])
        return weights.astype(q.dtype), d_logits.astype(q.dtype)

    def to_keys(other, gradients):
        (dk, dv), of_queries = gradients, queries(other)
        weights, dz = pair(False, of_queries, own_keys)
        return dk + dot(dz.T, of_queries[1]), dv + dot(weights.T, of_queries[2])

    def to_queries(other, dq):
        of_keys = keys(other)
        return dq + dot(pair(False, own_queries, of_keys)[1], of_keys[1])

    own_queries, own_keys = queries(number), keys(number)
    weights, dz = pair(True, own_queries, own_keys)
    dk, dv, dq = dot(dz.T, own_queries[1]), dot(weights.T, own_queries[2]), dot(dz, own_keys[1])
    last = jnp.minimum((number * block + block - 1 + window_ref[0]) // block + 1, count)
    dk, dv = jax.lax.fori_loop(number + 1, last, to_keys, (dk, dv))
    farthest = jnp.maximum(number * block - window_ref[0], 0) // block
    dq = jax.lax.fori_loop(farthest, number, to_queries, dq)
    for which, gradient in ((QUERY, dq * scale / LOG2E), (KEY, dk * scale / LOG2E), (VALUE, dv)):
        gradient = gradient.astype(d_ref.dtype)
        if turn_refs and which != VALUE:
            gradient = turn_back(gradient, *turn_refs, half)
        d_ref[:, which, :] = gradient


def turn_back(x, cos_ref, sin_ref, half):
    """The transpose of operations.rotate, for a block of positions: x (n, k)."""
    feature = jnp.arange(x.shape[1])
    exchange = (feature[:, None] + half) % (2 * half) == feature        # a pair's two features
    turned = x * cos_ref[...] + dot(x, exchange.astype(x.dtype)) * sin_ref[...]
    return turned.astype(x.dtype)


# --- Calling them -----------------------------------------------------------------------

def call(kernel, shape, block, inputs, outputs, interpret, stages):
    """A pallas_call over blocks of positions, sequences and heads, for qkv of a shape.

    inputs: what they are, each whole along positions, or with a * before it in blocks.
    outputs: [(what, dtype)], in blocks.
    """
    batch, length, _, heads, features = shape
    shapes = dict(row=(batch, heads, length), out=(batch, length, heads, features), qkv=shape)

    def specification(name, size, at):
        """What program i sees of an array: `size` positions of one head, from block at(i)."""
        return {
            "bias": pl.BlockSpec((None, 3), lambda i, b, h: (h, 0)),
            "window": pl.BlockSpec((None, 1), lambda i, b, h: (b, h)),
            "row_scale": pl.BlockSpec((None, size), lambda i, b, h: (h, at(i))),
            "turn": pl.BlockSpec((size, features), lambda i, b, h: (at(i), 0)),
            "row": pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, at(i))),
            "out": pl.BlockSpec((None, size, None, features), lambda i, b, h: (b, at(i), h, 0)),
            "qkv": pl.BlockSpec((None, size, 3, None, features),
                                lambda i, b, h: (b, at(i), 0, h, 0)),
        }[name]

    in_block = lambda name: specification(name, block, lambda i: i)
    whole = lambda name: specification(name, length, lambda i: 0)
    return pl.pallas_call(
        kernel, grid=(length // block, batch, heads), interpret=interpret,
        in_specs=[in_block(name[1:]) if name.startswith("*") else whole(name)
                  for name in inputs.split()],
        out_specs=[in_block(name) for name, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs],
        compiler_params=triton() and triton().CompilerParams(num_warps=4, num_stages=stages))


def padded(x, shape, value=0):
    """x with a value added at the end of axes, up to a shape."""
    return jnp.pad(x, [(0, size - old) for size, old in zip(shape, x.shape)], constant_values=value)


def forward(qkv, bias, row_scale, rope, interpret):
    """(out, what the backward pass needs). Arrays are padded to whole blocks, and kept so."""
    batch, length, _, heads, features = qkv.shape
    size = -(-length // ROWS) * ROWS
    if rope:                               # in one pass: values turn by no angle
        angles = operations.rope_angles(length, features)[:, None, None]
        qkv = operations.rotate(qkv, angles * np.array([1.0, 1.0, 0.0])[:, None, None])
    window = attention_window(qkv, bias) if length > ALL_SEEN else \
        jnp.full((batch, heads), length)
    constants = bias * LOG2E, window
    row_scale = padded(row_scale, (heads, size), 1)
    qkv = padded(qkv, (batch, size, 3, heads, max(16, pl.next_power_of_2(features))))
    kernel = call(partial(forward_kernel, scale=LOG2E / features**0.5), qkv.shape, ROWS,
                  "bias window *row_scale qkv", [("out", qkv.dtype), ("row", jnp.float32)],
                  interpret, 3)
    out, lse = kernel(*constants, row_scale, qkv)
    out = out[:, :length, :, :features]
    return out, (constants, row_scale, qkv, out, lse)


def gradients(rope, interpret, saved, g):
    """The gradient of qkv; bias and row_scale are constants."""
    constants, row_scale, qkv, out, lse = saved
    batch, length, heads, features = g.shape
    size, padded_features = qkv.shape[1], qkv.shape[-1]
    # out has D in it: inner has not.
    out = out.astype(jnp.float32) / row_scale[:, :length].T[..., None]
    inner = jnp.swapaxes(jnp.sum(g.astype(jnp.float32) * out, -1), 1, 2)
    turns = ()
    if rope:
        angles = operations.rope_angles(length, features)
        turns = [padded(jnp.asarray(np.concatenate(pair, 1), qkv.dtype), (size, padded_features))
                 for pair in ((np.cos(angles),) * 2, (np.sin(angles), -np.sin(angles)))]
    kernel = call(
        partial(backward_kernel, scale=LOG2E / features**0.5, half=features // 2), qkv.shape, BLOCK,
        "bias window row row qkv out" + " *turn" * len(turns), [("qkv", qkv.dtype)], interpret, 2)
    d, = kernel(*constants, lse, padded(inner, lse.shape), qkv,
                padded(g, (batch, size, heads, padded_features)), *turns)
    return d[:, :length, ..., :features], None, None


attend.defvjp(forward, gradients)
