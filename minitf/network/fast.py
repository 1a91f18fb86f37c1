"""The operations of operations.py, fast. `operations` chooses; the tests hold both equal.

On a GPU, in bfloat16: attention by kernels that make no T x T array, and the blocks as a straight
program. Everywhere: gradients written out that keep less for the backward pass.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..theory.activations import SLOPES
from ..theory.families import family
from . import flash, operations as plain

STRAIGHT_BLOCKS = 48        # at most so many blocks are a straight program on a GPU, not a loop
OUR_PLAIN_LENGTH = 512      # up to so many tokens our kernel beats cuDNN's at plain attention


def hardware(device=None):
    """"cpu", "tpu", or "gpu" for an NVIDIA GPU of compute capability 8.0 or more; else "other".

    What is not known to have bfloat16, and what our kernels need, computes the plain way.
    """
    device = device or jax.devices()[0]
    if device.platform in ("cpu", "tpu"):
        return device.platform
    try:                                               # "7.5"; "gfx942" of other makers
        return "gpu" if float(getattr(device, "compute_capability", "")) >= 8 else "other"
    except ValueError:
        return "other"


def operations(config, backend=None):
    """The fastest Operations for a ModelConfig on a backend, by default the one in use."""
    fused = fuses_attention(config, backend or hardware())
    straight = fused and config.depth <= STRAIGHT_BLOCKS and not config.remat
    keep = () if config.remat else ("attended",)
    return plain.REFERENCE._replace(
        attend=attend_fused if fused else plain.attend,
        repeat=repeat_straight if straight else partial(repeat_checkpointed, keep=keep),
        activate=activate, normalise=normalise, cross_entropy=cross_entropy)


def fuses_attention(config, backend):
    """Whether attention is left to kernels that make no T x T logits: in bfloat16 on a "gpu"."""
    if backend != "gpu" or config.dtype != "bfloat16":
        return False
    ours = flash.triton() and config.attn == "espa" and config.objective == "clm"
    # cuDNN's limits, with a bias.
    return config.features % 8 == 0 and config.features <= 128 and (ours or config.length % 2 == 0)


# --- Blocks -----------------------------------------------------------------------------

# One program, block after block. A loop would stack what the backward pass is to have.
repeat_straight = partial(plain.repeat, unroll=True)


def repeat_checkpointed(step, x, layers, keep):
    """A loop that keeps x and what is named in `keep`, and makes the rest again.

    A CPU's caches then hold what it works on; compilation takes no longer for more blocks.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    return plain.repeat(jax.checkpoint(step, policy=policy), x, layers)


# --- Attention --------------------------------------------------------------------------

def attend_fused(qkv, constants, config):
    """operations.attend by our kernel where it can, else by cuDNN's flash attention."""
    length, causal = qkv.shape[1], config.objective == "clm"
    ours = config.attn == "espa" or not constants and length <= OUR_PLAIN_LENGTH
    if flash.triton() and ours and causal:
        return attend_flash(qkv, constants, config)
    q, k, v = plain.split_qkv(qkv)
    q, k = plain.apply_rope(q, config), plain.apply_rope(k, config)
    bias = None
    if constants:                                      # rounded to bfloat16, as all the rest
        position = np.arange(length)
        bias = family(config).bias_rows(constants, position[:, None], position)
        bias = (jnp.tril(bias) if causal else bias).astype(v.dtype)[None]
    out = jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, implementation="cudnn")
    return plain.scale_rows(out, constants)


def attend_flash(qkv, constants, config):
    """operations.attend by flash.py: E-SPA, or without constants causal attention."""
    names, heads = ("slope", "first_key_bias", "self_bias"), qkv.shape[3:4]
    bias = jnp.stack([constants.get(name, jnp.zeros(heads)) for name in names], -1)    # (H, 3)
    row_scale = constants.get("row_scale", jnp.ones((*heads, qkv.shape[1])))
    return flash.attend(qkv, bias, row_scale, config.position == "rope")


