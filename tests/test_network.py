"""The initialised network against the theory: exactly where it is exact, by z-scores over initialisations where it is not.

Shapes are few (each is a compilation); seeds, tokens, positions, kernel parameters and weights are drawn.
"""
from dataclasses import replace
from functools import lru_cache, partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import Config, data, model, report, spa
from run import DATA, ENCODING

EPS32 = np.finfo(np.float32).eps
T, D, V = 16, 32, 64
SMALL = Config(depth=4, width=D, heads=4, length=T, eta=0.2, repeat_rate=0.0, rescale="plain")
SILENT = ("espa", "uspa", "vskip")                                         # W^Q = 0

seeds = st.integers(0, 2**31 - 1)
init = jax.jit(model.init, static_argnums=(1, 2))
forward = jax.jit(model.forward, static_argnums=3)
states = jax.jit(report.states, static_argnums=3)


@partial(jax.jit, static_argnums=3)
def attention_stack(weights, constants, x, config):
    """Attention alone, layer after layer: x (T, d) -> (L, T, d)."""
    step = lambda x, layer: (model.attention(x, *layer, config),) * 2
    return jax.lax.scan(step, x, (weights, constants))[1]


def network(attn, seed, **changes):
    config = replace(SMALL, attn=attn, **changes)
    return config, init(jax.random.key(seed), config, V), model.constants(config)


def stirred(params, seed, size=0.3):
    """Every parameter moved at random, so that Q and K, vskip's scalars and the head matter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def random_tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape or T).astype(np.int32)


# --- Exact at initialisation ----------------------------------------------------------------------------------------------

@given(st.sampled_from(["espa", "uspa"]), st.sampled_from([1, 2, 4, 8]), seeds, st.floats(-3, 0), st.floats(0.05, 0.95))
def test_attention_alone_makes_the_prescribed_kernels(attn, heads, seed, gamma, rho):
    """Orthonormal tokens, plain rescaling: Sigma_l at every depth l, with every number of heads.

    A layer is three products with rounding errors of sqrt(n) EPS32 of a result of size 1, and |log P| P EPS32 <= log T EPS32
    from B; A of a unit-diagonal kernel does not amplify them. Entries of X X^T / d carry twice that; 4 standard errors.
    """
    config, params, _ = network(attn, seed % 8, heads=heads)
    target = replace(config, gamma=10**gamma, rho=rho)                     # constants are data: nothing to compile anew
    x = np.sqrt(D) * np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0][:T].astype(np.float32)
    after = np.asarray(attention_stack(params["blocks"], model.constants(target), x, config), float)
    schedule = spa.exponential_schedule(target.gamma, 4) if attn == "espa" else spa.uniform_schedule(rho, 4)
    for layer, y in enumerate(after, 1):
        sigma = (spa.exponential_kernel if attn == "espa" else spa.uniform_kernel)(schedule[layer], T)
        tolerance = 4 * 2 * layer * (2 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


@given(st.sampled_from(SILENT), seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_attention_does_not_depend_on_the_input(attn, seed, a, b):
    """With W^Q = 0 a layer is linear in X: f(a X + b Y) = a f(X) + b f(Y). Softmax is not."""
    for attn, linear in ((attn, True), ("softmax", False)):
        config, params, constants = network(attn, seed % 8)
        f = lambda x: np.asarray(attention_stack(params["blocks"], constants, jnp.asarray(x, jnp.float32), config))[0]
        x, y = np.random.default_rng(seed).normal(size=(2, T, D)) * 2
        rowsum = np.exp(np.asarray(model.log_attentions(config, T) or [np.zeros((T, T))])[0]).sum(-1).max()
        wrong = np.max(np.abs(f(a * x + b * y) - a * f(x) - b * f(y)))
        size = 10 * rowsum * (1 + abs(a) + abs(b))                         # entries of X reach 5 standard deviations of 2
        if linear:
            assert wrong <= size * 4 * (2 * np.sqrt(D) + T) * EPS32
        elif abs(a) > 0.5 and abs(b) > 0.5:
            assert wrong > 1e-2


@given(seeds)
def test_vskip_starts_as_the_identity(seed):
    config, params, _ = network("vskip", seed % 8)
    x = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    first = attention_stack(params["blocks"], {}, x, config)[0]
    values = x @ np.asarray(params["blocks"]["value"][0]) @ np.asarray(params["blocks"]["output"][0])
    assert np.allclose(first, values, rtol=0, atol=5 * 4 * 2 * np.sqrt(D) * EPS32)


@given(st.sampled_from(SILENT), seeds)
def test_rotary_positions_leave_the_start_alone(attn, seed):
    """They turn Q and K; Q is zero."""
    config, params, constants = network(attn, seed % 8)
    tokens = random_tokens(seed)
    with_rope, without = (states(params, constants, tokens, replace(config, position=p)) for p in ("rope", "none"))
    assert np.array_equal(with_rope, without)


@given(seeds)
def test_orthogonal_weights(seed):
    """All singular values are max(sqrt(out/in), 1), to the rounding of a QR of n columns; attention's keys are random."""
    blocks = init(jax.random.key(seed), SMALL, V)["blocks"]
    for name, value in dict(value=1, output=1, up=2, down=1).items():
        singular = np.linalg.svd(np.asarray(blocks[name], float), compute_uv=False)
        assert np.allclose(singular, value, rtol=4 * D * EPS32), name
    assert not np.any(blocks["query"])


