"""Exponential signal-preserving attention without a T x T array: kernels for NVIDIA GPUs, in Pallas.

A row of log A, less a constant of the row, is a decay with distance, -slope |i - j|, and two exceptions: the first key
and the own one (spa.exponential_decay). So the bias is made where it is used, and memory is O(T). The decay also says
which keys are too far away to be seen in float32, whatever their logits: those are not visited (`reach`).

Queries, keys and values come as the one array that a matrix product made, and their gradients go back as one: they are
turned by their positions here, so that nothing but the kernels reads or writes them.

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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(qkv, angles, decay, rescale, interpret=False):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V, Q and K turned: qkv (B, T, 3, H, k) -> (B, T, H, k); differentiable in qkv.

    angles (2, T, k/2): cos and sin by which features i and i + k/2 turn. decay (3,) makes B; rescale (T,) is D.
    `interpret` runs it anywhere, slowly: for tests.
    """
    return forward(qkv, angles, decay, rescale, interpret)[0]


def reach(qkv, decay):
    """How many tokens back a key can weigh 2**-24 of a row or more, at most: (B, H) of int32.

    Key j has at most exp(2 M - slope (i - j)) times the weight of the own one, where |logits| <= M = |q| |k| / sqrt(d_k)
    for the longest query and key; all those further back than n have together exp(2 M - slope n) / (1 - exp(-slope)).
    """
    squares = jnp.max(jnp.sum(jnp.square(qkv[:, :, :2].astype(jnp.float32)), -1), 1)        # (B, 2, H)
    slope, first, _ = decay
    logits = 2 * jnp.sqrt(squares[:, 0]) * jnp.sqrt(squares[:, 1]) / np.sqrt(qkv.shape[-1])
    tail = jnp.logaddexp(-jnp.log(-jnp.expm1(-slope)), first)
    return jnp.minimum((logits + tail + UNSEEN / LOG2E) / slope + 1, 2.0**30).astype(jnp.int32)


# --- The kernels: one block of positions of one head. qkv_ref is (T, 3, k), angles_ref (2, T, k/2), all others (T, ...) -----

QUERY, KEY, VALUE = range(3)


def turned(qkv_ref, which, here, angles_ref):
    """Queries or keys at positions `here` -> their first and second halves, each (n, k/2), turned."""
    half = qkv_ref.shape[-1] // 2
    a, b = (qkv_ref[here, which, pl.ds(start, half)].astype(jnp.float32) for start in (0, half))
    cos, sin = (angles_ref[i, here, :].astype(jnp.float32) for i in (0, 1))
    return (a * cos - b * sin).astype(qkv_ref.dtype), (a * sin + b * cos).astype(qkv_ref.dtype)


def turn_back(gradients, here, angles_ref):
    """What `turned` does to a gradient of its result."""
    a, b = gradients
    cos, sin = (angles_ref[i, here, :].astype(jnp.float32) for i in (0, 1))
    return a * cos + b * sin, b * cos - a * sin


def dot(x, y):
    """Sums of products over the last axes of both, in float32."""
    return jnp.dot(x, y.T, preferred_element_type=jnp.float32)


def logits(q, k, begin, keys, decay_ref, scale, masked):
    """Blocks of queries from position `begin` and of keys at positions `keys` -> logits to base 2, with B + slope (i - begin)."""
    slope, first, own = decay_ref[0], decay_ref[1], decay_ref[2]
    bias = slope * (keys - begin).astype(jnp.float32) + jnp.where(keys == 0, first, 0.0)
    z = (dot(q[0], k[0]) + dot(q[1], k[1])) * scale + bias[None, :]
    if masked:
        lag = (begin + jnp.arange(len(q[0])))[:, None] - keys[None, :]
        z = jnp.where(lag > 0, z, jnp.where(lag == 0, z + own, -jnp.inf))
    return z


