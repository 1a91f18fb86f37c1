"""A family of attention is one entry of FAMILIES: here one that the package lacks.

Its kernel is exponential in the logarithm of the position: far back, far tokens look alike.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import decoded
from scipy.special import softmax

from minitf import attention_constants, forward, init, resolve
from minitf.network import model, operations
from minitf.theory import kernels as theory
from minitf.theory import spa
from minitf.theory.families import FAMILIES, prescribed
from minitf.training import data, optimizer, train

EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
T, D, V = 16, 32, 50
make_parameters = jax.jit(init, static_argnums=(1, 2))


@partial(jax.jit, static_argnums=3)
def attention_stack(weights, constants, x, config):
    """Attention alone, layer after layer: x (T, d) -> (L, T, d)."""
    step = lambda x, layer: (model.attention_sublayer(x, *layer, config, operations.REFERENCE),) * 2
    return jax.lax.scan(step, x, model.layers({"blocks": weights}, constants, config))[1]


def logarithmic_kernel(gamma, length):
    """Sigma_ij = ((1 + min(i, j)) / (1 + max(i, j)))^gamma, positions from 0."""
    place = 1.0 + np.arange(length)
    return (np.minimum.outer(place, place) / np.maximum.outer(place, place)) ** gamma


def schedules(config):
    return [spa.exponential_schedule(gamma, config.depth) for gamma in config.gamma]


@pytest.fixture(autouse=True, scope="module")
def with_the_family():
    """FAMILIES with one entry more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "logarithmic", prescribed(schedules, logarithmic_kernel))
        yield


def network(depth, **flags):
    """The Settings of a network of the family, with heads that differ unless flags say."""
    return resolve(**{**dict(attn="logarithmic", depth=depth, width=D, heads=4, length=T,
                             gamma=(0.3, 0.3, 0.3, 1.0)), **flags})


def test_a_family_that_nobody_has_added_is_refused():
    """And the new one is listed among those that may be chosen."""
    with pytest.raises(ValueError, match="attn must be one of .*logarithmic"):
        resolve(attn="nothing")


@given(st.integers(1, 6), st.integers(2, 40), st.floats(0.05, 2), st.floats(0.05, 2))
def test_its_attention_is_causal_and_made_by_a_softmax(depth, length, gamma, other):
    """A >= 0 and lower triangular, and D softmax(B) is A for each layer and head.

    A recursion says why: y_i = phi_out y_(i-1) + lambda (x_i - phi_in x_(i-1)) with phi of each
    position, and lambda falls along the sequence. What Cholesky factors lose are the digits of
    the condition numbers; `wrong` is that of an entry, beside the float32 of the constants: B is
    rounded to |B| EPS32, and x e^-x <= 1 bounds what |B| makes of A.
    """
    config = network(depth, length=length, gamma=(gamma, gamma, other, gamma),
                     row_scale="row-sum").model
    family, constants = FAMILIES["logarithmic"], attention_constants(config)
    a = family.by_head(config, lambda before, after: spa.cholesky_attention(
        logarithmic_kernel(before, length), logarithmic_kernel(after, length)))
    of_last = [np.linalg.cond(logarithmic_kernel(each, length)) for each in (gamma, other)]
    wrong = 2 * length * EPS * max(of_last)
    below = np.tri(length, dtype=bool)
    assert a.shape == (depth, 4, length, length)
    assert np.max(np.abs(a[..., ~below])) <= wrong and np.min(a) >= -wrong
    assert constants.keys() == {"bias", "row_scale"}
    position = np.arange(length)
    rows = np.array([family.bias_rows({"bias": bias}, position[:, None], position)
                     for bias in constants["bias"].astype(float)])
    made = constants["row_scale"].astype(float)[..., None] * softmax(rows, -1)
    rounding = (length + 8) * EPS32 * constants["row_scale"].max()
    assert np.max(np.abs(made - a)) <= rounding + length * wrong


@given(st.floats(0.05, 2), st.sampled_from(["row-sum", "unit"]), st.integers(0, 2**31 - 1))
def test_its_kernels_are_kept_exactly(gamma, row_scale, seed):
    """Attention alone, from orthonormal tokens: Sigma_l at every depth l.

    A layer is three products with rounding errors of sqrt(n) EPS32 of a result of size 1, and
    |log A| A EPS32 <= log T EPS32 from B. Entries of X X^T / d carry twice that; 4 standard errors.
    """
    any_config = network(4).model                                  # gamma and D are but constants:
    config = network(4, gamma=gamma, row_scale=row_scale).model    # nothing to compile anew
    params = make_parameters(jax.random.key(seed % 8), any_config, V)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    x = jnp.float32(np.sqrt(D) * q[:T])
    after = attention_stack(params["blocks"], attention_constants(config), x, any_config)
    for layer, y in enumerate(np.asarray(after, float), 1):
        tolerance = 4 * 2 * layer * (2 * np.sqrt(D) + np.sqrt(T) + np.log(T)) * EPS32
        sigma = logarithmic_kernel(schedules(config)[0][layer], T)
        assert np.max(np.abs(y @ y.T / D - sigma)) <= tolerance


def test_its_kernels_are_predicted():
    """From equal tokens on, with MLPs that look linear, mean squares stay at 1."""
    config = network(3, token_collision_rate=0.2).model
    for n, sigma in theory.predict_kernels(config, theory.input_kernel(config, T)):
        assert np.all(n > 1 - 1e-12) and n[-1] > 1.01
        assert np.allclose(np.diag(sigma), 1)


def test_a_network_of_it_learns():
    """20 steps on text: the loss falls from log V by more than batches differ."""
    settings = network(4, steps=20, warmup=2, batch=8, learning_rate=5e-3, lr_mult_embed=4.0)
    config, how = settings.model, settings.training
    corpus = data.load(settings.data, config.length)
    params = init(jax.random.key(0), config, corpus.encoding.n_vocab)
    constants, rates = attention_constants(config), optimizer.group_rates(how, config)
    opt_state, losses = optimizer.make_optimizer(how.optimizer).init(params), []
    for step in range(how.steps):
        batch = data.batch(corpus.train, config.length, how.batch, how.seed, step)
        params, opt_state, metrics = train.train_step(
            params, opt_state, constants, rates, optimizer.learning_rate(how, step), batch,
            config, how.optimizer)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(corpus.encoding.n_vocab), rel=1e-5)  # the head is 0
    assert np.all(np.isfinite(losses)) and np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_decoding_it_equals_the_forward_pass(position):
    """Five tokens at once, the others one by one, with parameters that all matter.

    A block is six sums of up to 4 d terms, with rounding errors of sqrt(4 d) EPS32 each.
    """
    config = network(3, position=position, head_init="gaussian").model
    params = init(jax.random.key(0), config, V)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    params = structure.unflatten([leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32)
                                  for leaf in leaves])
    constants, tokens = attention_constants(config), rng.integers(0, V, T).astype(np.int32)
    expected = forward(params, constants, tokens, config)
    got = decoded(params, constants, tokens, config)
    size = np.max(np.abs(expected))
    tolerance = 6 * config.depth * np.sqrt(4 * D) * EPS32 * size
    assert size > 0.1 and np.max(np.abs(got - expected)) <= tolerance
