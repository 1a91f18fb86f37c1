"""The recursion over a network's depth, heads that differ, and families made by definition alone.

In float64: see test_spa.py for how tolerances are derived.
"""
from dataclasses import replace
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from strategies import (CLOSED_FORMS, EPS, EPS32, KERNELS, attentions, collision_rates, depths,
                        gammas, identity, kernel, lengths, log_attention, maps, pairs, rhos,
                        schedules, skips, unlike_heads)

from minitf import resolve
from minitf.theory import kernels as theory, spa
from minitf.theory.activations import leaky_correlation
from minitf.theory.families import FAMILIES, prescribed
from minitf.theory.kernels import kernel_recursion

# --- The recursion over a network's depth -----------------------------------------------


@given(schedules(), collision_rates, skips, st.floats(0, 1), st.booleans())
def test_recursion_keeps_a_unit_diagonal(schedule, r, skip, slope, norm):
    """Every position keeps mean square 1 at every depth: with equal tokens, MLPs and skips."""
    length = schedule[-1]
    matrices = attentions(schedule)
    blocks = list(kernel_recursion(maps(matrices), spa.uniform_kernel(r, length),
                                   lambda c: leaky_correlation(c, slope), *skip, norm))
    assert len(blocks) == len(matrices)
    for layer, (n, sigma) in enumerate(blocks, 1):
        assert n.shape == (length,) and np.all(n > 0)
        assert np.allclose(np.diag(sigma), 1, rtol=0, atol=16 * EPS * layer)
        assert np.allclose(sigma, sigma.T, rtol=0, atol=8 * length * EPS * layer)


@given(schedules())
def test_recursion_is_attention_alone_without_equal_tokens_and_mlps(schedule):
    """From the schedule's first kernel n = 1, and Sigma_l are those of the schedule."""
    name, values, length = schedule
    start = kernel(name, values[0], length)
    recursion = kernel_recursion(maps(attentions(schedule)), start, identity)
    for layer, (n, sigma) in enumerate(recursion, 1):
        tolerance = layer * ((8 * length + 80) * EPS
                             + 8 * length**3 * EPS * (name == "uniform"))
        assert np.allclose(n, 1, rtol=0, atol=tolerance)
        assert np.allclose(sigma, kernel(name, values[layer], length), rtol=0, atol=tolerance)


@given(depths, gammas, lengths, collision_rates)
def test_equal_tokens_are_amplified_as_derived(depth, gamma, length, r):
    """With D = rowsum(A), n = 1: E Sigma_l = (1 - r) Sigma_l + r u u^T, where

    u_i = phi^(i-1) + s (1 - phi^(i-1)) / (1 - phi). Tolerance: correlation() and back is a few
    roundings more a layer; 1 - phi^(i-1) loses gamma's digits: relative to power's EPS.
    """
    values = spa.exponential_schedule(gamma, depth)
    phi = np.exp(-gamma)
    power = phi ** np.arange(length)
    u = power + np.sqrt(-np.expm1(-2 * gamma)) * (1 - power) / -np.expm1(-gamma)
    expected = (1 - r) * spa.exponential_kernel(gamma, length) + r * np.outer(u, u)
    *_, (_, sigma) = kernel_recursion(maps(attentions(("exponential", values, length))),
                                      spa.uniform_kernel(r, length), identity,
                                      n=np.ones((depth, length)))
    rounding = depth * (8 * length + 80) * EPS + 8 * EPS / -np.expm1(-gamma)
    assert np.allclose(sigma, expected, rtol=rounding)


@given(schedules(), collision_rates, skips, st.floats(0, 1))
def test_a_given_n_is_what_the_recursion_divides_by(schedule, r, skip, slope):
    """Its own n gives the same kernels; half of it, without skips, four times as large a block.

    Both to the last bit: all that changes is a power of 2, and MLPs pass sizes on as they are.
    """
    length = schedule[-1]
    run = lambda skip, n=None: [*kernel_recursion(
        maps(attentions(schedule)), spa.uniform_kernel(r, length),
        lambda c: leaky_correlation(c, slope), *skip, n=n)]
    for given_skip in (skip, (0.0, 1.0)):
        free = run(given_skip)
        own = run(given_skip, np.array([n for n, _ in free]))
        assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(free, own))
    half = run((0.0, 1.0), np.array([n for n, _ in free]) / 2)
    for layer, ((n, sigma), (given_n, larger)) in enumerate(zip(free, half), 1):
        assert np.array_equal(given_n, n / 2) and np.array_equal(larger, 4.0**layer * sigma)


@given(depths, rhos, lengths, st.floats(0, 0.9))
def test_uniform_attention_from_equal_tokens_on_needs_no_correction(depth, rho, length, share):
    """rho_0 = r: the attention-only part is exact, n = 1."""
    values = spa.uniform_schedule(rho, depth, share * rho)
    for n, _ in kernel_recursion(maps(attentions(("uniform", values, length))),
                                 spa.uniform_kernel(share * rho, length), identity):
        assert np.allclose(n, 1, rtol=0, atol=depth * 8 * length**3 * EPS)