# --- Whatever the parameters -----------------------------------------------------------------------------------------------

@given(st.sampled_from(["softmax", *SILENT]), seeds, st.integers(1, T - 1))
def test_causal(attn, seed, position):
    """No output before a position changes with the tokens from it on, bit for bit; some later one does, and Q and K matter."""
    config, params, constants = network(attn, seed % 8)
    params = stirred(params, seed)
    tokens = random_tokens(seed)
    later = np.where(np.arange(T) >= position, (tokens + 1) % V, tokens)
    one, other = (np.asarray(forward(params, constants, t, config)) for t in (tokens, later))
    assert np.all(np.isfinite(one)) and np.array_equal(one[:position], other[:position])
    assert np.any(one[position:] != other[position:])                      # one token alone may weigh nothing: a sharp softmax
    silenced = {**params, "blocks": {**params["blocks"], "query": 0 * params["blocks"]["query"]}}
    assert not np.allclose(one, forward(silenced, constants, tokens, config), rtol=1e-3)


@given(st.sampled_from(["softmax", *SILENT]), seeds, st.permutations(range(4)))
def test_permuting_the_batch_permutes_the_outputs(attn, seed, order):
    config, params, constants = network(attn, seed % 8)
    params, tokens = stirred(params, seed, 0.1), random_tokens(seed, 4, T)
    batch = lambda tokens: np.asarray(jax.vmap(forward, (None, None, 0, None))(params, constants, tokens, config))
    assert np.allclose(batch(tokens[list(order)]), batch(tokens)[list(order)], rtol=1e-4, atol=1e-4)


# --- In the mean over initialisations --------------------------------------------------------------------------------------

@lru_cache
def corpus():
    encoding = data.load_encoding(str(ENCODING))
    return data.encode([data.read_text(DATA)[:200_000]], encoding), encoding.n_vocab


@lru_cache
def sampled_kernels(width, samples, config):
    """Real tokens -> (predicted (L+1, T, T), measured (samples, L+1, T, T)), a new initialisation each."""
    tokens, vocabulary = corpus()
    window = tokens[1000:1000 + config.length].astype(np.int32)
    config, constants = replace(config, width=width), model.constants(config)

    @jax.jit
    def one(key):
        x = report.states(model.init(key, config, vocabulary), constants, window, config)
        return jnp.einsum("lid,ljd->lij", x, x) / width

    return report.predicted(constants, window, config), np.array([one(key) for key in jax.random.split(jax.random.key(7), samples)])


REAL = Config(depth=14, width=16, heads=2, length=16, repeat_rate=0.02)     # the least depth, nearly, that reaches eta = 0.9
SAMPLES = 48


@pytest.mark.parametrize("changes", [dict(attn="espa"), dict(attn="uspa"), dict(attn="vskip"),
                                     dict(block="weighted"), dict(attn="espa", repeat_rate=0.3)], ids=str)
