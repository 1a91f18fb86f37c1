"""Training: one compiled step, and losses on text that is not trained on."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..network import fast, objectives
from ..network.operations import REFERENCE
from ..network.quantize import few_bits
from . import sharding
from .optimizer import make_optimizer


def token_losses(params, constants, batch, config, ops, draw=0):
    """objectives.token_losses, on the mesh in use if there is one."""
    outer = sharding.whole({name: part for name, part in params.items() if name != "blocks"})
    return objectives.token_losses(params | outer, constants, batch, config,
                                   sharding.distribute(ops), draw)


def loss(params, constants, batch, config, draw=0):
    """Mean cross-entropy in nats per token; batch (B, T + 1) of tokens. draw: of masked ones."""
    return token_losses(params, constants, batch, config, fast.operations(config), draw).mean()


def loss_and_gradient(params, constants, batch, config, parts, draw=0):
    """(loss, its gradient), of `parts` equal parts of the batch, one after the other."""
    of_part = lambda part: jax.value_and_grad(loss)(params, constants, part, config, draw)
    if parts == 1:
        return of_part(batch)
    # Part i has every row i, i + parts, ...: on several devices, some of each one's.
    batch = jnp.swapaxes(batch.reshape(-1, parts, batch.shape[1]), 0, 1)
    add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
    zeros = jnp.float32(0), sharding.constrain(jax.tree.map(jnp.zeros_like, params))
    return jax.tree.map(lambda sum: sum / parts, jax.lax.scan(add, zeros, batch)[0])


@partial(jax.jit, static_argnames=("config", "optimizer", "parts"), donate_argnums=(0, 1))
def train_step(params, opt_state, constants, rates, learning_rate, batch, config, optimizer,
               parts=1, draw=0):
    """One update: (params, opt_state, metrics). Old buffers are given up.

    Args:
      constants: those of `attention_constants`.
      rates, learning_rate: those of `optimizer.group_rates` and of this step.
      batch: (B, T + 1) of tokens.
      config, optimizer: a ModelConfig and an optimizer's name; static, as nothing else is but
      parts: in how many parts the batch is computed, which must divide B.
      draw: a number, with which other tokens are masked (objective mlm).
    Returns metrics {"loss", "grad_norm", "grad_norms"}: the loss before the update, the gradient's
      norm before clipping, and that of each parameter, in their tree; (L,), those of the blocks.
    """
    value, gradient = loss_and_gradient(params, constants, batch, config, parts, draw)
    gradient = sharding.constrain(gradient)
    updates, opt_state = make_optimizer(optimizer, config.dtype).update(
        gradient, opt_state, params, rates=rates, learning_rate=learning_rate)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient),
               "grad_norms": gradient_norms(gradient)}
    params = optax.apply_updates(params, updates)
    return *sharding.constrain((params, opt_state)), sharding.whole(metrics)


def gradient_norms(gradient):
    """Each parameter's norm, in their tree; of those of the blocks each block's own, (L,)."""
    by_block = jax.vmap(optax.tree.norm)
    return {name: jax.tree.map(by_block, part) if name == "blocks" else optax.tree.norm(part)
            for name, part in gradient.items()}


@partial(jax.jit, static_argnames=("config", "bits"))
def evaluate_batch(params, constants, batch, config, bits=None):
    """Of a batch (B, T + 1): (cross-entropy in nats of each target, (B, T), each feature's mean
    square behind each block, (L, d)).

    The Operations are the fast ones, but of a loss that has no upper limit. bits: as `few_bits`.
    """
    squares = []

    def repeat(step, x, layers):
        def seen(x, layer):
            x = step(x, layer)
            return x, jnp.square(x.astype(jnp.float32)).mean(0)

        x, found = jax.lax.scan(seen, x, layers)
        squares.append(found)
        return x

    ops = fast.operations(config)._replace(cross_entropy=REFERENCE.cross_entropy, repeat=repeat)
    losses = token_losses(params, constants, batch, config, few_bits(ops, bits))
    return sharding.whole((losses, squares[0]))


def evaluate(params, constants, windows, config, size):
    """(loss in nats per token, {what is said of activations: (L,)}) of windows (n, T + 1).

    Means; `size` at a time, and a remainder smaller than that is left out. "mean_square";
    "kurtosis", of features' sizes s_j over tokens, mean s^4 / (mean s^2)^2: 1 where all are equal,
    d where one is all (He et al. 2024, arXiv 2405.19279).
    """
    size = min(size, len(windows))
    size += -size % sharding.devices()
    if size > len(windows):                                  # fewer than devices: some count twice
        windows = np.resize(windows, (size, windows.shape[1]))
    whole = windows[:len(windows) // size * size].reshape(-1, size, windows.shape[1])
    # One after the other: processes that run several at once could wait for each other.
    losses, squares = zip(*(jax.device_get(evaluate_batch(params, constants, batch, config))
                            for batch in whole))
    squares = np.mean(squares, 0, float)                                          # (L, d)
    sizes = np.maximum(squares.mean(1), 1e-30)
    return float(np.mean(losses)), {"mean_square": squares.mean(1).tolist(),
                                    "kurtosis": ((squares**2).mean(1) / sizes**2).tolist()}


def named_leaves(tree):
    """[(name, leaf)]: "blocks/query" and so on."""
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def largest_gradient(norms):
    """(name, norm) of the parameter, in a block, with the largest gradient; NaN is the largest."""
    named = [(f"{name} in block {block}" if np.ndim(leaf) else name, float(norm))
             for name, leaf in named_leaves(norms) for block, norm in enumerate(np.ravel(leaf), 1)]
    return max(named, key=lambda pair: pair[1] if np.isfinite(pair[1]) else np.inf)
