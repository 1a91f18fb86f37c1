"""Signal-preserving attention as matrices, in float64: what section 3 and 4 of the method promise of every kernel.

EPS is float64's spacing at 1. Where all terms of a product are >= 0 rounding errors are relative and never cancel
against a result: a sum of n such terms is right to n EPS of itself, and exp(x) to |x| EPS.
"""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from minitf import Config, model, spa, theory
from minitf.activations import leaky_correlation

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps

lengths = st.integers(2, 64)
depths = st.integers(1, 48)
gammas = st.floats(-5, 1).map(lambda power: 10**power)                     # 1e-5 to 10
rhos = st.floats(1e-4, 0.999)
repeat_rates = st.floats(0, 0.9)
skips = st.one_of(st.just(0.0), st.floats(0.05, 0.99)).map(lambda alpha: (alpha, (1 - alpha**2) ** 0.5))


@st.composite
def pairs(draw):
    """(family, kernel's parameter before, after, length): every admissible pair, from close together to far apart."""
    family, length = draw(st.sampled_from(["exponential", "uniform"])), draw(lengths)
    if family == "exponential":
        out = draw(gammas)
        return family, draw(st.one_of(st.just(np.inf), st.floats(-6, 3).map(lambda x: out * (1 + 10**x)))), out, length
    out = draw(rhos)                                                       # the domain: 1e-9 apart
    return family, draw(st.one_of(st.just(0.0), st.floats(-8.9, np.log10(out)).map(lambda x: max(out - 10**x, 0)))), out, length


@st.composite
def schedules(draw):
    """(family, parameters by layer, length)."""
    family, depth = draw(st.sampled_from(["exponential", "uniform"])), draw(depths)
    if family == "exponential":
        return family, spa.exponential_schedule(draw(gammas), depth), draw(lengths)
    last = draw(rhos)
    return family, spa.uniform_schedule(last, depth, draw(st.one_of(st.just(0.0), st.floats(0, 0.9))) * last), draw(lengths)


def kernel(family, parameter, length):
    return {"exponential": spa.exponential_kernel, "uniform": spa.uniform_kernel}[family](parameter, length)


def log_attention(family, before, after, length):
    form = {"exponential": spa.exponential_log_attention, "uniform": spa.uniform_log_attention}[family]
    return form(before, after, length)


# --- One attention matrix -----------------------------------------------------------------------------------------------

@given(pairs())
def test_causal_and_a_softmax_can_make_it(pair):
    """A is lower triangular, and positive there: B = log P is finite wherever the mask lets through."""
    log_a = log_attention(*pair)
    below = np.tri(len(log_a), dtype=bool)
    assert np.all(log_a[~below] == -np.inf)
    assert np.all(np.isfinite(log_a[below]))


@given(pairs())
def test_maps_one_kernel_to_the_other(pair):
    """A Sigma_in A^T = Sigma_out. For `uspa` an entry of A is a difference of sums of T terms below 1; for `espa` the
    exponential of a logarithm of size up to gamma T, whose rounding error becomes a relative one of gamma T EPS.
    """
    family, before, after, length = pair
    size = after * length * (family == "exponential")
    a, sigma_in = np.exp(log_attention(*pair)), kernel(family, before, length)
    sigma_out = kernel(family, after, length)
    wrong = length * EPS * (family == "uniform")                           # of an entry of A, beside its relative error
    tolerance = (4 * length + 40 + 4 * size) * EPS * sigma_out + 2 * length * wrong * (sigma_in @ a.T).max()
    assert np.all(np.abs(a @ sigma_in @ a.T - sigma_out) <= tolerance)


@given(pairs())
def test_closed_form_is_the_cholesky_quotient(pair):
    """The definition loses as many digits as the kernels' condition numbers have: T EPS (cond_in + cond_out)."""
    family, before, after, length = pair
    sigma_in, sigma_out = kernel(family, before, length), kernel(family, after, length)
    a = spa.cholesky_attention(sigma_in, sigma_out)
    tolerance = length * EPS * (np.linalg.cond(sigma_in) + np.linalg.cond(sigma_out))
    assert np.max(np.abs(np.exp(log_attention(*pair)) - a)) <= tolerance


