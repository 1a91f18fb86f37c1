"""Training: loss, optimizer, one compiled step, held-out loss, samples."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from . import model

MATRICES = ("query", "key", "value", "output", "up", "down")


def loss(params, constants, batch, config):
    """Mean cross-entropy in nats per token; batch (B, T + 1) of tokens."""
    logits = model.forward(params, constants, batch[:, :-1], config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def make_schedule(config):
    """Learning rate by step: linear warm-up, then a cosine that ends at zero with the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)


def make_optimizer(config):
    """Gradient clipping at norm 1, then AdamW, or Muon (Jordan et al. 2024) for the blocks' matrices with Adam for the rest.

    consistent_rms (Liu et al. 2025, arXiv 2502.16982) gives Muon's updates the size of Adam's: one learning rate serves both.
    """
    schedule = make_schedule(config)
    is_matrix = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)
    if config.optimizer == "adamw":
        optimizer = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_matrix)
    else:
        stacked = MuonDimensionNumbers(reduction_axis=1, output_axis=2)           # (L, in, out): layer by layer
        dimensions = lambda params: jax.tree.map(lambda matrix: stacked if matrix else None, is_matrix(params))
        optimizer = muon(schedule, weight_decay=config.weight_decay, adam_b2=0.95, consistent_rms=0.2,
                         muon_weight_dimension_numbers=dimensions)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


@partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def train_step(params, opt_state, constants, batch, config):
    """One update: (params, opt_state, {"loss", "grad_norm"}), the loss before it. The old buffers are given up."""
    value, gradient = jax.value_and_grad(loss)(params, constants, batch, config)
    updates, opt_state = make_optimizer(config).update(gradient, opt_state, params)
    metrics = {"loss": value, "grad_norm": optax.global_norm(gradient)}
    return optax.apply_updates(params, updates), opt_state, metrics


evaluate_batch = jax.jit(loss, static_argnames="config")


def evaluate(params, constants, windows, config):
    """Mean loss in nats per token over windows (n, T + 1), batch by batch; a remainder smaller than a batch is left out."""
    size = min(config.batch, len(windows))
    whole = windows[:len(windows) // size * size].reshape(-1, size, windows.shape[1])
    return float(np.mean([evaluate_batch(params, constants, batch, config) for batch in whole]))


def sample(params, constants, tokens, count, config, seed=0, temperature=1.0):
    """`count` tokens drawn after the given ones (a list, not empty); a context beyond config.length is cut to its last half."""
    key, context = jax.random.key(seed), list(tokens)[-config.length:]
    for step in range(count):
        if len(context) == config.length:
            context = context[-(config.length // 2):]
        padded = np.zeros(config.length, np.int32)                            # what comes later is masked
        padded[:len(context)] = context
        logits = next_logits(params, constants, padded, len(context) - 1, config)
        context.append(int(jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)))
        yield context[-1]


@partial(jax.jit, static_argnames="config")
def next_logits(params, constants, tokens, position, config):
    """Logits (V,) of the token after `position`, from tokens (T,)."""
    return model.forward(params, constants, tokens, config)[position]