def forward_kernel(decay_ref, reach_ref, rescale_ref, angles_ref, qkv_ref, out_ref, lse_ref, *, scale):
    """One block of queries: out, and the log of the sum of the row's weights, relative to the own key's distance 0."""
    size, block = out_ref.shape[0], BLOCK
    begin = pl.program_id(0) * size
    q = turned(qkv_ref, QUERY, pl.ds(begin, size), angles_ref)

    def step(masked, number, carry):
        out, top, total = carry
        here = pl.ds(number * block, block)
        k, keys = turned(qkv_ref, KEY, here, angles_ref), number * block + jnp.arange(block)
        z = logits(q, k, begin, keys, decay_ref, scale, masked)
        new = jnp.maximum(top, jnp.max(z, 1))
        weights, shrink = jnp.exp2(z - new[:, None]), jnp.exp2(top - new)
        v = qkv_ref[here, VALUE, :]
        out = out * shrink[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out, new, total * shrink + jnp.sum(weights, 1)

    # The diagonal first: every row then has a finite largest logit.
    carry = jnp.zeros(out_ref.shape, jnp.float32), jnp.full(size, -jnp.inf), jnp.zeros(size, jnp.float32)
    diagonal = begin // block
    carry = jax.lax.fori_loop(diagonal, diagonal + size // block, partial(step, True), carry)
    farthest = jnp.maximum(begin - reach_ref[0], 0) // block
    out, top, total = jax.lax.fori_loop(farthest, diagonal, partial(step, False), carry)
    out_ref[...] = (out * (rescale_ref[pl.ds(begin, size)] / total)[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total) - decay_ref[0] * jnp.arange(size).astype(jnp.float32)


def backward_kernel(decay_ref, reach_ref, rescale_ref, angles_ref, lse_ref, dot_ref, qkv_ref, g_ref, d_ref, *, scale):
    """The gradients of one block of positions: as keys and values, over the blocks of queries that can see it; as queries,
    over the blocks of keys that they can see. lse and dot (the sum of g times out, without D) are of queries.
    """
    block, count, number = BLOCK, qkv_ref.shape[0] // BLOCK, pl.program_id(0)

    def queries(other):
        """(their block's first position, q, gradient of what they attended to, lse, dot)"""
        here = pl.ds(other * block, block)
        g = (g_ref[here, :] * rescale_ref[here][:, None]).astype(g_ref.dtype)
        lse = lse_ref[here] + decay_ref[0] * jnp.arange(block).astype(jnp.float32)
        return other * block, turned(qkv_ref, QUERY, here, angles_ref), g, lse, dot_ref[here]

    def keys(other):
        """(positions, k, v)"""
        here = pl.ds(other * block, block)
        return other * block + jnp.arange(block), turned(qkv_ref, KEY, here, angles_ref), qkv_ref[here, VALUE, :]

    def pair(masked, of_queries, of_keys):
        """(P, the gradient of the logits) of two blocks."""
        begin, q, g, lse, inner = of_queries
        positions, k, v = of_keys
        weights = jnp.exp2(logits(q, k, begin, positions, decay_ref, scale, masked) - lse[:, None])
        dz = weights * (dot(g, v) - inner[:, None])
        return weights.astype(v.dtype), dz.astype(v.dtype)

    def to_keys(masked, of_keys, other, gradients):
        """The gradients of keys (in halves) and values, with what one block of queries adds to them."""
        dk0, dk1, dv = gradients
        of_queries = queries(other)
        weights, dz = pair(masked, of_queries, of_keys)
        _, (q0, q1), g, *_ = of_queries
        return dk0 + dot(dz.T, q0.T), dk1 + dot(dz.T, q1.T), dv + dot(weights.T, g.T)

    def to_queries(masked, of_queries, other, gradients):
        """Those of queries, with what one block of keys adds."""
        dq0, dq1 = gradients
        of_keys = keys(other)
        _, dz = pair(masked, of_queries, of_keys)
        _, (k0, k1), _ = of_keys
        return dq0 + dot(dz, k0.T), dq1 + dot(dz, k1.T)

    here, half = pl.ds(number * block, block), qkv_ref.shape[-1] // 2
    zeros = jnp.zeros((block, half), jnp.float32)
    own = keys(number)
    last = jnp.minimum((number * block + block - 1 + reach_ref[0]) // block + 1, count)
    gradients = to_keys(True, own, number, (zeros, zeros, jnp.zeros((block, 2 * half), jnp.float32)))
    *dk, dv = jax.lax.fori_loop(number + 1, last, partial(to_keys, False, own), gradients)
    d_ref[:, VALUE, :] = dv.astype(d_ref.dtype)
    own = queries(number)
    farthest = jnp.maximum(number * block - reach_ref[0], 0) // block
    gradients = to_queries(True, own, number, (zeros, zeros))
    dq = jax.lax.fori_loop(farthest, number, partial(to_queries, False, own), gradients)
    for which, gradients in ((QUERY, dq), (KEY, dk)):
        for start, x in zip((0, half), turn_back(gradients, here, angles_ref)):
            d_ref[:, which, pl.ds(start, half)] = (x * (scale / LOG2E)).astype(d_ref.dtype)


# --- Calling them -------------------------------------------------------------------------------------------------------------

def call(kernel, shape, block, inputs, outputs, interpret, stages, warps):
    """A pallas_call over blocks of positions, sequences and heads, for qkv of a shape. inputs: what they are, in words, each
    whole along positions; outputs: [(what, dtype)], in blocks of them."""
    batch, length, _, heads, features = shape
    whole = dict(decay=(3,), reach=(batch, heads), rescale=(length,), angles=(2, length, features // 2),
                 row=(batch, heads, length), out=(batch, length, heads, features), qkv=shape)

    def specification(name, size):
        return {
            "decay": pl.BlockSpec((3,), lambda i, b, h: (0,)),
            "reach": pl.BlockSpec((None, 1), lambda i, b, h: (b, h)),
            "rescale": pl.BlockSpec((size,), lambda i, b, h: (0,)),
            "angles": pl.BlockSpec((2, size, features // 2), lambda i, b, h: (0, 0, 0)),
            "row": pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, i if size == block else 0)),
            "out": pl.BlockSpec((None, size, None, features), lambda i, b, h: (b, i if size == block else 0, h, 0)),
            "qkv": pl.BlockSpec((None, size, 3, None, features), lambda i, b, h: (b, i if size == block else 0, 0, h, 0)),
        }[name]

    return pl.pallas_call(
        kernel, grid=(length // block, batch, heads), in_specs=[specification(name, length) for name in inputs.split()],
        out_specs=[specification(name, block) for name, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(whole[name], dtype) for name, dtype in outputs], interpret=interpret,
        compiler_params=triton and triton.CompilerParams(num_warps=warps, num_stages=stages))


def fit(x, length, half):
    """(B, T, ..., k) with zeros added: to `length` positions and, in each half of the features, to `half`."""
    x = x.reshape(*x.shape[:-1], 2, -1)
    missing = [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 3), (0, half - x.shape[-1])]
    return jnp.pad(x, missing).reshape(x.shape[0], length, *x.shape[2:-2], -1)


def unfit(x, length, half):
    """The same without them."""
    return x[:, :length].reshape(x.shape[0], length, *x.shape[2:-1], 2, -1)[..., :half].reshape(x.shape[0], length, *x.shape[2:-1], -1)


def forward(qkv, angles, decay, rescale, interpret):
    """(out, what the backward pass needs): arrays are padded to what the kernels' blocks need, and kept so."""
    _, length, _, _, features = qkv.shape
    size, half = -(-length // QUERIES) * QUERIES, max(16, pl.next_power_of_2(features // 2))
    angles = jnp.pad(angles, ((0, 0), (0, size - length), (0, half - features // 2)))
    constants = decay * LOG2E, reach(qkv, decay), jnp.pad(rescale, (0, size - length)), angles
    qkv = fit(qkv, size, half)
    kernel = call(partial(forward_kernel, scale=LOG2E / features**0.5), qkv.shape, QUERIES, "decay reach rescale angles qkv",
                  [("out", qkv.dtype), ("row", jnp.float32)], interpret, 3, 4)
    out, lse = kernel(*constants, qkv)
    out = unfit(out, length, features // 2)
    return out, (constants, qkv, out, lse)


def gradients(interpret, saved, g):
    """The gradient of qkv; all else is constant."""
    constants, qkv, out, lse = saved
    _, length, _, features = g.shape
    inner = jnp.einsum("bthk,bthk->bht", g, out, preferred_element_type=jnp.float32)
    inner = jnp.pad(inner, ((0, 0), (0, 0), (0, lse.shape[-1] - length)))
    kernel = call(partial(backward_kernel, scale=LOG2E / features**0.5), qkv.shape, BLOCK,
                  "decay reach rescale angles row row qkv out", [("qkv", qkv.dtype)], interpret, 2, 4)
    d, = kernel(*constants, lse, inner, qkv, fit(g, qkv.shape[1], qkv.shape[-1] // 2))
    return unfit(d, length, features // 2), None, None, None


attend.defvjp(forward, gradients)