@given(gammas, st.floats(-3, 3).map(lambda x: 1 + 10**x))
def test_far_entries_keep_their_digits(gamma, ratio):
    """The closed form's log holds where A itself underflows: log A_ij falls by exactly gamma_out a position."""
    log_a = spa.exponential_log_attention(gamma * ratio, gamma, 200)
    falls = -np.diff(log_a[2:, 1])                                         # j = 2, i = 3 to T
    assert np.allclose(falls, gamma, rtol=0, atol=4 * EPS * np.abs(log_a[2:, 1]).max())


LENGTH32 = 32
softmax32 = jax.jit(lambda bias: jax.nn.softmax(bias))


@given(pairs())
def test_rescaling_and_bias_give_the_matrix_back_in_float32(pair):
    """D softmax(B) = A. Rounding B to float32 shifts it by |B| EPS32, which is a relative error of P."""
    log_a = log_attention(*pair[:3], LENGTH32)
    rescale, bias = spa.rescale_and_bias(log_a)
    made = np.float32(rescale)[:, None] * np.asarray(softmax32(jnp.asarray(bias, jnp.float32)))
    a = np.exp(log_a)
    finite = np.where(np.isfinite(bias), bias, 0)
    assert np.all(np.abs(made - a) <= (np.abs(finite) + LENGTH32 + 8) * EPS32 * a + 1e-37 * rescale[:, None])
    assert np.allclose(rescale, a.sum(-1), rtol=LENGTH32 * EPS)


# --- Schedules, and products over depth --------------------------------------------------------------------------------

@given(depths, gammas)
def test_exponential_schedule(depth, gamma):
    """From gamma = inf strictly down to gamma_L, with one lambda: the diagonal of every A_l is the same."""
    schedule = spa.exponential_schedule(gamma, depth)
    assert len(schedule) == depth + 1 and schedule[0] == np.inf and schedule[-1] == gamma
    assert np.all(np.diff(schedule[1:]) < 0)
    s = np.sqrt(-np.expm1(-2 * schedule))
    # An error of gamma EPS in gamma is one of phi^2 gamma EPS / s^2 <= EPS / 2 in log s; and log s / L has rounded, too.
    assert np.allclose(np.diff(np.log(s)), np.log(s[-1]) / depth, rtol=0, atol=8 * EPS * (1 + abs(np.log(s[-1]))))


@given(depths, rhos, st.floats(0, 0.99))
def test_uniform_schedule(depth, rho, share):
    """From rho_0 strictly up to rho_L, with 1 - rho falling by one factor a layer."""
    schedule = spa.uniform_schedule(rho, depth, share * rho)
    assert len(schedule) == depth + 1 and schedule[0] == share * rho and schedule[-1] == rho
    assert np.all(np.diff(schedule) > 0)
    ratios = (1 - schedule[1:]) / (1 - schedule[:-1])
    assert np.allclose(ratios, ratios[0], rtol=8 * EPS / (1 - rho))


@given(schedules(), st.data())
def test_products_map_every_kernel_to_every_later_one(schedule, data):
    """A_l ... A_k maps Sigma_(k-1) to Sigma_l for every l >= k, and from Sigma_0 = I it is the Cholesky factor."""
    family, values, length = schedule
    k = data.draw(st.integers(1, len(values) - 1), label="k")
    product, sigma = np.eye(length), kernel(family, values[k - 1], length)
    for layer in range(k, len(values)):
        product = np.exp(log_attention(family, values[layer - 1], values[layer], length)) @ product
        # As for one matrix; of l - k + 1 factors, each of which moves a row by its entries' errors times the row sums.
        factors = layer - k + 1
        tolerance = factors * ((4 * length + 40) * EPS + 2 * length**2 * EPS * product.sum(-1).max() * (family == "uniform"))
        assert np.max(np.abs(product @ sigma @ product.T - kernel(family, values[layer], length))) <= tolerance


