"""The initialised network against the theory, by z-scores over initialisations.

And what arrives of gradients and kernels through its depth.
"""
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from networks import EPS32, T, compiled_as, seeds

from minitf import resolve
from minitf.cli import inspection
from minitf.network import model
from minitf.network.init import init as make_parameters
from minitf.network.operations import REFERENCE
from minitf.theory import kernels as theory
from minitf.theory.families import FAMILIES
from minitf.training import data
from minitf.training.encoding import encode, load_encoding, read_text

# --- In the mean over initialisations ---------------------------------------------------


@lru_cache
def corpus():
    """(tokens, vocabulary) of the included text's beginning."""
    encoding = load_encoding(str(data.RANKS))
    return encode([read_text(data.TEXT)[:200_000]], encoding), encoding.n_vocab


def scores(samples):
    """How many standard errors the mean of samples (n, ...) is from 0, without their skewness.

    Hall's (1992) monotone cubic of Student's t. Skewness shifts t by O(1/sqrt(n)), and a kernel's
    entries are skewed as chi-squares are; this is normal to O(1/n), the order of what Student's
    quantile allows for.
    """
    n, spread = len(samples), samples.std(0, ddof=1)
    t = np.sqrt(n) * samples.mean(0) / spread
    skew = np.mean(((samples - samples.mean(0)) / spread)**3, 0) / np.sqrt(n)
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def limit(n, count):
    """What the largest of `count` independent scores of n samples exceeds once in 1,000.

    Less often if they depend on each other.
    """
    return student.ppf(1 - 1e-3 / 2 / count, n - 1)


@partial(jax.jit, static_argnums=(3, 4))
def compiled_readings(keys, tokens, constants, config, vocabulary):
    def one(key, tokens):
        params = make_parameters(key, config, vocabulary)
        x = inspection.states(params, constants, tokens, config)     # (L + 1, T, d)
        attention = lambda x, *layer: model.attention_sublayer(x, *layer, config, REFERENCE)
        y = jax.vmap(attention)(x[:-1], *model.layers(params, constants, config))
        x = jnp.concatenate([x[:1], jnp.stack([y, x[1:]], 1).reshape(-1, *x.shape[1:])])
        return jnp.einsum("lid,ljd->lij", x, x) / config.width

    return jax.vmap(one)(keys, tokens)


def readings(seed, tokens, config, vocabulary):
    """Kernels of a new initialisation for each of tokens (n, T): (n, 2 L + 1, T, T), float64.

    Of the embedding, then after attention and after the MLP of each block.
    """
    keys, constants = jax.random.split(jax.random.key(seed), len(tokens)), \
        theory.attention_constants(config)
    return np.asarray(compiled_readings(keys, tokens, constants, compiled_as(config), vocabulary),
                      float)


def half_block(config):
    """(half, kernel) -> the kernel after half a block, by the recursion of the whole.

    Even halves are attention without the MLP, with the network's own n; odd ones the MLP alone.
    """
    maps, n = FAMILIES[config.attn].kernel_maps(config), theory.attended_rms(config)
    correlation_map = theory.network_activation(config).correlation_map

    def after(half, kernel):
        layer = half // 2
        made = ([lambda sigma: sigma], correlation_map, np.ones(len(kernel))) if half % 2 else \
            ([maps[layer]], lambda c: c, n[layer])
        ((_, kernel),) = theory.kernel_recursion(made[0], kernel, made[1], config.alpha,
                                                 config.beta, n=made[2][None])
        return kernel

    return after


@lru_cache
def steps_from_theory(width, samples, config):
    """Real tokens: what each half of a block makes of the kernel that it is given, less the theory.

    Relative to the predicted mean squares: (samples, 2 L + 1, T, T), a new initialisation each;
    first the embedding.
    """
    tokens, vocabulary = corpus()
    tokens = tokens[1000:1000 + config.length].astype(np.int32)
    config = replace(config, width=width)
    measured = readings(7, np.tile(tokens, (samples, 1)), config, vocabulary)
    half = half_block(config)
    start = theory.input_kernel(config, len(tokens), tokens[:, None] == tokens)
    steps = lambda each: [half(number, kernel) for number, kernel in enumerate(each[:-1])]
    expected = np.array([[start, *steps(each)] for each in measured])
    scale = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
    return (measured - expected) / (scale[..., :, None] * scale[..., None, :])


