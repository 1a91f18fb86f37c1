"""Data and training.

Every token once an epoch, losses that fall, and the same ones for the same seed, to the last bit.
"""
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minitf import resolve
from minitf.config import DataConfig
from minitf.network.init import init
from minitf.presets import PRESETS
from minitf.theory import spa
from minitf.theory.kernels import attention_constants
from minitf.training import data, optimizer, train
from minitf.training.encoding import apart, encode, load_encoding

EPS32 = np.finfo(np.float32).eps
SHAPE = dict(depth=14, width=16, heads=2, length=16, batch=8)
SMALL = dict(depth=3, width=16, heads=2, length=8, batch=2)


# --- Data -------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_any_text_comes_back(text):
    encoding = load_encoding(str(data.RANKS))
    assert encoding.decode(encode([text], encoding).tolist()) == text


@example("a\n\n", 0)
@example("a\n\nb", 0)
@given(st.text(st.sampled_from("a 1'\n\n\r\t.\x1c\x85\u2028é"), max_size=60), st.integers(0, 5))
def test_the_parts_of_a_text_have_its_tokens(text, size):
    """Wherever it is cut; and they are its parts."""
    encoding = load_encoding(str(data.RANKS))
    parts = [*apart(text, encoding, size)]
    assert "".join(parts) == text
    assert np.array_equal(encode(parts, encoding), encode([text], encoding))


@given(st.integers(2, 20), st.integers(1, 9), st.integers(30, 400), st.integers(0, 2**31 - 1))
def test_an_epoch_has_every_window_once(length, size, count, seed):
    """`windows` steps of `size` sequences are `size` whole epochs, whatever the sizes.

    Each has its own order: two of 20 windows are alike once in 20!.
    """
    tokens = np.arange(count)
    windows = (count - 1) // length
    starts = np.concatenate([data.batch(tokens, length, size, seed, step)[:, 0]
                             for step in range(windows)])
    expected = np.tile(np.arange(windows) * length, (size, 1))
    epochs = starts.reshape(size, windows)
    assert np.array_equal(np.sort(epochs, 1), expected)
    assert windows < 20 or len(np.unique(epochs, axis=0)) == size


# --- Losses -----------------------------------------------------------------------------


corpus = cache(partial(data.load, DataConfig(data=None, val_data=None, encoding=None), 16))
start = jax.jit(init, static_argnums=(1, 2))


def losses(preset, steps, **flags):
    """The losses of the first steps of a run, each before its update."""
    settings = resolve(preset, 0.012, **SHAPE, steps=steps, **flags)
    model, how, out = settings.model, settings.training, []
    params = start(jax.random.key(how.seed), model, corpus().encoding.n_vocab)
    constants, rates = attention_constants(model), optimizer.group_rates(how, model)
    state = optimizer.make_optimizer(how.optimizer).init(params)
    for step in range(steps):
        batch = data.batch(corpus().train, model.length, how.batch, how.seed, step)
        params, state, values = train.train_step(
            params, state, constants, rates, optimizer.learning_rate(how, step), batch, model,
            how.optimizer)
        out.append(float(values["loss"]))
    return out


@pytest.mark.parametrize("preset, flags", [
    *((preset, {}) for preset in ("isometric", "preln")),
    ("paper", dict(attn="vskip"))], ids=str)
def test_loss_falls(preset, flags):
    """From ln 1,024 = 6.93, the uniform guess, within a few steps.

    Tokens' frequencies alone would give 5.79.
    """
    values = losses(preset, 40, learning_rate=5e-3, **flags)
    assert np.mean(values[-5:]) < np.mean(values[:3]) - 0.3


def test_the_same_seed_gives_the_same_losses_to_the_last_bit():
    five = partial(losses, "isometric", 5)
    assert five() == five() != five(seed=1)


# --- Rates ------------------------------------------------------------------------------


