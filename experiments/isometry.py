"""Why a chain without shortcuts learns slowly, and what mends it: the rank of what it passes on, at initialisation or later.

    python experiments/isometry.py [--widths 64 256]         at initialisation: prints a table, draws isometry.png
    python experiments/isometry.py --trained DIR...          of models that run.py trained, along held-out text: prints a table

The kernels of signal-preserving attention and TAT say how alike two tokens' vectors are, in the mean over weights. They do not
say how many directions a token's vector can move in. Here J_l is the derivative of the last position after block l by
its own embedding, a d x d matrix, along a text (at initialisation random vectors). Its participation ratio
(sum s^2)^2 / sum s^4 of the singular values s is d where all are equal, and 1 where one direction is all that arrives.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from minitf import Config, checkpoint, data, model, theory                     # noqa: E402
from run import DATA                                                           # noqa: E402

NETWORKS = {                                                                   # name: flags
    "looks linear (--block vanilla)": dict(block="vanilla"),
    "orthogonal, TAT with eta 0.5": dict(block="paper", eta=0.5),
    "orthogonal, TAT with eta 0.9 (--block paper)": dict(block="paper"),
    "weighted skips (--block weighted)": dict(block="weighted"),
    "Pre-LN (--block preln)": dict(block="preln"),
}


@partial(jax.jit, static_argnames="config")
def jacobians(params, constants, x, config):
    """x (T, d) -> J_1, ..., J_L, and of each block those of its first half, with attention, and its second, (L, d, d) each."""
    def step(carry, layer):
        (x, jacobian), (weights, constants) = carry, layer
        first, second = lambda x: model.first_half(x, weights, constants, config), lambda x: model.second_half(x, weights, config)
        of_last = lambda half, x: jax.jacrev(lambda last: half(x.at[-1].set(last))[-1])(x[-1])
        halfway = first(x)
        halves = of_last(first, x), of_last(second, halfway)
        jacobian = halves[1] @ halves[0] @ jacobian
        return (second(halfway), jacobian), (jacobian, *halves)

    return jax.lax.scan(step, (x, jnp.eye(config.width)), model.layers(params, constants, config))[1]


def singular_values(matrices):
    """(..., d, d) -> (..., d), largest first."""
    return np.linalg.svd(np.asarray(matrices, float), compute_uv=False)


def at_initialisation(config, seed=0):
    """(L, d): the singular values of J_1, ..., J_L."""
    params, constants = model.init(jax.random.key(seed), config, 1024), theory.constants(config)
    x = jax.random.normal(jax.random.key(seed + 1), (config.length, config.width))
    return singular_values(jacobians(params, constants, x, config)[0])


def participation(s):
    return (s**2).sum(-1)**2 / (s**4).sum(-1)


def trained(folder, windows=8):
    """A table's line: the mean of what some windows of held-out text show."""
    config, params, constants, encoding = checkpoint.load_model(folder)
    texts = data.spread_windows(data.load(str(DATA), encoding, config.length).held_out, config.length, windows)[:, :-1]
    s = [[singular_values(each) for each in jacobians(params, constants, model.embed(params, text, config), config)] for text in texts]
    ranks, first, second = (np.mean(each, 0) for each in zip(*((participation(whole), *halves) for whole, *halves in s)))
    spread = lambda values: ", ".join(f"{value:.2f}" for value in np.quantile(values.mean(0), (1, 0.75, 0.5, 0.25, 0)))
    return " | ".join(["", folder, *(f"{ranks[layer - 1]:.1f}" for layer in (1, 6, 12, 36)), spread(first), spread(second), ""]).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--trained", nargs="+", metavar="DIR")
    arguments = parser.parse_args()
    if arguments.trained:
        print("| model | block 1 | block 6 | block 12 | block 36 | attention: largest, quartiles, least | MLP |\n| --- |" + " --- |" * 6)
        return print("\n".join(trained(folder) for folder in arguments.trained))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(arguments.widths), figsize=(5 * len(arguments.widths), 3.8), layout="constrained", squeeze=False)
    print("| initialisation | width | " + " | ".join(f"block {layer}" for layer in (1, 6, 12, 36)) + " | condition, block 36 |")
    print("| --- |" + " --- |" * 6)
    for width, axis in zip(arguments.widths, axes[0]):
        for (name, flags), style in zip(NETWORKS.items(), ("k-", "k-.", "k--", "C7-", "C7:")):
            s = at_initialisation(Config(depth=36, width=width, heads=4, length=32, repeat_rate=0.0, **flags))
            rank = participation(s)
            print(f"| {name} | {width} | " + " | ".join(f"{rank[layer - 1]:.1f}" for layer in (1, 6, 12, 36)) +
                  f" | {s[-1, 0] / s[-1, -1]:.2g} |", flush=True)
            axis.plot(np.arange(1, 37), rank, style, label=name)
        axis.set(xlabel="block", ylabel="directions that arrive", yscale="log", title=f"width {width}")
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(HERE / "isometry.png", dpi=110)


if __name__ == "__main__":
    main()
