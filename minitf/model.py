"""The network: its forward pass and its parameters.

Shapes: T tokens, d = width, H heads, k = d / H, V = vocabulary, L = depth. Weights are (in, out), applied as x @ W.
N = T for one sequence; a batch is its sequences one after the other, N = B T rows, which only attention tells apart.
Every function is pure: parameters are a nested dict of arrays, constants too, the configuration is static.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from . import activations, flash
from .theory import activation, sinusoids

STRAIGHT = 48                             # blocks that a GPU runs as a straight program instead of a loop
SHORT = 512                               # tokens at which our kernel beats cuDNN's at plain attention; more were not measured


# --- The forward pass -------------------------------------------------------------------------------------------------------

def forward(params, constants, tokens, config):
    """tokens (T,) or (B, T) of integers -> logits (..., T, V), in the arithmetic's dtype. Token by token: decode.py."""
    return unembed(params, last_states(params, constants, tokens, config)).reshape(*tokens.shape, -1)


def last_states(params, constants, tokens, config):
    """tokens (T,) or (B, T) -> x (N, d), what the head is given."""
    x = embed(params, tokens, config)                                                       # (N, d)
    step = lambda x, layer: (block(x, *layer, config, tokens.shape[-1]), None)
    straight = runs_straight(config)
    if not straight:
        kept = () if config.remat else ("halfway",)
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    x, _ = jax.lax.scan(step, x, layers(params, constants, config), unroll=config.depth if straight else 1)
    return norm(x, params, "norm", config)


def layers(params, constants, config):
    """What `block` is given, of all blocks, (L, ...): weights in the arithmetic's dtype, and constants."""
    return jax.tree.map(lambda w: w.astype(compute_dtype(config)), params["blocks"]), constants


def runs_straight(config):
    """Whether the blocks are one straight program instead of a loop: where `attend` makes no T x T array, unless they are many.

    A loop copies what the backward pass is to have into arrays for all blocks, so only x and X^ are kept (--remat: x) and the rest
    is made again: a CPU's caches then hold what it works on. A loop's compilation takes no more time for more blocks.
    """
    return attends_fused(config) and config.depth <= STRAIGHT and not config.remat


def attends_fused(config):
    """Whether attention is left to kernels that make no T x T logits: bfloat16 on a GPU, for what these can do."""
    features, ours = config.width // config.heads, flash.triton and config.attn == "espa"
    able = features % 8 == 0 and features <= 128 and (ours or config.length % 2 == 0)       # cuDNN's limits with a bias
    return jax.default_backend() == "gpu" and compute_dtype(config) == "bfloat16" and able


def embed(params, tokens, config, start=0):
    """tokens (..., S) at positions from `start` -> x (N, d), of mean square 1 at initialisation."""
    x, count = params["embed"][tokens], tokens.shape[-1]                                    # (..., S, d)
    if config.position == "sinusoidal":
        x = (x + rows(sinusoids(config.length, config.width), start, count)) / np.sqrt(2)
    if config.position == "learned":
        x = (x + rows(params["position"], start, count)) / np.sqrt(2)
    return x.astype(compute_dtype(config)).reshape(-1, config.width)


def rows(table, start, count):
    """`count` rows of a table (T, ...) from `start`, which may be traced."""
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, count)


def block(x, weights, constants, config, length=None):
    """Section 2: X^ = alpha X + beta MHA(Norm(X)), X' = alpha X^ + beta MLP(Norm(X^)); x (N, d), as what returns.

    length: of each sequence, where x has several.
    """
    x = checkpoint_name(first_half(x, weights, constants, config, length), "halfway")
    return second_half(x, weights, config)


def first_half(x, weights, constants, config, length=None):
    """X -> X^."""
    return skip(x, attention(norm(x, weights, "norm1", config), weights, constants, config, length), config)


def second_half(x, weights, config):
    """X^ -> X'."""
    return skip(x, mlp(norm(x, weights, "norm2", config), weights, config), config)


def skip(x, branch, config):
    """alpha X + beta branch; a vanilla block has no first term at all."""
    return config.beta * branch if config.alpha == 0 else config.alpha * x + config.beta * branch


def attention(x, weights, constants, config, length=None):
    """All heads of one layer: x (N, d), as what returns."""
    qkv = project(x, weights, config)                                                       # (N, 3, H, k)
    sequences = qkv.reshape(-1, length or len(x), *qkv.shape[1:])                           # (B, T, 3, H, k)
    attended = attend(sequences, of_softmax(constants), config).reshape(len(x), *qkv.shape[2:])    # (N, H, k)
    return merge(x, qkv[:, 2], attended, weights, constants, config)


def project(x, weights, config):
    """x (N, d) -> queries, keys, values of the heads, one array (N, 3, H, k)."""
    together = jnp.concatenate([weights[name] for name in ("query", "key", "value")], -1)   # (d, 3 d)
    return (x @ together).reshape(len(x), 3, config.heads, -1)