@given(st.integers(1, 500), st.floats(0, 1, exclude_max=True), st.floats(1e-6, 1.0))
def test_the_learning_rate_warms_up_and_falls_to_zero(steps, share, peak):
    """Linear, then half a cosine: as optax has it, to the rounding of its float32 arithmetic."""
    how = resolve(steps=steps, warmup=int(share * steps), learning_rate=peak).training
    expected = optax.warmup_cosine_decay_schedule(0.0, peak, how.warmup, steps) if how.warmup \
        else optax.cosine_decay_schedule(peak, steps)
    at = [optimizer.learning_rate(how, step) for step in range(steps + 1)]
    assert at[0] == (0 if how.warmup else np.float32(peak)) and at[-1] == 0
    assert at[how.warmup] == max(at) == np.float32(peak)
    assert np.all(np.diff(at[how.warmup:]) < 0) and np.all(np.diff(at[:how.warmup + 1]) > 0)
    for step in {0, 1, how.warmup, (how.warmup + steps) // 2, steps - 1, steps}:
        assert abs(at[min(step, steps)] - expected(min(step, steps))) <= 8 * EPS32 * peak


@given(st.sampled_from(list(PRESETS)), st.integers(1, 200), st.integers(1, 300),
       st.sampled_from(["muon", "adamw"]))
def test_rates_fall_with_width_and_where_there_are_no_skips_with_depth(preset, depth, half, name):
    """By the root of the width, 64, and of the depth, 36: what was tuned is at these.

    Embeddings and head stand once in the network: their own rate does not fall with the depth,
    unless there is one rate for all.
    """
    at = lambda width, depth: resolve(preset, heads=1, width=width, depth=depth,
                                      optimizer=name).training
    here, tuned, rates = at(2 * half, depth), at(64, 36), PRESETS[preset]["rates"][name]
    assert tuned.learning_rate == rates.learning_rate and tuned.lr_mult_embed == rates.lr_mult_embed
    chain = preset in ("isometric", "extra-heads", "paper", "identity-skip")
    by_depth, by_width = (36 / depth)**0.5 if chain else 1.0, (64 / (2 * half))**0.5
    assert here.learning_rate == pytest.approx(tuned.learning_rate * by_width * by_depth)
    assert (here.lr_mult_qk, here.lr_mult_vo) == (rates.lr_mult_qk, rates.lr_mult_vo)
    if rates.lr_mult_embed == 1:
        assert here.lr_mult_embed == 1
    else:
        own = here.learning_rate * here.lr_mult_embed
        assert own == pytest.approx(tuned.learning_rate * tuned.lr_mult_embed * by_width)


GROUP_OF = {"embed": "embed", "position": "embed", "norm": "embed", "head": "embed",
            "query": "qk", "key": "qk", "value": "vo", "output": "vo", "up": "mlp", "down": "mlp",
            "norm1": None, "norm2": None, "vskip_alpha": None, "vskip_beta": None}
PLAIN = dict(learning_rate=1e-3, warmup=0, lr_mult_embed=1.0, lr_mult_qk=1.0, lr_mult_vo=1.0,
             weight_decay=0.0, lr_mult_path=1.0, orthogonal_pull=0.0, unit_embeddings=False)


@partial(jax.jit, static_argnums=4)
def first_update(gradient, params, rates, learning_rate, name):
    chain = optimizer.make_optimizer(name)
    return chain.update(gradient, chain.init(params), params, rates=rates,
                        learning_rate=learning_rate)[0]


def moves(settings, params, gradient, **flags):
    """{name: its move in a first step} with other flags of training."""
    settings = settings.replace(**{**PLAIN, **flags})
    how = settings.training
    updates = first_update(gradient, params, optimizer.group_rates(how, settings.model),
                           optimizer.learning_rate(how, 0), how.optimizer)
    return {name.split("/")[-1]: np.asarray(leaf) for name, leaf in train.named_leaves(updates)}


def parts_kept(gammas, depth):
    """c, (L,), of A = c I + P, the least over heads, from A's definition.

    P falls by exp(-gamma) from one column to the one before it, A's diagonal apart.
    """
    c = np.full(depth, np.inf)
    for gamma in gammas:
        schedule = spa.exponential_schedule(gamma, depth)
        for layer, pair in enumerate(zip(schedule, schedule[1:])):
            a = spa.cholesky_attention(*(spa.exponential_kernel(each, 8) for each in pair))
            c[layer] = min(c[layer], a[-1, -1] - a[-1, -2] * np.exp(pair[1]))
    return c


@pytest.mark.parametrize("preset, flags", [
    ("isometric", dict(extra_heads=1)),
    ("identity-skip", dict(optimizer="adamw", gamma=(0.8, 0.16))),
    ("preln", dict(attn="vskip", position="learned"))], ids=str)
def test_each_parameter_moves_at_its_own_rate(preset, flags):
    """A step from the same gradient with other rates: exactly these move so many times as far.

    Decay is of a group's matrices, at the group's rate. What is held is the named group. Where a
    token passes attention by a skip c, queries, keys, values and outputs learn faster by
    (1 - c^2)^-1/2. To float32's rounding of sums and products.
    """
    settings = resolve(preset, 0.012, **SMALL, **flags)
    leaf = lambda w: w + 0.1 * jax.random.normal(jax.random.key(1), w.shape)
    params = jax.tree.map(leaf, init(jax.random.key(0), settings.model, 50))
    gradient = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), params)
    weights = {name.split("/")[-1]: np.asarray(w) for name, w in train.named_leaves(params)}
    matrices = {name for name, w in params["blocks"].items() if w.ndim == 3}
    assert weights.keys() <= GROUP_OF.keys()
    assert matrices == {name for name in weights
                        if GROUP_OF[name] in optimizer.MATRIX_GROUPS}          # Muon's

    after = partial(moves, settings, params, gradient)
    plain, other = after(), after(lr_mult_embed=3.0, lr_mult_qk=5.0, lr_mult_vo=0.5)
    factors = {"embed": 3.0, "qk": 5.0, "vo": 0.5, "mlp": 1.0, None: 1.0}
    decayed = after(lr_mult_qk=5.0, weight_decay=100.0, decay_groups="qk,mlp")
    undecayed = after(lr_mult_qk=5.0)
    held = after(lr_mult_vo=0.5, orthogonal_pull=0.25, lr_mult_path=0.5, pull_groups="vo")
    free = after(lr_mult_vo=0.5)
    moved = weights["embed"] + after(unit_embeddings=True)["embed"]
    assert np.allclose(np.square(moved).mean(-1), 1, rtol=1e-5), "rows of mean square 1"
    assert np.allclose(moved * np.linalg.norm(weights["embed"] + plain["embed"], axis=-1)[:, None],
                       4 * (weights["embed"] + plain["embed"]), atol=1e-4)
    # What extra heads give is not held.
    path = {"value": np.s_[:, :, :16], "output": np.s_[:, :16]}
    pair = [[jnp.asarray(tree[name][part]) for name, part in path.items()]
            for tree in (weights, free)]
    size = 6**-0.5 if settings.preset == "preln" else 1.0        # of 3 blocks with plain skips
    slowed = {name: np.array(free[name]) for name in path}
    for name, corrected in zip(path, optimizer.held(*pair, pull=0.25, rate=0.5, size=size)):
        slowed[name][path[name]] = corrected
    skipping = settings.model.identity_skip
    unskipped = moves(settings.replace(identity_skip=False), params, gradient)
    c = parts_kept(settings.model.gamma, 3) if skipping else np.zeros(3)
    for name, move in plain.items():
        group, near = GROUP_OF[name], partial(np.allclose, rtol=1e-5)
        by_block = (1 - c[:, None, None]**2)**-0.5 if group in ("qk", "vo") else 1.0
        assert np.any(move) and near(other[name], factors[group] * move, atol=0), name
        assert near(move, by_block * unskipped[name], atol=0), name
        decay = {"qk": 5.0, "mlp": 1.0}.get(group, 0.0) * 1e-3 * 100.0 * by_block * weights[name]
        assert near(decayed[name], undecayed[name] - decay, atol=1e-6), name
        assert near(held[name], slowed.get(name, free[name]), atol=1e-6), name
        assert near(held[name], free[name], atol=1e-6) == (group != "vo"), name


