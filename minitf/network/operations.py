"""Six operations in their plain form: a block's products, attention, activation, norm, loop, loss.

fast.py has another way for each. Shapes as in model.py.
"""
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..theory.families import family


class Operations(NamedTuple):
    """How a network is computed. Whichever are chosen, the result is the same to rounding."""
    project: Callable            # (x (N, in), w (in, out)) -> (N, out), a block's products
    attend: Callable             # (qkv (B, T, 3, H, k), constants, config) -> (B, T, H, k)
    activate: Callable           # (x, Activation) -> as x
    normalise: Callable          # (x (N, d), what is trained of the norm, config) -> as x
    repeat: Callable             # (step (x, layer) -> x, x, layers (L, ...)) -> x after all blocks
    cross_entropy: Callable      # (x (N, d), head (d, V), targets (N,)) -> (N,), float32


# --- Attention ----------------------------------------------------------------------------

def attend(qkv, constants, config):
    """Attn(X) over whole sequences: qkv (B, T, 3, H, k) -> (B, T, H, k)."""
    q, k, v = split_qkv(qkv)
    return softmax_attention(apply_rope(q, config), apply_rope(k, config), v, constants, config)


def split_qkv(qkv):
    """(..., 3, H, k) -> queries, keys, values, each (..., H, k)."""
    return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def softmax_attention(q, k, v, constants, config, start=0):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V; the softmax is float32. No mask with mlm.

    q (..., S, H, k) of positions from `start`; k, v (..., T, H, k) -> (..., S, H, k). constants:
    those of a layer, with row_scale (H, S) for the queries' positions.
    """
    queries, keys = start + np.arange(q.shape[-3])[:, None], np.arange(k.shape[-3])
    bias = family(config).bias_rows(constants, queries, keys)                 # (H, S, T)
    if config.objective == "clm":
        bias = jnp.where(queries >= keys, bias, -jnp.inf)
    q = (q / np.sqrt(q.shape[-1])).astype(q.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias).astype(v.dtype)                          # (H, S, T)
    return scale_rows(jnp.einsum("...hqk,...khd->...qhd", weights, v), constants)


def causal_mean(values):
    """The mean over all positions so far: values (..., T, H, k) -> the same shape."""
    count = np.arange(1, values.shape[-3] + 1)[:, None, None]
    return (jnp.cumsum(values.astype(jnp.float32), -3) / count).astype(values.dtype)


def scale_rows(attended, constants):
    """D times what is attended to, (..., S, H, k); families without D leave it alone."""
    if "row_scale" not in constants:
        return attended
    return (constants["row_scale"].T[..., None] * attended).astype(attended.dtype)


def apply_rope(x, config, start=0):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of queries or keys x (..., S, H, k)."""
    if config.position != "rope":
        return x
    return rotate(x, rope_angles(config.length, x.shape[-1])[:, None], start)


def rope_angles(length, features):
    """The angle of each position and pair of features, (T, k / 2)."""
    half = features // 2
    return np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)


def rotate(x, angles, start=0):
    """x (..., S, ..., k) at positions from `start`, by angles (T, ..., k / 2).

    Features i and i + k/2 turn as one point.
    """
    cos, sin = (slice_positions(f(angles).astype(x.dtype), start, x.shape[-angles.ndim])
                for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def slice_positions(table, start, count):
    """`count` rows of a table (T, ...) from `start`, which may be traced."""
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, count)


# --- The others ---------------------------------------------------------------------------

def activate(x, phi):
    """phi^(x)."""
    return phi(x, jnp, jax.scipy.special)


def normalise(x, trained, config):
    """A norm of NORMS in float32, with what is trained of it; "none": x itself."""
    if config.norm == "none":
        return x
    return NORMS[config.norm](x.astype(jnp.float32), trained).astype(x.dtype)


# (x (..., d), what is trained: (d,), or a dict) -> as x. To add one: also to NORM_STARTS (init.py),
# to config.py and, unless it makes mean squares 1, to NOT_NORMS (theory/kernels.py).
NORMS = {
    "layer": lambda x, gain: standardise(x, True)[0] * gain,
    "rms": lambda x, gain: standardise(x, False)[0] * gain,
    # Zhu et al. 2025, arXiv 2503.10622; Chen et al. 2025, arXiv 2512.10938: in place of a norm.
    "dyt": lambda x, of: of["gain"] * jnp.tanh(of["slope"] * x),
    "derf": lambda x, of: of["gain"] * jax.scipy.special.erf(of["slope"] * x + of["shift"]),
}


def standardise(x, centred):
    """x (..., d) less its mean if centred, over its RMS; and 1 / RMS, (..., 1): float32."""
    y = x.astype(jnp.float32)
    if centred:
        y = y - y.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return y * scale, scale


def repeat(step, x, layers, unroll=1):
    """The blocks one after the other, as a loop; `unroll`: that many in each turn, True: all."""
    return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, layers, unroll=unroll)[0]


def cross_entropy(x, head, targets):
    """-log softmax(x head)[target]."""
    logits = (x @ head).astype(jnp.float32)
    return -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]


REFERENCE = Operations(jnp.matmul, attend, activate, normalise, repeat, cross_entropy)
