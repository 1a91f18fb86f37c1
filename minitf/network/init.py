"""Initialisation: the parameters of a network, float32; those of the blocks are stacked, (L, ...).

To add an initialisation of the MLPs, add a function to MLP_INITS and its name in config.py.
"""
import jax
import jax.numpy as jnp

from ..errors import require
from ..theory.families import family
from ..theory.kernels import INIT_SCALES, branch_scale, network_activation

KEYS = ("query", "up", "down", "key", "value", "output", "head", "embed", "position")


def init(key: jax.Array, config, vocabulary: int) -> dict:
    """The parameters of a ModelConfig for so many tokens: a nested dict of arrays.

    key: of jax.random. ValueError unless the vocabulary has a token.

    "embed" (V, d), "head" (d, V); learned positions: "position" (T, d); norms: "norm" (d,).
    "blocks", each (L, ...): "query", "key", "value" (d, n), "output" (n, d), n = H k, extra heads
    last, "up" (d, hidden), "down" (hidden, d), all applied as x @ W; head h has the columns h k to
    (h + 1) k of the first three.
    Norms: "norm1", "norm2" (d,). What a family trains, (H,). With objective mlm V is the mask.
    """
    require(isinstance(vocabulary, int) and vocabulary > 0,
            f"vocabulary must be an integer of at least 1, not {vocabulary!r}")
    d, depth, keys = config.width, config.depth, dict(zip(KEYS, jax.random.split(key, len(KEYS))))
    branch, blocks = branch_scale(config), {}
    blocks["query"], blocks["key"] = QUERY_INITS[config.query_init](
        keys["query"], keys["key"], depth, d, config.all_heads, config.features)
    if not config.identity_values:
        blocks["value"], blocks["output"] = values_and_outputs(
            keys["value"], keys["output"], branch, config)
    blocks["up"], blocks["down"] = MLP_INITS[config.mlp_init](
        keys["up"], keys["down"], depth, d, config.hidden, network_activation(config), branch)
    for name, start in family(config).parameters.items():
        blocks[name] = jnp.full((depth, config.all_heads), start)
    for name in ("alpha", "beta", "mlp_alpha", "mlp_beta"):
        if config.trained_weights and getattr(config, name):
            blocks[name] = jnp.full(depth, getattr(config, name))
    if config.qk_norm:
        for name in ("query_gain", "key_gain"):
            blocks[name] = jnp.ones((depth, config.features))
    # Without norms the last layer's tokens are alike, and a random head gives all the same wrong
    # logits, to be unlearned first. With a final norm the customary random one learns faster.
    head = jax.random.normal(keys["head"], (d, vocabulary)) * d**-0.5
    params = {
        "embed": jax.random.normal(keys["embed"], (vocabulary + (config.objective == "mlm"), d)),
        "blocks": blocks,
        "head": head if config.head_init == "gaussian" else jnp.zeros_like(head),
    }
    if config.norm != "none":
        blocks["norm1"], blocks["norm2"] = (NORM_STARTS[config.norm]((depth, d)) for _ in range(2))
        params["norm"] = NORM_STARTS[config.norm]((d,))
    if config.position == "learned":
        params["position"] = jax.random.normal(keys["position"], (config.length, d))
    return jax.tree.map(jnp.float32, params)      # weak types would compile each program twice


def values_and_outputs(key_value, key_output, scale, config):
    """W^V (L, d, n) and W^O (L, n, d); of extra heads W^O is 0: they are silent at first."""
    d, depth, matrices = config.width, config.depth, MATRIX_INITS[config.init]
    value, output = matrices(key_value, depth, d, d), scale * matrices(key_output, depth, d, d)
    if config.identity_skip:
        output = jnp.swapaxes(value, 1, 2)                                       # W^V W^O = I
    extra = config.extra_heads * config.features
    if extra:
        added = matrices(jax.random.fold_in(key_value, 1), depth, d, extra)
        value = jnp.concatenate([value, added], 2)
        output = jnp.pad(output, ((0, 0), (0, extra), (0, 0)))
    return value, output


def path_sizes(config):
    """{group: root of the mean square singular value} of W^V W^O and of W_1 W_2 at the start."""
    linear = config.mlp_init == "looks_linear"
    mlp = 2 / network_activation(config).odd_slope() if linear else 1.0
    vo = INIT_SCALES.get(config.init, 1.0)**2
    return {"vo": branch_scale(config) * vo, "mlp": branch_scale(config) * mlp}


