"""Times real training steps (gradients, clipping, optimizer, feeding) and prints one line of JSON.

    python experiments/bench.py [--vocabulary 50304] [--timed 20] [--kernels 30] [any flag of run.py that shapes the model]

Tokens are random: only the speed means anything. A model's floating-point operations a token are counted as 6 for each
weight of a matrix product (2 forward, 4 backward) and 6 depth length width for causal attention; what is reached is
compared with the rate of one large matrix product in the same arithmetic, measured in the same run. --kernels N adds the
N kinds of kernel that take most of a step, in ms, from a profile of five more steps.
"""
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from run import keep_freed_memory, make_parser                                 # noqa: E402

import jax                                                                     # noqa: E402
import jax.numpy as jnp                                                        # noqa: E402

from minitf import data, model, theory, train                                  # noqa: E402


def main():
    parser, config_class = make_parser()
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0)
    flags = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    vocabulary, timed, kernels = (flags.pop(name) for name in ("vocabulary", "timed", "kernels"))
    config = config_class(**{"repeat_rate": 0.01, **{k: v for k, v in flags.items() if k in config_class.__dataclass_fields__}})

    keep_freed_memory()
    started = time.perf_counter()
    constants = theory.constants(config)
    seconds_constants = time.perf_counter() - started
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(0), config, vocabulary)
    weights = params["head"].size + sum(w.size for w in params["blocks"].values() if w.ndim == 3)
    opt_state = train.make_optimizer(config).init(params)
    tokens = np.random.default_rng(0).integers(0, vocabulary, 10**6, np.int32)

    def steps(first, count):
        """Runs them, with the next batch made while the device works; seconds until the last is done."""
        nonlocal params, opt_state
        begin = time.perf_counter()
        for step in range(first, first + count):
            batch = data.batch(tokens, config.length, config.batch, 0, step)
            params, opt_state, values = train.train_step(params, opt_state, constants, batch, config)
        loss = float(values["loss"])
        return time.perf_counter() - begin, loss

    first, _ = steps(0, 1)
    steps(1, 3)
    seconds, loss = steps(4, timed)
    rate = timed * config.batch * config.length / seconds
    work = 6 * weights + 6 * config.depth * config.length * config.width
    peak = product_rate(model.compute_dtype(config))
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "block": config.block, "attn": config.attn,
        "optimizer": config.optimizer, "depth": config.depth, "width": config.width, "length": config.length,
        "batch": config.batch, "ms_per_step": round(1e3 * seconds / timed, 2), "tokens_per_second": round(rate),
        "utilisation": round(rate * work / peak, 3), "product_tflops": round(peak / 1e12, 2), "loss": round(loss, 3),
        "seconds_constants": round(seconds_constants, 2), "seconds_first_step": round(first, 2),
        "peak_gib": round(memory / 2**30, 2)} | ({"kernels": profile(lambda: steps(4 + timed, 5), 5, kernels)} if kernels else {})))


def profile(run, steps, most):
    """{kind of kernel: ms a step}, the `most` largest and all together, of `steps` steps that `run` does."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    total = Counter()
    for line in (line for plane in trace.planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name):
        for event in line.events:
            total[re.sub(r"[._]?\d+$", "", event.name)[:60]] += event.duration_ns / 1e6 / steps
    return {"all": round(total.total(), 2)} | {name: round(ms, 2) for name, ms in total.most_common(most)}


def product_rate(dtype):
    """Floating-point operations a second of a large square product, on random data."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    begin = time.perf_counter()
    for _ in range(10):
        product = multiply(a, a)
    product.block_until_ready()
    return 10 * 2 * size**3 / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
