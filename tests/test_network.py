"""The initialised network against the theory: exactly where it is exact, by z-scores over initialisations where it is not.

Shapes are few (each is a compilation); seeds, tokens, positions, kernel parameters and weights are drawn.
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

from minitf import Config, data, model, report, spa, theory, train
from minitf.config import BLOCKS
from run import DATA, ENCODING

EPS32 = np.finfo(np.float32).eps
T, D, V = 16, 32, 64
SMALL = Config(block="paper", depth=4, width=D, heads=4, length=T, eta=0.2, repeat_rate=0.0, rescale="plain")
SILENT = ("espa", "uspa", "vskip")                                         # W^Q = 0

seeds = st.integers(0, 2**31 - 1)
init = jax.jit(model.init, static_argnums=(1, 2))
forward = jax.jit(model.forward, static_argnums=3)
states = jax.jit(report.states, static_argnums=3)


@partial(jax.jit, static_argnums=(3, 4))
def attention_stack(weights, constants, x, config, part=model.attention):
    """Attention alone, layer after layer: x (T, d) -> (L, T, d)."""
    step = lambda x, layer: (part(x, *layer, config),) * 2
    return jax.lax.scan(step, x, (weights, constants))[1]


block_stack = partial(attention_stack, part=model.block)


def network(attn, seed, **changes):
    config = replace(SMALL, attn=attn, **changes)
    return config, init(jax.random.key(seed), config, V), theory.constants(config)


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
    after = np.asarray(attention_stack(params["blocks"], theory.constants(target), x, config), float)
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
        ((_, log_a),) = (theory.log_attentions(config, T) or [[(1.0, np.zeros((T, T)))]])[0]
        rowsum = np.exp(log_a).sum(-1).max()
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
    for how, down in (("orthogonal", 1), ("looks_linear", 0.5**0.5)):      # ReLU's mirrored units: phi(z) and phi(-z) are never both there
        blocks = init(jax.random.key(seed), replace(SMALL, init=how, act="relu", transform="none"), V)["blocks"]
        for name, value in dict(value=1, output=1, up=2, down=down).items():
            singular = np.linalg.svd(np.asarray(blocks[name], float), compute_uv=False)
            assert np.allclose(singular, value, rtol=4 * D * EPS32), name
        assert not np.any(blocks["query"])


LINEAR = [("relu", "none"), ("leaky_relu", "tat"), ("leaky_relu", "dks"), ("gelu", "none"), ("silu", "none"), ("softplus", "none")]


@given(st.sampled_from(LINEAR), seeds, st.floats(-2, 2))
def test_an_mlp_that_looks_linear_is_a_rotation(act, seed, size):
    """x -> x R, R R^T = 1, for tokens of any size, whatever the activation; and no linear map any more once a weight moves.

    Rounding: a QR of d columns; sums of d and of 4 d terms, whose size is that of phi: softplus(0) = 0.7 where x is small.
    """
    config = Config(block="paper", depth=16, width=D, init="looks_linear", act=act[0], transform=act[1], zeta=1.2)
    weights = jax.tree.map(lambda leaf: leaf[seed % 16], init(jax.random.key(seed % 4), config, V)["blocks"])
    f = jax.jit(model.mlp, static_argnums=2)
    rotation = np.asarray(f(jnp.eye(D), weights, config), float)
    tolerance = 4 * (3 * np.sqrt(D) + D) * EPS32
    assert np.max(np.abs(rotation @ rotation.T - np.eye(D))) <= 2 * tolerance
    x = 10**size * np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    wrong = np.max(np.abs(f(x, weights, config) - x @ rotation))
    assert wrong <= tolerance * 5 * (10**size + 2)
    bent, x = {**weights, "down": weights["down"].at[0].add(1.0)}, x / 10**size
    assert np.max(np.abs(f(x, bent, config) + f(-x, bent, config) - 2 * f(0 * x, bent, config))) > 0.01


@given(st.sampled_from(["espa", "uspa"]), seeds, st.floats(-3, 0), st.floats(0.05, 0.95))
def test_whole_networks_that_look_linear_make_the_prescribed_kernels(attn, seed, gamma, rho):
    """Blocks and all, at every depth and any width: Sigma_l as prescribed, by real blocks on orthonormal tokens; to rounding.

    That of test_attention_alone, with the two products of an MLP, of d and 4 d terms, beside the three of attention.
    """
    config, params, _ = network(attn, seed % 8, init="looks_linear", act="relu", transform="none")
    target = replace(config, gamma=10**gamma, rho=rho)
    x = np.sqrt(D) * np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0][:T].astype(np.float32)
    after = np.asarray(block_stack(params["blocks"], theory.constants(target), x, config), float)
    schedule = spa.exponential_schedule(target.gamma, 4) if attn == "espa" else spa.uniform_schedule(rho, 4)
    for layer, y in enumerate(after, 1):
        sigma = (spa.exponential_kernel if attn == "espa" else spa.uniform_kernel)(schedule[layer], T)
        tolerance = 4 * 2 * layer * (5 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


@pytest.mark.parametrize("flags", [dict(), dict(far=1), dict(block="weighted"), dict(block="preln", attn="espa"), dict(dtype="bfloat16")], ids=str)
def test_a_matrix_of_its_own_changes_nothing_at_first(flags):
    """--own at initialisation: the same logits from the same parameters, to the rounding of each block's products."""
    config = Config(depth=4, width=D, heads=4, length=T, repeat_rate=0.1, own=False, **flags)
    tokens, found = random_tokens(0, 3, T), []
    for each in (config, replace(config, own=True)):
        params = init(jax.random.key(0), each, V)
        params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)
        found.append(np.asarray(forward(params, theory.constants(each), tokens, each), float))
    eps = EPS32 if config.dtype is None else 2.0**-8
    assert np.max(np.abs(found[0] - found[1])) <= 4 * config.depth * 2 * np.sqrt(D) * eps * np.max(np.abs(found[0]))
    assert "own" in params["blocks"] and np.max(np.abs(found[0])) > 1