def test_real_kernels_are_the_predicted_ones(changes):
    """Default eta, MLPs, repeats and all. An error of mean 0 and variance v/d in a kernel passes through C, which is not
    linear: the mean is off by order 1/d. Two widths, 16 and 64, remove that term: m = (4 m_64 - m_16) / 3, whose standard
    error is that of the two means. What is left is O(1/d^2), about (depth/d)^2 with d = 64: a twentieth.
    """
    config = replace(REAL, alpha=None, beta=None, norm=None, act=None, transform=None, init=None, **changes) \
        if "block" in changes else replace(REAL, **changes)
    theory, narrow = sampled_kernels(16, SAMPLES, config)
    _, wide = sampled_kernels(64, SAMPLES, config)
    mean = (4 * wide.mean(0) - narrow.mean(0)) / 3
    error = np.sqrt(16 * wide.var(0, ddof=1) + narrow.var(0, ddof=1)) / 3 / np.sqrt(SAMPLES)
    z = NormalDist().inv_cdf(1 - 1e-3 / 2 / theory.size)                   # of all entries together, once in 1,000
    assert np.all(np.abs(mean - theory) <= z * error + (config.depth / 64)**2)


def test_the_error_falls_as_one_over_the_root_of_the_width():
    """Four times the width, half the error: the ratio of two root mean squares over n samples is right to about 1/sqrt(n)."""
    config = replace(REAL, attn="espa")
    rms = [np.sqrt(np.mean((measured[:, layer] - theory[layer])**2)) for width in (16, 64) for layer in (0, 1)
           for theory, measured in [sampled_kernels(width, SAMPLES, config)]]
    for narrow, wide in zip(rms[:2], rms[2:]):
        assert abs(narrow / wide / 2 - 1) < 4 / np.sqrt(SAMPLES)


@pytest.mark.parametrize("attn", ["espa", "uspa"])
def test_unit_mean_square_at_every_depth(attn):
    """--rescale expected: over tokens that repeat with probability r, every position's mean square is 1 on average.

    With eta near 0 the MLPs are linear, and so is the mean. A z-score over draws of tokens and weights; plain fails it.
    """
    rate, samples = 1 / 4, 256
    config = Config(depth=6, width=32, heads=4, length=T, attn=attn, eta=1e-3, repeat_rate=rate, gamma=0.05)

    def squares(config):
        constants = model.constants(config)
        one = jax.jit(lambda key: jnp.mean(report.states(model.init(key, config, 4), constants,
                                                         jax.random.randint(jax.random.fold_in(key, 1), (T,), 0, 4), config)**2, -1))
        return np.array([one(key) for key in jax.random.split(jax.random.key(3), samples)])

    values = squares(config)                                               # (samples, L + 1, T)
    z = (values.mean(0) - 1) / (values.std(0, ddof=1) / np.sqrt(samples))
    assert np.max(np.abs(z)) < NormalDist().inv_cdf(1 - 1e-3 / 2 / z.size) + 0.5      # a skewed mean: half a unit more
    assert squares(replace(config, rescale="plain")).mean(0)[-1, -1] > 1.5


# --- Backward ------------------------------------------------------------------------------------------------------------

@lru_cache
def deep_report(attn):
    tokens, vocabulary = corpus()
    config = Config(depth=36, attn=attn, length=32, repeat_rate=data.repeat_rate(data.count(tokens, vocabulary)))
    return report.report(config, data.spread_windows(tokens, 32, 2)[:, :-1], vocabulary)


def test_gradients_and_kernels_survive_without_skips_and_norms():
    """Depth 36, vanilla: with `espa` the signal survives, and gradients of different tokens stay different;
    with softmax all tokens become one, and so do their gradients."""
    espa, softmax, vanilla = deep_report("espa"), deep_report("softmax"), Config(depth=36)
    assert report.verdict(espa, vanilla) == "signal survives"
    assert report.verdict(softmax, vanilla).startswith("signal does not survive") and "effective rank" in report.verdict(softmax, vanilla)
    assert np.all(espa["gradient cosine"] < 0.5) and softmax["gradient cosine"][30] > 0.5
    assert espa["mean cosine"][-1] < 0.99 < 0.9999 < softmax["mean cosine"][-1]
    assert len(report.table(espa).splitlines()) == 38
