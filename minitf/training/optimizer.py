"""The optimizer, a chain of optax transformations, and its learning rates by group.

To add a group, name its parameters in GROUPS, give its multiple in `group_rates`, and add it to
MATRIX_GROUPS if Muon is to train it; if it may decay, to decay_groups in config.py. What is held
(`hold_linear_path`, `hold_rows`) moves parameters whatever their rate.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..network.init import path_sizes
from ..theory.families import identity_parts
from . import sharding

# The learning-rate group that a parameter is in. Those not named, gains and families' own
# parameters, learn at the plain learning rate.
GROUPS = {
    "embed": "embed", "position": "embed", "norm": "embed", "head": "embed",
    "query": "qk", "key": "qk",
    "value": "vo", "output": "vo",
    "up": "mlp", "down": "mlp",
}
MATRIX_GROUPS = "qk", "vo", "mlp"
# What a token passes on of itself through a block, but for the nonlinear part of phi: in attention
# about c x W^V W^O, in the MLP m/2 x W_1 W_2, where phi^(z) = m/2 z + an even function. The pairs.
LINEAR_PATH = {"vo": ("value", "output"), "mlp": ("up", "down")}


def make_optimizer(name, dtype="float32"):
    """Clipping at norm 1, then Muon or AdamW, rates and decay by group; then what is held.

    dtype: of Muon's matrix products; states and everything else are float32.
    update() is also given rates, those of `group_rates`, and learning_rate, that of the step.
    """
    muon = name == "muon"
    moments = muon_moments() if muon else optax.adam(1.0, b2=0.95)
    of_matrices = orthogonal_updates(dtype) if muon else optax.identity()
    by_group = optax.chain(of_matrices, scale_by_group(), hold_linear_path())
    return optax.chain(optax.clip_by_global_norm(1.0), moments, spread(by_group, muon), hold_rows())


def group_rates(training, model):
    """What is tuned, as a pytree of numbers, so that trials need no new compilation.

    {"learning_rate", "weight_decay": {group: number or (L, 1, 1)}, "linear_path": {group: what
    `held` takes}, "row_size": {parameter: number}}. The first multiplies the step's learning rate;
    a group that is missing in the second does not decay, what is missing in the others is not held.
    """
    by_block = 1.0
    if model.identity_skip:
        # Of its mean square a token keeps c^2 there. The rest is all of it in the first block and
        # little in the last: heads of all blocks may change it by more equal parts.
        by_block = np.float32(1 - identity_parts(model)[0]**2)[:, None, None] ** -0.5
    path = dict(pull=training.orthogonal_pull, rate=training.lr_mult_path)
    held = training.pull_groups.split(",") if path != dict(pull=0, rate=1) else ()
    return jax.tree.map(np.float32, {
        "learning_rate": {"embed": training.lr_mult_embed, "qk": training.lr_mult_qk * by_block,
                          "vo": training.lr_mult_vo * by_block},
        "weight_decay": {group: training.weight_decay for group in training.decay_groups.split(",")
                         if group and training.weight_decay},
        "linear_path": {group: dict(path, size=size) for group, size in path_sizes(model).items()
                        if group in held},
        "row_size": {"embed": 1.0} if training.unit_embeddings else {}})


def learning_rate(training, step):
    """Of a step: linear warm-up, then a cosine that ends at zero with the last step."""
    if step < training.warmup:
        return np.float32(training.learning_rate * step / training.warmup)
    share = (step - training.warmup) / (training.steps - training.warmup)
    return np.float32(training.learning_rate * 0.5 * (1 + np.cos(np.pi * share)))


# --- The transformations ----------------------------------------------------------------

def muon_moments():
    """Momentum for the blocks' matrices, which Muon (Jordan et al. 2024) takes, Adam for the rest.

    At a rate of 1.
    """
    groups = lambda params: by_name(
        lambda name, w: "matrix" if GROUPS.get(name) in MATRIX_GROUPS else "other", params)
    return optax.partition({
        "matrix": optax.chain(optax.trace(0.95, nesterov=True), optax.scale(-1.0)),
        "other": optax.adam(1.0, b2=0.95, nesterov=True)}, groups)


def spread(inner, always):
    """`inner`, of which each device computes its share of the L matrices of each array.

    Not always: where the linear path is held. Else all is done entry by entry, wherever it is.
    """
    def update(updates, state, params, rates, **others):
        whole = always or rates["linear_path"]
        if whole:
            updates, params = sharding.by_matrix((updates, params))
        updates, state = inner.update(updates, state, params, rates=rates, **others)
        return sharding.by_matrix(updates, back=True) if whole else updates, state
    return optax.GradientTransformationExtraArgs(inner.init, update)


def orthogonal_updates(dtype):
    """The blocks' matrices (L, in, out) -> nearly orthogonal ones, times 0.2 sqrt(max(in, out)).

    An update then has the size of Adam's (Liu et al. 2025, arXiv 2502.16982), and one learning
    rate serves both.
    """
    def of_leaf(name, u):
        is_matrix = GROUPS.get(name) in MATRIX_GROUPS
        return 0.2 * max(u.shape[1:]) ** 0.5 * newton_schulz(u, dtype) if is_matrix else u
    return optax.stateless(lambda updates, params: by_name(of_leaf, updates))


def newton_schulz(x, dtype):
    """x (L, in, out), float32, with all singular values brought near 1 (Jordan et al. 2024)."""
    size = jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True))
    x = (x / jnp.maximum(size, 1e-15)).astype(dtype)
    identity = jnp.eye(min(x.shape[1:]), dtype=dtype)
    quintic = lambda gram: 3.4445 * identity - 4.7750 * gram + 2.0315 * (gram @ gram)
    for _ in range(5):                     # of x^T x or x x^T, whichever is smaller, on its side
        t = jnp.swapaxes(x, 1, 2)
        x = x @ quintic(t @ x) if x.shape[1] > x.shape[2] else quintic(x @ t) @ x
    return x.astype(jnp.float32)


def scale_by_group():
    """Each group's decoupled weight decay, if it has one, and its own learning rate."""
    def update(updates, params, rates, learning_rate):
        def of_leaf(name, u, w):
            group = GROUPS.get(name)
            u = u - rates["weight_decay"][group] * w if group in rates["weight_decay"] else u
            return u * (learning_rate * rates["learning_rate"].get(group, 1.0))
        return by_name(of_leaf, updates, params)
    return stateless(update)


