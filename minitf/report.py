"""The kernel report: do signals keep their shape at initialisation, in both directions, and as predicted?"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from . import model, spa

MEAN_SQUARE_FACTOR = 2                    # beyond what the width explains, below
RANK_SHARE = 0.001                        # of the first kernel's effective rank, above the 1 of tokens that are all the same
GRADIENT_RATIO = 10                       # between the largest and the smallest gradient norm of a layer
RULE = (f"signal survives if every layer's mean square is within a factor of {MEAN_SQUARE_FACTOR} of 1, beyond the "
        f"exp(2 beta^2 sqrt(1.5 depth / width)) of a finite width; if the last kernel's effective rank exceeds 1 by at least "
        f"{RANK_SHARE:g} of what the first one's does; and if layers' gradient norms are within a factor of {GRADIENT_RATIO}")


def report(config, vocabulary, tokens):
    """Measured and predicted quantities of the initialised network on tokens (N, T).

    {"measured": kernels (L + 1, N, T, T), "predicted": the same or None, "gradient": norms (L + 1,), relative to the last,
    "gradient_cosine": between different positions' gradients (L + 1,)}; index 0 is the embedding.
    """
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(config.seed), config, vocabulary)
    constants = model.constants(config)
    hidden, gradient = states_and_gradients(params, constants, tokens, jax.random.key(config.seed + 1), config)
    kernels = np.asarray(jnp.einsum("lnid,lnjd->lnij", hidden, hidden), np.float64) / config.width
    backward = np.asarray(jnp.einsum("lnid,lnjd->lnij", gradient, gradient), np.float64)
    norms = np.sqrt(np.trace(backward, axis1=-2, axis2=-1).mean(-1))
    return {"measured": kernels, "predicted": predicted(config, constants, tokens), "gradient": norms / norms[-1],
            "gradient_cosine": mean_cosine(backward, tokens)}


@partial(jax.jit, static_argnames="config")
def states_and_gradients(params, constants, tokens, key, config):
    """Each layer's output for tokens (N, T), and the gradient of a random linear function of the last: (L + 1, N, T, d) both.

    The head is left out: it starts at zero, and lets no gradient through.
    """

    def run(nudges):
        """What small changes of every layer's output lead to."""
        x = model.embed(params, tokens, config) + nudges[0]
        def layer(x, slices):
            weights, own, nudge = slices
            x = model.block(x, weights, own, config) + nudge
            return x, x
        last, states = jax.lax.scan(layer, x, (params["blocks"], constants, nudges[1:]))
        return last, jnp.concatenate([x[None], states])

    nudges = jnp.zeros((config.depth + 1, *tokens.shape, config.width), model.compute_dtype(config))
    last, backward, states = jax.vjp(run, nudges, has_aux=True)
    return states, backward(jax.random.normal(key, last.shape, last.dtype))[0]


def predicted(config, constants, tokens):
    """Section 4's kernels for these very tokens, (L + 1, N, T, T), under the network's own D; None for softmax."""
    length = tokens.shape[1]
    if config.attn == "softmax":
        return None
    log_attentions = model.log_attentions(config, length)
    if constants:
        log_attentions = np.asarray(constants["bias"], np.float64) + np.log(np.asarray(constants["rescale"], np.float64))[..., None]
    first = [model.initial_kernel(config, length, row[:, None] == row) for row in tokens]
    correlation_map = model.activation(config).correlation_map
    rest = [[kernel for _, kernel in spa.propagate(log_attentions, kernel, correlation_map, config.alpha, config.beta,
                                                   config.norm != "none", rescale=False)] for kernel in first]
    return np.concatenate([np.array(first)[None], np.swapaxes(rest, 0, 1)])


# --- Quantities of kernels (..., N, T, T), averaged over the N windows ---------------------------------------------------

def mean_square(kernels):
    return np.trace(kernels, axis1=-2, axis2=-1).mean(-1) / kernels.shape[-1]


def mean_cosine(kernels, tokens):
    """Over pairs of positions whose tokens differ."""
    scale = np.sqrt(np.maximum(np.diagonal(kernels, axis1=-2, axis2=-1), 1e-300))
    differ = tokens[:, :, None] != tokens[:, None, :]
    return (kernels / (scale[..., :, None] * scale[..., None, :]) * differ).sum((-3, -2, -1)) / differ.sum()


def effective_rank(kernels):
    """exp of the entropy of the eigenvalues' shares: T for the identity, 1 where all tokens are the same."""
    values = np.maximum(np.linalg.eigvalsh(kernels), 1e-300)
    share = values / values.sum(-1, keepdims=True)
    return np.exp(-(share * np.log(share)).sum(-1)).mean(-1)


def table(result, tokens):
    """The report's lines: a header, then one for each layer."""
    columns = [("mean square", mean_square), ("mean cosine", partial(mean_cosine, tokens=tokens)), ("effective rank", effective_rank)]
    rows = []
    for _, quantity in columns:
        measured = quantity(result["measured"])
        known = result["predicted"] is not None
        rows += [measured, quantity(result["predicted"]) if known else np.full(len(measured), np.nan)]
    rows += [result["gradient"], result["gradient_cosine"]]
    lines = ["layer " + "".join(f"{name:>14} predicted" for name, _ in columns) + "  gradient  its cosine"]
    for layer, values in enumerate(np.transpose(rows)):
        cells = "".join(f"{value:>14.3f}" if i % 2 == 0 else f"{value:>10.3f}" for i, value in enumerate(values[:-2]))
        lines.append(f"{layer:5} " + cells.replace("nan", "  -") + f"{values[-2]:10.3f}{values[-1]:12.3f}")
    return lines


def verdict(result, config):
    """One line: signal survives, or does not and why, by RULE.

    The product with 4 d -> d is a projection: it keeps one vector's mean square up to a relative spread of sqrt(1.5 / d).
    Deep tokens are nearly one vector, so over L blocks its logarithm walks at random; two standard deviations are allowed.
    """
    square, rank, gradient = mean_square(result["measured"]), effective_rank(result["measured"]), result["gradient"]
    allowed = MEAN_SQUARE_FACTOR * np.exp(2 * config.beta**2 * np.sqrt(1.5 * config.depth / config.width))
    worst, ratio = np.abs(np.log(square)).argmax(), gradient.max() / gradient.min()
    faults = [f"mean square {square[worst]:.3g} at layer {worst}"] * (not max(square[worst], 1 / square[worst]) <= allowed)
    faults += [f"effective rank falls from {rank[0]:.3g} to {rank[-1]:.6g}"] * (not rank[-1] - 1 >= RANK_SHARE * (rank[0] - 1))
    faults += [f"gradient norms differ by a factor of {ratio:.3g}"] * (not ratio <= GRADIENT_RATIO)
    return "signal does not survive: " + "; ".join(faults) if faults else \
        f"signal survives: mean square within {square.min():.3g} to {square.max():.3g}, effective rank {rank[0]:.3g} to " \
        f"{rank[-1]:.3g}, gradient norms within a factor of {ratio:.3g}"


# --- The picture ------------------------------------------------------------------------------------------------------------

def plot(path, result, control, tokens, name):
    """Heat maps of kernels at four depths, and the curves over depth, for `name` beside the softmax control; to a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plotting needs matplotlib: pip install -e '.[plot]'") from None
    depth = len(result["measured"]) - 1
    shown = sorted({max(1, depth * share // 6) for share in (1, 2, 4, 6)})
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(4, 4)
    missing = " (none)" if result["predicted"] is None else ""
    rows = [(f"{name}, predicted{missing}", result["predicted"]), (f"{name}, measured", result["measured"]),
            ("softmax, measured", control["measured"])]
    for line, (label, kernels) in zip(axes, rows):
        line[0].set_ylabel(f"{label}\nposition i")
        for axis, layer in zip(line, shown):
            shade = np.zeros((1, 1)) if kernels is None else kernels[layer, 0] / mean_square(kernels[layer, :1])
            image = axis.imshow(shade, cmap="gray_r", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}")
            axis.set_xlabel("position j")
        figure.colorbar(image, ax=line, label="kernel Sigma_ij,\nat mean square 1")
    curves = [("mean square", mean_square, "log"), ("mean cosine of\ndifferent tokens", partial(mean_cosine, tokens=tokens), "linear"),
              ("effective rank", effective_rank, "log"), ("gradient norm,\nrelative to the last", None, "log")]
    for axis, (label, quantity, scale) in zip(axes[3], curves):
        for each, style, title in ((result, "-", name), (control, "--", "softmax")):
            axis.plot(each["gradient"] if quantity is None else quantity(each["measured"]), "k" + style, label=title)
        if quantity and result["predicted"] is not None:
            axis.plot(quantity(result["predicted"]), "o", color="0.5", markersize=3, markevery=3, label=f"{name}, predicted")
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.set_yscale(scale)
    axes[3][0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None
