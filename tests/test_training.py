"""Data and training: every token once an epoch, losses that fall, and the same ones for the same seed, to the last bit."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minitf import Config, data, model, spa, theory, train
from run import DATA, ENCODING

SHAPE = dict(depth=14, width=16, heads=2, length=16, batch=8)


@given(st.text(max_size=200))
def test_any_text_comes_back(text):
    encoding = data.load_encoding(str(ENCODING))
    assert encoding.decode(data.encode([text], encoding).tolist()) == text


@given(st.integers(2, 20), st.integers(1, 9), st.integers(30, 400), st.integers(0, 2**31 - 1))
def test_an_epoch_has_every_window_once(length, size, count, seed):
    """Over `windows` steps of `size` sequences there are `size` whole epochs, whatever the sizes."""
    tokens = np.arange(count)
    windows = (count - 1) // length
    starts = np.concatenate([data.batch(tokens, length, size, seed, step)[:, 0] for step in range(windows)])
    assert np.array_equal(np.sort(starts.reshape(size, windows), 1), np.tile(np.arange(windows) * length, (size, 1)))


def losses(steps, **flags):
    config = Config(**SHAPE, steps=steps, repeat_rate=0.012, **flags)
    encoding = data.load_encoding(str(ENCODING))
    tokens = data.load(str(DATA), encoding, config.length).train
    params, constants = model.init(jax.random.key(config.seed), config, encoding.n_vocab), theory.constants(config)
    opt_state, out = train.make_optimizer(config).init(params), []
    for step in range(steps):
        batch = data.batch(tokens, config.length, config.batch, config.seed, step)
        params, opt_state, values = train.train_step(params, opt_state, constants, batch, config)
        out.append(float(values["loss"]))
    return out


@pytest.mark.parametrize("flags", [dict(), dict(block="preln"), dict(block="weighted"), dict(attn="vskip", optimizer="adamw")], ids=str)
def test_loss_falls(flags):
    """From ln 1,024 = 6.93, the uniform guess, within a few steps; tokens' frequencies alone would give 5.79."""
    values = losses(40, learning_rate=5e-3, **flags)
    assert np.mean(values[-5:]) < np.mean(values[:3]) - 0.3


def test_the_same_seed_gives_the_same_losses_to_the_last_bit():
    assert losses(5) == losses(5) != losses(5, seed=1)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(2, 60), st.floats(0.01, 20), st.integers(0, 2**31 - 1))
def test_cross_entropy_and_its_gradients(count, width, vocabulary, size, seed):
    """Against float64. Rounding: of logits that are sums of `width` products, then in the exponent; of sums of `vocabulary`."""
    rng = np.random.default_rng(seed)
    x, head, g = size * rng.normal(size=(count, width)), rng.normal(size=(width, vocabulary)), rng.normal(size=count)
    x, head, g, targets = *(a.astype(np.float32) for a in (x, head, g)), rng.integers(0, vocabulary, count)
    losses, back = jax.vjp(lambda x, head: train.cross_entropy(x, head, targets), x, head)
    z = x.astype(float) @ head
    z = z - z[np.arange(count), targets][:, None]
    total = np.exp(z).sum(1)
    assume(z.max() < train.LARGEST)
    error = np.exp(z) / total[:, None] - (np.arange(vocabulary) == targets[:, None])
    wrong = np.finfo(np.float32).eps * (vocabulary + 4 * width * np.abs(x).max() * np.abs(head).max() + np.abs(z).max(1))     # (N,)
    assert np.all(np.abs(losses - np.log(total)) < wrong)
    dx, dhead = back(g)
    assert np.all(np.abs(dx - g[:, None] * (error @ head.T)) < (np.abs(g) * wrong * 4 * np.abs(head).max())[:, None])
    assert np.all(np.abs(dhead - x.T @ (g[:, None] * error)) < (np.abs(x) * (np.abs(g) * wrong)[:, None]).sum(0)[:, None] * 4)