def hold_linear_path():
    """Slows what changes W^V W^O and W_1 W_2, and pulls both back to rotations.

    A network without skips multiplies these products, and so the spreads of their singular values.
    """
    def update(updates, params, rates, learning_rate):
        blocks, weights = dict(updates["blocks"]), params["blocks"]
        for group, how in rates["linear_path"].items():
            first, second = LINEAR_PATH[group]
            # Of values the first d features: what is behind them, of extra heads, is not held.
            end = weights[first].shape[1] if group == "vo" else None
            parts = (first, np.s_[:, :, :end]), (second, np.s_[:, :end])
            pairs = [[tree[name][part] for name, part in parts] for tree in (weights, blocks)]
            for (name, part), corrected in zip(parts, held(*pairs, **how)):
                blocks[name] = blocks[name].at[part].set(corrected)
        return updates | {"blocks": blocks}
    return stateless(update)


def hold_rows():
    """Brings the rows of a parameter back to one root mean square.

    Embeddings grow otherwise, and with them all that follows: without norms nothing divides by it.
    """
    def update(updates, params, rates, learning_rate):
        for name, size in rates["row_size"].items():
            moved = params[name] + updates[name]
            square = jnp.square(moved).mean(-1, keepdims=True)
            scale = size / jnp.sqrt(jnp.maximum(square, 1e-30))
            updates = updates | {name: scale * moved - params[name]}
        return updates
    return stateless(update)


def held(weights, updates, pull, rate, size):
    """Updates of a pair w1 (L, d, n), w2 (L, n, d), corrected for what they do to W = w1 w2.

    To first order W then changes by `rate` times what it would, and by `pull` times a Newton-Schulz
    step towards a rotation times `size`: (W - W W^T W / size^2) / 2. The correction is the least
    that does it, each matrix measured in units of its own size.
    """
    (w1, w2), (u1, u2) = weights, updates
    t = lambda matrices: jnp.swapaxes(matrices, 1, 2)
    square = lambda matrices: jnp.square(matrices).sum((1, 2), keepdims=True) / w1.shape[1]
    s1, s2, product = square(w1), square(w2), w1 @ w2
    change = (rate - 1) * (u1 @ w2 + w1 @ u2)
    change += pull * (product - product @ (t(product) @ product) / size**2) / 2
    # u1 + x w2^T / s2 and u2 + w1^T x / s1 change W by G1 x + x G2 more.
    x = solve_sum(w1 @ t(w1) / s1, t(w2) @ w2 / s2, change)
    return [u1 + x @ t(w2) / s2, u2 + t(w1) @ x / s1]


def solve_sum(g1, g2, e, steps=4):
    """x of g1 x + x g2 = e, all (L, d, d), g1 and g2 symmetric and not negative.

    Conjugate gradients: after one step exact where both are multiples of 1, as at the start; later
    nearly, and never beyond.
    """
    dot = lambda a, b: (a * b).sum((1, 2), keepdims=True)
    x, residual, direction = jnp.zeros_like(e), e, e
    for _ in range(steps):
        image, before = g1 @ direction + direction @ g2, dot(residual, residual)
        length = before / jnp.maximum(dot(direction, image), 1e-30)
        x, residual = x + length * direction, residual - length * image
        after = dot(residual, residual)
        direction = residual + after / jnp.maximum(before, 1e-30) * direction
    return x


def stateless(update):
    """A transformation of update(updates, params, rates, learning_rate) -> updates."""
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params, **others: (update(updates, params, **others), state))


def by_name(function, tree, *others):
    """function(a parameter's name, leaf, ...) for each leaf; a gain has the name of its norm."""
    def of_leaf(path, *leaves):
        *outer, name = (key.key for key in path)
        return function(outer[-1] if name == "gain" else name, *leaves)
    return jax.tree_util.tree_map_with_path(of_leaf, tree, *others)
