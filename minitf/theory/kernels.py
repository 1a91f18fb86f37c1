"""The kernels of a whole network at initialisation, by one recursion over depth. float64 NumPy.

Attention alone keeps the prescribed kernels, from Sigma_0 = I. In a network tokens repeat and MLPs
add correlation, and what is common to the tokens grows along the sequence, since the rows of A sum
to more than 1. The recursion follows that. It serves twice: to choose D so that every position
keeps mean square 1 (row_scale "unit"), and to predict kernels. `config` is a ModelConfig.
L = depth, H = heads, T = length.
"""
import numpy as np

from ..errors import require
from . import activations, spa
from .families import family, identity_parts

NOT_NORMS = "dyt", "derf"  # which stand in the place of a norm
MASKED = 0.15              # of the tokens, by objective mlm; each becomes the mask's
EXACT_LENGTH = 1024        # positions over which the recursion, O(T^2) or more a layer, is run


def kernel_recursion(kernel_maps, kernel, correlation_map, alpha=0.0, beta=1.0, norm=False, n=None,
                     of_mlp=None):
    """Yields (n_l, Sigma_l), shapes (T,) and (T, T), for each block l:

        K = mean over heads of A_l Sigma A_l^T,   K <- K / (n n^T),
        Sigma^ = alpha^2 Sigma + beta^2 K,   Sigma' = alpha^2 Sigma^ + beta^2 C(Sigma^).

    kernel_maps: Sigma -> K of each block; kernel: Sigma_0; correlation_map: C of the MLPs; alpha,
    beta: weights of skip and branch, of_mlp: those of the MLP if they differ; norm: whether a norm
    stands before each branch; n: what D = rowsum(A) / n divides by, (L, T), None: sqrt(diag K),
    which keeps a mean square of 1. Where it is not kept, Sigma is exact for positively homogeneous
    activations.
    """
    mlp_alpha, mlp_beta = of_mlp or (alpha, beta)
    for layer, kernel_map in enumerate(kernel_maps):
        attended = kernel_map(correlation(kernel) if norm else kernel)
        scale = np.sqrt(np.diag(attended)) if n is None else n[layer]
        kernel = alpha**2 * kernel + beta**2 * attended / np.outer(scale, scale)
        root = np.sqrt(np.diag(kernel))
        size = 1.0 if norm else np.outer(root, root)
        kernel = mlp_alpha**2 * kernel + mlp_beta**2 * size * correlation_map(correlation(kernel))
        yield scale, kernel


def correlation(kernel):
    """The cosines between the tokens of kernels (..., T, T); 0 beside a token that is 0."""
    root = np.maximum(np.sqrt(np.diagonal(kernel, axis1=-2, axis2=-1)), 1e-30)
    return np.clip(kernel / root[..., None] / root[..., None, :], -1.0, 1.0)


def network_activation(config):
    """The Activation of a network's MLPs, solved for depth and skips; OutOfReach if there is none.

    With a norm before it and nothing to solve for, it is left as it is, not scaled.
    """
    if config.norm != "none" and config.transform == "none":
        return activations.plain(config.act)
    return activations.solve(config.act, config.transform, config.depth, config.mlp_alpha,
                             config.mlp_beta, config.eta, config.zeta, config.tau)


def input_kernel(config, length: int, equal: np.ndarray | None = None) -> np.ndarray:
    """E Sigma_0, (T, T). Tokens are equal by config.token_collision_rate, or as `equal`, (T, T).

    Learned positions, independent at the start, are half of what the first block is given.
    """
    rate = config.token_collision_rate
    if config.objective == "mlm":                      # masked ones are all alike
        rate = (1 - MASKED)**2 * rate + MASKED**2
    tokens = spa.uniform_kernel(rate, length) if equal is None else equal
    return (tokens + np.eye(length)) / 2 if config.position == "learned" else tokens + 0.0


