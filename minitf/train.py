"""Training: loss, optimizer, one compiled step, held-out loss."""
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from . import model, theory
from .errors import require

CHAIN = ("value", "output", "up", "down")                   # the matrices whose product a signal passes without skips
CHAIN_OWN = ("own", "up", "down")                           # the same with --own
MATRICES = ("query", "key", "own", *CHAIN)


def loss(params, constants, batch, config):
    """Mean cross-entropy in nats per token; batch (B, T + 1) of tokens."""
    return token_losses(params, constants, batch, config).mean()


def token_losses(params, constants, batch, config):
    """Cross-entropy in nats of each target: batch (B, T + 1) -> (B, T)."""
    x, targets = model.last_states(params, constants, batch[:, :-1], config), batch[:, 1:]
    return cross_entropy(x, params["head"].astype(x.dtype), targets.reshape(-1)).reshape(targets.shape)


@jax.custom_vjp
def cross_entropy(x, head, targets):
    """-log softmax(x head)[target], x (N, d), head (d, V), targets (N,) -> (N,), in float32.

    The logits are the largest array in training, so they are read once: each loss is the log of a sum of
    exp(logit - the target's), at least 1. One that is LARGEST or more above the target's counts as LARGEST above it.
    """
    return cross_entropy_forward(x, head, targets)[0]


LARGEST = 70.0                                              # the sum of a million exp(70) is finite in float32


def cross_entropy_forward(x, head, targets):
    logits, rows = x @ head, jnp.arange(len(x))
    above = logits.astype(jnp.float32) - logits[rows, targets][:, None].astype(jnp.float32)
    weights = jnp.exp(jnp.minimum(above, LARGEST))                                         # (N, V); the targets' are 1
    total = weights.sum(-1)
    error = weights.astype(x.dtype).at[rows, targets].set((1 - total).astype(x.dtype))     # total (softmax - one-hot)
    return jnp.log(total), (x, head, targets, error, total)


def cross_entropy_backward(saved, gradient):
    x, head, targets, error, total = saved
    scale = (gradient / total)[:, None]
    return (scale * (error @ head.T)).astype(x.dtype), ((scale * x).astype(x.dtype).T @ error), None


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)


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
    balance = theory.balance(config)
    last = lambda updates, params: steer(updates, params, 1.0, config.ends, config.qk * balance, config.vo * balance, config.orthogonality or None)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer, optax.stateless(last))


def steer(updates, params, rate, ends, qk, vo, orthogonality):
    """The optimizer's updates times `rate`, and times `ends`, `qk` or `vo` where these apply (numbers, or of each block, (L, 1, 1)),
    with a pull toward orthogonal matrices (None: without).

    What limits the rate of blocks is that the changes of all of them add up. The ends (embeddings, positions, final gain, head)
    stand once in the network, and queries and keys not in the product of matrices that a signal passes: they may learn
    faster. So may values and outputs with --own; without it they do stand there, and do better at a lower rate than the MLPs.
    """
    chain = CHAIN_OWN if "own" in params["blocks"] else CHAIN
    multiples = dict(query=qk, key=qk, value=vo, output=vo, embed=ends, position=ends, norm=ends, head=ends)

    def one(path, update, w):
        name = path[-1].key
        update = update * (rate * multiples.get(name, 1.0))
        return update + orthogonality * to_orthogonal(w) if orthogonality is not None and name in chain else update

    return jax.tree_util.tree_map_with_path(one, updates, params)


def to_orthogonal(w):
    """From matrices (L, in, out) nearly c Q, Q orthogonal, to it: (1 - W W^T / c^2) W / 2, a Newton-Schulz step; c^2 is the
    mean of their squared singular values. Training spreads these, and a chain without skips multiplies the spreads.
    """
    tall = w.shape[1] > w.shape[2]
    gram = jnp.einsum("lij,lik->ljk" if tall else "lji,lki->ljk", w, w)
    off = jnp.eye(gram.shape[-1]) - gram * (gram.shape[-1] / jnp.trace(gram, axis1=1, axis2=2))[:, None, None]
    return (w @ off if tall else off @ w) / 2


@partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def train_step(params, opt_state, constants, batch, config):
    """One update: (params, opt_state, {"loss", "grad_norm", "grad_norms"}), the loss before it. Old buffers are given up.

    grad_norm is before clipping; grad_norms has one for each parameter, in their tree.
    """
    value, gradient = jax.value_and_grad(loss)(params, constants, batch, config)
    updates, opt_state = make_optimizer(config).update(gradient, opt_state, params)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient),
               "grad_norms": jax.tree.map(optax.tree.norm, gradient)}
    return optax.apply_updates(params, updates), opt_state, metrics


def require_memory(config, vocabulary):
    """ValueError if parameters, their moments, biases and a batch's activations alone exceed the machine's memory."""
    d, length, depth = config.width, config.length, config.depth
    numbers = 3 * (12 * d * d * depth + 2 * d * vocabulary) + (depth * length**2 if config.attn == "uspa" else 0)
    numbers += config.batch * length * (vocabulary + d * depth)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(4 * numbers < memory, f"this needs {4 * numbers / 2**30:,.0f} GiB of memory at the least, there are "
            f"{memory / 2**30:.0f}: a smaller depth, width, length or batch is needed")


def named_leaves(tree):
    """[(name, leaf)]: "blocks/query" and so on."""
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def largest_gradient(norms):
    """(name, norm) of the parameter with the largest gradient; one that is not a number counts as the largest."""
    return max(((name, float(norm)) for name, norm in named_leaves(norms)),
               key=lambda pair: pair[1] if np.isfinite(pair[1]) else np.inf)


evaluate_batch, evaluate_tokens = (jax.jit(f, static_argnames="config") for f in (loss, token_losses))


def evaluate(params, constants, windows, config):
    """Mean loss in nats per token over windows (n, T + 1), batch by batch; a remainder smaller than a batch is left out."""
    size = min(config.batch, len(windows))
    whole = windows[:len(windows) // size * size].reshape(-1, size, windows.shape[1])
    return float(np.mean([evaluate_batch(params, constants, batch, config) for batch in whole]))


def total_loss(params, constants, windows, counted, config):
    """Sum of the losses in nats of the counted targets: windows (n, T + 1), counted (n, T); any n, batch by batch."""
    spare = -len(windows) % config.batch                                       # one shape for all: compiled once
    windows, counted = np.pad(windows, ((0, spare), (0, 0))), np.pad(counted, ((0, spare), (0, 0)))
    parts = zip(windows.reshape(-1, config.batch, windows.shape[1]), counted.reshape(-1, config.batch, counted.shape[1]))
    return sum(np.asarray(evaluate_tokens(params, constants, batch, config), np.float64)[of_these].sum()
               for batch, of_these in parts)
