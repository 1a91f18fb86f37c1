"""Activations by an independent quadrature: the trapezoid rule on a Gaussian, no Hermite series."""
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.errors import OutOfReach
from minitf.network import fast, operations
from minitf.theory import activations

EPS32 = np.finfo(np.float32).eps
few = settings(max_examples=max(settings().max_examples // 4, 5))        # a solution takes a second
Z = np.linspace(-10, 10, 801)
W = np.exp(-Z**2 / 2) / np.exp(-Z**2 / 2).sum()


def phi(activation, x):
    """The activation in float64."""
    a = activation
    if a.name in activations.SLOPES:
        return a.output_scale * (np.where(x < 0, a.slope * x, x) + a.output_shift)
    inside = a.input_scale * x + a.input_shift
    return a.output_scale * (activations.SMOOTH[a.name](inside, np, scipy.special)
                             + a.output_shift)


skips = st.one_of(st.just(0.0), st.floats(0.3, 0.98)).map(
    lambda alpha: (alpha, (1 - alpha**2) ** 0.5))


@few
@given(st.sampled_from(activations.NAMES), st.sampled_from(["tat", "dks"]), st.integers(1, 100),
       skips)
def test_conditions_hold_or_the_target_is_refused(name, transform, depth, skip):
    """Q(1) = 1, C(1) = 1, C increasing and convex on [0, 1]; and the network is as asked for.

    A kink costs the trapezoid rule h^2 = 6e-4 of the slope's jump at most; smooth phi are solved to
    1e-9.
    """
    alpha, beta = skip
    try:
        found = activations.solve(name, transform, depth, alpha, beta)
    except OutOfReach as error:
        assert 0 <= error.best < {"eta": 0.9, "zeta": 1.5, "tau": 0.3}[error.target]
        return
    kinked = name in activations.SLOPES
    close = 1e-3 if kinked else 1e-7
    assert abs(W @ phi(found, Z)**2 - 1) < close
    assert abs(found.mean_square() - 1) < 1e-8
    c = np.linspace(0, 1, 201)
    values = found.correlation_map(c)
    assert abs(values[-1] - 1) < 1e-9
    assert np.all(np.diff(values) > -1e-12) and np.all(np.diff(values, 2) > -1e-9)
    for each in (0.3, 0.8):
        mixed = each * Z[:, None] + np.sqrt(1 - each**2) * Z
        expected = W @ (phi(found, Z)[:, None] * phi(found, mixed)) @ W
        assert abs(expected - found.correlation_map(each)) < close
    h = 1e-4
    slope = (phi(found, Z + h) - phi(found, Z - h)) / (2 * h)
    if transform == "dks":
        psi = W @ slope**2
        network = max((alpha**2 + beta**2 * psi)**depth, psi)
        assert abs(W @ phi(found, Z)) < 1e-3 and abs(network - 1.5) < (0.05 if kinked else 1e-4)
    if not kinked:
        assert abs(W @ (Z * phi(found, Z) * slope) - 1) < 1e-5
    if transform == "tat" and kinked:
        one = found.correlation_map(0.0)
        whole = activations.network_correlation(found.correlation_map, 0.0, depth, alpha, beta)
        assert abs(max(whole, one) - 0.9) < 1e-9
    if transform == "tat" and not kinked:
        second = (phi(found, Z + h) - 2 * phi(found, Z) + phi(found, Z - h)) / h**2
        assert abs(W @ slope**2 - 1) < 1e-5
        assert abs(max(depth * beta**2, 1) * (W @ second**2) - 0.3) < 1e-3


@few
@given(st.sampled_from(activations.NAMES), st.sampled_from(activations.TRANSFORMS),
       st.integers(13, 100), st.integers(0, 2**31 - 1))
def test_the_network_computes_this_activation(name, transform, depth, seed):
    """In float32, by the formula and by its fast form, against phi in float64.

    Each of a few roundings is of a number no larger than 1 + |x| times the scales and shifts, or
    than what the output scale multiplies; all of these phi grow by 1.13 at most for 1 in their
    input.
    """
    try:
        a = activations.solve(name, transform, depth)
    except OutOfReach:
        return
    x = 3 * np.random.default_rng(seed).normal(size=64).astype(np.float32)
    expected = phi(a, x.astype(float))
    inside = 2 * (np.abs(a.input_scale * x) + abs(a.input_shift))
    size = a.output_scale * (inside + np.abs(expected / a.output_scale)
                             + 2 * abs(a.output_shift) + 1)
    for activate in (operations.activate, fast.activate):
        made = activate(jnp.asarray(x), a)
        assert made.dtype == np.float32
        assert np.all(np.abs(np.asarray(made, float) - expected) <= 4 * EPS32 * size)


@pytest.mark.parametrize("name", activations.LOOK_LINEAR)
def test_what_looks_linear_is_linear(name):
    """phi^(x) - phi^(-x) = m x, in float64: what the MLPs' initialisation relies on."""
    a = activations.solve(name, "none", 1)
    rounding = 8 * np.finfo(float).eps * a.output_scale * (1 + np.abs(Z))
    assert np.all(np.abs(a(Z) - a(-Z) - a.odd_slope() * Z) <= rounding)


@given(st.integers(13, 200), st.floats(0.1, 0.9))
def test_tat_of_a_leaky_relu_reaches_eta(depth, eta):
    """C_f(0) = eta in every stack without skips of 13 blocks or more.

    At depth 36 and eta = 0.9 the slope is 0.351121.
    """
    found = activations.solve("leaky_relu", "tat", depth, eta=eta)
    whole = activations.network_correlation(found.correlation_map, 0.0, depth, 0.0, 1.0)
    assert abs(whole - eta) < 1e-9
    assert abs(activations.solve("leaky_relu", "tat", 36).slope - 0.351121) < 1e-6
