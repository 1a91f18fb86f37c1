"""Signal-preserving attention as matrices, in float64: what the paper promises of every kernel.

EPS is float64's spacing at 1. Where all terms of a product are >= 0 rounding errors are relative
and never cancel against a result: a sum of n such terms is right to n EPS of itself, and exp(x) to
|x| EPS.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import (EPS, EPS32, KERNELS, attentions, depths, gammas, kernel, lengths,
                        log_attention, pairs, rhos, schedules)

from minitf import resolve
from minitf.theory import kernels as theory, spa
from minitf.theory.families import FAMILIES, prescribed

# --- One attention matrix ---------------------------------------------------------------


@given(pairs())
def test_causal_and_a_softmax_can_make_it(pair):
    """A is lower triangular, and positive there: B is finite wherever the mask lets through."""
    log_a = log_attention(*pair)
    below = np.tri(len(log_a), dtype=bool)
    assert np.all(log_a[~below] == -np.inf)
    assert np.all(np.isfinite(log_a[below]))


@given(pairs())
def test_maps_one_kernel_to_the_other(pair):
    """A Sigma_in A^T = Sigma_out.

    For uspa an entry of A is a difference of sums of T terms below 1; for espa the exponential of a
    logarithm of size up to gamma T, whose rounding error becomes a relative one of gamma T EPS.
    """
    name, before, after, length = pair
    size = after * length * (name == "exponential")
    a, sigma_in = np.exp(log_attention(*pair)), kernel(name, before, length)
    sigma_out = kernel(name, after, length)
    wrong = length * EPS * (name == "uniform")             # of an entry of A, beside its relative
    tolerance = (4 * length + 40 + 4 * size) * EPS * sigma_out \
        + 2 * length * wrong * (sigma_in @ a.T).max()
    assert np.all(np.abs(a @ sigma_in @ a.T - sigma_out) <= tolerance)


@given(pairs())
def test_closed_form_is_the_cholesky_quotient(pair):
    """The definition loses the digits of the condition numbers: T EPS (cond_in + cond_out)."""
    name, before, after, length = pair
    sigma_in, sigma_out = kernel(name, before, length), kernel(name, after, length)
    a = spa.cholesky_attention(sigma_in, sigma_out)
    tolerance = length * EPS * (np.linalg.cond(sigma_in) + np.linalg.cond(sigma_out))
    assert np.max(np.abs(np.exp(log_attention(*pair)) - a)) <= tolerance


@given(gammas, st.floats(-3, 3).map(lambda x: 1 + 10**x))
def test_far_entries_keep_their_digits(gamma, ratio):
    """log A holds where A itself underflows: log A_ij falls by exactly gamma_out a position."""
    log_a = spa.exponential_log_attention(gamma * ratio, gamma, 200)
    falls = -np.diff(log_a[2:, 1])                                         # j = 2, i = 3 to T
    assert np.allclose(falls, gamma, rtol=0, atol=4 * EPS * np.abs(log_a[2:, 1]).max())


LENGTH32 = 32
softmax32 = jax.jit(lambda bias: jax.nn.softmax(bias))


@given(pairs())
def test_row_scale_and_bias_give_the_matrix_back_in_float32(pair):
    """D softmax(B) = A.

    Rounding B to float32 shifts it by |B| EPS32, which is a relative error of A.
    """
    log_a = log_attention(*pair[:3], LENGTH32)
    row_scale, bias = spa.row_scale_and_bias(log_a)
    made = np.float32(row_scale)[:, None] * np.asarray(softmax32(jnp.asarray(bias, jnp.float32)))
    a = np.exp(log_a)
    finite = np.where(np.isfinite(bias), bias, 0)
    tolerance = (np.abs(finite) + LENGTH32 + 8) * EPS32 * a + 1e-37 * row_scale[:, None]
    assert np.all(np.abs(made - a) <= tolerance)
    assert np.allclose(row_scale, a.sum(-1), rtol=LENGTH32 * EPS)


# --- Schedules, and products over depth -------------------------------------------------


@given(depths, gammas)
def test_exponential_schedule(depth, gamma):
    """From gamma = inf strictly down to gamma_L, with one lambda: all A_l have one diagonal.

    An error of gamma EPS in gamma is one of phi^2 gamma EPS / s^2 <= EPS / 2 in log s; and
    log s / L has rounded, too.
    """
    schedule = spa.exponential_schedule(gamma, depth)
    assert len(schedule) == depth + 1 and schedule[0] == np.inf and schedule[-1] == gamma
    assert np.all(np.diff(schedule[1:]) < 0)
    s = np.sqrt(-np.expm1(-2 * schedule))
    assert np.allclose(np.diff(np.log(s)), np.log(s[-1]) / depth, rtol=0,
                       atol=8 * EPS * (1 + abs(np.log(s[-1]))))


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
    """A_l ... A_k maps Sigma_(k-1) to Sigma_l for every l >= k; from I it is the Cholesky factor.

    As for one matrix; of l - k + 1 factors, each of which moves a row by its entries' errors times
    the row sums.
    """
    name, values, length = schedule
    k = data.draw(st.integers(1, len(values) - 1), label="k")
    product, sigma = np.eye(length), kernel(name, values[k - 1], length)
    uniform = name == "uniform"
    for factors, a in enumerate(attentions(schedule)[k - 1:], 1):
        product = a @ product
        of_entries = 2 * length**2 * EPS * product.sum(-1).max() * uniform
        tolerance = factors * ((4 * length + 40) * EPS + of_entries)
        target = kernel(name, values[k - 1 + factors], length)
        assert np.max(np.abs(product @ sigma @ product.T - target)) <= tolerance


@given(st.sampled_from(["espa", "uspa"]), depths, gammas, rhos, st.floats(0, 0.9), lengths)
def test_the_network_asks_for_this_schedule(attn, depth, gamma, rho, share, length):
    """FAMILIES: L maps, which take the first kernel to the one that the settings name.

    What multiplies by A in O(T) sums up to T terms that may cancel: 4 T EPS of the largest entry,
    twice a layer. An error goes on as a kernel does: by the row sums' square at most, which is that
    of the product of all A >= 0 whose rows sum to 1 or more. So does one of A's entries.
    """
    config = resolve(depth=depth, attn=attn, gamma=gamma, rho=rho, rho_first=share * rho).model
    kernel_maps = FAMILIES[attn].kernel_maps(config)
    assert len(kernel_maps) == depth
    first = np.eye(length) if attn == "espa" else spa.uniform_kernel(share * rho, length)
    last = KERNELS["exponential" if attn == "espa" else "uniform"](
        gamma if attn == "espa" else rho, length)
    sigma, ones = first, np.ones((length, length))
    for kernel_map in kernel_maps:
        sigma, ones = kernel_map(sigma), kernel_map(ones)
    tolerance = depth * (12 * length + 40) * EPS * ones.max() \
        + 2 * depth * length**2 * EPS * np.sqrt(ones.max()) * (attn == "uspa")
    assert np.max(np.abs(sigma - last)) <= tolerance


UNLIKE = dict(gamma=(0.1, 0.1, 0.1, 0.02), depth=1)


@pytest.mark.parametrize("refused", [
    lambda: spa.exponential_schedule(1e9, 4),
    lambda: spa.exponential_schedule(-1.0, 4),
    lambda: spa.uniform_schedule(1e-17, 4, 1e-17),
    lambda: spa.uniform_schedule(1.0, 4),
    lambda: spa.exponential_log_attention(0.1, 0.1, 8),
    lambda: spa.exponential_log_attention(0.1, 0.2, 8),
    lambda: spa.uniform_log_attention(0.2, 0.2, 8),
    lambda: spa.uniform_log_attention(0.2, 0.1, 8),
    lambda: prescribed(lambda config: [[0.5, 0.1]], spa.uniform_kernel).bias(resolve().model),
    lambda: theory.attention_constants(resolve(length=1025, **UNLIKE).model),
    lambda: spa.exponential_kernel(float("nan"), 8),
    lambda: spa.uniform_kernel(1.0, 8),
])
def test_what_has_no_such_attention_is_refused(refused):
    """In one line."""
    with pytest.raises(ValueError) as caught:
        refused()
    assert "\n" not in str(caught.value)


# --- The non-causal form ----------------------------------------------------------------


@given(st.sampled_from([*KERNELS]), st.floats(0.05, 0.9), st.floats(0.05, 0.95), lengths)
def test_symmetric_form_preserves_its_kernels(name, close, ratio, length):
    """Sigma_out^(1/2) Sigma_in^(-1/2): what rounding costs is the kernels' condition numbers.

    Uniform kernels have their eigenvectors in common, which makes A symmetric. The other way round
    entries are negative.
    """
    out = -np.log(close) if name == "exponential" else close
    before = out / ratio if name == "exponential" else out * ratio
    sigma_in, sigma_out = kernel(name, before, length), kernel(name, out, length)
    a = spa.symmetric_attention(sigma_in, sigma_out)
    assert a.min() >= 0
    tolerance = 8 * length * EPS * (np.linalg.cond(sigma_in) + np.linalg.cond(sigma_out))
    assert np.max(np.abs(a @ sigma_in @ a.T - sigma_out)) <= tolerance
    assert name == "exponential" or np.max(np.abs(a - a.T)) <= tolerance
    with pytest.raises(ValueError, match="no softmax makes this"):
        spa.symmetric_attention(sigma_out, sigma_in)
