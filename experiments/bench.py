"""Times real training steps (gradients, clipping, optimizer, feeding); prints one line of JSON.

    python experiments/bench.py [--vocabulary 50304] [--timed 20] [--kernels 30] [--draw 200] [flags]

Tokens are random: only the speed means anything. A model's floating-point operations a token are
counted as 6 for each weight of a matrix product (2 forward, 4 backward) and 6 depth length width
for causal attention. What is reached is compared with the rate of one large matrix product in the
same arithmetic, measured in the same run. --kernels N adds the N kinds of kernel that take most of
a step, in ms, from a profile of five more steps; --draw N the ms that each of N tokens takes.
"""
import json
import re
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from records import HERE                               # noqa: F401: minitf is importable with it

from minitf import attention_constants, init, resolve
from minitf.cli.loop import keep_freed_memory
from minitf.cli.main import MODES, make_parser
from minitf.network import decode, fast
from minitf.training import data, optimizer, train

OWN = dict(vocabulary=50304, timed=20, kernels=0, draw=0)      # flags that run.py has not


def main():
    parser = make_parser()
    parser.prog, parser.description = "bench.py", __doc__.splitlines()[0]
    for name, default in OWN.items():
        parser.add_argument("--" + name, type=int, default=default)
    given = vars(parser.parse_args())
    vocabulary, timed, kernels, draw = (given.pop(name) for name in OWN)
    flags = {name: value for name, value in given.items() if name not in MODES}
    settings = resolve(collision_rate=0.01, backend=fast.hardware(), **flags)
    model, how = settings.model, settings.training

    keep_freed_memory()
    started = time.perf_counter()
    constants = attention_constants(model)
    seconds_constants = time.perf_counter() - started
    params = jax.jit(partial(init, config=model, vocabulary=vocabulary))(jax.random.key(0))
    weights = params["head"].size + sum(w.size for w in params["blocks"].values() if w.ndim == 3)
    state = optimizer.make_optimizer(how.optimizer).init(params)
    fixed = jax.tree.map(jnp.asarray, (constants, optimizer.group_rates(how, model)))
    tokens = np.random.default_rng(0).integers(0, vocabulary, 10**6, np.int32)

    def steps(first, count):
        """The loss, and seconds for some steps; a batch is made while the device works."""
        nonlocal params, state
        begin = time.perf_counter()
        for step in range(first, first + count):
            batch = data.batch(tokens, model.length, how.batch, 0, step)
            params, state, values = train.train_step(
                params, state, *fixed, optimizer.learning_rate(how, step), batch, model,
                how.optimizer)
        return float(values["loss"]), time.perf_counter() - begin

    _, first = steps(0, 1)
    steps(1, 3)
    loss, seconds = steps(4, timed)
    rate = timed * how.batch * model.length / seconds
    work = 6 * weights + 6 * model.depth * model.length * model.width
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    peak = product_rate(model.dtype)
    result = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": settings.preset,
        "attn": model.attn, "optimizer": how.optimizer, "depth": model.depth, "width": model.width,
        "length": model.length, "batch": how.batch, "ms_per_step": round(1e3 * seconds / timed, 2),
        "tokens_per_second": round(rate), "utilisation": round(rate * work / peak, 3),
        "product_tflops": round(peak / 1e12, 2), "loss": round(loss, 3),
        "seconds_constants": round(seconds_constants, 2), "seconds_first_step": round(first, 2),
        "peak_gib": round(memory / 2**30, 2)}
    if kernels:
        result["kernels"] = profile(lambda: steps(4 + timed, 5), 5, kernels)
    if draw:
        for _ in range(2):                             # the first time compiles
            begin = time.perf_counter()
            list(decode.sample(params, fixed[0], [0], draw, model, temperature=0.8))
        result["ms_per_token_drawn"] = round(1e3 * (time.perf_counter() - begin) / draw, 2)
    print(json.dumps(result))


def profile(run, steps, most):
    """{kind of kernel: ms a step} of `steps` steps that `run` does: all, and the `most` largest."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        trace = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    lines = (line for plane in planes if "GPU" in plane.name for line in plane.lines)
    total = Counter()
    for event in (event for line in lines if "Stream" in line.name for event in line.events):
        total[re.sub(r"[._]?\d+$", "", event.name)[:60]] += event.duration_ns / 1e6 / steps
    return {name: round(ms, 2) for name, ms in [("all", total.total()), *total.most_common(most)]}


def product_rate(dtype):
    """Floating-point operations a second of a large square product, on random data."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    begin = time.perf_counter()
    jax.block_until_ready([multiply(a, a) for _ in range(10)])
    return 10 * 2 * size**3 / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
