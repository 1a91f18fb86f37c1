"""Every fast operation against the formula that it stands for, forward and backward, in float32.

What a GPU would run is run here: its attention kernel in the interpreter, cuDNN's by a stand-in.
"""
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minitf import attention_constants, init, resolve
from minitf.network import fast, flash, model, operations

EPS32 = np.finfo(np.float32).eps
D, V = 32, 50
seeds = st.integers(0, 2**31 - 1)


@partial(jax.jit, static_argnums=(3, 4))
def outputs(params, constants, windows, config, ops):
    """(gradient of the mean loss, (logits, losses)) with these Operations."""
    def mean_loss(params):
        x = model.final_hidden(params, constants, windows[:, :-1], config, ops)
        losses = ops.cross_entropy(x, params["head"], windows[:, 1:].reshape(-1))
        return losses.mean(), (model.unembed(params, x), losses)

    return jax.grad(mean_loss, has_aux=True)(params)


def small(preset="isometric", **flags):
    """A small ModelConfig; TAT of a leaky ReLU has a target that 2 blocks reach."""
    shape = dict(depth=4, width=D, heads=2, length=16, eta=0.2, token_collision_rate=0.05)
    return resolve(preset, **{**shape, **flags}).model


def moved(params, seed, size):
    """Parameters away from their start, so that all matter: Q and K, gains, the head."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [
        leaf + size * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def compare(config, ops, roundings):
    """Asserts that Operations give what the formulas give, to rounding.

    roundings: of a block, in units of EPS32. How much of them arrives at the end depends on the
    parameters: as much as of an equal noise in the embeddings. A gradient's own sums round as
    often again. All of an array counts, by its norm: of units at a kink noise switches a few.
    """
    key, rng = jax.random.key(0), np.random.default_rng(0)
    start = jax.jit(init, static_argnums=(1, 2))
    params = moved(start(key, config, V), 1, 0.05)
    constants = attention_constants(config)
    windows = rng.integers(0, V, (3, config.length + 1)).astype(np.int32)
    error = config.depth * roundings * EPS32
    noise = 1 + error * rng.choice([-1, 1], params["embed"].shape).astype(np.float32)
    run = partial(outputs, constants=constants, windows=windows, config=config)
    expected = run(params, ops=operations.REFERENCE)
    noisy = run({**params, "embed": params["embed"] * noise}, ops=operations.REFERENCE)
    got = run(params, ops=ops)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    norm = lambda x: np.linalg.norm(np.ravel(x))
    for (path, one), other, shaken in zip(paths, jax.tree.leaves(got), jax.tree.leaves(noisy)):
        tolerance = 2 * norm(shaken - one) + error * norm(one)
        assert norm(one) > 1e-4 and tolerance < 0.05 * norm(one), path
        assert norm(other - one) <= tolerance, path


SUMS = 6 * np.sqrt(4 * D)             # a block is six sums of up to 4 d terms, forward

CASES = [                             # each activation, norm and loop; attention is the formula's
    dict(),
    dict(preset="paper"),
    dict(preset="preln"),
    dict(act="leaky_relu", transform="dks", mlp_init="orthogonal"),
    dict(norm="rms", alpha=0.8, position="learned"),
    dict(remat=True, extra_heads=1, mlp_ratio=3.0),
]


def name(flags):
    return "-".join(str(value) for value in flags.values()) if isinstance(flags, dict) else None


@pytest.mark.parametrize("flags", CASES, ids=name)
def test_what_a_cpu_runs_is_what_the_formulas_say(flags):
    """Logits, losses and every parameter's gradient."""
    config = small(**flags)
    ops = fast.operations(config, "cpu")
    assert ops.attend is operations.attend
    compare(config, ops, SUMS)