# --- Activations and norms --------------------------------------------------------------

def activate(x, phi):
    """phi^(x). The backward pass keeps the output of a leaky ReLU, and of others their input."""
    if phi.name not in SLOPES:
        return jax.checkpoint(plain.activate, static_argnums=1)(x, phi)
    y = leaky_relu(phi.output_scale * x, phi.slope)
    return y + phi.output_scale * phi.output_shift if phi.output_shift else y


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def leaky_relu(x, slope):
    """max(x, slope x) for 0 <= slope <= 1. The output's sign is all that its gradient needs."""
    return jnp.maximum(x, slope * x if slope else 0)


leaky_relu.defvjp(
    lambda x, slope: (leaky_relu(x, slope),) * 2,
    lambda slope, y, gradient: (jnp.where(y > 0, gradient, slope * gradient),))


def normalise(x, trained, config):
    """operations.normalise; all that the backward pass keeps is x."""
    if config.norm == "none":
        return x
    if config.norm in ("layer", "rms"):
        return normalised(x, trained, config.norm == "layer")
    return jax.checkpoint(plain.normalise, static_argnums=2)(x, trained, config)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalised(x, gain, centred):
    """Layer norm, or RMS norm without centring."""
    return (plain.standardise(x, centred)[0] * gain).astype(x.dtype)


def normalised_backward(centred, saved, g):
    (x, gain), g = saved, g.astype(jnp.float32)
    y, scale = plain.standardise(x, centred)
    inner = g * gain
    inner = inner - y * (inner * y).mean(-1, keepdims=True)
    inner = inner - (g * gain).mean(-1, keepdims=True) if centred else inner
    d_gain = (g * y).reshape(-1, len(gain)).sum(0)
    return (scale * inner).astype(x.dtype), d_gain.astype(gain.dtype)


normalised.defvjp(lambda x, gain, centred: (normalised(x, gain, centred), (x, gain)),
                  normalised_backward)

# --- Cross-entropy ----------------------------------------------------------------------

LARGEST = 70.0              # the sum of a million exp(70) is finite in float32
ALIGNED = 128               # GPUs multiply matrices with such a number of columns faster


@jax.custom_vjp
def cross_entropy(x, head, targets):
    """-log softmax(x head)[target], x (N, d), head (d, V), targets (N,) -> (N,), in float32.

    The logits are the largest array in training, so they are read once: each loss is the log of a
    sum of exp(logit - the target's). A logit LARGEST or more above the target's counts as LARGEST.
    """
    return cross_entropy_forward(x, head, targets)[0]


def cross_entropy_forward(x, head, targets):
    logits, rows = x @ aligned(head), jnp.arange(len(x))
    above = logits.astype(jnp.float32) - logits[rows, targets][:, None].astype(jnp.float32)
    columns = jnp.arange(logits.shape[1])
    weights = jnp.where(columns < head.shape[1], jnp.exp(jnp.minimum(above, LARGEST)), 0.0)
    # Exactly, though a compiler may round `logits` in one place and not in the other.
    weights = jnp.where(columns == targets[:, None], 1.0, weights)
    total = weights.sum(-1)
    # total (softmax - one-hot), in the logits' place
    error = weights.astype(x.dtype).at[rows, targets].set((1 - total).astype(x.dtype))
    return jnp.log(total), (x, head, targets, error, total)


def cross_entropy_backward(saved, gradient):
    x, head, targets, error, total = saved
    scale = (gradient / total)[:, None]
    d_x, d_head = scale * (error @ aligned(head).T), (scale * x).astype(x.dtype).T @ error
    return d_x.astype(x.dtype), d_head[:, :head.shape[1]], None


def aligned(head):
    """head (d, V) with columns of zeros up to a multiple of ALIGNED."""
    return jnp.pad(head, ((0, 0), (0, -head.shape[1] % ALIGNED)))


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)