@pytest.mark.parametrize("flags, own, far", [
    (dict(), True, 0), (dict(length=256), True, 1), (dict(length=1024, heads=8), True, 2), (dict(length=1025), True, 0),
    (dict(length=256, own=False), False, 0), (dict(length=256, far=0), True, 0), (dict(length=256, rescale="plain"), True, 0),
    (dict(attn="uspa", length=256), False, 0), (dict(block="paper", length=256), False, 0), (dict(block="weighted", length=256), False, 0),
    (dict(alpha=0.9, length=256), False, 0), (dict(norm="rms", length=256), False, 0), (dict(block="preln", attn="espa", length=256), False, 0)], ids=str)
def test_what_parts_the_own_token_from_others_by_default(flags, own, far):
    """Where nothing but espa's matrices carries a signal, --own; with it far heads, where the context is long and D is known."""
    config = Config(**flags)
    assert (config.own, config.far) == (own, far) and config.gamma_far == config.gamma / 5
    assert ("own" in jax.eval_shape(lambda: model.init(jax.random.key(0), config, V))["blocks"]) == own


# --- Whatever the parameters -----------------------------------------------------------------------------------------------

@given(st.sampled_from(["softmax", *SILENT]), seeds, st.integers(1, T - 1))
def test_causal(attn, seed, position):
    """No output before a position changes with the tokens from it on, bit for bit; some later one does, and Q and K matter."""
    config, params, constants = network(attn, seed % 8)
    params = stirred(params, seed, 0.05)                                   # more, and a softmax may be too sharp to see a token
    tokens = random_tokens(seed)
    later = np.where(np.arange(T) >= position, (tokens + 1) % V, tokens)
    one, other = (np.asarray(forward(params, constants, t, config)) for t in (tokens, later))
    assert np.all(np.isfinite(one)) and np.array_equal(one[:position], other[:position])
    assert np.any(one[position:] != other[position:])
    silenced = {**params, "blocks": {**params["blocks"], "query": 0 * params["blocks"]["query"]}}
    assert not np.allclose(one, forward(silenced, constants, tokens, config), rtol=1e-3)


