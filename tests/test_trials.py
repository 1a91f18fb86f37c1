"""The headline's lanes: networks trained side by side see what each would see alone."""
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import headline
from minitf import Config, data, model, theory, train

STEPS, VOCABULARY = 10, 40


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_lanes_train_as_run_py_does(optimizer):
    """Rounding: some units of a loss's last place, 2e-7, fed back through the steps. Without balance the lanes are off by 5e-4."""
    config = Config(depth=4, width=8, heads=4, length=16, batch=4, steps=STEPS, optimizer=optimizer, repeat_rate=0.03, far=1)
    lanes = [headline.LANE | lane for lane in (
        dict(learning_rate=1e-3, ends=50.0, qk=30.0, vo=30.0, orthogonality=0.2, gamma=0.4, far=1, gamma_far=0.1, balance=0.5, seed=0),
        dict(learning_rate=2e-3, ends=20.0, qk=9.0, vo=10.0, gamma=0.8, far=0, balance=1.0, seed=1),
        dict(learning_rate=1e-3, ends=50.0, qk=30.0, vo=30.0, orthogonality=0.2, gamma=0.4, far=1, gamma_far=0.1, balance=0.0, seed=0))]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000, np.int32)
    at, together, by_position = headline.train_lanes(config, lanes, SimpleNamespace(train=tokens, held_out=tokens), VOCABULARY, STEPS, 8)
    assert at.tolist() == [STEPS] and by_position.shape == (3, config.length)
    assert np.ptp(by_position.mean(1)) > 1e-3                                  # the lanes differ, the last from the first by balance alone
    for number, lane in enumerate(lanes):
        alone = replace(config, **lane)
        constants, params = theory.constants(alone), model.init(jax.random.key(lane["seed"]), alone, VOCABULARY)
        state, losses = train.make_optimizer(alone).init(params), []
        for step in range(STEPS):
            batch = data.batch(tokens, alone.length, alone.batch, alone.seed, step)
            params, state, metrics = train.train_step(params, state, constants, batch, alone)
            losses.append(float(metrics["loss"]))
        assert together[0, number] == pytest.approx(np.mean(losses), abs=1e-5)
        held_out = train.evaluate(params, constants, data.spread_windows(tokens, alone.length, 8), alone)
        assert by_position[number].mean() == pytest.approx(held_out, abs=1e-5)