@given(st.sampled_from(["espa", "uspa"]), depths, gammas, rhos, lengths)
def test_the_network_asks_for_this_schedule(attn, depth, gamma, rho, length):
    """theory.log_attentions: L matrices, whose product takes I to the kernel that the configuration names."""
    matrices = theory.log_attentions(Config(depth=depth, attn=attn, gamma=gamma, rho=rho), length)
    assert len(matrices) == depth
    product = np.eye(length)
    for (share, log_a), in matrices:
        assert share == 1
        product = np.exp(log_a) @ product
    last = spa.exponential_kernel(gamma, length) if attn == "espa" else spa.uniform_kernel(rho, length)
    tolerance = depth * (4 * length + 40) * EPS + 2 * depth * length**2 * EPS * product.sum(-1).max() * (attn == "uspa")
    assert np.max(np.abs(product @ product.T - last)) <= tolerance


@pytest.mark.parametrize("refused", [
    lambda: spa.exponential_schedule(1e9, 4), lambda: spa.exponential_schedule(-1.0, 4),
    lambda: spa.uniform_schedule(1e-17, 4, 1e-17), lambda: spa.uniform_schedule(1.0, 4),
    lambda: spa.exponential_log_attention(0.1, 0.1, 8), lambda: spa.exponential_log_attention(0.1, 0.2, 8),
    lambda: spa.uniform_log_attention(0.2, 0.2, 8), lambda: spa.uniform_log_attention(0.2, 0.1, 8),
    lambda: theory.constants(Config(far=1, length=1025, depth=1)), lambda: spa.exponential_kernel(float("nan"), 8), lambda: spa.uniform_kernel(1.0, 8)])
def test_what_has_no_such_attention_is_refused(refused):
    with pytest.raises(ValueError) as caught:
        refused()
    assert "\n" not in str(caught.value)


# --- The recursion of section 4 -------------------------------------------------------------------------------------------

@given(schedules(), repeat_rates, skips, st.floats(0, 1))
def test_recursion_keeps_a_unit_diagonal(schedule, r, skip, slope):
    """Every position keeps mean square 1 at every depth: with repeats, MLPs and skips."""
    family, values, length = schedule
    matrices = [[(1.0, log_attention(family, a, b, length))] for a, b in zip(values, values[1:])]
    blocks = list(spa.propagate(matrices, spa.repeat_kernel(r, length), lambda c: leaky_correlation(c, slope), *skip))
    assert len(blocks) == len(matrices)
    for layer, (n, sigma) in enumerate(blocks, 1):
        assert n.shape == (length,) and np.all(n > 0)
        assert np.allclose(np.diag(sigma), 1, rtol=0, atol=16 * EPS * layer)
        assert np.array_equal(sigma, sigma.T) or np.allclose(sigma, sigma.T, rtol=0, atol=8 * length * EPS * layer)


@given(schedules())
def test_recursion_is_section_3_without_repeats_and_mlps(schedule):
    family, values, length = schedule
    matrices = [[(1.0, log_attention(family, a, b, length))] for a, b in zip(values, values[1:])]
    start = kernel(family, values[0], length)
    for layer, (n, sigma) in enumerate(spa.propagate(matrices, start, lambda c: c), 1):
        tolerance = layer * ((8 * length + 80) * EPS + 8 * length**3 * EPS * (family == "uniform"))
        assert np.allclose(n, 1, rtol=0, atol=tolerance)
        assert np.allclose(sigma, kernel(family, values[layer], length), rtol=0, atol=tolerance)