@given(st.sampled_from(["softmax", *SILENT]), seeds, st.integers(2, 5))
def test_a_batch_gives_what_each_of_its_sequences_gives_alone(attn, seed, size):
    """In whatever company: to the rounding of products of other shapes, which is six sums of up to 4 d terms in each block.

    How much of that arrives at the end depends on the drawn weights: as much as of an equal noise in the embeddings.
    """
    config, params, constants = network(attn, seed % 8)
    params, tokens = stirred(params, seed, 0.05), random_tokens(seed, size, T)
    together = np.asarray(forward(params, constants, tokens, config))
    alone = np.array([forward(params, constants, each, config) for each in tokens])
    noise = 6 * config.depth * np.sqrt(4 * D) * EPS32 * np.random.default_rng(seed).choice([-1, 1], (V, D)).astype(np.float32)
    arrives = np.max(np.abs(forward({**params, "embed": params["embed"] * (1 + noise)}, constants, tokens, config) - together))
    assert together.shape == (size, T, V) and np.max(np.abs(together - alone)) <= 2 * arrives < 0.1 * np.max(np.abs(together))


@pytest.mark.parametrize("act, transform", [("relu", "none"), ("leaky_relu", "dks"), ("gelu", "none"), ("tanh", "none")])
@pytest.mark.parametrize("block", BLOCKS)
def test_bfloat16_stays_bfloat16(block, act, transform):
    """Every block and kind of activation keeps the dtype of what passes through it, and so do its gradients."""
    transform = "none" if block == "preln" else transform                  # refused there: its sums have no fixed weights
    config = Config(block=block, act=act, transform=transform, depth=14, width=D, length=T, repeat_rate=0.1, dtype="bfloat16",
                    zeta=1.1, init="orthogonal" if act == "tanh" else None)
    params = jax.eval_shape(lambda key: model.init(key, config, V), jax.random.key(0))
    constants = jax.eval_shape(lambda: theory.constants(config))
    tokens = jax.ShapeDtypeStruct((2, T + 1), jnp.int32)
    logits = jax.eval_shape(lambda p, c, t: model.forward(p, c, t[:, 1:], config), params, constants, tokens)
    assert logits.dtype == jnp.bfloat16
    gradients = jax.eval_shape(jax.grad(lambda *a: train.loss(*a, config)), params, constants, tokens)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), gradients) == jax.tree.map(lambda p: (p.shape, p.dtype), params)


@pytest.mark.parametrize("block", BLOCKS)
def test_rematerialised_gradients_are_the_same(block):
    """--remat computes the same numbers again; a fused sum may round otherwise."""
    config = Config(block=block, transform="none", act="relu", depth=3, width=D, length=T, repeat_rate=0.1)
    params, tokens = stirred(init(jax.random.key(0), config, V), 1, 0.1), random_tokens(2, 2, T + 1)
    gradient = jax.jit(jax.grad(lambda p, c: train.loss(p, theory.constants(config), tokens, c)), static_argnums=1)
    for kept, again in zip(*map(jax.tree.leaves, (gradient(params, config), gradient(params, replace(config, remat=True))))):
        assert np.max(np.abs(kept - again)) <= 1e3 * EPS32 * np.max(np.abs(kept))


# --- In the mean over initialisations --------------------------------------------------------------------------------------

@lru_cache
def corpus():
    encoding = data.load_encoding(str(ENCODING))
    return data.encode([data.read_text(DATA)[:200_000]], encoding), encoding.n_vocab


