"""The network as formulas: forward pass, loss, initialisation. Nothing here is fast by trickery.

    X^ = alpha X  + beta MHA(Norm(X))         no skips: alpha = 0, beta = 1
    X' = alpha X^ + beta MLP(Norm(X^))        no norms: Norm = identity

Shapes: T tokens, d = width, H heads, k = d / H, V = vocabulary, L = depth. Weights are (in, out),
applied as x @ W. A batch is its sequences one after the other, N = B T rows, which only attention
tells apart. Functions are pure. Parameters and constants are nested dicts of arrays, `config` is
a static ModelConfig, `ops` is how four operations are computed: as below, or as fast.py does.
"""
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..theory.families import FAMILIES
from ..theory.kernels import network_activation

# --- The forward pass -------------------------------------------------------------------


def forward(params, constants, tokens, config, ops=None):
    """tokens (T,) or (B, T) of integers -> logits (..., T, V), in config.dtype.

    constants: those of `attention_constants`. Token by token: decode.py.
    """
    x = final_hidden(params, constants, tokens, config, ops or REFERENCE)
    return unembed(params, x).reshape(*tokens.shape, -1)


def token_losses(params, constants, windows, config, ops=None):
    """Cross-entropy of each target in nats: windows (B, T + 1) of tokens -> (B, T), float32."""
    ops = ops or REFERENCE
    targets = windows[:, 1:]
    x = final_hidden(params, constants, windows[:, :-1], config, ops)
    losses = ops.cross_entropy(x, params["head"].astype(x.dtype), targets.reshape(-1))
    return losses.reshape(targets.shape)


def final_hidden(params, constants, tokens, config, ops):
    """tokens (..., T) -> x (N, d), which the head is given."""
    x = embed(params, tokens, config)                                     # (N, d)
    step = lambda x, layer: block(x, *layer, config, ops)
    x = ops.repeat(step, x, layers(params, constants, config))            # (N, d)
    return ops.normalise(x, params.get("norm"), config)


def layers(params, constants, config):
    """Weights, in config.dtype, and constants of all blocks, each (L, ...)."""
    return jax.tree.map(lambda w: w.astype(config.dtype), params["blocks"]), constants


def embed(params, tokens, config, start=0):
    """tokens (..., S) at positions from `start` -> x (N, d), mean square 1 at the start."""
    x = params["embed"][tokens]                                           # (..., S, d)
    if config.position == "learned":
        x = (x + slice_positions(params["position"], start, tokens.shape[-1])) / np.sqrt(2)
    return x.astype(config.dtype).reshape(-1, config.width)


def slice_positions(table, start, count):
    """`count` rows of a table (T, ...) from `start`, which may be traced."""
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, count)


def unembed(params, x):
    """x (N, d) -> logits (N, V)."""
    return x @ params["head"].astype(x.dtype)


def block(x, weights, constants, config, ops):
    """One block: x (N, d) -> (N, d), with the weights and constants of its layer."""
    x = attention_sublayer(x, weights, constants, config, ops)
    return mlp_sublayer(checkpoint_name(x, "attended"), weights, config, ops)


def attention_sublayer(x, weights, constants, config, ops):
    """X^ = alpha X + beta MHA(Norm(X))."""
    y = ops.normalise(x, weights.get("norm1"), config)                    # (N, d)
    qkv = project_qkv(y, weights, config)                                 # (N, 3, H, k)
    sequences = qkv.reshape(-1, config.length, *qkv.shape[1:])            # (B, T, 3, H, k)
    attended = ops.attend(sequences, constants, config)                   # (B, T, H, k)
    attended = attended.reshape(len(x), *qkv.shape[2:])                   # (N, H, k)
    branch = output_projection(qkv[:, 2], attended, weights, config)      # (N, d)
    return add_residual(x, branch, constants.get("skip_scale"), config)


def mlp_sublayer(x, weights, config, ops):
    """X' = alpha X^ + beta MLP(Norm(X^)), MLP(X) = phi^(X W_1) W_2: d -> 4d -> d."""
    y = ops.normalise(x, weights.get("norm2"), config)                    # (N, d)
    hidden = ops.activate(y @ weights["up"], network_activation(config))  # (N, 4d)
    return add_residual(x, hidden @ weights["down"], None, config)


