"""Losses on meshes of eight simulated devices, as JSON: a program that test_sharding.py runs.

Each case: (preset, flags, mesh). Its losses are compared with one device's, and these with one
device's where the rows of each batch stand in another order.
"""
import json
import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = \
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax                                                                     # noqa: E402
import numpy as np                                                             # noqa: E402

import minitf                                                                  # noqa: E402
from minitf.config import DataConfig                                           # noqa: E402
from minitf.training import data, optimizer, sharding, train                   # noqa: E402

STEPS, VOCABULARY = int(sys.argv[2]) if len(sys.argv) > 2 else 20, 1024
SHAPE = dict(depth=2, width=32, length=32, batch=16, steps=200, warmup=2)
DATA = DataConfig(data=None, val_data=None, encoding=None)
ORDER = np.random.default_rng(0).permutation(SHAPE["batch"])


def losses(tokens, settings, mesh=None, order=slice(None)):
    """(losses, the first step's gradient norm of each parameter, the shape of a part of W_1)."""
    model, how = settings.model, settings.training
    read = lambda step, rows: data.batch(tokens, model.length, how.batch, 0, step)[order][rows]
    with sharding.use(mesh, settings):
        params = sharding.make(partial(minitf.init, config=model, vocabulary=VOCABULARY),
                               jax.random.key(0))
        state = sharding.make(optimizer.make_optimizer(how.optimizer).init, params)
        fixed = sharding.place((minitf.attention_constants(model),
                                optimizer.group_rates(how, model)))
        out = []
        for step in range(STEPS):
            batch = sharding.batch(partial(read, step), how.batch, model.length)
            params, state, metrics = train.train_step(
                params, state, *fixed, optimizer.learning_rate(how, step), batch, model,
                how.optimizer, how.accumulate)
            out.append(float(metrics["loss"]))
            if step == 0:
                first = np.array([*map(np.linalg.norm, jax.tree.leaves(metrics["grad_norms"]))])
        if mesh:                                       # fewer windows than devices
            few = train.evaluate(params, fixed[0], read(0, slice(3)), model, how.batch)[0]
            assert np.isfinite(few)
        return np.array(out), first, params["blocks"]["up"].addressable_shards[0].data.shape


def main(cases):
    tokens = data.load(DATA, SHAPE["length"]).train
    for preset, flags, mesh in cases:
        settings = minitf.resolve(preset, 0.01, **SHAPE | flags)
        alone, expected, _ = losses(tokens, settings.replace(accumulate=1))
        shuffled, _, _ = losses(tokens, settings.replace(accumulate=1), order=ORDER)
        found, first, shard = losses(tokens, settings, mesh)
        print(json.dumps(dict(
            mesh=mesh, preset=preset, shard=shard, apart=np.abs(found - alone).tolist(),
            shuffled=np.abs(shuffled - alone).tolist(), fall=float(alone[0] - alone[-1]),
            gradient=float((abs(first - expected) / np.maximum(expected, 1e-30)).max()))))


main(json.loads(sys.argv[1]))
