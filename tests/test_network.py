"""The initialised network against the theory.

Exactly where it is exact, by z-scores over initialisations where it is not. Shapes are few, since
each is a compilation; seeds, tokens, positions, kernel parameters and weights are drawn.
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

from minitf import resolve
from minitf.cli import inspection
from minitf.network import model
from minitf.network.init import MLP_INITS, init as make_parameters
from minitf.network.operations import REFERENCE
from minitf.presets import PRESETS
from minitf.theory import kernels as theory
from minitf.theory import spa
from minitf.theory.families import FAMILIES
from minitf.training import data, train
from minitf.training.encoding import encode, load_encoding, read_text

EPS32 = np.finfo(np.float32).eps
T, D, V = 16, 32, 64
SMALL = resolve("paper", depth=4, width=D, heads=4, length=T, eta=0.2, gamma=0.8)
SILENT = ("espa", "uspa", "vskip", "identity_skip")        # W^Q = 0
PRESCRIBED = ("espa", "uspa", "identity_skip")

seeds = st.integers(0, 2**31 - 1)
init = jax.jit(make_parameters, static_argnums=(1, 2))
forward = jax.jit(model.forward, static_argnums=3)
states = jax.jit(inspection.states, static_argnums=3)


@partial(jax.jit, static_argnums=(3, 4))
def attention_stack(weights, constants, x, config, part=model.attention_sublayer):
    """Attention alone, layer after layer: x (T, d) -> (L, T, d)."""
    step = lambda x, layer: (part(x, *layer, config, REFERENCE),) * 2
    return jax.lax.scan(step, x, model.layers({"blocks": weights}, constants, config))[1]


block_stack = partial(attention_stack, part=model.block)


def small(attn, **flags):
    """The small ModelConfig of a family; "identity_skip" is that of espa."""
    family = dict(attn="espa", identity_skip=True) if attn == "identity_skip" else dict(attn=attn)
    return SMALL.replace(**family, **flags).model


def compiled_as(config, **others):
    """A ModelConfig of the same program: what the constants are made of is data to it."""
    return replace(config, gamma=(0.8,) * others.get("heads", config.heads), rho=0.8,
                   rho_first=0.0, row_scale="unit", token_collision_rate=0.0, **others)


def network(attn, seed, **flags):
    """(config, parameters, constants). The number of heads is none of the parameters' business."""
    config = small(attn, **flags)
    params = init(jax.random.key(seed), compiled_as(config, heads=4), V)
    return config, params, theory.attention_constants(config)


def stirred(params, seed, size=0.3):
    """Every parameter moved at random, so that Q and K, vskip's scalars and the head matter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, moved)


def random_tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape or T).astype(np.int32)


def orthonormal_tokens(seed):
    """x (T, D) with x x^T / D = I."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    return np.float32(np.sqrt(D) * q[:T])


def prescribed_kernels(config):
    """Sigma_1, ..., Sigma_L of espa with one gamma, or of uspa."""
    if config.attn == "espa":
        schedule, kernel = spa.exponential_schedule(config.gamma[0], config.depth), \
            spa.exponential_kernel
    else:
        schedule, kernel = spa.uniform_schedule(config.rho, config.depth), spa.uniform_kernel
    return [kernel(parameter, config.length) for parameter in schedule[1:]]


# --- Exact at initialisation ------------------------------------------------------------


@given(st.sampled_from(PRESCRIBED), st.sampled_from([1, 2, 4, 8]), seeds, st.floats(-3, 0),
       st.floats(0.05, 0.95))
