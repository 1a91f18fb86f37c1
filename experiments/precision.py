"""How far the bfloat16 kernel of long-context espa is from float64, forward and gradients.

    python experiments/precision.py [--length 8192] [--gammas 0.2 0.005] [--sizes 0 1 4]

One head of 64 features, the first, middle and last block of 36, queries and keys of a given size
(0: as at initialisation). Both see the same inputs, rounded to bfloat16. Each line is
|result - reference| / |reference| over all entries, in units of 2^-9, the rounding error of a
bfloat16. On a GPU the kernel itself runs, elsewhere it is interpreted: slow, for short lengths.
"""
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from records import header, parser, row

from minitf.network import flash
from minitf.theory import spa

FEATURES, DEPTH = 64, 36


def reference(qkv, bias, row_scale):
    """What the kernel computes, as T x T: (T, 3, FEATURES) -> (T, FEATURES)."""
    (q, k, v), (slope, first_key_bias, self_bias) = qkv.swapaxes(0, 1), bias
    lag = np.arange(len(q))[:, None] - np.arange(len(q))
    z = q @ k.T / np.sqrt(FEATURES) - slope * lag + self_bias * (lag == 0)
    z = z.at[:, 0].add(first_key_bias)
    return row_scale[:, None] * (jax.nn.softmax(jnp.where(lag >= 0, z, -jnp.inf)) @ v)


def errors(gamma_in, gamma_out, size, length):
    """Relative errors of out, dq, dk, dv, in units of 2^-9."""
    rng, interpret = np.random.default_rng(0), jax.default_backend() != "gpu"
    inputs = [scale * rng.normal(size=(length, FEATURES)) for scale in (size, size, 1, 1)]
    rounded = np.asarray(jnp.asarray(np.stack(inputs, 1), jnp.bfloat16))      # (T, 4, FEATURES)
    bias = np.array(spa.espa_bias(gamma_in, gamma_out), np.float32)
    row_scale = spa.espa_matvec(gamma_in, gamma_out, np.ones((length, 1)))[:, 0].astype(np.float32)
    attend = lambda qkv: flash.attend(qkv[None, :, :, None], bias[None], row_scale[None],
                                      False, interpret)[0, :, 0]
    got = with_gradients(attend, rounded)
    with jax.enable_x64(True):
        exact = lambda qkv: reference(qkv, bias.astype(float), row_scale.astype(float))
        wanted = with_gradients(exact, rounded.astype(float))
    return [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300) * 2**9
            for a, b in zip(got, wanted)]


def with_gradients(attend, inputs):
    """(out, dq, dk, dv) of float64, from queries, keys, values and a cotangent, (T, 4, k)."""
    out, pull = jax.vjp(attend, jnp.asarray(inputs[:, :3]))
    gradient, = pull(jnp.asarray(inputs[:, 3]))
    return [np.asarray(each, float) for each in (out, *jnp.moveaxis(gradient, 1, 0))]


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--length", type=int, default=8192)
    arguments.add_argument("--gammas", type=float, nargs="+", default=[0.2, 0.005])
    arguments.add_argument("--sizes", type=float, nargs="+", default=[0.0, 1.0, 4.0])
    given = arguments.parse_args()
    print(f"{jax.devices()[0].device_kind}, T = {given.length}\n")
    print(header("gamma", "block", "size of q, k", "out", "dq", "dk", "dv"))
    for gamma, layer, size in product(given.gammas, (1, DEPTH // 2, DEPTH), given.sizes):
        before, after = spa.exponential_schedule(gamma, DEPTH)[layer - 1:layer + 1]
        units = errors(before, after, size, given.length)
        print(row(f"{gamma:g}", layer, f"{size:g}", *(f"{each:.2f}" for each in units)), flush=True)