@given(st.sampled_from([(1, 1, 1), (3, 2, 7), (2, 8, 8), (1, 5, 20)]), st.floats(0, 2),
       st.floats(0, 1), st.floats(0.1, 10), st.floats(1, 3), st.integers(0, 2**31 - 1))
def test_the_linear_path_learns_at_its_own_rate(shape, rate, pull, size, spread, seed):
    """To first order its product moves by `rate` of what it would, and by `pull` of a
    Newton-Schulz step: against float64.

    Exactly where both matrices are multiples of orthogonal ones. Where their singular values
    spread, four steps of conjugate gradients leave at most 2 ((k^1/2 - 1) / (k^1/2 + 1))^4 of the
    change (in its own norm, within k^1/2 of the plain one), k the condition. Rounding: sums of at
    most 20 terms, of entries up to the sizes squared.
    """
    rng, (blocks, d, n) = np.random.default_rng(seed), shape
    orthonormal = lambda: np.linalg.qr(rng.normal(size=(blocks, n, n)))[0][:, :d]
    turn = lambda: np.linalg.qr(rng.normal(size=(blocks, d, d)))[0]
    uneven = lambda: turn() * rng.uniform(1, spread, (blocks, 1, d)) @ turn()
    a, b = rng.uniform(0.3, 3, 2)
    w1, w2 = a * uneven() @ orthonormal(), b * np.swapaxes(orthonormal(), 1, 2) @ uneven()
    u1, u2 = rng.normal(size=w1.shape), rng.normal(size=w2.shape)
    float32 = [[jnp.float32(x) for x in pair] for pair in ((w1, w2), (u1, u2))]
    new1, new2 = map(partial(np.asarray, dtype=float), optimizer.held(
        *float32, pull=pull, rate=rate, size=size))
    product, moved = w1 @ w2, u1 @ w2 + w1 @ u2
    way = (product - product @ np.swapaxes(product, 1, 2) @ product / size**2) / 2
    change = (rate - 1) * moved + pull * way
    wrong = np.linalg.norm(new1 @ w2 + w1 @ new2 - moved - change, axis=(1, 2))
    k = spread**2                                          # at most, of each gram, so of their sum
    left = 2 * ((k**0.5 - 1) / (k**0.5 + 1))**4 * k**0.5 * np.linalg.norm(change, axis=(1, 2))
    scale = n * (1 + 9 * a + 9 * b) * (1 + np.abs(way).max() + 9 * n) * EPS32
    assert np.all(wrong <= left + 64 * scale)
    # What was added lies along the other matrix: the rest is untouched.
    rest = np.eye(n) - np.linalg.pinv(w1) @ w1
    assert np.max(np.abs(rest @ (new2 - u2))) <= 64 * scale