def predict_kernels(config, kernel: np.ndarray, n: np.ndarray | None = None) -> list:
    """[(n, Sigma)] after each block from Sigma_0 = kernel; [] where A depends on the input.

    n: as in kernel_recursion; ones, (L, T), for row_scale "row-sum". Nor is a prediction made of
    sublayers in parallel, and of what only stands in the place of a norm.
    """
    kernel_maps = family(config).kernel_maps
    if kernel_maps is None or config.parallel or config.norm in NOT_NORMS:
        return []
    if n is None and config.row_scale == "row-sum":
        n = np.ones((config.depth, len(kernel)))
    phi, linear = network_activation(config), config.mlp_init == "looks_linear"
    correlation_map = (lambda c: c) if linear else phi.correlation_map
    branch = branch_scale(config)
    of_mlp = config.mlp_alpha, config.mlp_beta * branch * (1 if linear else phi.mean_square()**0.5)
    beta = config.beta * branch * INIT_SCALES.get(config.init, 1.0)**2
    return list(kernel_recursion(kernel_maps(config), kernel, correlation_map, config.alpha, beta,
                                 config.norm != "none", n, of_mlp))


# Of W^V and of W^O, where it is not 1 (Ji et al. 2025, arXiv 2510.00345).
INIT_SCALES = {"orthogonal-3": 3.0}


def branch_scale(config):
    """Of W^O and W_2. Unweighted skips add up 2 L branches: GPT-2 starts each at (2 L)^-1/2."""
    unweighted = config.alpha == config.beta == config.mlp_alpha == config.mlp_beta == 1
    return (2 * config.depth)**-0.5 if unweighted else 1.0


def attended_rms(config):
    """n of D = rowsum(A) / n for each block and position, (L, T), from the expected kernel.

    It is computed for the first EXACT_LENGTH positions. From there on it is level, to a percent
    of D or so over the depth.
    """
    if config.row_scale == "row-sum":
        return np.ones((config.depth, config.length))
    require(len(set(config.gamma)) == 1 or config.length <= EXACT_LENGTH, "gamma must be the same "
            f"for all heads beyond {EXACT_LENGTH} tokens, unless row-scale is row-sum")
    exact = min(config.length, EXACT_LENGTH)
    n = np.array([n for n, _ in predict_kernels(config, input_kernel(config, exact))])
    return np.pad(n, ((0, 0), (0, config.length - exact)), mode="edge")


def attention_constants(config) -> dict[str, np.ndarray]:
    """The constants of attention, {name: float32 array}; {} for families that have none.

    "row_scale": D, (L, H, T). What B is made of: of E-SPA "slope", "first_key_bias", "self_bias",
    (L, H), B_ij = -slope (i - j) + first_key_bias [j = 0] + self_bias [i = j], j <= i; else "bias",
    B itself, (L, H, T, T). 1 for H: the same for all heads. Extra heads are the last of H.
    identity_skip: "skip_scale" too, c / n of A = c I + P, (L, T), and D and B are of what A has
    beyond c I.
    """
    attention = family(config)
    if attention.row_sums is None:
        return {}
    constants, row_scale = attention.bias(config), attention.row_sums(config)
    n = attended_rms(config)
    if config.identity_skip:
        c, diagonal = identity_parts(config)
        with np.errstate(divide="ignore"):             # c is all of a diagonal: refused below
            constants["self_bias"] = constants["self_bias"] + np.log1p(-c[:, None] / diagonal)
        constants["skip_scale"] = c[:, None] / n
        row_scale = row_scale - c[:, None, None]
    constants["row_scale"] = row_scale / n[:, None]
    others = [table for name, table in constants.items() if name != "bias"]   # of uspa: log 0
    require(all(np.isfinite(table).all() for table in others),
            f"attn {config.attn} has no finite constants with these parameters: less extreme "
            "gamma or rho are needed")
    return {name: np.float32(with_extra_heads(name, table, config))
            for name, table in constants.items()}


def with_extra_heads(name, table, config):
    """A constant, (L, H or 1, ...), with those of the extra heads behind it.

    B = 0, and D is the share that others have of an even attention, i / (i + 1) at position i: the
    first token has nobody else to attend to. There D is 0.001, since flash.py divides by it.
    """
    if not config.extra_heads or name == "skip_scale":
        return table
    depth, _, *others = table.shape
    extra = np.zeros((depth, config.extra_heads, *others))
    if name == "row_scale":
        seen = np.arange(config.length) + 1 if config.objective == "clm" else config.length
        extra += np.maximum(1 - 1 / seen, 0.001)
    return np.concatenate([np.broadcast_to(table, (depth, config.heads, *others)), extra], 1)
