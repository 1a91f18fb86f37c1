"""Exponential signal-preserving attention without a T x T array: kernels for NVIDIA GPUs, in Pallas. Without decay: plain.

A row of log A, less a constant of the row, is a decay with distance, -slope |i - j|, and two exceptions: the first key
and the own one (spa.exponential_decay). So the bias is made where it is used, and memory is O(T). The decay also says
which keys are too far away to be seen in float32, whatever their logits: those are not visited (`reach`).

Queries, keys and values come as the one array that a matrix product made, and their gradients go back as one.
model.softmax_attention is the specification; the tests hold both equal, forward and gradients. Blocks and the recomputation
of the backward pass follow FlashAttention-2 (Dao 2023, arXiv 2307.08691). Logarithms are to base 2 in here.
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
ROWS = 128                                                # queries in a block of the forward pass
LOG2E = float(np.log2(np.e))
UNSEEN = 24.0                                             # a weight of 2**-24 is half a unit of float32's last place
QUERY, KEY, VALUE = range(3)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(qkv, decay, rescale, interpret=False):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V: qkv (B, T, 3, H, k) -> (B, T, H, k); differentiable in qkv.

    decay (H, 3) makes B, rescale (H, T) is D > 0. `interpret` runs it anywhere, slowly: for tests.
    """
    return forward(qkv, decay, rescale, interpret)[0]


def reach(qkv, decay):
    """How many tokens back a key can weigh 2**-24 of a row or more, at most: (B, H) of int32.

    Key j has at most exp(2 M - slope (i - j)) times the weight of the own one, where |logits| <= M = |q| |k| / sqrt(d_k)
    for the longest query and key; all those further back than n have together exp(2 M - slope n) / (1 - exp(-slope)).
    Without a slope that is infinite: all are seen.
    """
    squares = jnp.max(jnp.sum(jnp.square(qkv[:, :, :VALUE].astype(jnp.float32)), -1), 1)    # (B, 2, H)
    slope, first, _ = decay.T                                                               # (H,) each
    logits = 2 * jnp.sqrt(squares[:, QUERY]) * jnp.sqrt(squares[:, KEY]) / np.sqrt(qkv.shape[-1])
    tail = jnp.logaddexp(-jnp.log(-jnp.expm1(-slope)), first)
    return jnp.minimum((logits + tail + UNSEEN / LOG2E) / slope + 1, 2.0**30).astype(jnp.int32)


# --- The kernels: a block of positions of one head; qkv_ref is (T, 3, k) --------------------------------------------------

def logits(q, k, begin, keys, decay_ref, scale, masked):
    """Blocks of queries from position `begin` and of keys at positions `keys` -> logits to base 2, with B + slope (i - begin)."""
    slope, first, own = decay_ref[0], decay_ref[1], decay_ref[2]
    bias = slope * (keys - begin).astype(jnp.float32) + jnp.where(keys == 0, first, 0.0)
    z = dot(q, k.T) * scale + bias[None, :]
    if masked:
        lag = (begin + jnp.arange(len(q)))[:, None] - keys[None, :]
        z = jnp.where(lag > 0, z, jnp.where(lag == 0, z + own, -jnp.inf))
    return z


dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def forward_kernel(decay_ref, reach_ref, rescale_ref, qkv_ref, out_ref, lse_ref, *, scale):
    """A block of queries: out, and the log of the row's sum of weights over D, for logits with -slope (i - j) in them."""
    size, block = out_ref.shape[0], BLOCK
    begin = pl.program_id(0) * size
    q = qkv_ref[pl.ds(begin, size), QUERY, :]

    def step(masked, number, carry):
        out, top, total = carry
        here = pl.ds(number * block, block)
        z = logits(q, qkv_ref[here, KEY, :], begin, number * block + jnp.arange(block), decay_ref, scale, masked)
        new = jnp.maximum(top, jnp.max(z, 1))
        weights, shrink = jnp.exp2(z - new[:, None]), jnp.exp2(top - new)
        out = out * shrink[:, None] + dot(weights.astype(q.dtype), qkv_ref[here, VALUE, :])
        return out, new, total * shrink + jnp.sum(weights, 1)

    # The diagonal first: every row then has a finite largest logit.
    carry = jnp.zeros(out_ref.shape, jnp.float32), jnp.full(size, -jnp.inf), jnp.zeros(size, jnp.float32)
    diagonal = begin // block
    carry = jax.lax.fori_loop(diagonal, diagonal + size // block, partial(step, True), carry)
    farthest = jnp.maximum(begin - reach_ref[0], 0) // block
    out, top, total = jax.lax.fori_loop(farthest, diagonal, partial(step, False), carry)
    total = total / rescale_ref[...]
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total) - decay_ref[0] * jnp.arange(size).astype(jnp.float32)