def merge(x, v, attended, weights, constants, config):
    """What the heads attended to, (N, H, k), with what a token keeps of itself, by its values v or x (N, d) -> (N, d)."""
    if config.attn == "vskip":
        attended = weights["vskip_alpha"][:, None] * v + weights["vskip_beta"][:, None] * attended
    out = attended.reshape(len(v), -1) @ weights["output"]
    return out + kept(x, weights, constants) if "own" in weights else out


def of_softmax(constants):
    """What `attend` is given of a layer's constants."""
    return {name: table for name, table in constants.items() if name != "own"}


def kept(x, weights, constants):
    """What a token keeps of itself, c x W, (N, d), where that has a matrix of its own (--own).

    W^V W^O carries the signal of a network without skips, so it may change but slowly. With A = c I + P it need not: W starts
    as W^V W^O, which changes nothing, and what others say, P x W^V W^O, can be learned at the pace of other transformers.
    """
    c = jnp.tile(constants["own"][0], len(x) // constants["own"].shape[-1])[:, None]        # (N, 1)
    return (c * (x @ weights["own"])).astype(x.dtype)


def attend(qkv, constants, config):
    """Section 3, over whole sequences: qkv (B, T, 3, H, k) -> what each head attends to, (B, T, H, k).

    `softmax_attention` says what is computed, by whichever kernel.
    """
    length, fused = qkv.shape[1], attends_fused(config)
    plain = dict(decay=jnp.zeros((1, 3)), rescale=jnp.ones((1, length))) if length <= SHORT else {}
    if fused and flash.triton and "decay" in (constants or plain):
        each_head = lambda table: jnp.broadcast_to(table, (config.heads, table.shape[-1]))
        return flash.attend(turn(qkv, config, stacked=True), **jax.tree.map(each_head, constants or plain))
    q, k, v = unstack(qkv)
    return softmax_attention(turn(q, config), turn(k, config), v, **constants, fused=fused)


def unstack(qkv):
    """(..., 3, H, k) -> queries, keys and values, each (..., H, k)."""
    return tuple(qkv[..., i, :, :] for i in range(3))


def turn(x, config, start=0, stacked=False):
    """Rotary position encoding (Su et al. 2021, arXiv 2104.09864) of queries or keys x (..., S, H, k) at positions from `start`:
    features i and i + k/2, as one point, turn with position. Other encodings leave all alone.

    stacked: x (..., S, 3, H, k) is queries, keys and values, of which the last do not turn.
    """
    if config.position != "rope":
        return x
    half = x.shape[-1] // 2
    angle = (np.arange(config.length)[:, None] * 10000.0 ** (-np.arange(half) / half))[:, None]   # (T, 1, k/2)
    angle = np.stack([angle, angle, 0 * angle], 1) if stacked else angle
    cos, sin = (rows(f(angle).astype(x.dtype), start, x.shape[-4 if stacked else -3]) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def softmax_attention(q, k, v, bias=None, decay=None, rescale=None, start=0, fused=False):
    """Section 3: D softmax(mask(Q K^T / sqrt(d_k) + B)) V for each head; q (..., S, H, k); k, v (..., T, H, k) -> as q.

    B: bias, (H, S, T), -inf where j > i; or decay, (H, 3), what makes it, see decay_bias. rescale: D, (H, S). Where heads are
    alike one is enough. Without them: causal, D = 1. The softmax is float32. The queries are those of positions from `start`.
    """
    if decay is not None:
        bias = decay_bias(decay, start, q.shape[-3], k.shape[-3])
    if bias is None and not fused:
        bias = jnp.where(start + np.arange(q.shape[-3])[:, None] >= np.arange(k.shape[-3]), 0.0, -jnp.inf)
    out = (softmax_sum_fused if fused else softmax_sum)(q, k, v, bias)
    return out if rescale is None else (rescale.T[..., None] * out).astype(v.dtype)


def softmax_sum(q, k, v, bias):
    """softmax(Q K^T / sqrt(d_k) + B) V for each head: q (..., S, H, k), k, v (..., T, H, k), bias (H or 1, S, T) -> as q."""
    q = (q / np.sqrt(q.shape[-1])).astype(q.dtype)                                          # fewer numbers than logits
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits + bias).astype(v.dtype), v)


def softmax_sum_fused(q, k, v, bias):
    """The same by cuDNN's flash attention, for bfloat16: the bias, too, is rounded to it. Without one: causal."""
    if bias is not None:
        bias = jnp.tril(bias).astype(v.dtype)[None]                                         # is_causal does the mask
    return jax.nn.dot_product_attention(q, k, v, bias, is_causal=True, implementation="cudnn")


def decay_bias(decay, start, count, length):
    """B of `espa`, (H, count, length), for queries from `start`: -slope (i - j), and `first` for key 0, `own` for key i."""
    slope, first, own = decay.T[:, :, None, None]
    lag = start + np.arange(count)[:, None] - np.arange(length)
    bias = -slope * lag + jnp.where(np.arange(length) == 0, first, 0.0) + jnp.where(lag == 0, own, 0.0)
    return jnp.where(lag >= 0, bias, -jnp.inf)