# What is trained of a norm, of a shape (d,), or (L, d) of all blocks.
NORM_STARTS = {
    "layer": jnp.ones, "rms": jnp.ones,
    "dyt": lambda shape: {"gain": jnp.ones(shape), "slope": jnp.full((*shape[:-1], 1), 0.5)},
    "derf": lambda shape: NORM_STARTS["dyt"](shape) | {"shift": jnp.zeros((*shape[:-1], 1))},
}


def gaussian_matrices(key, depth, fan_in, fan_out):
    """(L, in, out), entries N(0, 1/in)."""
    return jax.random.normal(key, (depth, fan_in, fan_out)) * fan_in**-0.5


def orthogonal_stack(key, depth, fan_in, fan_out):
    """(L, in, out) of orthonormal rows or columns, whichever are fewer."""
    # One after the other: QR decompositions side by side can wait for each other on a small CPU.
    one = lambda key: jax.nn.initializers.orthogonal()(key, (fan_in, fan_out))
    return jax.lax.map(one, jax.random.split(key, depth))


def orthogonal_matrices(key, depth, fan_in, fan_out):
    """(L, in, out): orthonormal, times max(sqrt(out / in), 1), which keeps mean squares."""
    return max((fan_out / fan_in)**0.5, 1) * orthogonal_stack(key, depth, fan_in, fan_out)


MATRIX_INITS = {
    "orthogonal": orthogonal_matrices, "gaussian": gaussian_matrices,
    "orthogonal-3": lambda *shape: INIT_SCALES["orthogonal-3"] * orthogonal_matrices(*shape)}


# --- Queries and keys: (key of W^Q, of W^K, depth, d, heads, k) -> W^Q, W^K (L, d, heads k) --

def near_identity(key, _, depth, d, heads, k):
    """W^Q W^K^T = 2 Z + 0.6 I, Z_ij ~ N(0, 1 / d), as near as a head's rank allows (Ji et al.)."""
    def one(key):
        u, s, v = jnp.linalg.svd(2 * jax.random.normal(key, (d, d)) * d**-0.5 + 0.6 * jnp.eye(d))
        return jnp.sqrt(s[:k]) * u[:, :k], jnp.sqrt(s[:k]) * v[:k].T

    pairs = jax.lax.map(one, jax.random.split(key, depth * heads))                 # (L H, d, k)
    return [jnp.swapaxes(each.reshape(depth, heads, d, k), 1, 2).reshape(depth, d, heads * k)
            for each in pairs]


def zero_query(_, key, depth, d, heads, k):
    """W^Q = 0: attention begins with what does not depend on the input."""
    return jnp.zeros((depth, d, heads * k)), gaussian_matrices(key, depth, d, heads * k)


def gaussian_query(key_query, key_key, depth, d, heads, k):
    """The standard transformer's."""
    return tuple(gaussian_matrices(key, depth, d, heads * k) for key in (key_query, key_key))


QUERY_INITS = {"zero": zero_query, "gaussian": gaussian_query, "near-identity": near_identity}

# --- MLPs: (key of up, of down, depth, d, hidden, phi^, scale) -> up (L, d, hidden), down ------


def independent(matrices):
    """Both drawn for themselves: orthogonal is the paper's, gaussian the standard transformer's."""
    return lambda key_up, key_down, depth, d, hidden, phi, scale: (
        matrices(key_up, depth, d, hidden), scale * matrices(key_down, depth, hidden, d))


def looks_linear_mlp(key_up, key_down, depth, d, hidden, phi, scale):
    """A rotation at the start, x -> scale x R (Balduzzi et al. 2017, arXiv 1702.08591).

    Half of the hidden units see the negative of what the others see, and what they say is
    subtracted: phi(z) - phi(-z) = m z. Kernels are then kept exactly, at any width.
    """
    u = orthogonal_stack(key_up, depth, d, hidden // 2)
    r = orthogonal_stack(key_down, depth, d, d)
    up = jnp.sqrt(2.0) * u
    down = scale / (2**0.5 * phi.odd_slope()) * jnp.swapaxes(u, 1, 2) @ r
    return jnp.concatenate([up, -up], 2), jnp.concatenate([down, -down], 1)


MLP_INITS = {"looks_linear": looks_linear_mlp, "orthogonal": independent(orthogonal_matrices),
             "gaussian": independent(gaussian_matrices)}