# The least depth, nearly, that reaches eta = 0.9.
SIZES = dict(depth=14, width=16, heads=2, length=16)
REAL = resolve("paper", 0.02, gamma=0.8, row_scale="unit", **SIZES)
SAMPLES = 144


@pytest.mark.parametrize("flags", [
    dict(row_scale="row-sum"), dict(gamma=(0.8, 0.16), token_collision_rate=0.3),
    dict(identity_skip=True), dict(preset="normless")], ids=str)
def test_real_kernels_are_the_predicted_ones(flags):
    """Default eta, MLPs, repeats and all. The recursion is exact in the mean at any width.

    One half of a block at a time: a column of `up` sees two tokens as two coordinates of a point
    uniform on a sphere in 4 d dimensions, whose direction is that of a Gaussian and whose mean
    square radius is, too, and leaky ReLUs are homogeneous: E phi(u) phi(v) is C's definition.
    E down down^T is a multiple of I, and E W^V W^O = 0 leaves no cross term with a skip. With
    identity_skip the terms add up to A: each head's share of the features is a projection, of mean
    I / H. So the errors, given what went in, have mean 0; as does their mean over blocks. Where
    alpha is 0 and all heads are alike, what attention gives is exact but for rounding.
    """
    settings = resolve(flags["preset"], 0.02, **SIZES) if "preset" in flags else \
        REAL.replace(**flags)
    config = settings.model
    errors = steps_from_theory(16, SAMPLES, config)
    halves = [errors[:, first::2].mean(1, keepdims=True) for first in (1, 2)]
    errors = np.concatenate([errors, *halves], 1)
    # Products over d, d and T terms; sum_j A_ij |v_j| is at most sqrt(T) times the size of
    # sum_j A_ij v_j for orthogonal v.
    rounding = 4 * 2 * (2 * np.sqrt(16) + np.sqrt(T) * np.sqrt(T) + np.log(T)) * EPS32
    exact = np.abs(errors).max(0) <= rounding
    assert np.all(exact | (np.abs(scores(errors)) <= limit(SAMPLES, errors[0].size)))
    assert np.all(exact[1:-2:2]) or config.alpha > 0 or len(set(config.gamma)) > 1