# --- Heads that differ ------------------------------------------------------------------


@given(schedules(), st.floats(0.1, 0.9), collision_rates, st.integers(1, 3))
def test_of_heads_that_differ_the_kernels_mean_goes_on(schedule, part, r, near):
    """One block from E Sigma_0: `near` heads of four with one attention matrix, the others with
    another. n^2 and Sigma are of the mean of their kernels."""
    name, values, length = schedule
    other = values[:2] * [1, part] if name == "exponential" else values[:2] + [0, part / 1e3]
    heads = near * [values[:2]] + (4 - near) * [other]
    config = resolve().model
    family = prescribed(lambda config: heads, KERNELS[name], CLOSED_FORMS[name])
    start = spa.uniform_kernel(r, length)
    (n, sigma), = kernel_recursion(family.kernel_maps(config), start, identity)
    matrices = np.exp([log_attention(name, *pair, length) for pair in heads])
    mean = np.mean(matrices @ start @ matrices.swapaxes(1, 2), 0)
    assert np.allclose(n**2, np.diag(mean), rtol=1e-12)
    size = np.sqrt(np.outer(np.diag(mean), np.diag(mean)))
    assert np.allclose(sigma, mean / size, rtol=1e-12)


@given(unlike_heads, lengths)
def test_each_head_has_its_own_memory(gammas, length):
    """Each head's bias is that of its own gamma, and D its own row sums over the common n."""
    heads = len(gammas)
    config = resolve(depth=2, width=2 * heads, heads=heads, gamma=gammas, length=length).model
    constants, n = theory.attention_constants(config), theory.attended_rms(config)
    predicted = theory.predict_kernels(config, theory.input_kernel(config, length))
    assert np.array_equal(n, [each for each, _ in predicted])
    for head, gamma in enumerate(gammas):
        alone = replace(config, gamma=(gamma,) * heads)
        for name in ("slope", "first_key_bias", "self_bias"):
            mine = theory.attention_constants(alone)[name][:, 0]
            assert np.array_equal(constants[name][:, head], mine)
        schedule = "exponential", spa.exponential_schedule(gamma, 2), length
        row_sum = attentions(schedule).sum(-1)
        assert np.allclose(constants["row_scale"][:, head], row_sum / n,
                           rtol=(4 * length + 40) * EPS32)


@given(pairs().filter(lambda pair: pair[0] == "exponential"))
def test_without_its_identity_part_attention_is_nothing_but_decay(pair):
    """A = c I + P with c >= 0, and log P is E-SPA's bias without its term for the own key.

    Relative to each row's largest entry.
    """
    _, *pair, length = pair
    log_a = spa.exponential_log_attention(*pair, length)
    (c, ratio), (slope, first, own) = spa.espa_identity_part(*pair), spa.espa_bias(*pair)
    lag = np.arange(length)[:, None] - np.arange(length)
    bias = -slope * lag + np.where(np.arange(length) == 0, first, 0.0)
    log_p = np.where(lag >= 0, bias, -np.inf) + np.log(ratio) - own
    wrong = np.abs(np.exp(log_p) + c * np.eye(length) - np.exp(log_a))
    assert 0 <= c < ratio
    assert np.max(wrong) <= 20 * EPS * (1 + slope * length)


def bias_of(family, constants, length):
    """B of all layers and heads by a family's bias rows, masked: (L, H, T, T), float64."""
    position, names = np.arange(length), constants.keys() - {"row_scale", "skip_scale"}
    tables = [np.asarray(constants[name], float) for name in names]
    rows = np.array([family.bias_rows(dict(zip(names, layer)), position[:, None], position)
                     for layer in zip(*tables)])
    return np.where(np.tri(length, dtype=bool), rows, -np.inf)


@given(unlike_heads, collision_rates, lengths)
def test_an_identity_skip_takes_the_least_that_any_head_keeps(gammas, r, length):
    """D softmax(B) of each head without it = c I + D' softmax(B') with it.

    c is as large as that allows: one head's softmax keeps nothing.
    """
    heads = len(gammas)
    config = resolve(depth=3, width=2 * heads, heads=heads, gamma=gammas, length=length,
                     token_collision_rate=r).model
    plain = theory.attention_constants(config)
    apart = theory.attention_constants(replace(config, identity_skip=True))
    assert "skip_scale" not in plain and apart["skip_scale"].shape == (3, length)
    matrices = lambda constants: np.asarray(constants["row_scale"], float)[..., None] \
        * softmax(bias_of(FAMILIES["espa"], constants, length), -1)
    c = np.asarray(apart["skip_scale"], float)[:, None, :, None] * np.eye(length)
    size = np.asarray(plain["row_scale"], float)[..., None]
    wrong = np.abs(matrices(apart) + c - matrices(plain)) / size
    largest = max(np.max(np.abs(plain[name])) for name in ("slope", "first_key_bias", "self_bias"))
    assert np.max(wrong) <= 8 * EPS32 * (2 + largest * length)
    least = np.min(apart["self_bias"], 1)
    assert np.all(c >= 0)
    assert np.max(np.abs(least)) <= 4 * EPS32 * (1 + np.max(plain["self_bias"]))


