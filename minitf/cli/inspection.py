"""The kernel report: does signal survive the depth of a network at initialisation? Measured, beside the prediction."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from . import model, spa, theory

WINDOWS, INITIALISATIONS = 4, 8           # a report is a mean over both: theory speaks of the mean over initialisations
MEAN_SQUARE_FACTOR = 2.0                  # of activations, at every depth: beyond what the width explains, see `verdict`
GRADIENT_RATIO = 10.0                     # largest over smallest gradient norm, over depth
ROUNDINGS = 8                             # of a token's activations in a block: each product's, phi's, D's and the skips'
THRESHOLDS = (f"signal survives where the mean square stays within a factor of {MEAN_SQUARE_FACTOR:g} of 1 beyond what the "
              f"width explains, exp(2 beta^2 sqrt(2.25 depth / (width {INITIALISATIONS}))), the effective rank above what "
              f"rounding, {ROUNDINGS} times a block, would leave of tokens that are all one vector, and gradient norms within "
              f"a ratio of {GRADIENT_RATIO:g} over depth")


# --- What is measured -------------------------------------------------------------------

def states(params, constants, tokens, config):
    """tokens (T,) -> X_0, ..., X_L: (L + 1, T, d), the embedding and what each block gives."""
    x = model.embed(params, tokens, config)
    step = lambda x, layer: (model.block(x, *layer, config),) * 2
    return jnp.concatenate([x[None], jax.lax.scan(step, x, model.layers(params, constants, config))[1]])


def gradients(params, constants, x, cotangent, config):
    """From states (L + 1, T, d) and a cotangent of the last, (T, d): the gradients at all states, (L + 1, T, d)."""
    def back(gradient, layer):
        x, weights, constants = layer
        gradient, = jax.vjp(lambda x: model.block(x, weights, constants, config), x)[1](gradient)
        return gradient, gradient

    before = jax.lax.scan(back, cotangent, (x[:-1], *model.layers(params, constants, config)), reverse=True)[1]
    return jnp.concatenate([before, cotangent[None]])


@partial(jax.jit, static_argnames="config")
def measure(params, constants, tokens, key, config):
    """tokens (n, T) -> kernels of activations and of gradients, (n, L + 1, T, T) each, in float32.

    The head starts at zero and passes no gradient: a random cotangent of mean square 1 at the last layer stands for it.
    """
    def one(tokens, key):
        x = states(params, constants, tokens, config)
        g = gradients(params, constants, x, jax.random.normal(key, x.shape[1:], x.dtype), config)
        kernels = lambda y: jnp.einsum("lid,ljd->lij", y, y, precision="highest") / config.width
        return [kernels(y.astype(jnp.float32)) for y in (x, g)]

    return jax.vmap(one)(tokens, jax.random.split(key, len(tokens)))


def predicted(constants, tokens, config):
    """The recursion from where the tokens (T,) do repeat, with the network's own D: (L + 1, T, T); softmax: None."""
    if config.attn == "softmax":
        return None
    kernel = theory.initial_kernel(config, len(tokens), tokens[:, None] == tokens)
    if not constants:
        return np.array([kernel] + [sigma for _, sigma in theory.predict(config, kernel)])
    blocks = spa.propagate(theory.made_attentions(config, constants), kernel, theory.correlation_map(config), config.alpha, config.beta,
                           config.norm != "none", rescale=False)            # D has brought n along
    return np.array([kernel] + [sigma for _, sigma in blocks])


# --- What is said of a kernel -----------------------------------------------------------

def mean_square(kernels):
    """(..., T, T) -> (...): over tokens."""
    return np.trace(kernels, axis1=-2, axis2=-1) / kernels.shape[-1]


def mean_cosine(kernels):
    """(..., T, T) -> (...): over pairs of different positions."""
    scale = np.sqrt(np.maximum(np.diagonal(kernels, axis1=-2, axis2=-1), 1e-30))
    length = kernels.shape[-1]
    return ((kernels / scale[..., None] / scale[..., None, :]).sum((-2, -1)) - length) / (length * (length - 1))


def effective_rank(kernels):
    """(..., T, T) -> (...): exp of the entropy of the eigenvalues, which share out 1; from 1 to T."""
    values = np.maximum(np.linalg.eigvalsh(np.asarray(kernels, float)), 0)
    share = values / np.maximum(values.sum(-1, keepdims=True), 1e-30)
    return np.exp(-np.sum(share * np.log(np.maximum(share, 1e-300)), -1))


def report(config, tokens, vocabulary):
    """tokens (n, T) -> {name: array over depth 0 to L}, means over windows and initialisations, see `table`.

    And "kernels" and "predicted kernels" of the first window, (L + 1, T, T).
    """
    constants = theory.constants(config)
    init = jax.jit(model.init, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(config.seed), INITIALISATIONS)
    measured = [measure(init(key, config, vocabulary), constants, tokens, jax.random.fold_in(key, 1), config) for key in keys]
    kernels, gradient_kernels = (np.concatenate(each) for each in zip(*measured))           # (inits x n, L + 1, T, T)
    expected = None if config.attn == "softmax" else np.array([predicted(constants, window, config) for window in tokens])
    say = lambda kernels: {f.__name__.replace("_", " "): f(kernels).mean(0) for f in (mean_square, mean_cosine, effective_rank)}
    out = say(kernels) | {"gradient norm": np.sqrt(config.width * config.length * mean_square(gradient_kernels)).mean(0),
                          "gradient cosine": mean_cosine(gradient_kernels).mean(0), "kernels": kernels[::len(tokens)].mean(0)}
    return out if expected is None else \
        out | {f"predicted {name}": values for name, values in say(expected).items()} | {"predicted kernels": expected[0]}


