"""Trials that are trained side by side see what each would see alone."""
from dataclasses import asdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweeps
import trials

import minitf
from minitf.training import data, optimizer, train

STEPS, VOCABULARY = 10, 40
SHAPE = dict(depth=4, width=8, heads=4, length=16, batch=4, steps=STEPS, token_collision_rate=0.03)
RATES = dict(learning_rate=1e-3, lr_mult_embed=50.0, lr_mult_qk=30.0, lr_mult_vo=30.0,
             gamma=(0.4, 0.4, 0.4, 0.1), orthogonal_pull=0.2, weight_decay=0.0, seed=0,
             decay_groups="qk")
CHANGES = [dict(weight_decay=10.0),
           dict(learning_rate=2e-3, lr_mult_embed=20.0, lr_mult_qk=9.0, lr_mult_vo=10.0, gamma=0.8,
                orthogonal_pull=0.0, seed=1)]


def corpus():
    """Random tokens, to train on and to validate on."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000, np.int32)
    return SimpleNamespace(train=tokens, validation=tokens)


def trained_alone(settings, text):
    """(losses, gradient norms, validation loss) by the steps that run.py takes."""
    model, how = settings.model, settings.training
    constants = jax.tree.map(jnp.asarray, minitf.attention_constants(model))
    params = trials.initialise(jax.random.key(how.seed), config=model, vocabulary=VOCABULARY)
    state = optimizer.make_optimizer(how.optimizer).init(params)
    rates = optimizer.group_rates(how, model)
    history = []
    for step in range(STEPS):
        batch = data.batch(text.train, model.length, how.batch, how.seed, step)
        params, state, metrics = train.train_step(
            params, state, constants, rates, optimizer.learning_rate(how, step), batch, model,
            how.optimizer)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    windows = data.spread_windows(text.validation, model.length, trials.WINDOWS)
    return *np.array(history).T, train.evaluate(params, constants, windows, model, how.batch)[0]


@pytest.mark.parametrize("flags", [dict(preset="identity-skip", optimizer="muon")], ids=str)
def test_trials_side_by_side_train_as_run_py_does(flags):
    """Rounding: some units of a loss's last place, 2e-7, fed back through the steps.

    A gradient norm is of the size of 1 here, with units of as much. A trial without decay or pull
    beside one that has them sees none. A single trial is the same program as run.py's, so that its
    steps are equal to the last bit; its validation loss is a mean taken in another order.
    """
    text = corpus()
    settings = [minitf.resolve(**flags | SHAPE | RATES | change) for change in CHANGES]
    together = list(trials.train_together(settings, text, VOCABULARY))
    alone = [trained_alone(each, text) for each in settings]
    for (losses, norms, by_position), (own_losses, own_norms, validation) in zip(together, alone):
        np.testing.assert_allclose(losses, own_losses, atol=1e-5, rtol=0)
        np.testing.assert_allclose(norms, own_norms, atol=1e-5, rtol=1e-5)
        assert by_position.shape == (SHAPE["length"],)
        assert by_position.mean() == pytest.approx(validation, abs=1e-5)
    assert abs(alone[0][2] - alone[1][2]) > 1e-3
    (losses, norms, by_position), = trials.train_together(settings[:1], text, VOCABULARY)
    np.testing.assert_array_equal([losses, norms], alone[0][:2])
    assert by_position.mean() == pytest.approx(alone[0][2], abs=1e-6)


@pytest.mark.parametrize("sweep", sweeps.SWEEPS)
def test_trials_of_a_sweep_differ_in_what_one_program_can_vary(sweep):
    """All else of the settings must be equal, for every network."""
    for network in sweeps.NETWORKS:
        settings = [minitf.resolve(**flags) for flags in sweeps.trials(sweep, network)]
        for each in settings:
            ours, first = (asdict(its.model) | asdict(its.training) for its in (each, settings[0]))
            assert {name for name in ours if ours[name] != first[name]} <= set(sweeps.VARIED)
