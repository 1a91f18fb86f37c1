"""Why a network without shortcuts learns slowly, and what mends it: the rank of its Jacobian.

    python experiments/isometry.py [--widths 64 256]     initialised: prints a table, isometry.png
    python experiments/isometry.py --trained DIR...      trained by run.py: prints a table

The kernels of signal-preserving attention and TAT say how alike two tokens' vectors are, in the
mean over weights. They do not say in how many directions a token's vector can move. Here J_l is
the derivative of the last position after block l by its own embedding, a d x d matrix, along a
text (at initialisation random vectors). The participation ratio of its singular values s is
(sum s^2)^2 / sum s^4: d where all are equal, 1 where one is all there is.
"""
import jax
import numpy as np
from records import HERE, header, parser, row, start

import minitf
from minitf.cli.figures import jacobians, participation_ratio, singular_values
from minitf.cli.pictures import figure, save
from minitf.network import model
from minitf.training import checkpoint, data

BLOCKS = (1, 6, 12, 36)
TITLES = [f"block {block}" for block in BLOCKS]
NETWORKS = {                                           # name: flags
    "isometric: looks-linear": dict(preset="isometric"),
    "orthogonal, TAT with eta 0.5": dict(preset="paper", eta=0.5),
    "paper: orthogonal, TAT with eta 0.9": dict(preset="paper"),
    "normless: weighted skips": dict(preset="normless"),
    "preln": dict(preset="preln"),
}


def at_initialisation(settings):
    """(L, d): the singular values of J_1, ..., J_L."""
    params, _, constants, _ = start(settings, 1024)
    x = jax.random.normal(jax.random.key(1), (settings.model.length, settings.model.width))
    return singular_values(jacobians(params, constants, x, settings.model)[0])


def trained(folders, count=8):
    """Prints a table: means over some windows of each model's validation text."""
    print(header("model", *TITLES, "attention: largest, quartiles, least", "MLP"))
    spread = lambda s: ", ".join(f"{q:.2f}" for q in np.quantile(s, (1, 0.75, 0.5, 0.25, 0)))
    for folder in folders:
        saved, _ = checkpoint.newest(folder)
        config, params, constants, encoding = checkpoint.model_of(saved)
        corpus = data.load(saved.settings.data, config.length, encoding)
        windows = data.spread_windows(corpus.validation, config.length, count)[:, :-1]
        embedded = (model.embed(params, window, config) for window in windows)
        s = singular_values([jacobians(params, constants, x, config) for x in embedded])
        ranks, halves = participation_ratio(s[:, 0]).mean(0), s[:, 1:].mean((0, 2))
        print(row(folder, *some(ranks), *map(spread, halves)))          # s: (windows, 3, L, d)


def some(ranks):
    """Of BLOCKS; the last one's for those beyond it."""
    return [f"{ranks[min(block, len(ranks)) - 1]:.1f}" for block in BLOCKS]


def draw(widths):
    """At initialisation: prints the table and draws isometry.png."""
    picture, axes = figure((5 * len(widths), 3.8), 1, len(widths), squeeze=False)
    print(header("initialisation", "width", *TITLES, f"condition, block {BLOCKS[-1]}"))
    for width, axis in zip(widths, axes[0]):
        for (name, flags), style in zip(NETWORKS.items(), ("k-", "k-.", "k--", "C7-", "C7:")):
            s = at_initialisation(minitf.resolve(width=width, length=32, **flags))
            ranks = participation_ratio(s)
            print(row(name, width, *some(ranks), f"{s[-1, 0] / s[-1, -1]:.2g}"), flush=True)
            axis.plot(np.arange(len(ranks)) + 1, ranks, style, label=name)
        axis.set(xlabel="block", ylabel="participation ratio of the Jacobian", yscale="log",
                 title=f"width {width}")
    axes[0][0].legend(fontsize="x-small")
    save(picture, HERE / "isometry.png")


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    arguments.add_argument("--trained", nargs="+", metavar="DIR")
    given = arguments.parse_args()
    trained(given.trained) if given.trained else draw(given.widths)