def backward_kernel(decay_ref, reach_ref, lse_ref, inner_ref, qkv_ref, g_ref, d_ref, *, scale):
    """The gradients of one block of positions: as keys and values, over the blocks of queries that can see it; as queries,
    over the blocks of keys that they can see. inner: of g and out over D, for each query.
    """
    block, count, number = BLOCK, qkv_ref.shape[0] // BLOCK, pl.program_id(0)

    def queries(other):
        """(their block's first position, q, g, lse, inner)"""
        here = pl.ds(other * block, block)
        lse = lse_ref[here] + decay_ref[0] * jnp.arange(block).astype(jnp.float32)
        return other * block, qkv_ref[here, QUERY, :], g_ref[here, :], lse, inner_ref[here]

    def keys(other):
        """(positions, k, v)"""
        here = pl.ds(other * block, block)
        return other * block + jnp.arange(block), qkv_ref[here, KEY, :], qkv_ref[here, VALUE, :]

    def pair(masked, of_queries, of_keys):
        """(D P, the gradient of the logits) between two blocks."""
        (begin, q, g, lse, inner), (positions, k, v) = of_queries, of_keys
        weights = jnp.exp2(logits(q, k, begin, positions, decay_ref, scale, masked) - lse[:, None])
        return weights.astype(q.dtype), (weights * (dot(g, v.T) - inner[:, None])).astype(q.dtype)

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
    last = jnp.minimum((number * block + block - 1 + reach_ref[0]) // block + 1, count)
    dk, dv = jax.lax.fori_loop(number + 1, last, to_keys, (dk, dv))
    dq = jax.lax.fori_loop(jnp.maximum(number * block - reach_ref[0], 0) // block, number, to_queries, dq)
    for which, gradient in ((QUERY, dq * (scale / LOG2E)), (KEY, dk * (scale / LOG2E)), (VALUE, dv)):
        d_ref[:, which, :] = gradient.astype(d_ref.dtype)


# --- Calling them -----------------------------------------------------------------------------------------------------------

def call(kernel, shape, block, inputs, outputs, interpret, stages):
    """A pallas_call over blocks of positions, sequences and heads, for qkv of a shape. inputs: what they are, each whole
    along positions, or with a * before it in blocks; outputs: [(what, dtype)], in blocks."""
    batch, length, _, heads, features = shape
    shapes = dict(row=(batch, heads, length), out=(batch, length, heads, features), qkv=shape)

    def specification(name, size, at):
        """What a program sees of an array: `size` positions of one head, of its block number i those at number at(i)."""
        return {
            "decay": pl.BlockSpec((None, 3), lambda i, b, h: (h, 0)),
            "reach": pl.BlockSpec((None, 1), lambda i, b, h: (b, h)),
            "rescale": pl.BlockSpec((None, size), lambda i, b, h: (h, at(i))),
            "row": pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, at(i))),
            "out": pl.BlockSpec((None, size, None, features), lambda i, b, h: (b, at(i), h, 0)),
            "qkv": pl.BlockSpec((None, size, 3, None, features), lambda i, b, h: (b, at(i), 0, h, 0)),
        }[name]

    in_block = lambda name: specification(name, block, lambda i: i)
    whole = lambda name: specification(name, length, lambda i: 0)
    return pl.pallas_call(
        kernel, grid=(length // block, batch, heads), interpret=interpret,
        in_specs=[in_block(name[1:]) if name.startswith("*") else whole(name) for name in inputs.split()],
        out_specs=[in_block(name) for name, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs],
        compiler_params=triton and triton.CompilerParams(num_warps=4, num_stages=stages))


def padded(x, shape, value=0):
    """x with a value added at the end of axes, up to a shape."""
    return jnp.pad(x, [(0, size - old) for size, old in zip(shape, x.shape)], constant_values=value)


def forward(qkv, decay, rescale, interpret):
    """(out, what the backward pass needs): arrays are padded to what the kernels' blocks need, and kept so."""
    batch, length, _, heads, features = qkv.shape
    size = -(-length // ROWS) * ROWS
    constants, rescale = (decay * LOG2E, reach(qkv, decay)), padded(rescale, (heads, size), 1)
    qkv = padded(qkv, (batch, size, 3, heads, max(16, pl.next_power_of_2(features))))
    kernel = call(partial(forward_kernel, scale=LOG2E / features**0.5), qkv.shape, ROWS, "decay reach *rescale qkv",
                  [("out", qkv.dtype), ("row", jnp.float32)], interpret, 3)
    out, lse = kernel(*constants, rescale, qkv)
    out = out[:, :length, :, :features]
    return out, (constants, rescale, qkv, out, lse)


def gradients(interpret, saved, g):
    """The gradient of qkv; decay and rescale are constants."""
    constants, rescale, qkv, out, lse = saved
    batch, length, heads, features = g.shape
    inner = jnp.einsum("bthk,bthk->bht", g, out, preferred_element_type=jnp.float32)        # out has D in it, inner / D not
    kernel = call(partial(backward_kernel, scale=LOG2E / features**0.5), qkv.shape, BLOCK, "decay reach row row qkv out",
                  [("qkv", qkv.dtype)], interpret, 2)
    d, = kernel(*constants, lse, padded(inner, lse.shape) / rescale, qkv, padded(g, (*qkv.shape[:2], heads, qkv.shape[-1])))
    return d[:, :length, ..., :features], None, None


attend.defvjp(forward, gradients)
