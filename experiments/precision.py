"""How far the bfloat16 kernel of long-context espa is from float64, forward and gradients.

    python experiments/precision.py [--length 8192] [--gammas 0.2 0.005] [--sizes 0 1 4]

One head of 64 features, the first, middle and last block of 36, queries and keys of a given size (0: as at initialisation).
Both see the same inputs, rounded to bfloat16. Each line is |result - reference| / |reference| over all entries, in units of
2^-9, the rounding error of a bfloat16. On a GPU the kernel itself runs, elsewhere it is interpreted: slow, for short lengths.
"""
import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).parent.parent))

from minitf import flash, spa                                                  # noqa: E402

ROWS, FEATURES, DEPTH = 512, 64, 36


def reference(q, k, v, decay, rescale, cotangent):
    """float64, some rows of T x T at a time: out and the gradients of q, k, v, each (T, FEATURES)."""
    slope, first, own = decay
    out, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for start in range(0, len(q), ROWS):
        row = np.arange(start, min(start + ROWS, len(q)))
        keys = np.arange(row[-1] + 1)
        lag = row[:, None] - keys
        z = q[row] @ k[keys].T / np.sqrt(FEATURES) - slope * lag + first * (keys == 0) + own * (lag == 0)
        p = softmax(np.where(lag >= 0, z, -np.inf), 1)
        out[row] = rescale[row, None] * (p @ v[keys])
        inner = rescale[row, None] * cotangent[row]
        slopes = p * (inner @ v[keys].T - (inner * (p @ v[keys])).sum(1, keepdims=True)) / np.sqrt(FEATURES)
        dq[row], dv[keys], dk[keys] = slopes @ k[keys], dv[keys] + p.T @ inner, dk[keys] + slopes.T @ q[row]
    return out, dq, dk, dv


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.2, 0.005])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0, 1.0, 4.0])
    arguments = parser.parse_args()
    interpret = jax.default_backend() != "gpu"
    print(f"{jax.devices()[0].device_kind}, T = {arguments.length}\n\n| gamma | block | size of q, k | out | dq | dk | dv |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    for gamma in arguments.gammas:
        gammas = spa.exponential_schedule(gamma, DEPTH)
        for layer in (1, DEPTH // 2, DEPTH):
            for size in arguments.sizes:
                rng = np.random.default_rng(0)
                q, k, v, cotangent = (scale * rng.normal(size=(arguments.length, FEATURES)) for scale in (size, size, 1, 1))
                decay = jnp.array(spa.exponential_decay(gammas[layer - 1], gammas[layer]), jnp.float32)
                rescale = jnp.asarray(spa.exponential_attend(gammas[layer - 1], gammas[layer], np.ones((arguments.length, 1)))[:, 0], jnp.float32)
                rounded = jnp.asarray(np.stack([q, k, v, cotangent], 1), jnp.bfloat16)[None, :, :, None]     # (1, T, 4, 1, k)
                out, pull = jax.vjp(lambda qkv: flash.attend(qkv, decay[None], rescale[None], interpret), rounded[:, :, :3])
                gradient, = pull(rounded[:, :, 3])
                got = [np.asarray(x[0, :, 0], float) for x in (out, *jnp.moveaxis(gradient, 2, 0))]
                *exact, cotangent = np.asarray(rounded[0, :, :, 0], float).swapaxes(0, 1)
                wanted = reference(*exact, np.asarray(decay, float), np.asarray(rescale, float), cotangent)
                errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300) * 2**9 for a, b in zip(got, wanted)]
                print(f"| {gamma:g} | {layer} | {size:g} | " + " | ".join(f"{error:.2f}" for error in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
