"""The kernel report: does signal survive the depth of a network?

Kernels and gradients as measured on real text: at initialisation beside their prediction, after
training beside the start.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..network import fast, model, objectives
from ..network.init import init
from ..theory import kernels as theory
from ..training import checkpoint, data, sharding
from ..training.encoding import vocabulary as vocabulary_of
from .pictures import COLUMNS, draw_reports
from .use import read_corpus

WINDOWS, INITIALISATIONS = 4, 8     # a report is a mean over both: theory speaks of the mean
MEAN_SQUARE_FACTOR = 2.0            # of activations, beyond what the width explains: see `verdict`
GRADIENT_RATIO = 10.0               # largest over smallest gradient norm, over depth
ROUNDINGS = 8                       # of a token in a block: each product's, phi's, D's, the skips'


initialise = jax.jit(init, static_argnums=(1, 2))


def inspect(settings, plot_path):
    """Prints the report of a network on validation text; draws it into `plot_path` if given."""
    settings, *text = read_windows(settings)
    config, out = settings.model, report(settings, *text)
    print(table(out, "predicted"))
    if plot_path:
        others = {} if config.attn == "softmax" else {"softmax": report(
            settings.replace(attn="softmax", identity_skip=False), *text)}
        draw_reports({config.attn: out, **others}, plot_path)
    print(verdict(out, config))


def read_windows(settings):
    """(settings with the text's collision rate, windows of it (n, T), vocabulary)."""
    corpus, settings = read_corpus(settings)
    return settings, windows_of(corpus, settings.model), vocabulary_of(corpus.encoding)


def windows_of(corpus, config):
    """Windows of the validation text (n, T), as the network is given them."""
    windows = data.spread_windows(corpus.validation, config.length, WINDOWS)[:, :-1]
    if config.objective == "mlm":
        windows = np.asarray(objectives.hide(windows, vocabulary_of(corpus.encoding))[0])
    return windows


def inspect_run(folder, plot_path, mesh=None):
    """Prints the report of a run's newest checkpoint, beside its start, and its weights' sizes."""
    saved = checkpoint.newest(folder)[0]
    settings, config = saved.settings, saved.settings.model
    windows = windows_of(data.load(settings.data, config.length, saved.encoding), config)
    key, constants = jax.random.key(settings.training.seed), theory.attention_constants(config)
    start = initialise(key, config, vocabulary_of(saved.encoding))
    with sharding.use(mesh, settings):
        before, after = (measured([sharding.place(params)], [key], constants, windows, config)
                         for params in (start, saved.params))
    print(table(after | {f"start {name}": value for name, value in before.items()}, "start"))
    print(gains(start["blocks"], saved.params["blocks"]))
    if plot_path:
        draw_reports({f"after {saved.step} steps": after, "at the start": before}, plot_path)


# --- What is measured -------------------------------------------------------------------

def states(params, constants, tokens, config):
    """tokens (T,) -> X_0, ..., X_L: (L + 1, T, d), the embedding and what each block gives."""
    x = model.embed(params, tokens, config)
    step = lambda x, layer: (model.block(x, *layer, config, fast.operations(config)),) * 2
    _, after = jax.lax.scan(step, x, model.layers(params, constants, config))
    return jnp.concatenate([x[None], after])


def gradients(params, constants, x, cotangent, config):
    """The gradients at all states (L + 1, T, d), from a cotangent (T, d) of the last one."""
    def back(gradient, layer):
        x, *layer = layer
        block = lambda x: model.block(x, *layer, config, fast.operations(config))
        gradient, = jax.vjp(block, x)[1](gradient)
        return gradient, gradient

    layers = x[:-1], *model.layers(params, constants, config)
    before = jax.lax.scan(back, cotangent, layers, reverse=True)[1]
    return jnp.concatenate([before, cotangent[None]])


@partial(jax.jit, static_argnames="config")
def measure(params, constants, tokens, key, config):
    """tokens (n, T) -> kernels of activations and of gradients, (n, L + 1, T, T) each, float32.

    The head may start at zero and pass no gradient: a random cotangent stands for it.
    """
    def one(tokens, key):
        x = states(params, constants, tokens, config)
        cotangent = jax.random.normal(key, x.shape[1:], x.dtype)
        g = gradients(params, constants, x, cotangent, config)
        kernels = lambda y: jnp.einsum("lid,ljd->lij", y, y, precision="highest") / config.width
        return [kernels(y.astype(jnp.float32)) for y in (x, g)]

    return jax.vmap(one)(tokens, jax.random.split(key, len(tokens)))


def predicted(equal, n, config):
    """The recursion with the network's own D = rowsum(A) / n, from the kernel of the tokens.

    equal: (T, T), where tokens repeat, or the products of their embeddings. (L + 1, T, T); None
    where A depends on the input.
    """
    kernel = theory.input_kernel(config, len(equal), equal)
    after = [sigma for _, sigma in theory.predict_kernels(config, kernel, n)]
    return np.array([kernel, *after]) if after else None


# --- What is said of a kernel -----------------------------------------------------------

def mean_square(kernels):
    """(..., T, T) -> (...): over tokens."""
    return np.trace(kernels, axis1=-2, axis2=-1) / kernels.shape[-1]


def mean_cosine(kernels):
    """(..., T, T) -> (...): over pairs of different positions."""
    length = kernels.shape[-1]
    return (theory.correlation(kernels).sum((-2, -1)) - length) / (length * (length - 1))


def effective_rank(kernels):
    """(..., T, T) -> (...), from 1 to T: exp of the entropy of the eigenvalues as shares of 1."""
    values = np.maximum(np.linalg.eigvalsh(np.asarray(kernels, float)), 0)
    share = values / np.maximum(values.sum(-1, keepdims=True), 1e-30)
    return np.exp(-np.sum(share * np.log(np.maximum(share, 1e-300)), -1))


def measured(parameters, keys, constants, tokens, config):
    """{name: array over depth 0 to L} of COLUMNS, means over networks and windows, tokens (n, T).

    And "kernels", those of the first window, (L + 1, T, T).
    """
    each = [measure(params, constants, tokens, jax.random.fold_in(key, 1), config)
            for params, key in zip(parameters, keys)]
    kernels, of_gradients = (np.concatenate(part) for part in zip(*each))
    return describe(kernels) | {
        "gradient norm": np.sqrt(config.width * config.length * mean_square(of_gradients)).mean(0),
        "gradient cosine": mean_cosine(of_gradients).mean(0),
        "kernels": kernels[::len(tokens)].mean(0)}


def report(settings, tokens, vocabulary):
    """What is measured at initialisation, and "predicted ..." where theory makes a prediction."""
    config = settings.model
    constants = theory.attention_constants(config)
    keys = jax.random.split(jax.random.key(settings.training.seed), INITIALISATIONS)
    parameters = (initialise(key, config, vocabulary) for key in keys)
    out = measured(parameters, keys, constants, tokens, config)
    n = theory.attended_rms(config) if constants else None
    # The embeddings' own kernel matters to the effective rank alone, which is not linear in it.
    expected = [predicted(window[:, None] == window, n, config) for window in tokens]
    if expected[0] is None:
        return out
    named = {f"predicted {name}": value for name, value in describe(np.array(expected)).items()}
    drawn = np.array([predicted(drawn_kernel(tokens[i % len(tokens)], config.width, i), n, config)
                      for i in range(INITIALISATIONS)])
    return out | named | {"predicted kernels": expected[0],
                          "predicted effective rank": effective_rank(drawn).mean(0)}


def drawn_kernel(tokens, width, seed):
    """X X^T / d of random embeddings: of finite width they are not quite orthogonal."""
    distinct, of_token = np.unique(tokens, return_inverse=True)
    x = np.random.default_rng(seed).normal(size=(len(distinct), width))[of_token]
    return x @ x.T / width


def describe(kernels):
    """{name: what is said of kernels (n, L + 1, T, T), as a mean over n, (L + 1,)}."""
    return {f.__name__.replace("_", " "): f(kernels).mean(0)
            for f in (mean_square, mean_cosine, effective_rank)}


def rounded_rank(width, length, depth, dtype):
    """The effective rank of tokens that are one vector but for rounding, at most about this.

    A rounding is an error of at most u relative to each feature, u^2 / 3 in the mean square if
    uniform, and all of a network's add up. Products of `width` terms leave errors of u sqrt(width)
    in a float32 kernel's entries: a random matrix, whose positive eigenvalues (half of Wigner's
    semicircle) add up to 4 / (3 pi) T^(3/2) times that. As shares of the trace, spread over T - 1
    eigenvalues beside the first, these have the entropy share (1 + log((T - 1) / share)).
    """
    unit = lambda dtype: float(jnp.finfo(dtype).eps) / 2
    of_kernel = 4 / (3 * np.pi) * np.sqrt(length * width) * unit("float32")
    share = ROUNDINGS * depth * unit(dtype)**2 / 3 + of_kernel
    return np.exp(share * (1 + np.log((length - 1) / share)))


def verdict(out, config):
    """One line: signal survives, or what breaks first and where.

    It survives where mean squares stay within MEAN_SQUARE_FACTOR of 1 beyond what the width
    explains, effective ranks above what rounding alone would leave, and gradient norms within
    GRADIENT_RATIO.

    An MLP keeps the mean square of one vector up to a relative variance of 2.25 / d at most:
    1.5 / d from the projection 4 d -> d, up to 0.75 / d (that of ReLU) from the leaky ReLUs. Deep
    tokens are nearly one vector, so over L blocks its logarithm walks at random; two standard
    deviations are allowed.
    """
    walk = np.sqrt(2.25 * config.depth / (config.width * INITIALISATIONS))
    factor = MEAN_SQUARE_FACTOR * np.exp(2 * config.beta**2 * walk)
    least = rounded_rank(config.width, config.length, config.depth, config.dtype)
    square, rank, gradient = out["mean square"], out["effective rank"], out["gradient norm"]
    problems = []
    bad = np.flatnonzero(~((square <= factor) & (square >= 1 / factor)))
    if len(bad):
        problems.append(f"mean square {square[bad[0]]:.3g} after block {bad[0]}, not within a "
                        f"factor of {factor:.3g} of 1")
    bad = np.flatnonzero(~(rank > least))
    if len(bad):
        problems.append(f"effective rank 1 + {rank[bad[0]] - 1:.2g} after block {bad[0]}, where "
                        f"rounding alone may leave 1 + {least - 1:.2g}")
    ratio = gradient.max() / max(gradient.min(), 1e-30)
    if not ratio <= GRADIENT_RATIO:
        problems.append(f"gradient norms spread by a ratio of {ratio:.3g} over depth, "
                        f"not {GRADIENT_RATIO:g}")
    return "signal does not survive: " + "; ".join(problems) if problems else "signal survives"


def table(out, beside):
    """The report's text: a line a depth, each value with what it stands beside, if anything."""
    def cell(name, layer):
        other = out.get(f"{beside} {name}")
        said = "" if other is None else f" ({other[layer]:.4g})"
        return f"{out[name][layer]:.4g}{said}".rjust(24)

    lines = ["block" + "".join(name.rjust(24) for name in COLUMNS)
             + f"     ({beside})" * (f"{beside} kernels" in out)]
    for layer in range(len(out["mean square"])):
        lines.append(f"{layer:5}" + "".join(cell(name, layer) for name in COLUMNS))
    return "\n".join(lines)


def gains(start, after):
    """The size of each block's weights over that at the start; queries start at 0: over keys'."""
    size = lambda w: np.sqrt(np.square(np.asarray(w)).mean(tuple(range(1, w.ndim))))
    names = [name for name, w in after.items() if getattr(w, "ndim", 0) == 3]
    ratio = [size(after[name]) / size(start["key" if name == "query" else name]) for name in names]
    lines = ["", "size of the weights over that at the start (queries over keys)",
             "block" + "".join(name.rjust(10) for name in names)]
    for block, row in enumerate(np.transpose(ratio), 1):
        lines.append(f"{block:5}" + "".join(f"{value:10.3g}" for value in row))
    return "\n".join(lines)
