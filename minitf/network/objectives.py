"""What is predicted: the next token (clm), or masked ones (mlm). Shapes as in model.py."""
import jax
import jax.numpy as jnp
import numpy as np

from ..theory.kernels import MASKED
from . import model
from .operations import REFERENCE


def token_losses(params, constants, windows, config, ops=REFERENCE, draw=0):
    """Cross-entropy of each target in nats: windows (B, T + 1) of tokens -> (B, T), float32.

    objective mlm: of each masked token, times T over how many there are, so that a mean is theirs;
    0 of the others. draw: an integer; of each, other tokens are masked.
    """
    tokens, targets, weights = windows[:, :-1], windows[:, 1:], 1.0
    if config.objective == "mlm":
        targets = tokens                                                  # (B, T)
        tokens, hidden = hide(tokens, params["head"].shape[1], draw)
        weights = hidden / hidden.mean(1, keepdims=True)
    x = model.final_hidden(params, constants, tokens, config, ops)
    losses = ops.cross_entropy(x, params["head"].astype(x.dtype), targets.reshape(-1))
    return weights * losses.reshape(targets.shape)


def hide(tokens, mask, draw=0):
    """tokens (B, T) -> the same with `mask` in place of some, and which these are."""
    hidden = masked(tokens, draw)
    return jnp.where(hidden, mask, tokens), hidden


def masked(tokens, draw):
    """Which of the tokens (B, T) are masked: MASKED T of each sequence, at least one.

    Drawn by `draw` and the sequence itself, the same for every seed.
    """
    length = tokens.shape[1]
    odd = np.uint32(31) ** np.arange(length, dtype=np.uint32)
    keys = (tokens.astype(jnp.uint32) * odd).sum(1, dtype=jnp.uint32)             # a hash, (B,)
    key = jax.random.key(draw)
    order = lambda of: jax.random.permutation(jax.random.fold_in(key, of), length)
    return jax.vmap(order)(keys) < max(round(MASKED * length), 1)