@given(st.sampled_from(["espa", "uspa"]), gammas, rhos, collision_rates, lengths)
def test_the_constants_hold_equal_tokens_down(attn, gamma, rho, r, length):
    """In the first layer n^2 = 1 - r + r rowsum^2 for any A that takes I to a unit diagonal.

    D = rowsum / n.
    """
    config = resolve(depth=2, attn=attn, gamma=gamma, rho=rho, rho_first=0.0,
                     token_collision_rate=r, length=length, position="none").model
    name, values = ("exponential", spa.exponential_schedule(gamma, 2)) if attn == "espa" else \
        ("uniform", spa.uniform_schedule(rho, 2))
    row_sum = attentions((name, values, length))[0].sum(-1)
    row_scale = theory.attention_constants(config)["row_scale"][0]
    assert np.allclose(row_scale, row_sum / np.sqrt(1 - r + r * row_sum**2), rtol=4 * EPS32)


# --- The definition and the closed forms ------------------------------------------------

SLOW = {
    "espa": prescribed(
        lambda config: [spa.exponential_schedule(gamma, config.depth) for gamma in config.gamma],
        spa.exponential_kernel),
    "uspa": prescribed(
        lambda config: [spa.uniform_schedule(config.rho, config.depth, config.rho_first)],
        spa.uniform_kernel),
}


@given(st.sampled_from([*SLOW]), st.integers(1, 4), st.integers(2, 24),
       st.lists(st.floats(0.05, 0.66), min_size=2, max_size=2), st.floats(0.05, 0.9),
       st.floats(0, 0.9), st.floats(0, 0.5), st.integers(0, 2**31 - 1))
def test_kernel_and_schedule_alone_make_what_the_closed_forms_make(
        attn, depth, length, gammas, rho, share, r, seed):
    """An entry of FAMILIES that has nothing else gives the same row sums, kernel maps, D and B.

    An entry of A is off by T EPS times the kernels' condition numbers, here those of the whole
    schedule; `wrong` is that of D softmax(B), of a row sum T times as much. A kernel map carries it
    twice, and n from block to block, where errors grow by the square of D at most.
    """
    config = resolve(attn=attn, depth=depth, width=4, heads=2, length=length, gamma=gammas,
                     rho=rho, rho_first=share * rho, token_collision_rate=r).model
    fast, slow = FAMILIES[attn], SLOW[attn]
    last = [spa.exponential_kernel(gamma, length) for gamma in gammas] if attn == "espa" else \
        [spa.uniform_kernel(rho, length)]
    wrong = 2 * length * EPS * max(map(np.linalg.cond, last))

    sums = fast.row_sums(config)                                           # (L, H, T)
    assert np.max(np.abs(slow.row_sums(config) - sums)) <= length * wrong

    x = np.random.default_rng(seed).normal(size=(length, length))
    sigma = x @ x.T / length
    for one, other in zip(fast.kernel_maps(config), slow.kernel_maps(config), strict=True):
        size = length * sums.max() * np.abs(sigma).max()
        assert np.max(np.abs(one(sigma) - other(sigma))) <= 2 * size * wrong

    def matrices(family):
        """diag(row sums) softmax(B), (L, H, T, T), by the family's own bias rows."""
        bias = bias_of(family, family.bias(config), length)
        return family.row_sums(config)[..., None] * softmax(bias, -1)

    assert np.max(np.abs(matrices(slow) - matrices(fast))) <= 2 * length * wrong

    constants = theory.attention_constants(config)
    with mock.patch.dict(FAMILIES, {attn: slow}):
        of_slow = theory.attention_constants(config)
    assert of_slow.keys() == {"row_scale", "bias"}
    growth = np.prod(constants["row_scale"].max((1, 2)).astype(float))**2
    of_n = depth * 2 * length * sums.max() * wrong * growth
    assert np.allclose(of_slow["row_scale"], constants["row_scale"], rtol=4 * EPS32 + of_n)


@given(st.integers(1, 4), st.floats(-1, 1), st.integers(2, 128), collision_rates, skips)
def test_n_is_level_beyond_what_attention_looks_back(depth, power, length, r, skip):
    """n of all positions, computed to the end, and that of the first ones, padded.

    Keys 16 / gamma away weigh exp(-16) of those at hand; each block adds its own part.
    """
    alpha, beta = skip
    config = resolve(depth=depth, gamma=10**power, length=length, token_collision_rate=r,
                     alpha=alpha, beta=beta).model
    with mock.patch.object(theory, "EXACT_LENGTH", int(np.ceil(16 / config.gamma[0]))):
        padded = theory.attended_rms(config)
    assert np.allclose(padded, theory.attended_rms(config), rtol=4 * depth * np.exp(-16))
