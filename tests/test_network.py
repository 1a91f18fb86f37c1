"""The initialised network against the theory, exactly where it is exact.

Shapes are few, since each is a compilation; seeds, tokens, positions, kernel parameters and weights
are drawn.
"""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from networks import (D, EPS32, PRESCRIBED, SILENT, T, V, attention_stack, block_stack,
                      compiled_as, forward, init, network, orthonormal_tokens, prescribed_kernels,
                      random_tokens, seeds, small, states, stirred)

from minitf import resolve
from minitf.network import decode, model
from minitf.network.init import MLP_INITS, init as make_parameters
from minitf.network.operations import REFERENCE
from minitf.presets import PRESETS
from minitf.theory import kernels as theory
from minitf.theory.families import FAMILIES
from minitf.training import train

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


@given(st.sampled_from(PRESCRIBED), seeds)
def test_extra_heads_are_silent_at_the_start(attn, seed):
    """Whatever they attend to: states are those of the network without them, to rounding."""
    config, params, constants = network(attn, seed, extra_heads=3)
    start = params["blocks"]["output"][:, D:]
    assert not np.any(start) and start.shape[1] == 3 * config.features
    blocks = stirred(params, seed, 0.1)["blocks"]
    blocks["output"] = blocks["output"].at[:, D:].set(0)
    bare, without = small(attn), dict(blocks, output=blocks["output"][:, :D])
    without |= {name: blocks[name][:, :, :D] for name in ("query", "key", "value")}
    x = orthonormal_tokens(seed)
    got = block_stack(blocks, constants, x, config)
    expected = block_stack(without, theory.attention_constants(bare), x, bare)
    # A block is six sums of up to 4 d terms; what they round by passes up to four such blocks.
    tolerance = 6 * np.sqrt(4 * D) * EPS32 * np.arange(1, 5)[:, None, None]
    scale = np.abs(expected).max((1, 2), keepdims=True) + np.abs(x).max()
    assert np.all(np.abs(got - expected) <= 4 * tolerance * scale)


@pytest.mark.parametrize("attn", PRESCRIBED)
def test_extra_heads_have_plain_attention_less_the_own_share(attn):
    """B = 0; D takes off what an even attention gives to the own token. Others are as before."""
    constants = theory.attention_constants(small(attn, extra_heads=2))
    before, share = theory.attention_constants(small(attn)), np.arange(T) / np.arange(1, T + 1)
    for name, table in constants.items():
        expected = np.maximum(share, 0.001) if name == "row_scale" else 0.0
        if name != "skip_scale":
            assert np.allclose(table[:, -2:], expected, rtol=1e-6, atol=0)
            table = table[:, :-2]
        assert np.all(table == before[name]) and np.all(np.isfinite(table) | (table == -np.inf))
    both = small("espa", extra_heads=2, objective="mlm")
    assert np.allclose(theory.attention_constants(both)["row_scale"][:, -2:], 1 - 1 / T)


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
    up, down = looks_linear(*jax.random.split(jax.random.key(seed)), 2, D, 4 * D,
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


looks_linear = jax.jit(MLP_INITS["looks_linear"], static_argnums=(2, 3, 4, 5, 6))
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
    """With W^V W^O = I, X^ = (c I + P) X / n is A X / n: the logits of isometric.

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


@pytest.mark.parametrize("preset, flags", [(preset, {}) for preset in PRESETS] + [
    ("isometric", dict(act="leaky_relu", transform="dks")), ("isometric", dict(act="relu")),
    ("normless", dict(act="gelu")), ("paper", dict(act="tanh", transform="none"))], ids=str)
def test_bfloat16_stays_bfloat16(preset, flags):
    """Every preset and kind of activation keeps the dtype of what passes through it.

    Gradients have that of their parameters.
    """
    config = resolve(preset, 0.1, depth=14, width=D, length=T, dtype="bfloat16", zeta=1.1,
                     **flags).model
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


@pytest.mark.parametrize("length", [1, 5])
def test_a_shorter_sequence_gives_what_its_beginning_gives(length):
    """Lists too: later tokens change nothing before them. To the head's rounding, of d terms."""
    config, params, constants = network("espa", 0)
    params, tokens = stirred(params, 0, 0.05), random_tokens(0)
    whole = np.asarray(model.forward(params, constants, tokens, config), float)[:length]
    part = np.asarray(model.forward(params, constants, tokens[:length].tolist(), config))
    assert part.shape == (length, V)
    assert np.max(np.abs(part - whole)) <= 4 * D * EPS32 * np.max(np.abs(whole))


@pytest.mark.parametrize("tokens", [[], [[]], [0] * (T + 1), [-1], [V], [0.5], "ab", [[[1]]],
                                    [[1, 2], [3]], np.zeros((2, 0), int), None], ids=str)
def test_what_are_no_tokens_is_refused(tokens):
    """By forward, and but for what is only long by sampling; by their other arguments as well."""
    config, params, constants = network("espa", 0)
    with pytest.raises(ValueError):
        model.forward(params, constants, tokens, config)
    if tokens is None or len(tokens) <= T:
        with pytest.raises(ValueError):
            decode.sample(params, constants, tokens, 1, config)


@pytest.mark.parametrize("wrong", [dict(count=0), dict(count=1.5), dict(temperature=-1),
                                   dict(temperature=np.nan), dict(temperature=None),
                                   dict(top_k=0), dict(seed=-1)], ids=str)
def test_no_sampling_is_refused_late(wrong):
    config, params, constants = network("espa", 0)
    with pytest.raises(ValueError):
        decode.sample(params, constants, [1], **{"count": 1, "config": config} | wrong)
    for vocabulary in (0, -1, 2.5, None):
        with pytest.raises(ValueError):
            make_parameters(jax.random.key(0), config, vocabulary)
