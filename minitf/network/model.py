"""The network as formulas: the forward pass. What makes it fast is elsewhere.

    X^ = alpha X  + beta MHA(Norm(X))         no skips: alpha = 0, beta = 1
    X' = alpha X^ + beta MLP(Norm(X^))        no norms: Norm = identity

Shapes: T tokens, d = width, H heads of k features, n = H k, which is d but with extra heads, V =
vocabulary, L = depth. Weights are (in, out), applied as x @ W. A batch is its sequences one after
the other, N = B T rows, which only attention tells apart. Functions are pure. Parameters and
constants are nested dicts of arrays, `config` is a static ModelConfig. `ops` says how six
operations are computed: plainly, as in operations.py, or as fast.py does.
"""
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..errors import require
from ..theory.families import family
from ..theory.kernels import network_activation
from .operations import REFERENCE, causal_mean, slice_positions, standardise


def forward(params: dict, constants: dict, tokens, config, ops=REFERENCE) -> jax.Array:
    """tokens (S,) or (B, S) of integers, S <= T -> logits (..., S, V), in config.dtype.

    constants: those of `attention_constants`. Token by token: decode.py. ValueError for longer
    sequences, and for tokens that are none of the vocabulary's. With objective mlm V is the mask.
    """
    tokens = check_tokens(tokens, len(params["embed"]), config.length)
    require(config.objective == "clm" or tokens.shape[-1] == config.length,
            f"with objective mlm a sequence must have {config.length} tokens")
    # What is added behind changes nothing before it.
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, config.length - tokens.shape[-1])])
    x = final_hidden(params, constants, padded, config, ops).reshape(*padded.shape, -1)
    return unembed(params, x[..., :tokens.shape[-1], :])


def final_hidden(params, constants, tokens, config, ops):
    """tokens (..., T) -> x (N, d), which the head is given."""
    x = embed(params, tokens, config)                                     # (N, d)
    step = lambda x, layer: block(x, *layer, config, ops)
    x = ops.repeat(step, x, layers(params, constants, config))            # (N, d)
    return ops.normalise(x, params.get("norm"), config)


def layers(params, constants, config):
    """Weights, in config.dtype, and constants of all blocks, each (L, ...).

    W^Q, W^K and W^V, if there is one, stand side by side, "qkv", (L, d, 3 n): they are one product.
    """
    weights = jax.tree.map(lambda w: w.astype(config.dtype), params["blocks"])
    names = [name for name in ("query", "key", "value") if name in weights]
    weights["qkv"] = jnp.concatenate([weights.pop(name) for name in names], -1)
    return weights, constants


def embed(params, tokens, config, start=0):
    """tokens (..., S) at positions from `start` -> x (N, d), mean square 1 at the start."""
    x = params["embed"][tokens]                                           # (..., S, d)
    if config.position == "learned":
        x = (x + slice_positions(params["position"], start, tokens.shape[-1])) / np.sqrt(2)
    return x.astype(config.dtype).reshape(-1, config.width)


def unembed(params, x):
    """x (..., d) -> logits (..., V)."""
    return x @ params["head"].astype(x.dtype)


def block(x, weights, constants, config, ops):
    """One block: x (N, d) -> (N, d), with the weights and constants of its layer."""
    attended = attention_sublayer(x, weights, constants, config, ops)
    return after_attention(x, checkpoint_name(attended, "attended"), weights, config, ops)


def after_attention(x, attended, weights, config, ops):
    """X' from X^, or in parallel from X: their sum, as in SAS-P."""
    if config.parallel:
        return attended + mlp_sublayer(x, weights, config, ops)
    return mlp_sublayer(attended, weights, config, ops)


def attention_sublayer(x, weights, constants, config, ops):
    """X^ = alpha X + beta MHA(Norm(X))."""
    y = ops.normalise(x, weights.get("norm1"), config)                    # (N, d)
    qkv = project_qkv(y, weights, config, ops)                            # (N, 3, H, k)
    sequences = qkv.reshape(-1, config.length, *qkv.shape[1:])            # (B, T, 3, H, k)
    attended = ops.attend(sequences, constants, config)                   # (B, T, H, k)
    values = sequences[:, :, 2]                                           # (B, T, H, k)
    mean = causal_mean(values) if family(config).centred else None
    branch = output_projection(values, attended, mean, weights, config, ops)        # (N, d)
    return add_residual(x, branch, ("alpha", "beta"), weights, config, constants.get("skip_scale"))


def mlp_sublayer(x, weights, config, ops):
    """X' = alpha X^ + beta MLP(Norm(X^)), MLP(X) = phi^(X W_1) W_2: d -> hidden -> d."""
    y = ops.normalise(x, weights.get("norm2"), config)                    # (N, d)
    hidden = ops.project(y, weights["up"])                                # (N, hidden)
    hidden = ops.activate(hidden, network_activation(config))             # (N, hidden)
    branch = ops.project(hidden, weights["down"])                         # (N, d)
    return add_residual(x, branch, ("mlp_alpha", "mlp_beta"), weights, config)


def project_qkv(x, weights, config, ops):
    """x (N, d) -> queries, keys and values of all heads, (N, 3, H, k)."""
    qkv = ops.project(x, weights["qkv"])                                  # (N, 3 n), or (N, 2 d)
    if config.identity_values:
        qkv = jnp.concatenate([qkv, x], -1)
    qkv = qkv.reshape(len(x), 3, config.all_heads, config.features)
    if config.qk_norm:                                                    # each head's, RMS norm
        gains = jnp.stack([weights["query_gain"], weights["key_gain"]])[:, None]
        qk = (standardise(qkv[:, :2], False)[0] * gains).astype(x.dtype)
        qkv = jnp.concatenate([qk, qkv[:, 2:]], 1)
    return qkv


def output_projection(values, attended, mean, weights, config, ops):
    """values, what is attended to and perhaps the mean, (..., H, k) -> (N, d)."""
    heads = family(config).mix(weights, values, attended, mean)
    heads = heads.reshape(-1, config.attention_width)
    return heads if config.identity_values else ops.project(heads, weights["output"])


def add_residual(x, branch, names, weights, config, skip_scale=None):
    """alpha X + beta branch; no skip: the branch alone; identity_skip: skip_scale X + branch.

    names: those of alpha and beta, trained ones among the weights, or the settings'.
    """
    if skip_scale is not None:                                            # (T,), of each sequence
        scale = jnp.tile(skip_scale, len(x) // len(skip_scale))[:, None]
        return (scale * x).astype(x.dtype) + branch
    alpha, beta = (weights.get(name, getattr(config, name)) for name in names)
    return beta * branch if getattr(config, names[0]) == 0 else alpha * x + beta * branch


def check_tokens(tokens, vocabulary, longest=None):
    """Tokens, perhaps a list, as an array of integers (S,) or (B, S); ValueError if they are not.

    Of what is traced only the shape can be checked.
    """
    traced = isinstance(tokens, jax.core.Tracer)
    tokens = tokens if traced else np.asarray(tokens)
    require(jnp.issubdtype(tokens.dtype, jnp.integer) and tokens.ndim in (1, 2) and tokens.size,
            "tokens must be integers, a sequence or several of one length, at least one token")
    require(longest is None or tokens.shape[-1] <= longest,
            f"a sequence must have at most {longest} tokens, not {tokens.shape[-1]}")
    require(traced or 0 <= tokens.min() and tokens.max() < vocabulary,
            f"tokens must be 0 to {vocabulary - 1}")
    return tokens