def add_residual(x, branch, skip_scale, config):
    """alpha X + beta branch. No skip: the branch itself. identity_skip: skip_scale X + branch."""
    if skip_scale is not None:                                            # (T,), of each sequence
        scale = jnp.tile(skip_scale, len(x) // len(skip_scale))[:, None]
        return (scale * x).astype(x.dtype) + branch
    return config.beta * branch if config.alpha == 0 else config.alpha * x + config.beta * branch


# --- Attention --------------------------------------------------------------------------


def project_qkv(x, weights, config):
    """x (N, d) -> queries, keys and values of all heads, (N, 3, H, k)."""
    together = jnp.concatenate([weights[name] for name in ("query", "key", "value")], -1)
    return (x @ together).reshape(len(x), 3, config.heads, -1)


def split_qkv(qkv):
    """(..., 3, H, k) -> queries, keys, values, each (..., H, k)."""
    return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def output_projection(values, attended, weights, config):
    """values and what is attended to, both (N, H, k) -> (N, d)."""
    heads = FAMILIES[config.attn].mix(weights, values, attended)
    return heads.reshape(len(values), -1) @ weights["output"]


def attend(qkv, constants, config):
    """Attn(X) over whole sequences: qkv (B, T, 3, H, k) -> (B, T, H, k)."""
    q, k, v = split_qkv(qkv)
    q, k = apply_rope(q, config), apply_rope(k, config)
    return softmax_attention(q, k, v, constants, config)


def softmax_attention(q, k, v, constants, config, start=0):
    """D softmax(mask(Q K^T / sqrt(d_k) + B)) V; the softmax is float32.

    q (..., S, H, k) of positions from `start`; k, v (..., T, H, k) -> (..., S, H, k). constants:
    those of a layer, its row_scale (H, S) for the queries' positions.
    """
    queries, keys = start + np.arange(q.shape[-3])[:, None], np.arange(k.shape[-3])
    bias = FAMILIES[config.attn].bias_rows(constants, queries, keys)                 # (H, S, T)
    bias = jnp.where(queries >= keys, bias, -jnp.inf)
    q = (q / np.sqrt(q.shape[-1])).astype(q.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias).astype(v.dtype)                          # (H, S, T)
    return scale_rows(jnp.einsum("...hqk,...khd->...qhd", weights, v), constants)


def scale_rows(attended, constants):
    """D times what is attended to, (..., S, H, k); families without D leave it alone."""
    if "row_scale" not in constants:
        return attended
    return (constants["row_scale"].T[..., None] * attended).astype(attended.dtype)


def apply_rope(x, config, start=0):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of queries or keys x (..., S, H, k)."""
    return rotate(x, rope_angles(config)[:, None], start) if config.position == "rope" else x


def rope_angles(config):
    """The angle of each position and pair of features, (T, k / 2)."""
    half = config.width // config.heads // 2
    return np.arange(config.length)[:, None] * 10000.0 ** (-np.arange(half) / half)


def rotate(x, angles, start=0):
    """x (..., S, ..., k) at positions from `start`, by angles (T, ..., k / 2).

    Features i and i + k/2 turn as one point.
    """
    cos, sin = (slice_positions(f(angles).astype(x.dtype), start, x.shape[-angles.ndim])
                for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# --- The operations that fast.py has another way for ------------------------------------


class Operations(NamedTuple):
    """How a network is computed. All of a kind give the same, to rounding."""
    attend: Callable             # (qkv (B, T, 3, H, k), constants, config) -> (B, T, H, k)
    activate: Callable           # (x, Activation) -> as x
    normalise: Callable          # (x (N, d), gain (d,), config) -> as x
    repeat: Callable             # (step (x, layer) -> x, x, layers (L, ...)) -> x after all blocks
    cross_entropy: Callable      # (x (N, d), head (d, V), targets (N,)) -> (N,), float32


def activate(x, phi):
    """phi^(x)."""
    return phi(x, jnp, jax.scipy.special)


def normalise(x, gain, config):
    """Layer norm or RMS norm over features in float32, with a trained gain; "none": x itself."""
    if config.norm == "none":
        return x
    return (standardise(x, config.norm == "layer")[0] * gain).astype(x.dtype)


def standardise(x, centred):
    """x (..., d) less its mean if centred, over its RMS; and 1 / RMS, (..., 1): float32."""
    y = x.astype(jnp.float32)
    if centred:
        y = y - y.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return y * scale, scale


def repeat(step, x, layers):
    """The blocks one after the other, as a loop."""
    return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, layers)[0]


def cross_entropy(x, head, targets):
    """-log softmax(x head)[target]."""
    logits = (x @ head).astype(jnp.float32)
    return -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]


REFERENCE = Operations(attend, activate, normalise, repeat, cross_entropy)