def test_attention_alone_makes_the_prescribed_kernels(attn, heads, seed, gamma, rho):
    """Orthonormal tokens, the paper's row sums: Sigma_l at every depth l, with any number of heads.

    A layer is three products with rounding errors of sqrt(n) EPS32 of a result of size 1, and
    |log P| P EPS32 <= log T EPS32 from B; A of a unit-diagonal kernel does not amplify them.
    Entries of X X^T / d carry twice that; 4 standard errors.
    """
    config, params, constants = network(attn, seed % 8, heads=heads, gamma=10**gamma, rho=rho)
    after = np.asarray(attention_stack(params["blocks"], constants, orthonormal_tokens(seed),
                                       compiled_as(config)), float)
    for layer, (y, sigma) in enumerate(zip(after, prescribed_kernels(config)), 1):
        tolerance = 4 * 2 * layer * (2 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


@given(st.sampled_from(SILENT), seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_attention_does_not_depend_on_the_input(attn, seed, a, b):
    """With W^Q = 0 a layer is linear in X: f(a X + b Y) = a f(X) + b f(Y). Softmax is not."""
    for attn, linear in ((attn, True), ("softmax", False)):
        config, params, constants = network(attn, seed % 8)
        f = lambda x: np.asarray(attention_stack(params["blocks"], constants,
                                                 jnp.asarray(x, jnp.float32), config))[0]
        x, y = np.random.default_rng(seed).normal(size=(2, T, D)) * 2
        row_sums = FAMILIES[config.attn].row_sums
        row_sum = row_sums(config)[0].max() if row_sums else 1.0
        wrong = np.max(np.abs(f(a * x + b * y) - a * f(x) - b * f(y)))
        # Entries of X reach 5 standard deviations of 2.
        size = 10 * row_sum * (1 + abs(a) + abs(b))
        if linear:
            assert wrong <= size * 4 * (2 * np.sqrt(D) + T) * EPS32
        elif abs(a) > 0.5 and abs(b) > 0.5:
            assert wrong > 1e-2


@given(seeds)
def test_vskip_starts_as_the_identity(seed):
    """Attention gives X W^V W^O, to the rounding of two products of d terms."""
    config, params, _ = network("vskip", seed % 8)
    x = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    first = attention_stack(params["blocks"], {}, x, config)[0]
    product = np.asarray(params["blocks"]["value"][0]) @ np.asarray(params["blocks"]["output"][0])
    assert np.allclose(first, x @ product, rtol=0, atol=5 * 4 * 2 * np.sqrt(D) * EPS32)


@given(st.sampled_from(SILENT), seeds)
def test_rotary_positions_leave_the_start_alone(attn, seed):
    """They turn Q and K; Q is zero."""
    config, params, constants = network(attn, seed % 8)
    tokens = random_tokens(seed)
    with_rope, without = (states(params, constants, tokens, replace(config, position=position))
                          for position in ("rope", "none"))
    assert np.array_equal(with_rope, without)


@given(seeds)
def test_orthogonal_weights(seed):
    """All singular values are max(sqrt(out/in), 1), to the rounding of a QR of n columns.

    Of ReLU's mirrored units, phi(z) and phi(-z), one is 0: `down` is as large by sqrt(1/2).
    Queries are zero.
    """
    for how, down in (("orthogonal", 1), ("looks_linear", 0.5**0.5)):
        config = small("espa", mlp_init=how, act="relu", transform="none")
        blocks = init(jax.random.key(seed), config, V)["blocks"]
        for name, value in dict(value=1, output=1, up=2, down=down).items():
            singular = np.linalg.svd(np.asarray(blocks[name], float), compute_uv=False)
            assert np.allclose(singular, value, rtol=4 * D * EPS32), name
        assert not np.any(blocks["query"])


LINEAR = [("relu", "none"), ("leaky_relu", "tat"), ("leaky_relu", "dks"), ("gelu", "none"),
          ("silu", "none"), ("softplus", "none")]


@given(st.sampled_from(LINEAR), seeds, st.floats(-2, 2))
def test_an_mlp_that_looks_linear_is_a_rotation(act, seed, size):
    """x -> x R, R R^T = 1, for tokens of any size, whatever the activation.

    It is no linear map any more once a weight moves. Rounding: a QR of d columns; sums of d and of
    4 d terms, whose size is that of phi: softplus(0) = 0.7 where x is small.
    """
    config = resolve("paper", depth=16, width=D, mlp_init="looks_linear", act=act[0],
                     transform=act[1], zeta=1.2).model
    up, down = looks_linear(*jax.random.split(jax.random.key(seed)), 2, D,
                            theory.network_activation(config), 1.0)
    weights = {"up": up[1], "down": down[1]}
    f = lambda x, weights: mlp(x, weights, config, REFERENCE)
    rotation = np.asarray(f(jnp.eye(D), weights), float)
    tolerance = 4 * (3 * np.sqrt(D) + D) * EPS32
    assert np.max(np.abs(rotation @ rotation.T - np.eye(D))) <= 2 * tolerance
    x = 10**size * np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    wrong = np.max(np.abs(f(x, weights) - x @ rotation))
    assert wrong <= tolerance * 5 * (10**size + 2)
    bent, x = {**weights, "down": weights["down"].at[0].add(1.0)}, x / 10**size
    assert np.max(np.abs(f(x, bent) + f(-x, bent) - 2 * f(0 * x, bent))) > 0.01


looks_linear = jax.jit(MLP_INITS["looks_linear"], static_argnums=(2, 3, 4, 5))
mlp = jax.jit(model.mlp_sublayer, static_argnums=(2, 3))   # without a skip: the MLP alone


@given(st.sampled_from(PRESCRIBED), seeds, st.floats(-3, 0), st.floats(0.05, 0.95))
def test_whole_networks_that_look_linear_make_the_prescribed_kernels(attn, seed, gamma, rho):
    """Blocks and all, at every depth and any width: Sigma_l as prescribed, on orthonormal tokens.

    The tolerance is that of attention alone, with the two products of an MLP, of d and 4 d terms,
    beside the three of attention.
    """
    config, params, constants = network(attn, seed % 8, mlp_init="looks_linear", act="relu",
                                        transform="none", gamma=10**gamma, rho=rho)
    after = np.asarray(block_stack(params["blocks"], constants, orthonormal_tokens(seed),
                                   compiled_as(config)), float)
    for layer, (y, sigma) in enumerate(zip(after, prescribed_kernels(config)), 1):
        tolerance = 4 * 2 * layer * (5 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


@pytest.mark.parametrize("flags", [
    dict(), dict(gamma=(0.02, 0.8, 0.1, 0.5)), dict(row_scale="row-sum", gamma=0.005),
    dict(mlp_init="orthogonal", dtype="bfloat16")], ids=str)
def test_an_identity_skip_is_the_same_network_folded(flags):
    """With W^V W^O = I, X^ = (c I + P) X / n is A X / n: the isometric network's logits.

    They are those of the same parameters without the skip, to the rounding of each block's
    products. The skip is not zero, and after a step of training it is another network.
    """
    skipping = resolve("identity-skip", 0.1, depth=4, width=D, heads=4, length=T, **flags)
    folded = skipping.replace(identity_skip=False)
    assert folded.model == resolve("isometric", 0.1, depth=4, width=D, heads=4, length=T,
                                   **flags).model
    params = init(jax.random.key(0), compiled_as(skipping.model), V)
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)
    product = np.einsum("lij,ljk->lik", params["blocks"]["value"], params["blocks"]["output"])
    assert np.max(np.abs(product - np.eye(D))) <= 4 * (D + np.sqrt(D)) * EPS32
    logits = lambda settings, params: np.asarray(forward(
        params, theory.attention_constants(settings.model), random_tokens(0, 3, T),
        compiled_as(settings.model)), float)
    one, other = logits(skipping, params), logits(folded, params)
    eps = 2.0**-8 if "dtype" in flags else EPS32
    size = np.max(np.abs(one))
    assert size > 1 and np.max(np.abs(one - other)) <= 4 * 4 * 2 * np.sqrt(D) * eps * size
    c_over_n = theory.attention_constants(skipping.model)["skip_scale"]
    assert np.all(c_over_n[0] == 0) and np.all(c_over_n[1:] > 0.1)   # the first kernel is I
    moved = stirred(params, 2, 0.3)
    assert np.max(np.abs(logits(skipping, moved) - logits(folded, moved))) > 0.1 * size


# --- Whatever the parameters ------------------------------------------------------------


@given(st.sampled_from(["softmax", *SILENT]), seeds, st.integers(1, T - 1))
def test_causal(attn, seed, position):
    """No output before a position changes with the tokens from it on, bit for bit.

    Some later one does, and Q and K matter.
    """
    config, params, constants = network(attn, seed % 8)
    params = stirred(params, seed, 0.05)      # more, and a softmax may be too sharp to see a token
    tokens = random_tokens(seed)
    later = np.where(np.arange(T) >= position, (tokens + 1) % V, tokens)
    one, other = (np.asarray(forward(params, constants, each, config)) for each in (tokens, later))
    assert np.all(np.isfinite(one)) and np.array_equal(one[:position], other[:position])
    assert np.any(one[position:] != other[position:])
    silent = {**params["blocks"], "query": 0 * params["blocks"]["query"]}
    without = forward({**params, "blocks": silent}, constants, tokens, config)
    assert not np.allclose(one, without, rtol=1e-3)


@given(st.sampled_from(["softmax", *SILENT]), seeds, st.integers(2, 5))
def test_a_batch_gives_what_each_of_its_sequences_gives_alone(attn, seed, size):
    """To the rounding of products of other shapes: six sums of up to 4 d terms in each block.

    How much of that arrives at the end depends on the drawn weights: as much as of an equal noise
    in the embeddings.
    """
    config, params, constants = network(attn, seed % 8)
    params, tokens = stirred(params, seed, 0.05), random_tokens(seed, size, T)
    together = np.asarray(forward(params, constants, tokens, config))
    alone = np.array([forward(params, constants, each, config) for each in tokens])
    signs = np.random.default_rng(seed).choice([-1, 1], (V, D)).astype(np.float32)
    noise = 6 * config.depth * np.sqrt(4 * D) * EPS32 * signs
    noisy = {**params, "embed": params["embed"] * (1 + noise)}
    arrives = np.max(np.abs(forward(noisy, constants, tokens, config) - together))
    assert together.shape == (size, T, V)
    assert np.max(np.abs(together - alone)) <= 2 * arrives < 0.1 * np.max(np.abs(together))


@pytest.mark.parametrize("act, transform", [("relu", "none"), ("leaky_relu", "dks"),
                                            ("gelu", "none"), ("tanh", "none")])
@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_stays_bfloat16(preset, act, transform):
    """Every preset and kind of activation keeps the dtype of what passes through it.

    Gradients have that of their parameters. A transform is refused where skips have no fixed
    weights.
    """
    transform = "none" if preset == "preln" else transform
    others = dict(mlp_init="orthogonal") if act == "tanh" else {}
    config = resolve(preset, 0.1, act=act, transform=transform, depth=14, width=D, length=T,
                     dtype="bfloat16", zeta=1.1, **others).model
    params = jax.eval_shape(lambda key: make_parameters(key, config, V), jax.random.key(0))
    constants = theory.attention_constants(config)
    tokens = jax.ShapeDtypeStruct((2, T + 1), jnp.int32)
    logits = jax.eval_shape(
        lambda params, tokens: model.forward(params, constants, tokens[:, 1:], config),
        params, tokens)
    assert logits.dtype == jnp.bfloat16
    gradients = jax.eval_shape(
        jax.grad(lambda params, tokens: train.loss(params, constants, tokens, config)),
        params, tokens)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kinds(gradients) == kinds(params)


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
    maps, n = FAMILIES[config.attn].kernel_maps(config), theory.position_scale(config)
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
SAMPLES = 192


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
    for width, samples in ((16, SAMPLES), (64, SAMPLES // 3)):
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
        assert np.allclose(theory.position_scale(config), 1, rtol=1e-9)
    if config.attn == "espa" and len(set(config.gamma)) == 1:
        paper = settings.replace(row_scale="row-sum").model
        assert kernels(paper).mean(0)[-1, -1, -1] > 1.5


# --- Backward ---------------------------------------------------------------------------


@lru_cache
def deep_report(attn):
    """(the report of a network of 36 blocks on real text, its ModelConfig)"""
    tokens, vocabulary = corpus()
    rate = data.token_collision_rate(data.count(tokens, vocabulary))
    config = resolve("isometric", rate, depth=36, attn=attn, length=32).model
    windows = data.spread_windows(tokens, 32, 2)[:, :-1]
    return inspection.report(config, windows, vocabulary), config


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