@given(depths, gammas, lengths, repeat_rates)
def test_repeats_are_amplified_as_derived(depth, gamma, length, r):
    """Plain: E Sigma_l = (1-r) Sigma_l + r u u^T, u_i = phi^(i-1) + s (1 - phi^(i-1)) / (1 - phi)."""
    values = spa.exponential_schedule(gamma, depth)
    matrices = [[(1.0, spa.exponential_log_attention(a, b, length))] for a, b in zip(values, values[1:])]
    phi = np.exp(-gamma)
    power = phi ** np.arange(length)
    u = power + np.sqrt(-np.expm1(-2 * gamma)) * (1 - power) / -np.expm1(-gamma)
    expected = (1 - r) * spa.exponential_kernel(gamma, length) + r * np.outer(u, u)
    *_, (_, sigma) = spa.propagate(matrices, spa.repeat_kernel(r, length), lambda c: c, rescale=False)
    # correlation() and back is a few roundings more a layer; 1 - phi^(i-1) loses gamma's digits: relative to power's EPS.
    assert np.allclose(sigma, expected, rtol=depth * (8 * length + 80) * EPS + 8 * EPS / -np.expm1(-gamma))


@given(depths, rhos, lengths, st.floats(0, 0.9))
def test_uniform_attention_from_the_repeats_on_needs_no_correction(depth, rho, length, share):
    """rho_0 = r: the attention-only part is exact, n = 1."""
    values = spa.uniform_schedule(rho, depth, share * rho)
    matrices = [[(1.0, spa.uniform_log_attention(a, b, length))] for a, b in zip(values, values[1:])]
    for n, _ in spa.propagate(matrices, spa.repeat_kernel(share * rho, length), lambda c: c):
        assert np.allclose(n, 1, rtol=0, atol=depth * 8 * length**3 * EPS)


@given(schedules(), schedules(), repeat_rates, st.integers(1, 3))
def test_of_heads_that_differ_the_kernels_mean_goes_on(schedule, other, r, near):
    """One block from E Sigma_0: `near` heads of four with one attention matrix, the rest with another, each of which is known."""
    (family, values, length), (others, far, _) = schedule, other
    heads = [log_attention(family, *values[:2], length), log_attention(others, *far[:2], length)]
    shares, start = (near / 4, 1 - near / 4), spa.repeat_kernel(r, length)
    (n, sigma), = spa.propagate([list(zip(shares, heads))], start, lambda c: c)
    mean = sum(share * np.exp(a) @ start @ np.exp(a).T for share, a in zip(shares, heads))
    assert np.allclose(n**2, np.diag(mean), rtol=1e-12)
    assert np.allclose(sigma, mean / np.sqrt(np.outer(np.diag(mean), np.diag(mean))), rtol=1e-12)


@given(gammas, gammas, st.integers(1, 5), st.integers(0, 5), lengths)
def test_each_head_has_its_own_memory(gamma, gamma_far, heads, far, length):
    """The first heads near, the last `far` of them far: their bias and, over the common n, their row sums."""
    config = Config(depth=2, width=2 * heads, heads=heads, far=min(far, heads), gamma=gamma, gamma_far=gamma_far, length=length, own=False)
    constants, n = theory.constants(config), np.array([n for n, _ in theory.predict(config, theory.initial_kernel(config, length))])
    for head in range(heads):
        alone = replace(config, far=0, gamma=gamma if head < heads - config.far else gamma_far)
        row = head if 0 < config.far < heads else 0                            # heads that are alike have one for all
        assert np.array_equal(constants["decay"][:, row], theory.constants(alone)["decay"][:, 0])
        rowsum = np.exp([log_a for (_, log_a), in theory.log_attentions(alone, length)]).sum(-1)
        assert np.allclose(constants["rescale"][:, row], rowsum / n, rtol=(4 * length + 40) * EPS32)