def scores(samples):
    """How many standard errors the mean of samples (n, ...) is from 0, without their skewness: Hall's (1992) monotone cubic
    of Student's t. Skewness shifts t by O(1/sqrt(n)), and a kernel's entries are skewed as chi-squares are; this is normal
    to O(1/n), the order of what Student's quantile allows for.
    """
    n, spread = len(samples), samples.std(0, ddof=1)
    t = np.sqrt(n) * samples.mean(0) / spread
    skew = np.mean(((samples - samples.mean(0)) / spread)**3, 0) / np.sqrt(n)
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def limit(n, count):
    """What the largest of `count` scores of n samples exceeds once in 1,000, were they independent; less often otherwise."""
    return student.ppf(1 - 1e-3 / 2 / count, n - 1)


def reading(tokens, config, vocabulary):
    """A key -> kernels of a new initialisation: of the embedding, then after attention and after the MLP of each block,
    (2 L + 1, T, T)."""
    constants = theory.constants(config)

    @jax.jit
    def one(key):
        params = model.init(key, config, vocabulary)
        x = report.states(params, constants, tokens, config)               # (L + 1, T, d)
        halfway = jax.vmap(lambda x, *layer: model.skip(x, model.attention(x, *layer, config), config))
        y = halfway(x[:-1], params["blocks"], constants)
        x = jnp.concatenate([x[:1], jnp.stack([y, x[1:]], 1).reshape(-1, *x.shape[1:])])
        return jnp.einsum("lid,ljd->lij", x, x) / config.width

    return one