def rounded_rank(width, length, depth, dtype):
    """The effective rank of a kernel measured in float32, whose tokens are one vector but for rounding: at most about this.

    A rounding is an error of at most u relative to each feature, u^2 / 3 in the mean square if uniform, and all of a chain's
    add up. Products of `width` terms leave errors of u sqrt(width) in a kernel's entries: a random matrix, the half of whose
    eigenvalues that is positive (Wigner's semicircle) adds up to 4 / (3 pi) T^(3/2) times that. As shares of the
    trace, spread over T - 1 eigenvalues beside the first, these have the entropy share (1 + log((T - 1) / share)).
    """
    unit = lambda dtype: float(jnp.finfo(dtype).eps) / 2
    share = ROUNDINGS * depth * unit(dtype)**2 / 3 + 4 / (3 * np.pi) * np.sqrt(length * width) * unit("float32")
    return np.exp(share * (1 + np.log((length - 1) / share)))


def verdict(out, config):
    """One line: signal survives, or what breaks first and where.

    An MLP keeps the mean square of one vector up to a relative variance of 2.25 / d at most: 1.5 / d from the projection
    4 d -> d, up to 0.75 / d (that of ReLU) from the leaky ReLUs. Deep tokens are nearly one vector, so over L blocks its
    logarithm walks at random; two standard deviations are allowed.
    """
    walk = np.sqrt(2.25 * config.depth / (config.width * INITIALISATIONS))
    factor = MEAN_SQUARE_FACTOR * np.exp(2 * config.beta**2 * walk)
    least = rounded_rank(config.width, out["kernels"].shape[-1], config.depth, model.compute_dtype(config))
    square, rank, gradient = out["mean square"], out["effective rank"], out["gradient norm"]
    problems = []
    bad = np.flatnonzero(~((square <= factor) & (square >= 1 / factor)))
    if len(bad):
        problems.append(f"mean square {square[bad[0]]:.3g} after block {bad[0]}, not within a factor of {factor:.3g} of 1")
    bad = np.flatnonzero(~(rank > least))
    if len(bad):
        problems.append(f"effective rank 1 + {rank[bad[0]] - 1:.2g} after block {bad[0]}, where rounding alone may leave "
                        f"1 + {least - 1:.2g}")
    ratio = gradient.max() / max(gradient.min(), 1e-30)
    if not ratio <= GRADIENT_RATIO:
        problems.append(f"gradient norms spread by a ratio of {ratio:.3g} over depth, not {GRADIENT_RATIO:g}")
    return "signal does not survive: " + "; ".join(problems) if problems else "signal survives"


COLUMNS = ("mean square", "mean cosine", "effective rank", "gradient norm", "gradient cosine")


def table(out):
    """The report's text: a line a depth, each measured value beside its prediction where theory makes one."""
    cell = lambda name, layer: f"{out[name][layer]:.4g}" + \
        (f" ({out['predicted ' + name][layer]:.4g})" if "predicted " + name in out else "")
    head = "block" + "".join(f"{name:>18}" for name in COLUMNS) + "     (predicted)" * ("predicted kernels" in out)
    return "\n".join([head] + [f"{layer:5}" + "".join(f"{cell(name, layer):>18}" for name in COLUMNS)
                               for layer in range(len(out["mean square"]))])


# --- The picture ------------------------------------------------------------------------

def plot(out, other, config, path):
    """Kernels of the first window at four depths, predicted above measured, beside those of softmax; curves over depth.

    out: the report of `config`; other: that of the same network with softmax attention. ValueError without matplotlib.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install -e '.[plot]'") from None
    rows = [(f"{config.attn}, predicted", out.get("predicted kernels")), (f"{config.attn}, measured", out["kernels"]),
            ("softmax, measured", other["kernels"] if config.attn != "softmax" else None)]
    rows = [row for row in rows if row[1] is not None]
    figure, axes = pyplot.subplots(len(rows) + 1, 4, figsize=(12, 3 * len(rows) + 3), layout="constrained")
    for name, kernels, line in [(*row, line) for row, line in zip(rows, axes)]:
        for axis, depth in zip(line, np.linspace(0, config.depth, 4).round().astype(int)):
            image = axis.imshow(spa.correlation(kernels[depth].astype(float)), cmap="gray_r", vmin=0, vmax=1)
            axis.set(title=f"{name}, block {depth}", xlabel="position", ylabel="position")
    figure.colorbar(image, ax=axes[:-1], label="cosine of two positions' activations", shrink=0.6)
    for axis, name in zip(axes[-1], COLUMNS):
        axis.plot(out[name], "k-", label=f"{config.attn}, measured")
        if "predicted " + name in out:
            axis.plot(out["predicted " + name], "o", color="0.5", mfc="none", ms=4, label=f"{config.attn}, predicted")
        if config.attn != "softmax":
            axis.plot(other[name], "k:", label="softmax, measured")
        axis.set(xlabel="block", ylabel=name, yscale="linear" if "cosine" in name else "log")
    axes[-1][1].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)