@pytest.mark.parametrize("flags, kernel", [
    (dict(identity_skip=True, gamma=(0.8, 0.1), position="none", extra_heads=1), "flash"),
    (dict(attn="softmax", position="learned", extra_heads=1), "flash"),
    (dict(attn="uspa", extra_heads=1), "cudnn"),
    (dict(objective="mlm"), "cudnn"),
    (dict(preset="preln", attn="espa", remat=True), "flash"),
], ids=name)
def test_what_a_gpu_runs_is_what_the_formulas_say(flags, kernel, monkeypatch):
    """In float32, of two blocks of positions, of which the second is not full.

    Within a block of keys the bias reaches the slope times its length, and is rounded.
    """
    calls, attend, attention = [], flash.attend, jax.nn.dot_product_attention

    def interpreted(qkv, bias, row_scale, rope):
        calls.append("flash")
        return attend(qkv, bias, row_scale, rope, True)

    def without_cudnn(*arrays, is_causal, implementation):
        calls.append(implementation)
        return attention(*arrays, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(flash, "attend", interpreted)
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    monkeypatch.setattr(fast, "fuses_attention", lambda config, backend: backend == "gpu")
    if kernel == "cudnn":
        monkeypatch.setattr(fast, "OUR_PLAIN_LENGTH", 0)
    outputs.clear_cache()                                          # of what is patched now
    config = small(depth=2, length=72, **flags)
    ops = fast.operations(config, "gpu")
    assert (ops.repeat is fast.repeat_straight) == (not config.remat)
    compare(config, ops, SUMS + 2 * max(config.gamma) * flash.ROWS)
    assert set(calls) == {kernel}


@pytest.mark.parametrize("flags, fused, straight", [
    (dict(), True, True),
    (dict(remat=True), True, False),
    (dict(depth=49), True, False),
    (dict(dtype="float32"), False, False),
    (dict(length=33), True, True),
    (dict(length=33, attn="uspa"), False, False),
    (dict(width=24), False, False),                                # 12 features a head
    (dict(width=272), False, False),                               # 136
], ids=str)
def test_which_operations_a_gpu_is_given(flags, fused, straight):
    """Kernels for bfloat16 of the sizes that they take; a loop where there are many blocks."""
    config = small(**{"dtype": "bfloat16", **flags})
    ops = fast.operations(config, "gpu")
    assert (ops.attend is fast.attend_fused) == fused
    assert (ops.repeat is fast.repeat_straight) == straight
    assert fast.operations(config, "cpu").attend is operations.attend


@pytest.mark.parametrize("platform, capability, expected", [
    ("cpu", None, "cpu"), ("tpu", None, "tpu"), ("gpu", "9.0", "gpu"), ("gpu", "8.0", "gpu"),
    ("gpu", "7.5", "other"), ("gpu", "gfx942", "other"), ("gpu", None, "other"),
    ("xpu", None, "other")])
def test_only_what_is_known_to_run_fast_kernels_is_given_them(platform, capability, expected):
    """A T4, ROCm and whatever is new compute the plain way, in float32."""
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    backend = fast.hardware(device)
    config = resolve(backend=backend).model
    ops = fast.operations(config, backend)
    assert backend == expected
    assert config.dtype == ("bfloat16" if backend in ("gpu", "tpu") else "float32")
    assert (ops.attend is fast.attend_fused) == (backend == "gpu")


# --- Norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@given(seeds, st.floats(-2, 2), st.floats(-3, 3))
def test_the_gradient_of_a_norm_is_that_of_its_formula(centred, seed, size, offset):
    """The one that is written out, against differentiation.

    Sums of d terms, of size at most |gain| |g| over the deviation.
    """
    rng = np.random.default_rng(seed)
    x = jnp.float32(10**size * (rng.normal(size=(5, D)) + offset))
    gain, g = jnp.float32(rng.normal(size=D)), jnp.float32(rng.normal(size=(5, D)))
    plain = lambda x, gain: operations.standardise(x, centred)[0] * gain
    written_out = lambda x, gain: fast.normalised(x, gain, centred)
    (y, back), (y_plain, back_plain) = (jax.vjp(f, x, gain) for f in (written_out, plain))
    assert np.array_equal(y, y_plain)
    (dx, dgain), (dx_plain, dgain_plain) = back(g), back_plain(g)
    scale = np.max(operations.standardise(x, centred)[1]) * np.linalg.norm(g * gain)
    rounding = 8 * np.sqrt(D) * (1 + abs(offset)) * EPS32      # of x less its mean, and of the sums
    assert np.max(np.abs(dx - dx_plain)) <= rounding * scale
    largest = np.linalg.norm(g) * np.max(np.abs(y_plain / gain))
    assert np.max(np.abs(dgain - dgain_plain)) <= rounding * largest


# --- Cross-entropy ----------------------------------------------------------------------


@given(st.sampled_from([1, 9]), st.sampled_from([1, 12]), st.sampled_from([2, 60]),
       st.floats(0.01, 20), seeds)
def test_cross_entropy_and_its_gradients(count, width, vocabulary, size, seed):
    """Against float64.

    Rounding: of logits that are sums of `width` products, then in the exponent; of sums of
    `vocabulary`.
    """
    rng = np.random.default_rng(seed)
    x, head = size * rng.normal(size=(count, width)), rng.normal(size=(width, vocabulary))
    x, head, g = (a.astype(np.float32) for a in (x, head, rng.normal(size=count)))
    targets = rng.integers(0, vocabulary, count)
    losses, back = jax.vjp(lambda x, head: fast.cross_entropy(x, head, targets), x, head)
    z = x.astype(float) @ head
    z = z - z[np.arange(count), targets][:, None]
    total = np.exp(z).sum(1)
    assume(z.max() < fast.LARGEST)
    error = np.exp(z) / total[:, None] - (np.arange(vocabulary) == targets[:, None])
    wrong = EPS32 * (vocabulary + 4 * width * np.abs(x).max() * np.abs(head).max()
                     + np.abs(z).max(1))                       # (N,)
    assert np.all(np.abs(losses - np.log(total)) < wrong)
    dx, dhead = back(g)
    of_x = (np.abs(g) * wrong * 4 * np.abs(head).max())[:, None]
    assert np.all(np.abs(dx - g[:, None] * (error @ head.T)) < of_x)
    of_head = (np.abs(x) * (np.abs(g) * wrong)[:, None]).sum(0)[:, None] * 4
    assert np.all(np.abs(dhead - x.T @ (g[:, None] * error)) < of_head)


def test_a_loss_beyond_what_float32_can_say_is_large_and_has_a_finite_gradient():
    head = jnp.array([[-1e4, 0.0, 1e4]])
    loss, back = jax.vjp(
        lambda head: fast.cross_entropy(jnp.ones((1, 1)), head, jnp.array([0]))[0], head)
    assert loss >= fast.LARGEST and np.allclose(back(1.0)[0], [[-1, 0.5, 0.5]])


def test_a_loss_is_never_negative():
    """In bfloat16 too, where logits of a deviation of 20 round by 0.1: at the least log(1 + 0)."""
    x, head = (jax.random.normal(jax.random.key(seed), shape).astype("bfloat16")
               for seed, shape in ((0, (256, 64)), (1, (64, 1000))))
    head = 2.5 * head
    likeliest = jnp.argmax(x.astype(jnp.float32) @ head.astype(jnp.float32), -1)
    losses = jax.jit(fast.cross_entropy)(x, head, likeliest)
    assert losses.min() >= 0 and losses.max() > 0.5