@lru_cache
def steps_from_theory(width, samples, config):
    """Real tokens: what each half of each block makes of the kernel that it is given, less the prediction, relative to the
    predicted mean squares: (samples, 2 L + 1, T, T), a new initialisation each; first the embedding."""
    tokens, vocabulary = corpus()
    tokens, config = tokens[1000:1000 + config.length].astype(np.int32), replace(config, width=width)
    one = reading(tokens, config, vocabulary)
    measured = np.array([one(key) for key in jax.random.split(jax.random.key(7), samples)], float)
    constants, still = theory.constants(config), theory.log_attentions(replace(config, attn="vskip", own=False), config.length)
    made = theory.made_attentions(config, constants) if constants else still                    # with the network's own D
    correlation_map = theory.activation(config).correlation_map

    def half(layer, kernel):
        """Attention without the MLP, then the MLP alone: each half of a block by the recursion of the whole."""
        parts = (still, correlation_map) if layer % 2 else (made, lambda c: c)
        (_, kernel), = spa.propagate([parts[0][layer // 2]], kernel, parts[1], config.alpha, config.beta, rescale=False)
        return kernel

    start = theory.initial_kernel(config, len(tokens), tokens[:, None] == tokens)
    expected = np.array([[start] + [half(layer, kernel) for layer, kernel in enumerate(each[:-1])] for each in measured])
    scale = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
    return (measured - expected) / (scale[..., :, None] * scale[..., None, :])


REAL = Config(block="paper", depth=14, width=16, heads=2, length=16, repeat_rate=0.02)     # the least depth, nearly, that reaches eta = 0.9
SAMPLES = 192


@pytest.mark.parametrize("changes", [dict(attn="espa"), dict(attn="espa", far=1, gamma=0.8, rescale="expected", own=True), dict(attn="uspa"), dict(attn="vskip"),
                                     dict(block="weighted"), dict(attn="espa", repeat_rate=0.3)], ids=str)
def test_real_kernels_are_the_predicted_ones(changes):
    """Default eta, MLPs, repeats and all. The recursion is exact in the mean at any width, one half of a block at a time:
    a column of `up` sees two tokens as two coordinates of a point uniform on a sphere in 4 d dimensions, whose direction is
    that of a Gaussian and whose mean square radius is, too, and leaky ReLUs are homogeneous: E phi(u) phi(v) is C's
    definition. E down down^T is a multiple of I, and E W^V W^O = 0 leaves no cross term with a skip. So the errors, given
    what went in, have mean 0; as does their mean over blocks. What attention gives without skip is exact but for rounding, if all heads are alike.
    """
    config = replace(REAL, alpha=None, beta=None, norm=None, act=None, transform=None, init=None, **changes) \
        if "block" in changes else replace(REAL, **changes)
    errors = steps_from_theory(16, SAMPLES, config)
    errors = np.concatenate([errors, errors[:, 1::2].mean(1, keepdims=True), errors[:, 2::2].mean(1, keepdims=True)], 1)
    # Products over d, d and T terms; sum_j A_ij |v_j| is at most sqrt(T) times the size of sum_j A_ij v_j for orthogonal v.
    rounding = 4 * 2 * (2 * np.sqrt(16) + np.sqrt(T) * np.sqrt(T) + np.log(T)) * EPS32
    exact = np.abs(errors).max(0) <= rounding
    assert np.all(exact | (np.abs(scores(errors)) <= limit(SAMPLES, errors[0].size)))
    assert np.all(exact[1:-2:2]) or config.alpha > 0 or config.far


def test_the_error_falls_with_the_width_as_derived():
    """The errors' variance, exact at any width d. Of the embedding's kernel (1 + Sigma^2) / d. Of a token's mean square
    after an MLP: phi's mean over a sphere of 4 d dimensions has the variance 3 k / (4 d + 2), k = ((1 - s^2) / (1 + s^2))^2,
    and a projection from 4 d to d dimensions, a beta variable, 3 / (2 d + 1): together about (1.5 + 0.75 k) / d.
    """
    config = replace(REAL, attn="espa")
    tokens = corpus()[0][1000:1000 + T]
    slope = theory.activation(config).slope
    k = ((1 - slope**2) / (1 + slope**2))**2
    for width, samples in ((16, SAMPLES), (64, SAMPLES // 3)):
        errors = steps_from_theory(width, samples, config)
        embedding = errors[:, 0]**2 / (1 + (tokens[:, None] == tokens)) * width
        block = np.diagonal(errors[:, 2::2], axis1=-2, axis2=-1)**2 / ((1 + 3 * k / (4 * width + 2)) * (1 + 3 / (2 * width + 1)) - 1)
        for ratio in (embedding, block):
            means = ratio.reshape(samples, -1).mean(1)
            assert abs(scores(means - 1)) <= limit(samples, 4)
            assert means.std() / np.sqrt(samples) < 0.1                    # enough samples to tell a wrong rate, or k = 0


@pytest.mark.parametrize("attn, far", [("espa", 0), ("espa", 1), ("uspa", 0), ("vskip", 0)])
def test_whole_networks_make_the_predicted_kernels(attn, far):
    """--rescale expected: over tokens that repeat with probability r, E Sigma_l is the prediction, mean squares of 1, at every
    depth. Where the MLPs look linear, so is the mean; plain rescaling fails it.
    """
    rate, samples = 1 / 4, 256
    config = Config(depth=6, width=32, heads=4, length=T, attn=attn, far=far, repeat_rate=rate, gamma=0.8 if far else 0.05)

    def kernels(config):
        tokens = lambda key: jax.random.randint(jax.random.fold_in(key, 1), (T,), 0, 4)
        one = jax.jit(lambda key: reading(tokens(key), config, 4)(key)[::2])
        return np.array([one(key) for key in jax.random.split(jax.random.key(3), samples)], float)

    expected = np.array([theory.initial_kernel(config, T)] + [kernel for _, kernel in theory.predict(config, theory.initial_kernel(config, T))])
    assert np.allclose(np.diagonal(expected, axis1=1, axis2=2), 1)
    z = scores(kernels(config) - expected)                                 # (L + 1, T, T)
    assert np.max(np.abs(z)) <= limit(samples, z.size)
    if attn != "vskip" and not far:
        assert kernels(replace(config, rescale="plain")).mean(0)[-1, -1, -1] > 1.5


# --- Backward ------------------------------------------------------------------------------------------------------------

@lru_cache
def deep_report(attn, block):
    tokens, vocabulary = corpus()
    config = Config(depth=36, block=block, attn=attn, length=32, repeat_rate=data.repeat_rate(data.count(tokens, vocabulary)))
    return report.report(config, data.spread_windows(tokens, 32, 2)[:, :-1], vocabulary)


@pytest.mark.parametrize("block", ["vanilla", "paper"])
def test_gradients_and_kernels_survive_without_skips_and_norms(block):
    """Depth 36: with `espa` the signal survives, and gradients of different tokens stay different;
    with softmax all tokens become one, and so do their gradients."""
    espa, softmax, vanilla = deep_report("espa", block), deep_report("softmax", block), Config(depth=36, block=block)
    assert report.verdict(espa, vanilla) == "signal survives"
    assert report.verdict(softmax, vanilla).startswith("signal does not survive") and "effective rank" in report.verdict(softmax, vanilla)
    assert np.all(espa["gradient cosine"] < 0.5) and softmax["gradient cosine"][30] > 0.5
    assert espa["mean cosine"][-1] < 0.99 < 0.9999 < softmax["mean cosine"][-1]
    assert len(report.table(espa).splitlines()) == 38


@given(seeds, st.sampled_from(["float32", "bfloat16"]), st.integers(1, 100))
def test_rounding_is_not_taken_for_rank(seed, dtype, depth):
    """Tokens that are one vector, but for as many roundings as a network of this depth makes; ten times the errors are rank."""
    rng, width, length = np.random.default_rng(seed), 64, 32
    one = np.float32(rng.normal(size=width) * np.ones((length, 1)))
    # The noise's mean square, of T d terms weighted by x^2, has this relative spread; 6 of it.
    spread = np.sqrt(2 * np.sum(one[0]**4) / length) / np.sum(one[0]**2)
    least = report.rounded_rank(width, length, depth * (1 + 6 * spread), dtype)
    noise = rng.uniform(-1, 1, (report.ROUNDINGS * depth, length, width)).sum(0) * float(jnp.finfo(dtype).eps) / 2
    rank = lambda x: report.effective_rank(np.asarray(jnp.einsum("id,jd->ij", x, x)) / width)
    assert rank(np.float32(one * (1 + noise))) <= least
    assert rank(np.float32(one * (1 + (10 if dtype == "bfloat16" else 1e5) * noise))) > least


@pytest.mark.parametrize("centred", [True, False])
@given(seeds, st.floats(-2, 2), st.floats(-3, 3))
def test_the_gradient_of_a_norm_is_that_of_its_formula(centred, seed, size, offset):
    """The one that is written out, against differentiation: sums of d terms, of size at most |gain| |g| over the deviation."""
    rng = np.random.default_rng(seed)
    x = jnp.float32(10**size * (rng.normal(size=(5, D)) + offset))
    gain, g = jnp.float32(rng.normal(size=D)), jnp.float32(rng.normal(size=(5, D)))
    plain = lambda x, gain: model.standardised(x, centred)[0] * gain
    (y, back), (y_plain, back_plain) = (jax.vjp(f, x, gain) for f in (lambda *a: model.normalised(*a, centred), plain))
    assert np.array_equal(y, y_plain)
    (dx, dgain), (dx_plain, dgain_plain) = back(g), back_plain(g)
    scale = np.max(model.standardised(x, centred)[1]) * np.linalg.norm(g * gain)
    rounding = 8 * np.sqrt(D) * (1 + abs(offset)) * EPS32                    # of x less its mean, and of the sums
    assert np.max(np.abs(dx - dx_plain)) <= rounding * scale
    assert np.max(np.abs(dgain - dgain_plain)) <= rounding * np.linalg.norm(g) * np.max(np.abs(y_plain / gain))
