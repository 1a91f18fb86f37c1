"""Times real training steps (gradients, clipping, optimizer, feeding); prints one line of JSON.

    python experiments/bench.py [--vocabulary 50304] [--timed 20] [--kernels 30] [--draw 200] ...

Tokens are random: only the speed means anything. A model's floating-point operations a token are
counted as 6 for each weight of a matrix product (2 forward, 4 backward) and 6 depth length width
for causal attention. What is reached is compared with the rate of one large matrix product in the
same arithmetic, measured in the same run. --kernels N adds the N kinds of kernel that take most of
a step, in ms, from a profile of five more steps; --draw N the ms that each of N tokens takes.
--collectives 1 adds what the devices of --mesh send each other in a step, and what each holds.
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
from minitf.cli.host import keep_freed_memory
from minitf.cli.main import SETTINGS, make_parser
from minitf.network import decode, fast
from minitf.training import data, optimizer, sharding, train

OWN = dict(vocabulary=50304, timed=20, kernels=0, draw=0, collectives=0)    # run.py has not


def main():
    parser = make_parser()
    parser.prog, parser.description = "bench.py", __doc__.splitlines()[0]
    for name, default in OWN.items():
        parser.add_argument("--" + name, type=int, default=default)
    given = vars(parser.parse_args())
    own = [given.pop(name) for name in OWN]
    flags = {name: value for name, value in given.items() if name in SETTINGS}
    settings = resolve(collision_rate=0.01, backend=fast.hardware(), **flags)
    keep_freed_memory()
    with sharding.use(given["mesh"], settings):
        print(json.dumps(dict(mesh=given["mesh"]) | measure(settings, *own)))


def measure(settings, vocabulary, timed, kernels, draw, collectives):
    """{what: value} of some steps."""
    model, how = settings.model, settings.training
    started = time.perf_counter()
    constants = attention_constants(model)
    seconds_constants = time.perf_counter() - started
    params = sharding.make(partial(init, config=model, vocabulary=vocabulary), jax.random.key(0))
    weights = params["head"].size + sum(
        w.size for w in jax.tree.leaves(params["blocks"]) if w.ndim == 3)
    state = sharding.make(optimizer.make_optimizer(how.optimizer).init, params)
    fixed = sharding.place((constants, optimizer.group_rates(how, model)))
    tokens = np.random.default_rng(0).integers(0, vocabulary, 10**6, np.int32)

    def arguments(step):
        rows = partial(data.batch, tokens, model.length, how.batch, 0, step)
        return (params, state, *fixed, optimizer.learning_rate(how, step),
                sharding.batch(rows, how.batch, model.length), model, how.optimizer, how.accumulate)

    def steps(first, count):
        """The loss, and seconds for some steps; a batch is made while the device works."""
        nonlocal params, state
        begin = time.perf_counter()
        for step in range(first, first + count):
            params, state, values = train.train_step(*arguments(step))
        return float(values["loss"]), time.perf_counter() - begin

    _, first = steps(0, 1)
    steps(1, 3)
    loss, seconds = steps(4, timed)
    rate = timed * how.batch * model.length / seconds
    work = 6 * weights + 6 * model.depth * model.length * model.attention_width
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
    if collectives:
        compiled = train.train_step.lower(*arguments(0)).compile()
        held = sum(leaf.addressable_shards[0].data.nbytes
                   for leaf in jax.tree.leaves((params, state)))
        result |= {"collectives": sent(compiled.as_text()), "gib_of_state": held / 2**30,
                   "gib_of_work": compiled.memory_analysis().temp_size_in_bytes / 2**30}
    return result


def sent(program):
    """{kind: [how many, MiB of their results]} of the collectives in a compiled program."""
    found = {}
    for shapes, kind, begun in re.findall(
            r" = (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all|"
            r"collective-permute)(-start)?\(", program):
        shapes = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", shapes)
        if begun and kind != "all-reduce":             # what is given stands before what comes out
            shapes = shapes[len(shapes) // 2:]
        size = sum(int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
                   for _, bits, dims in shapes)
        count, total = found.get(kind, (0, 0))
        found[kind] = [count + 1, round(total + size / 2**20, 2)]
    return found


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