def test_a_loss_beyond_what_float32_can_say_is_large_and_has_a_finite_gradient():
    loss, back = jax.vjp(lambda head: train.cross_entropy(jnp.ones((1, 1)), head, jnp.array([0]))[0], jnp.array([[-1e4, 0.0, 1e4]]))
    assert loss >= train.LARGEST and np.allclose(back(1.0)[0], [[-1, 0.5, 0.5]])


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 100), st.floats(0, 0.5), st.integers(0, 2**31 - 1))
def test_a_step_to_orthogonal_maps_each_singular_value(layers, fan_in, fan_out, size, spread, seed):
    """s -> s + s (1 - s^2 / c^2) / 2 with c^2 = mean s^2, singular vectors kept: by an SVD in float64.

    Rounding: products of at most 12 terms, of matrices whose entries are below their largest singular value.
    """
    rng, n = np.random.default_rng(seed), min(fan_in, fan_out)
    u, _, vt = np.linalg.svd(rng.normal(size=(layers, fan_in, fan_out)), full_matrices=False)
    s = size * rng.uniform(1 - spread, 1 + spread, (layers, n))
    w = np.float32(u * s[:, None] @ vt)
    moved = s * (1 - s**2 / np.mean(s**2, 1, keepdims=True)) / 2
    wrong = np.abs(train.to_orthogonal(jnp.asarray(w)) - u * moved[:, None] @ vt)
    assert np.max(wrong) <= 4 * 3 * 12 * np.finfo(np.float32).eps * s.max() * (s.max() / s.mean())**2


@given(st.integers(1, 200), st.integers(1, 32), st.sampled_from(["muon", "adamw"]), st.booleans())
def test_deeper_chains_learn_more_slowly_but_for_their_ends(depth, more, optimizer, own):
    shallow, deep = (Config(depth=each, heads=1, width=2 * each, optimizer=optimizer, own=own) for each in (depth, depth + more))
    size = (deep.width / shallow.width)**0.5                  # rates fall with the width as its root, all of them
    assert deep.learning_rate * size < shallow.learning_rate
    at = [Config(depth=each, optimizer=optimizer, own=own).learning_rate for each in (9, 36, 144)]
    assert at == pytest.approx([2 * at[1], at[1], at[1] / 2])
    assert deep.learning_rate * deep.ends * size == pytest.approx(shallow.learning_rate * shallow.ends)
    skips = Config(depth=depth, block="weighted", optimizer=optimizer), Config(depth=depth + more, block="weighted", optimizer=optimizer)
    assert skips[0].learning_rate == skips[1].learning_rate


@pytest.mark.parametrize("own, far", [(False, 0), (True, 0), (True, 1)])
def test_each_parameter_moves_at_its_own_rate(own, far):
    """A step from the same gradient with other multiples: exactly these parameters move so many times as far."""
    config = Config(**SHAPE, repeat_rate=0.012, own=own, far=far, ends=1.0, qk=1.0, vo=1.0, orthogonality=0.0, balance=0.0, warmup=0, optimizer="adamw")
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape),
                          model.init(jax.random.key(0), config, 50))
    assert {name for name, leaf in params["blocks"].items() if leaf.ndim == 3} <= set(train.MATRICES)        # which Muon trains
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)

    def moves(**flags):
        optimizer = train.make_optimizer(replace(config, **flags))
        return dict(train.named_leaves(optimizer.update(gradient, optimizer.init(params), params)[0]))

    # c of A = c I + P: P falls by exp(-gamma) from one column to the one before it, A's diagonal apart. Heads share the least.
    c = np.full((config.depth, 1, 1), float(own))
    for gamma in [config.gamma, config.gamma_far][:own + far]:
        gammas = spa.exponential_schedule(gamma, config.depth)
        for layer, pair in enumerate(zip(gammas, gammas[1:])):
            a = spa.cholesky_attention(*(spa.exponential_kernel(each, 8) for each in pair))
            c[layer] = min(c[layer], a[-1, -1] - a[-1, -2] * np.exp(pair[1]))

    plain, other, pulled = moves(), moves(ends=3.0, qk=5.0, vo=0.5), moves(orthogonality=0.5)      # by 0.5 x 0.1 or so, the steps by 0.001
    balanced = moves(balance=0.3)
    for name, move in plain.items():
        factor = {"embed": 3, "head": 3, "blocks/query": 5, "blocks/key": 5, "blocks/value": 0.5, "blocks/output": 0.5}.get(name, 1)
        assert np.any(move) and np.allclose(other[name], factor * move, rtol=1e-6, atol=0), name
        more = (1 - c**2)**-0.3 if name.split("/")[-1] in ("query", "key", "value", "output") else 1
        assert np.allclose(balanced[name], more * move, rtol=1e-5, atol=0), name
        assert (np.max(np.abs(pulled[name] - move)) > 0.01) == (name.split("/")[-1] in (train.CHAIN_OWN if own else train.CHAIN)), name
