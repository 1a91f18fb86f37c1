"""Kernels, schedules and parameters to draw, shared by the tests of the theory."""
import numpy as np
from hypothesis import strategies as st

from minitf.theory import spa

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
KERNELS = {"exponential": spa.exponential_kernel, "uniform": spa.uniform_kernel}
CLOSED_FORMS = {"exponential": spa.exponential_log_attention,
                "uniform": spa.uniform_log_attention}

lengths = st.integers(2, 64)
depths = st.integers(1, 48)
gammas = st.floats(-5, 1).map(lambda power: 10**power)                     # 1e-5 to 10
rhos = st.floats(1e-4, 0.999)
collision_rates = st.floats(0, 0.9)
skips = st.one_of(st.just(0.0), st.floats(0.05, 0.99)).map(
    lambda alpha: (alpha, (1 - alpha**2) ** 0.5))
unlike_heads = st.tuples(gammas, gammas).flatmap(                          # a gamma for each head
    lambda two: st.lists(st.sampled_from(two), min_size=1, max_size=5).map(tuple))


@st.composite
def pairs(draw):
    """(kernel, its parameter before and after, length), from close together to far apart."""
    name, length = draw(st.sampled_from([*KERNELS])), draw(lengths)
    if name == "exponential":
        out = draw(gammas)
        above = st.floats(-6, 3).map(lambda x: out * (1 + 10**x))
        return name, draw(st.one_of(st.just(np.inf), above)), out, length
    out = draw(rhos)                                                       # allowed: 1e-9 apart
    below = st.floats(-8.9, np.log10(out)).map(lambda x: max(out - 10**x, 0))
    return name, draw(st.one_of(st.just(0.0), below)), out, length


@st.composite
def schedules(draw):
    """(kernel, parameters by depth, length)."""
    name, depth = draw(st.sampled_from([*KERNELS])), draw(depths)
    if name == "exponential":
        return name, spa.exponential_schedule(draw(gammas), depth), draw(lengths)
    last, first = draw(rhos), draw(st.one_of(st.just(0.0), st.floats(0, 0.9)))
    return name, spa.uniform_schedule(last, depth, first * last), draw(lengths)


def kernel(name, parameter, length):
    return KERNELS[name](parameter, length)


def log_attention(name, before, after, length):
    return CLOSED_FORMS[name](before, after, length)


def attentions(schedule):
    """A of each layer in closed form, (L, T, T)."""
    name, values, length = schedule
    return np.array([np.exp(log_attention(name, before, after, length))
                     for before, after in zip(values, values[1:])])


def maps(matrices):
    """For each A its map of kernels: Sigma -> A Sigma A^T."""
    return [lambda sigma, a=a: a @ sigma @ a.T for a in matrices]


def identity(c):
    return c
