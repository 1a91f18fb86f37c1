"""--figure NAME: pictures for a lecture, of networks at initialisation. Nothing is trained."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..config import resolve
from ..errors import require
from ..network import model
from ..network.operations import REFERENCE
from ..theory import activations
from ..theory.families import FAMILIES, family
from ..theory.kernels import attention_constants
from .inspection import initialise, read_windows, report
from .pictures import draw_columns, draw_reports, figure, plain_numbers, save
from .use import reachable

SHOWN, LEAST = 64, 1e-4                    # of an attention matrix: positions, smallest entry
SUCCESSORS = "sas", "cutting-the-skip"     # presets that are shown beside the attention families


def reports_by_family(settings):
    """{"espa": the report of settings with this attention, ...}, and of SUCCESSORS."""
    settings, *text = read_windows(settings)
    require(settings.model.objective == "clm", "this figure is of networks with objective clm")
    plain = dict(identity_skip=False, extra_heads=0)
    reports = {name: settings.replace(attn=name, **plain) for name in FAMILIES}
    reports |= {name: resolve(name, settings.model.token_collision_rate, **size(settings))
                for name in SUCCESSORS}
    return {name: report(each, *text) for name, each in reports.items()}


def size(settings):
    """The flags that say how large a network is."""
    return {name: getattr(settings.model, name) for name in ("depth", "width", "heads", "length")}


def rank_collapse(settings, path):
    """Mean cosine and effective rank of the tokens by depth, for each attention family."""
    picture, panels = figure((11, 5), 1, 2)
    draw_columns(picture, panels, ("mean cosine", "effective rank"), reports_by_family(settings))
    save(picture, path)


def kernels(settings, path):
    """All families' kernels at four depths, predicted beside measured."""
    draw_reports(reports_by_family(settings), path)


def c_maps(settings, path):
    """C_f of the MLPs of the whole depth: activations as they are, and solved by DKS and by TAT."""
    c, depth = np.linspace(-1, 1, 201), max(settings.model.depth, 16)      # eta 0.9 needs some
    picture, panels = figure((12, 4.5), 1, 3, sharey=True)
    for axis, act in zip(panels, ("leaky_relu", "gelu", "tanh")):
        for transform, style in (("none", "C7"), ("dks", "C0"), ("tat", "C3")):
            phi = activations.solve(act, transform, depth)
            for blocks, line, label in ((1, ":", f"{transform}, one MLP"),
                                        (depth, "-", f"{transform}, {depth} MLPs")):
                axis.plot(c, activations.network_correlation(phi.correlation_map, c, blocks, 0, 1),
                          style + line, label=label)
        axis.set(title=act, xlabel="cosine of two tokens before")
    panels[0].set(ylabel="cosine after")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(picture, path)


def attention(settings, path):
    """A of the first and the last head at four depths, as it is at the start.

    ValueError where A depends on the input.
    """
    require(settings.model.objective == "clm", "this figure is of networks with objective clm")
    settings = settings.replace(identity_skip=False)          # which has c of A beside attention
    config, shown = settings.model, min(settings.model.length, SHOWN)
    constants, attends = attention_constants(config), family(config)
    require(attends.row_sums, f"A of attn {config.attn} is not prescribed: it cannot be drawn")
    queries, keys = np.arange(shown)[:, None], np.arange(config.length)
    differ = config.attn == "espa" and len(set(config.gamma)) > 1
    heads = (0, config.heads - 1) if differ else (0,)                        # else all are alike
    picture, panels = figure((13, 3.6 * len(heads)), len(heads), 4, squeeze=False)
    for column, layer in zip(panels.T, np.linspace(0, config.depth - 1, 4).astype(int)):
        own = {name: table[layer] for name, table in constants.items()}
        weights = np.exp(attends.bias_rows(own, queries, keys)[:, :, :shown]) * np.tri(shown)
        matrices = weights / weights.sum(-1, keepdims=True)
        matrices = matrices * own["row_scale"][:, :shown, None]
        for axis, head in zip(column, heads):
            image = axis.imshow(np.maximum(matrices[head], LEAST), cmap="gray_r",
                                norm="log", vmin=LEAST, vmax=1)
            of_head = f", gamma {own['slope'][head]:.2g}" if config.attn == "espa" else ""
            axis.set(title=f"block {layer + 1}{of_head}", xlabel="key", ylabel="query")
    picture.colorbar(image, ax=panels, label="A = D softmax(B)", shrink=0.6)
    picture.suptitle(f"{config.attn}, the first {shown} of {config.length} positions")
    save(picture, path)


def jacobian(settings, path):
    """The participation ratio of a token's Jacobian by depth, of each preset at this size."""
    picture, axis = figure((7, 4.5))
    for number, preset in enumerate(("isometric", "paper", "normless", "preln")):
        config = reachable(resolve(preset, **size(settings))).model
        params = initialise(jax.random.key(settings.training.seed), config, 2)
        x = jax.random.normal(jax.random.key(1), (config.length, config.width))
        found = jacobians(params, attention_constants(config), x, config)[0]
        ranks = participation_ratio(singular_values(found))
        axis.plot(np.arange(len(ranks)) + 1, ranks, f"C{number}-", label=preset)
    axis.set(xlabel="block", ylabel="participation ratio of the Jacobian's singular values",
             yscale="log", title=f"directions of a token that arrive, of {config.width}")
    plain_numbers(axis.yaxis)
    axis.legend()
    save(picture, path)


@partial(jax.jit, static_argnames="config")
def jacobians(params, constants, x, config):
    """x (T, d) -> J_1, ..., J_L and those of each block's sublayers, attention and MLP: (L, d, d).

    J_l is the derivative of the last position after block l by its own embedding.
    """
    def step(carry, layer):
        (x, whole), (weights, constants) = carry, layer
        attend = lambda x: model.attention_sublayer(x, weights, constants, config, REFERENCE)
        mlp = lambda x: model.mlp_sublayer(x, weights, config, REFERENCE)
        first, second = of_last(attend, x), of_last(mlp, attend(x))
        whole = second @ first @ whole
        return (mlp(attend(x)), whole), (whole, first, second)

    return jax.lax.scan(step, (x, jnp.eye(x.shape[1])), model.layers(params, constants, config))[1]


def of_last(sublayer, x):
    """The derivative of the last row of sublayer(x) by the last row of x, (d, d)."""
    return jax.jacrev(lambda last: sublayer(x.at[-1].set(last))[-1])(x[-1])


def singular_values(matrices):
    """(..., d, d) -> (..., d), largest first."""
    return np.linalg.svd(np.asarray(matrices, float), compute_uv=False)


def participation_ratio(s):
    """(sum s^2)^2 / sum s^4, (..., d) -> (...): d where all are equal, 1 where one is all."""
    return (s**2).sum(-1)**2 / (s**4).sum(-1)


# What they take of the settings, where it is not all.
TAKES = {"c-maps": ["depth"], "jacobian": ["depth", "width", "heads", "length", "seed"]}
FIGURES = {"rank-collapse": rank_collapse, "kernels": kernels, "c-maps": c_maps,
           "jacobian": jacobian, "attention": attention}