def test_the_error_falls_with_the_width_as_derived():
    """The errors' variance, exact at any width d.

    Of the embedding's kernel (1 + Sigma^2) / d. Of a token's mean square after an MLP: phi's mean
    over a sphere of 4 d dimensions has the variance 3 k / (4 d + 2),
    k = ((1 - s^2) / (1 + s^2))^2, and a projection from 4 d to d dimensions, a beta variable,
    3 / (2 d + 1): together about (1.5 + 0.75 k) / d.
    """
    config = REAL.model
    tokens = corpus()[0][1000:1000 + T]
    slope = theory.network_activation(config).slope
    k = ((1 - slope**2) / (1 + slope**2))**2
    for width, samples in ((16, SAMPLES), (48, SAMPLES // 4)):
        errors = steps_from_theory(width, samples, config)
        embedding = errors[:, 0]**2 / (1 + (tokens[:, None] == tokens)) * width
        squares = np.diagonal(errors[:, 2::2], axis1=-2, axis2=-1)**2
        block = squares / ((1 + 3 * k / (4 * width + 2)) * (1 + 3 / (2 * width + 1)) - 1)
        for ratio in (embedding, block):
            means = ratio.reshape(samples, -1).mean(1)
            assert abs(scores(means - 1)) <= limit(samples, 4)
            # Enough samples to tell a wrong rate, or k = 0.
            assert means.std() / np.sqrt(samples) < 0.1


@pytest.mark.parametrize("flags", [
    dict(gamma=(0.8, 0.8, 0.8, 0.16)), dict(attn="uspa")], ids=str)
def test_whole_networks_make_the_predicted_kernels(flags):
    """Row scale "unit": E Sigma_l is the prediction at every depth, with mean squares of 1.

    Tokens are equal with probability r; where the MLPs look linear, so is the mean. The paper's
    row sums do not keep mean squares, but for uspa, whose first kernel is that of such tokens.
    """
    flags, samples = {"gamma": 0.05, **flags}, 256
    settings = resolve("isometric", 1 / 4, depth=6, width=32, heads=4, length=T, **flags)
    config = settings.model

    tokens = np.random.default_rng(3).integers(0, 4, (samples, T)).astype(np.int32)
    kernels = lambda config: readings(3, tokens, config, 4)[:, ::2]

    start = theory.input_kernel(config, T)
    predicted = theory.predict_kernels(config, start)
    expected = np.array([start, *(kernel for _, kernel in predicted)])
    assert np.allclose(np.diagonal(expected, axis1=1, axis2=2), 1)
    z = scores(kernels(config) - expected)                           # (L + 1, T, T)
    assert np.max(np.abs(z)) <= limit(samples, z.size)
    if config.attn == "uspa":
        assert np.allclose(theory.attended_rms(config), 1, rtol=1e-9)
    if config.attn == "espa" and len(set(config.gamma)) == 1:
        paper = settings.replace(row_scale="row-sum").model
        assert kernels(paper).mean(0)[-1, -1, -1] > 1.5


# --- Backward ---------------------------------------------------------------------------


@lru_cache
def deep_report(attn):
    """(the report of a network of 36 blocks on real text, its ModelConfig)"""
    tokens, vocabulary = corpus()
    rate = data.token_collision_rate(data.count(tokens, vocabulary))
    settings = resolve("isometric", rate, depth=36, attn=attn, length=32)
    windows = data.spread_windows(tokens, 32, 2)[:, :-1]
    return inspection.report(settings, windows, vocabulary), settings.model


def test_gradients_and_kernels_survive_without_skips_and_norms():
    """Depth 36: with `espa` the signal survives, and gradients of different tokens stay different.

    With softmax all tokens become one, and so do their gradients.
    """
    (espa, config), (softmax, control) = (deep_report(attn) for attn in ("espa", "softmax"))
    assert inspection.verdict(espa, config) == "signal survives"
    said = inspection.verdict(softmax, control)
    assert said.startswith("signal does not survive") and "effective rank" in said
    assert np.all(espa["gradient cosine"] < 0.5) and softmax["gradient cosine"][30] > 0.5
    assert espa["mean cosine"][-1] < 0.99 < 0.9999 < softmax["mean cosine"][-1]
    assert len(inspection.table(espa, "predicted").splitlines()) == 38
    # Of embeddings of this width, drawn once a window; measured on 8 draws: from block 0 on.
    ranks = espa["effective rank"] / espa["predicted effective rank"]
    assert np.all(np.abs(ranks - 1) < 0.1), ranks


@given(seeds, st.sampled_from(["float32", "bfloat16"]), st.integers(1, 100))
def test_rounding_is_not_taken_for_rank(seed, dtype, depth):
    """Tokens that are one vector, but for as many roundings as a network of this depth makes.

    Ten times the errors are rank.
    """
    rng, width, length = np.random.default_rng(seed), 64, 32
    one = np.float32(rng.normal(size=width) * np.ones((length, 1)))
    # The noise's mean square, of T d terms weighted by x^2, has this relative spread; 6 of it.
    spread = np.sqrt(2 * np.sum(one[0]**4) / length) / np.sum(one[0]**2)
    least = inspection.rounded_rank(width, length, depth * (1 + 6 * spread), dtype)
    unit = float(jnp.finfo(dtype).eps) / 2
    noise = rng.uniform(-1, 1, (inspection.ROUNDINGS * depth, length, width)).sum(0) * unit
    rank = lambda x: inspection.effective_rank(np.asarray(jnp.einsum("id,jd->ij", x, x)) / width)
    assert rank(np.float32(one * (1 + noise))) <= least
    assert rank(np.float32(one * (1 + (10 if dtype == "bfloat16" else 1e5) * noise))) > least
