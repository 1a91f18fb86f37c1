"""Why a chain without shortcuts learns slowly, and what mends it: the rank of what it passes on, at initialisation.

    python experiments/isometry.py [--widths 64 256]         prints a table, draws isometry.png

The kernels of signal-preserving attention and TAT say how alike two tokens' vectors are, in the mean over weights. They do not
say how many directions a token's vector can move in. Here J_l is the derivative of the last position after block l by
its own embedding, a d x d matrix, along random tokens. Its participation ratio (sum s^2)^2 / sum s^4 of the singular values s
is d where all are equal, and 1 where one direction is all that arrives.
"""
import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from minitf import Config, model, theory                                       # noqa: E402

NETWORKS = {                                                                   # name: flags
    "looks linear (--block vanilla)": dict(block="vanilla"),
    "orthogonal, TAT with eta 0.5": dict(block="paper", eta=0.5),
    "orthogonal, TAT with eta 0.9 (--block paper)": dict(block="paper"),
    "weighted skips (--block weighted)": dict(block="weighted"),
    "Pre-LN (--block preln)": dict(block="preln"),
}


def singular_values(config, seed=0):
    """(L, d): those of J_1, ..., J_L, largest first."""
    params, constants = model.init(jax.random.key(seed), config, 1024), theory.constants(config)
    x = jax.random.normal(jax.random.key(seed + 1), (config.length, config.width))

    def step(carry, layer):
        x, jacobian = carry
        after = lambda last: model.block(x.at[-1].set(last), *layer, config)[-1]
        jacobian = jax.jacrev(after)(x[-1]) @ jacobian
        return (model.block(x, *layer, config), jacobian), jacobian

    _, jacobians = jax.lax.scan(step, (x, jnp.eye(config.width)), model.layers(params, constants, config))
    return np.linalg.svd(np.asarray(jacobians, float), compute_uv=False)


def participation(s):
    return (s**2).sum(-1)**2 / (s**4).sum(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    widths = parser.parse_args().widths
    figure, axes = pyplot.subplots(1, len(widths), figsize=(5 * len(widths), 3.8), layout="constrained", squeeze=False)
    print("| initialisation | width | " + " | ".join(f"block {layer}" for layer in (1, 6, 12, 36)) + " | condition, block 36 |")
    print("| --- |" + " --- |" * 6)
    for width, axis in zip(widths, axes[0]):
        for (name, flags), style in zip(NETWORKS.items(), ("k-", "k-.", "k--", "C7-", "C7:")):
            s = singular_values(Config(depth=36, width=width, heads=4, length=32, repeat_rate=0.0, **flags))
            rank = participation(s)
            print(f"| {name} | {width} | " + " | ".join(f"{rank[layer - 1]:.1f}" for layer in (1, 6, 12, 36)) +
                  f" | {s[-1, 0] / s[-1, -1]:.2g} |", flush=True)
            axis.plot(np.arange(1, 37), rank, style, label=name)
        axis.set(xlabel="block", ylabel="directions that arrive", yscale="log", title=f"width {width}")
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(HERE / "isometry.png", dpi=110)


if __name__ == "__main__":
    main()