def test_a_pull_brings_the_linear_path_back_to_a_rotation():
    """Its singular values, up to a fifth off, are at its size after 60 steps of 0.2."""
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=(2, 8, 8)))
    w1 = np.float32(u * rng.uniform(0.8, 1.2, (2, 1, 8)) @ vt)
    w2 = np.float32(1.5 * np.linalg.qr(rng.normal(size=(2, 8, 8)))[0])
    for _ in range(60):
        zeros = [jnp.zeros_like(w1), jnp.zeros_like(w2)]
        change = optimizer.held([w1, w2], zeros, pull=0.2, rate=1.0, size=1.5)
        w1, w2 = w1 + change[0], w2 + change[1]
    assert np.allclose(np.linalg.svd(w1 @ w2, compute_uv=False), 1.5, atol=1e-4)


@given(st.sampled_from([(1, 1, 1), (2, 3, 9), (2, 9, 3), (3, 8, 8)]), st.floats(1e-9, 1e6),
       st.integers(0, 2**31 - 1))
def test_the_first_step_of_muon_by_singular_values(shape, size, seed):
    """-0.2 sqrt(max(in, out)) U p(p(p(p(p(s))))) V^T, p the quintic, from an SVD in float64.

    Singular values are within a factor of 10. Five steps amplify rounding by 3.45^5 at most.
    """
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = rng.uniform(1, 10, (shape[0], min(shape[1:])))
    gradient = {"up": np.float32(size * (u * s[:, None] @ vt))}
    s = s / np.linalg.norm(s, axis=1, keepdims=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = -0.2 * max(shape[1:])**0.5 * (u * s[:, None] @ vt)
    chain = optax.chain(optimizer.muon_moments(), optimizer.orthogonal_updates("float32"))
    got = chain.update(gradient, chain.init(gradient))[0]["up"]
    assert np.max(np.abs(got - expected)) <= 3.45**5 * 9 * EPS32 * np.max(np.abs(expected))


def test_muon_in_bfloat16_makes_matrices_nearly_orthogonal():
    """All singular values end in the quintic's range, but for three roundings of its terms."""
    rng = np.random.default_rng(0)
    s = np.linalg.svd(np.asarray(optimizer.newton_schulz(
        jnp.float32(rng.normal(size=(4, 16, 64))), "bfloat16")), compute_uv=False)
    rounding = 3 * (3.4445 + 4.7750 + 2.0315) * 2.0**-9
    assert s.min() > 0.68 - rounding and s.max() < 1.21 + rounding


@pytest.mark.parametrize("preset", ["isometric", "preln"])
def test_a_training_step_can_be_lowered_for_a_tpu(preset):
    settings = resolve(preset, backend="tpu", **SMALL)
    model, how = settings.model, settings.training
    assert model.dtype == "bfloat16"
    params = jax.eval_shape(start, jax.random.key(0), model, 50)
    state = jax.eval_shape(optimizer.make_optimizer(how.optimizer).init, params)
    fixed = attention_constants(model), optimizer.group_rates(how, model)
    batch = np.zeros((2, 9), np.int32)
    jax.export.export(train.train_step, platforms=["tpu"])(
        params, state, *fixed, np.float32(0), batch, model, how.optimizer)


def test_an_evaluation_says_how_bad_a_ruined_network_is():
    """Where training counts a logit 70 above the target's as 70, an evaluation has no limit."""
    config = resolve(**SMALL).model
    params, constants = start(jax.random.key(0), config, 50), attention_constants(config)
    params = params | {"head": params["head"].at[:, 7].set(1e4 * params["embed"][7])}
    batch = np.full((2, 9), 7, np.int32)
    batch[:, 1::2] = 3
    losses, _ = train.evaluate_batch(params, constants, batch, config)
    assert losses.shape == (2, 8) and losses.mean() > 1000
    assert train.loss(params, constants, batch, config) < 80


def test_other_numbers_compile_nothing_anew():
    """Rates, gammas and seeds are data to a compiled step."""
    base = resolve("isometric", 0.012, **SMALL, steps=10, warmup=0)
    model, name = base.model, base.training.optimizer
    batch, before = np.arange(18).reshape(2, 9) % 50, train.train_step._cache_size()
    losses = set()
    for flags in ({}, dict(learning_rate=3e-3, weight_decay=0.3, seed=1), dict(gamma=(0.1, 0.02)),
                  dict(lr_mult_embed=7.0, lr_mult_qk=2.0, lr_mult_path=0.5, seed=2)):
        trial = base.replace(**flags)
        params = start(jax.random.key(trial.training.seed), model, 50)
        opt_state = optimizer.make_optimizer(name).init(params)
        fixed = attention_constants(trial.model), optimizer.group_rates(trial.training, model)
        for step in range(3):
            params, opt_state, metrics = train.train_step(
                params, opt_state, *fixed, optimizer.learning_rate(trial.training, step), batch,
                model, name)
        losses.add(float(metrics["loss"]))
    assert train.train_step._cache_size() == before + 1
    assert len(losses) == 4


@pytest.mark.parametrize("flags", [
    *(dict(preset=name) for name in PRESETS), dict(preset="preln", norm="dyt"),
    dict(preset="preln", norm="derf"), dict(attn="vskip")], ids=str)
def test_what_begins_has_the_types_of_what_a_step_gives(flags):
    """A weak type at the start would compile the step, and the evaluation, once more."""
    settings = resolve(**{**SHAPE, **flags})
    params = jax.eval_shape(partial(init, config=settings.model, vocabulary=50),
                            jax.random.key(0))
    state = jax.eval_shape(optimizer.make_optimizer(settings.training.optimizer).init, params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((params, state)))