def mlp(x, weights, config):
    """One non-linearity between d -> 4d and 4d -> d: x (N, d), as what returns."""
    return activation(config)(x @ weights["up"]) @ weights["down"]


def unembed(params, x):
    """x (N, d) -> logits (N, V)."""
    return x @ params["head"].astype(x.dtype)


def norm(x, weights, name, config):
    """The configured normalisation of x (..., d) over features, in float32, with a trained gain; identity for "none"."""
    return x if config.norm == "none" else normalised(x, weights[name], config.norm == "layer")


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalised(x, gain, centred):
    """Layer norm, or without centring RMS norm. All that the backward pass keeps is x."""
    return (standardised(x, centred)[0] * gain).astype(x.dtype)


def standardised(x, centred):
    """x (..., d), less its mean if centred, over its root mean square; and one over that, (..., 1): both float32."""
    y = x.astype(jnp.float32)
    if centred:
        y = y - y.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return y * scale, scale


def normalised_backward(centred, saved, g):
    (x, gain), g = saved, g.astype(jnp.float32)
    y, scale = standardised(x, centred)
    inner = g * gain
    inner = inner - y * (inner * y).mean(-1, keepdims=True) - (inner.mean(-1, keepdims=True) if centred else 0)
    return (scale * inner).astype(x.dtype), (g * y).reshape(-1, len(gain)).sum(0).astype(gain.dtype)


normalised.defvjp(lambda x, gain, centred: (normalised(x, gain, centred), (x, gain)), normalised_backward)


def compute_dtype(config):
    """The arithmetic's dtype; parameters are float32."""
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


# --- Parameters -----------------------------------------------------------------------------------------------------------

def init(key, config, vocabulary):
    """Section 6: the parameters, a nested dict of float32 arrays; those of the blocks are stacked, (L, ...)."""
    d, depth = config.width, config.depth
    keys = iter(jax.random.split(key, 9))
    gaussian = lambda *shape, std=1.0: std * jax.random.normal(next(keys), shape)
    orthogonal = jax.nn.initializers.orthogonal()

    def frames(fan_in, fan_out):
        """(L, in, out) of orthonormal rows or columns, whichever are fewer."""
        # One after the other: batched QR decompositions side by side can wait for each other for ever on a small CPU.
        return jax.lax.map(lambda key: orthogonal(key, (fan_in, fan_out)), jax.random.split(next(keys), depth))

    def matrix(fan_in, fan_out, std=1.0):
        """(L, in, out), keeping mean squares in expectation: orthogonal times max(sqrt(out/in), 1), or N(0, 1/in)."""
        if config.init == "gaussian":
            return gaussian(depth, fan_in, fan_out, std=std * fan_in**-0.5)
        return std * max((fan_out / fan_in)**0.5, 1) * frames(fan_in, fan_out)

    def mirrored(std):
        """up, down of an MLP that starts as a rotation, x -> std x R: half of the hidden units see the negative of what the
        others see, and what they say is subtracted: phi(z) - phi(-z) = m z (Balduzzi et al. 2017, arXiv 1702.08591)."""
        u, r, m = frames(d, 2 * d), frames(d, d), activations.odd_slope(activation(config))
        up, down = np.sqrt(2) * u, std / (np.sqrt(2) * m) * jnp.swapaxes(u, 1, 2) @ r
        return jnp.concatenate([up, -up], 2), jnp.concatenate([down, -down], 1)

    # Unweighted skips add up 2 L branches: GPT-2 (Radford et al. 2019) starts each at 1/sqrt(2 L).
    branch = (2 * depth)**-0.5 if config.alpha == config.beta == 1 else 1.0
    query = gaussian(depth, d, d, std=d**-0.5)
    up, down = mirrored(branch) if config.init == "looks_linear" else (matrix(d, 4 * d), matrix(4 * d, d, branch))
    blocks = {
        "query": query if config.attn == "softmax" else jnp.zeros_like(query),
        "key": gaussian(depth, d, d, std=d**-0.5),
        "value": matrix(d, d),
        "output": matrix(d, d, branch),
        "up": up,
        "down": down,
    }
    # Without norms the tokens of the last layer are alike: a random head would give all of them the same wrong logits,
    # to be unlearned first, so it starts at zero. With a final norm the customary random one learns faster.
    head = gaussian(d, vocabulary, std=d**-0.5 if config.norm != "none" else 0.0)
    params = {"embed": gaussian(vocabulary, d), "blocks": blocks, "head": head}
    if config.own:
        blocks["own"] = jnp.matmul(blocks["value"], blocks["output"], precision="highest")
    if config.attn == "vskip":                                                              # A <- 1 I + 0 A(X)
        blocks["vskip_alpha"], blocks["vskip_beta"] = jnp.ones((depth, config.heads)), jnp.zeros((depth, config.heads))
    if config.norm != "none":
        blocks["norm1"], blocks["norm2"], params["norm"] = jnp.ones((depth, d)), jnp.ones((depth, d)), jnp.ones(d)
    if config.position == "learned":
        params["position"] = gaussian(config.length, d)
    return params
