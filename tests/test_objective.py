"""--objective mlm: tokens masked, attention from both sides, the paper's non-causal form."""
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from networks import (D, EPS32, T, V, attention_stack, compiled_as, init, orthonormal_tokens,
                      prescribed_kernels, random_tokens, small, stirred)

from minitf import attention_constants, forward, resolve
from minitf.cli import inspection
from minitf.network import decode, objectives
from minitf.theory import kernels as theory, spa
from minitf.training import train


@given(st.sampled_from(["espa", "uspa"]), st.floats(0.05, 2), st.sampled_from([1, 4]),
       st.integers(0, 2**31 - 1))
def test_attention_from_both_sides_keeps_the_prescribed_kernels(attn, gamma, heads, seed):
    """Sigma_l at each depth l, from orthonormal tokens, as the causal form does.

    A layer is three products with rounding errors of sqrt(n) EPS32 of a result of size 1, B is
    rounded to |log A| EPS32, and |log A| A <= log T for the entries of a row. Entries of X X^T / d
    carry twice that; four standard errors.
    """
    config = small(attn, objective="mlm", gamma=gamma, heads=heads, rho=min(gamma / 2.1, 0.9))
    params = init(jax.random.key(seed % 8), compiled_as(config, heads=4), V)
    constants = attention_constants(config)
    assert constants["bias"].shape == (4, 1, T, T) and np.isfinite(constants["bias"]).all()
    after = np.asarray(attention_stack(params["blocks"], constants, orthonormal_tokens(seed),
                                       config), float)
    for layer, (y, sigma) in enumerate(zip(after, prescribed_kernels(config)), 1):
        tolerance = 4 * 2 * layer * (2 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


def test_kernels_are_predicted():
    """From tokens that repeat, mean squares are held at 1; the causal form predicts others."""
    kernels = {}
    for objective in ("clm", "mlm"):
        config = resolve(depth=4, length=T, token_collision_rate=0.2, objective=objective).model
        kernels[objective] = [sigma for _, sigma in theory.predict_kernels(
            config, theory.input_kernel(config, T))]
        assert np.allclose([np.diag(sigma) for sigma in kernels[objective]], 1)
    turned = kernels["mlm"][-1][::-1, ::-1]                        # from either side the same
    assert np.allclose(turned, kernels["mlm"][-1], atol=1e-10)
    assert not np.allclose(kernels["clm"][-1][::-1, ::-1], kernels["clm"][-1], atol=1e-3)


@pytest.mark.parametrize("attn", ["espa", "softmax"])
def test_each_token_sees_all_others(attn):
    """The last token matters to the first one's logits; with clm it does not."""
    tokens, changed = random_tokens(0), random_tokens(0)
    changed[-1] = (changed[-1] + 1) % V
    for objective in ("mlm", "clm"):
        config = small(attn, objective=objective, head_init="gaussian")
        params = stirred(init(jax.random.key(0), config, V), 1, 0.1)
        constants = attention_constants(config)
        before, after = (forward(params, constants, each, config)[0] for each in (tokens, changed))
        assert (np.max(np.abs(after - before)) > 1e-3 * np.std(before)) == (objective == "mlm")


@settings(max_examples=8)
@given(st.integers(1, 100), st.integers(0, 2**31 - 1))
def test_a_share_of_the_tokens_is_masked(length, seed):
    """Exactly 15 %, rounded, at least one: the same of the same sequence and draw."""
    tokens = np.random.default_rng(seed).integers(0, 1000, (3, length), np.int32)
    hidden = np.asarray(objectives.masked(tokens, seed))
    assert np.all(hidden.sum(1) == max(round(0.15 * length), 1))
    assert np.array_equal(objectives.masked(tokens[::-1], seed), hidden[::-1])


def test_a_report_is_about_text_with_masks():
    settings, windows, vocabulary = inspection.read_windows(resolve(objective="mlm", length=40))
    assert windows.shape[1] == 40 and np.all((windows == vocabulary).sum(1) == 6)


def test_other_sequences_and_other_steps_mask_other_tokens():
    """No position is preferred, and a sequence's tokens all have their turn."""
    share = 5 * np.sqrt(0.15 * 0.85 / 100)
    many = np.asarray(objectives.masked(np.arange(4000, dtype=np.int32).reshape(100, 40), 0))
    assert abs(many.mean(0) - 0.15).max() < share
    one = np.arange(40, dtype=np.int32)[None]
    steps = np.array([objectives.masked(one, draw)[0] for draw in range(100)])
    assert abs(steps.mean(0) - 0.15).max() < share
    config = small("espa", objective="mlm", head_init="gaussian")
    params, batch = init(jax.random.key(0), config, V), random_tokens(0, 2, T + 1)
    constants = attention_constants(config)
    losses = [float(train.loss(params, constants, batch, config, draw)) for draw in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_is_that_of_the_masked_tokens():
    """With a head of zeros log V each, and 0 for tokens that are shown; V stands for a mask."""
    config = small("espa", objective="mlm")
    params, windows = init(jax.random.key(0), config, V), random_tokens(0, 2, T + 1)
    constants = attention_constants(config)
    hidden = np.asarray(objectives.masked(windows[:, :-1], 0))
    losses = np.asarray(objectives.token_losses(params, constants, windows, config))
    assert len(params["embed"]) == V + 1 and params["head"].shape == (D, V)
    assert np.all(losses[~hidden] == 0) and np.isclose(losses.mean(), np.log(V), rtol=1e-5)
    params = stirred(params, 0, 0.1)
    losses = np.asarray(objectives.token_losses(params, constants, windows, config))
    logits = forward(params, constants, np.where(hidden, V, windows[:, :-1]), config)
    expected = -np.asarray(jax.nn.log_softmax(logits))[hidden, windows[:, :-1][hidden]]
    assert np.allclose(losses[hidden] * hidden.mean(), expected, rtol=1e-4)


@pytest.mark.parametrize("flags", [dict(identity_skip=True), dict(preset="shaped"),
                                   dict(length=2000, heads=1)], ids=str)
def test_what_has_no_form_from_both_sides_is_refused(flags):
    with pytest.raises(ValueError, match="objective mlm"):
        resolve(**{**flags, "objective": "mlm"})


def test_it_draws_no_text_and_takes_whole_sequences():
    config = small("espa", objective="mlm")
    params, constants = init(jax.random.key(0), config, V), attention_constants(config)
    with pytest.raises(ValueError, match="draws no text"):
        decode.sample(params, constants, [1, 2], 3, config)
    with pytest.raises(ValueError, match=f"must have {T} tokens"):
        forward(params, constants, random_tokens(0, T - 1), config)
    assert forward(params, constants, np.full(T, V), config).shape == (T, V)
    assert np.array_equal(spa.symmetric_attention(np.eye(3), np.eye(3)), np.eye(3))