@given(pairs().filter(lambda pair: pair[0] == "exponential"))
def test_what_a_token_keeps_of_itself_leaves_nothing_but_decay(pair):
    """A = c I + P with c >= 0, and log P is the flash form without its term for the own key; relative to each row's largest entry."""
    _, *pair, length = pair
    log_a, (c, ratio), (slope, first, own) = \
        spa.exponential_log_attention(*pair, length), spa.exponential_own(*pair), spa.exponential_decay(*pair)
    lag = np.arange(length)[:, None] - np.arange(length)
    log_p = np.where(lag >= 0, -slope * lag + np.where(np.arange(length) == 0, first, 0.0), -np.inf) + np.log(ratio) - own
    assert 0 <= c < ratio
    assert np.max(np.abs(np.exp(log_p) + c * np.eye(length) - np.exp(log_a))) <= 20 * EPS * (1 + slope * length)


@given(gammas, gammas, st.integers(1, 4), st.integers(0, 4), repeat_rates, lengths)
def test_a_matrix_of_its_own_takes_the_least_that_any_head_keeps(gamma, gamma_far, heads, far, r, length):
    """D softmax(B) of each head without it = c I + D' softmax(B') with it; c is as large as that allows: one head keeps nothing."""
    config = Config(depth=3, width=2 * heads, heads=heads, far=min(far, heads), gamma=gamma, gamma_far=gamma_far, length=length, repeat_rate=r,
                    own=False)
    plain, apart = theory.constants(config), theory.constants(replace(config, own=True))

    def matrices(constants):                                                   # (L, H, T, T)
        bias = np.array(jax.vmap(lambda decay: model.decay_bias(decay, 0, length, length))(constants["decay"]), float)
        return np.asarray(constants["rescale"], float)[..., None] * softmax(bias, -1)

    c = np.asarray(apart["own"], float)[..., None] * np.eye(length)
    size = np.asarray(plain["rescale"], float)[..., None]
    wrong = np.abs(matrices(apart) + c - matrices(plain)) / size
    assert np.max(wrong) <= 8 * EPS32 * (2 + np.max(np.abs(plain["decay"])) * length)
    assert np.all(c >= 0) and np.max(np.abs(np.min(apart["decay"][..., 2], 1))) <= 4 * EPS32 * (1 + np.max(plain["decay"][..., 2]))


@given(st.sampled_from(["espa", "uspa"]), gammas, rhos, repeat_rates, lengths)
def test_the_constants_hold_repeats_down(attn, gamma, rho, r, length):
    """In the first layer n^2 = 1 - r + r rowsum^2 for any A that takes I to a unit diagonal: D = rowsum / n."""
    config = Config(depth=2, attn=attn, gamma=gamma, rho=rho, repeat_rate=r, length=length, position="none", own=False)
    (_, log_a), = theory.log_attentions(config, length)[0]
    rowsum, rescale = np.exp(log_a).sum(-1), np.asarray(theory.constants(config)["rescale"][0])
    assert np.allclose(rescale, rowsum / np.sqrt(1 - r + r * rowsum**2), rtol=4 * EPS32)


# --- The non-causal form ---------------------------------------------------------------------------------------------------

@given(st.sampled_from(["exponential", "uniform"]), st.floats(0.05, 0.9), st.floats(0.05, 0.95), lengths)
def test_symmetric_form_preserves_its_kernels(family, close, ratio, length):
    """Sigma_out^(1/2) Sigma_in^(-1/2): what rounding costs is the kernels' condition numbers. Uniform kernels have their
    eigenvectors in common, which makes A symmetric."""
    out = -np.log(close) if family == "exponential" else close
    before = out / ratio if family == "exponential" else out * ratio
    sigma_in, sigma_out = kernel(family, before, length), kernel(family, out, length)
    a = spa.symmetric_attention(sigma_in, sigma_out)
    assert a.min() >= 0
    tolerance = 8 * length * EPS * (np.linalg.cond(sigma_in) + np.linalg.cond(sigma_out))
    assert np.max(np.abs(a @ sigma_in @ a.T - sigma_out)) <= tolerance
    assert family == "exponential" or np.max(np.abs(a - a.T)) <= tolerance
    with pytest.raises(ValueError, match="no softmax makes this"):         # the other way round entries are negative
        spa.symmetric_attention(sigma_out, sigma_in)
