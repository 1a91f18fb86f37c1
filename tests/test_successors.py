"""Successors of the method, as comparisons: each does at the start what it promises."""
from itertools import product

import bench
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from networks import D, EPS32, T, V, decoded, random_tokens, stirred

from minitf import attention_constants, forward, resolve
from minitf.network import fast, init as starts, model, objectives, operations, quantize
from minitf.network.operations import REFERENCE
from minitf.cli import main
from minitf.training import checkpoint, optimizer, train

NAMES = ("shaped", "sas", "sas-p", "op", "cutting-the-skip")
NETWORKS = {**{name: dict(preset=name) for name in NAMES},
            "dyt": dict(preset="preln", norm="dyt"), "derf": dict(preset="preln", norm="derf")}


def network(name, seed=0, **flags):
    """(ModelConfig, parameters at the start) of a small one, in which the head matters."""
    config = resolve(**{**dict(depth=3, width=D, heads=4, length=T, head_init="gaussian"),
                        **NETWORKS[name], **flags}).model
    return config, jax.jit(starts.init, static_argnums=(1, 2))(jax.random.key(seed), config, V)


def one_block(name, seed=0, moved=0.0):
    """(x, what a block makes of it, X^, its weights, config): x (T, d) of any size."""
    config, params = network(name, seed)
    params = stirred(params, seed, moved)
    weights = jax.tree.map(lambda w: w[0], model.layers(params, {}, config)[0])
    x = 3 * jax.random.normal(jax.random.key(seed + 1), (T, D))
    after = model.block(x, weights, {}, config, REFERENCE)
    return x, after, model.attention_sublayer(x, weights, {}, config, REFERENCE), weights, config


def rms_norm(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)


# --- Shaped attention and simplified blocks ---------------------------------------------

def test_shaped_attention_is_the_identity_at_the_start():
    """alpha I + beta A - gamma C with W^Q = 0: A is C. What SAS gives is the norm of its input.

    A mean of up to T terms and a sum of three: T + 3 roundings of numbers up to 3 or so.
    """
    x, _, attended, _, _ = one_block("sas")
    assert np.max(np.abs(attended - rms_norm(x))) <= (T + 3) * EPS32 * np.max(np.abs(x))


def test_shaped_attention_is_its_formula():
    """With parameters away from their start, head by head, in float64."""
    x, _, attended, weights, config = one_block("sas", moved=0.3)
    y = np.asarray(rms_norm(x) * weights["norm1"], float)
    weights = jax.tree.map(lambda w: np.asarray(w, float), weights)
    mean = np.tri(T) / np.arange(1, T + 1)[:, None]
    q, k = np.split(y @ weights["qkv"], 2, 1)
    turned = [np.asarray(operations.apply_rope(jnp.float32(each.reshape(T, 4, -1)), config), float)
              for each in (q, k)]
    logits = np.einsum("qhd,khd->hqk", *turned) / np.sqrt(D // 4)
    a = np.exp(logits) * np.tri(T)
    a /= a.sum(-1, keepdims=True)
    alpha, beta, gamma = (weights[f"shaped_{name}"][:, None, None]
                          for name in ("alpha", "beta", "gamma"))
    mixed = alpha * np.eye(T) + beta * a - gamma * mean
    expected = np.einsum("hqk,khd->qhd", mixed, y.reshape(T, 4, -1)).reshape(T, D)
    assert np.std(beta) > 0.05 and np.std(a[:, -1]) > 0.005        # they matter
    assert np.allclose(attended, weights["beta"] * expected, atol=1e-4)


def test_simplified_blocks_are_their_equations():
    """SAS: X^ + beta MLP(Norm(X^)), without a skip before it; SAS-P: both of Norm(X), added."""
    for name, moved in product(("sas", "sas-p"), (0.0, 0.1)):
        x, after, attended, weights, config = one_block(name, moved=moved)
        assert "output" not in weights and weights["qkv"].shape == (D, 2 * D)
        assert moved or np.isclose(weights["mlp_beta"], 0.07) and config.alpha == 0
        y = rms_norm(attended if name == "sas" else x) * weights["norm2"]
        mlp = jax.nn.relu(y @ weights["up"]) @ weights["down"]
        skip = weights["mlp_alpha"] * attended if name == "sas" else attended
        assert np.allclose(after, skip + weights["mlp_beta"] * mlp, atol=2e-5)
    assert "mlp_alpha" not in weights and "alpha" not in weights


# --- OP, Cutting the Skip, what stands in the place of norms -----------------------------

def test_a_norm_of_queries_and_keys_forgets_their_size():
    """OP: the same attention with W^Q ten times as large; and no norm anywhere else."""
    config, params = network("op")
    constants, tokens = attention_constants(config), random_tokens(0)
    larger = params | {"blocks": params["blocks"] | {"query": 10 * params["blocks"]["query"]}}
    before, after = (forward(each, constants, tokens, config) for each in (params, larger))
    assert "norm" not in params and np.allclose(before, after, atol=2e-3 * np.std(before))
    gain = params["blocks"] | {"query_gain": 3 * params["blocks"]["query_gain"]}
    other = forward(params | {"blocks": gain}, constants, tokens, config)
    assert np.std(other - before) > 0.01 * np.std(before)


def test_cutting_the_skip_starts_as_published():
    """W^V W^O is 9 times a rotation; W^Q W^K^T = 2 Z + 0.6 I, of variance 4 / d.

    d^2 entries, so a mean square within 5 sqrt(2) / d of its expectation; a diagonal of d.
    """
    config, params = network("cutting-the-skip", heads=1)
    blocks = jax.tree.map(lambda w: np.asarray(w, float), params["blocks"])
    product = blocks["value"][0] @ blocks["output"][0] / 9
    assert np.allclose(product @ product.T, np.eye(D), atol=D * EPS32)
    z = (blocks["query"][0] @ blocks["key"][0].T - 0.6 * np.eye(D)) / 2
    assert abs(np.square(z).mean() * D - 1) < 5 * np.sqrt(2) / D
    assert abs(np.diag(z).mean()) < 5 / D


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31 - 1))
@settings(max_examples=8)
def test_each_head_takes_the_largest_part_of_its_own_matrix(heads, seed):
    """W^Q W^K^T of a head is of rank k, and the best such approximation of some 2 Z + 0.6 I.

    So its singular vectors are shared evenly: W^Q^T W^Q = W^K^T W^K, diagonal and falling.
    """
    query, key = (np.asarray(w, float).reshape(2, D, heads, D // heads) for w in
                  starts.near_identity(jax.random.key(seed), None, 2, D, heads, D // heads))
    for layer in range(2):
        for head in range(heads):
            q, k = query[layer, :, head], key[layer, :, head]
            size = np.diag(q.T @ q)
            assert np.allclose(q.T @ q, np.diag(size), atol=50 * EPS32 * size[0])
            assert np.allclose(k.T @ k, q.T @ q, atol=50 * EPS32 * size[0])
            assert np.all(np.diff(size) <= 1e-5) and size[0] < 2 * 2.5 + 0.6


@pytest.mark.parametrize("norm, function", [("dyt", np.tanh), ("derf", jax.scipy.special.erf)])
def test_what_stands_in_the_place_of_a_norm_is_its_formula(norm, function):
    config, params = network(norm)
    x = 4 * np.random.default_rng(0).standard_normal((T, D), np.float32)
    at_start = operations.normalise(x, params["norm"], config)
    assert np.allclose(at_start, function(x / 2), atol=4 * EPS32)
    trained = {"gain": np.float32(3), "slope": np.float32(2), "shift": np.float32(1)}
    shift = 1 if norm == "derf" else 0
    assert np.allclose(operations.normalise(x, trained, config), 3 * function(2 * x + shift),
                       atol=16 * EPS32)


# --- All of them ------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_decoding_and_what_is_fast_equal_the_forward_pass(name):
    """Five tokens at once, the others one by one; and the loss as a CPU computes it."""
    config, params = network(name)
    params, constants, tokens = stirred(params, 1, 0.1), attention_constants(config), \
        random_tokens(2)
    expected = forward(params, constants, tokens, config)
    got = decoded(params, constants, tokens, config)
    wrong = 6 * config.depth * np.sqrt(4 * D) * EPS32 * np.max(np.abs(expected))
    assert np.max(np.abs(got - expected)) <= wrong
    windows = np.concatenate([tokens, tokens[:1]])[None]
    plain, quick = (objectives.token_losses(params, constants, windows, config, ops)
                    for ops in (REFERENCE, fast.operations(config, "cpu")))
    assert np.max(np.abs(plain - quick)) <= 2 * wrong + 70 * EPS32


def run(*lines):
    """run.py's main with these arguments, one after the other."""
    for line in lines:
        main.main(line.split())


SMALL = "--depth 2 --width 16 --heads 2 --length 8 --batch 4 --steps 2"


def test_nested_parameters_are_saved_inspected_and_exported(no_sample, tmp_path, capsys,
                                                            monkeypatch):
    """Those of what stands in the place of a norm: the weights come back."""
    monkeypatch.setattr(bench, "product_rate", lambda dtype: 1e12)         # which takes seconds
    folder, out = tmp_path / "run", tmp_path / "out.safetensors"
    run(f"--preset preln --norm derf {SMALL} --out {folder}", f"--inspect {folder}",
        f"--export {folder} {out}")
    assert f"{out}: " in capsys.readouterr().out
    blocks = checkpoint.load(folder).params["blocks"]
    assert {name: leaf.shape for name, leaf in blocks["norm1"].items()} == {
        "gain": (2, 16), "slope": (2, 1), "shift": (2, 1)}
    settings = checkpoint.newest(folder)[0].settings
    assert bench.measure(settings, 1024, 1, 0, 0, 0)["loss"] > 0


def test_an_encoder_is_trained_and_evaluated_at_few_bits(tmp_path, capsys):
    """Its loss is that of masked tokens."""
    text = tmp_path / "text"
    text.write_text("Now is the winter of our discontent made glorious summer. " * 3)
    run(f"--preset op --objective mlm {SMALL} --out {tmp_path / 'run'}",
        f"--eval {tmp_path / 'run'} --data {text} --quantize w8a8")
    said = capsys.readouterr().out
    assert said.count("a masked token") == 4 and "w8a8: " in said and "bits a byte" not in said


def test_a_final_gain_learns_with_its_group_and_a_slope_at_the_plain_rate():
    """DyT's gain is that of the norm in whose place it stands."""
    config, params = network("dyt")
    rates = {"learning_rate": {"embed": 7.0}, "weight_decay": {}, "linear_path": {}}
    update, _ = optimizer.scale_by_group().update(jax.tree.map(jnp.ones_like, params), None, params,
                                                  rates=rates, learning_rate=2.0)
    assert np.all(update["norm"]["gain"] == 14) and np.all(update["norm"]["slope"] == 2)
    assert np.all(update["blocks"]["norm1"]["gain"] == 2) and np.all(update["head"] == 14)


def test_rates_of_skipless_networks_fall_with_the_root_of_long_runs():
    """Of blocks beyond 6,000 steps; embeddings keep theirs, and networks with skips all."""
    at = lambda preset, steps: resolve(preset, steps=steps).training
    short, long = at("isometric", 6000), at("isometric", 24_000)
    assert at("isometric", 100).learning_rate == short.learning_rate
    assert long.learning_rate == pytest.approx(short.learning_rate / 2)
    assert long.lr_mult_embed == pytest.approx(2 * short.lr_mult_embed)
    assert at("preln", 24_000).learning_rate == at("preln", 100).learning_rate


@pytest.mark.parametrize("flags, said", [
    (dict(preset="sas-p", alpha=0.5), "parallel needs alpha 0"),
    (dict(parallel=True), "parallel does not go with attn espa"),
    (dict(norm="dyt"), "needs norm none, layer or rms"),
    (dict(preset="identity-skip", identity_values=True), "neither with identity-values"),
    (dict(preset="identity-skip", trained_weights=True), "nor with trained-weights"),
    (dict(identity_values=True, pull_groups="vo"), "there is no W.V and no W.O"),
    (dict(qk_norm=True), "query-init that is not zero"),
    (dict(query_init="gaussian"), "needs query-init zero"),
    (dict(preset="shaped", query_init="gaussian"), "needs query-init zero"),
    (dict(init="orthogonal-3"), "needs norm layer or rms"),
    (dict(preset="op", mlp_beta=0.5), "to 0.05"), (dict(query_init="none"), "query-init must be")])
def test_what_does_not_go_together_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        resolve(**flags)


# --- Few bits ---------------------------------------------------------------------------

@given(st.integers(2, 8), st.integers(0, 1), st.integers(0, 2**31 - 1))
@settings(max_examples=25)
def test_rounding_is_to_the_nearest_of_few_levels(bits, axis, seed):
    """At most 2^bits - 1 levels a row, off by half a step at most, and the same done twice."""
    x = np.random.default_rng(seed).standard_normal((5, 40), np.float32)
    rounded = np.asarray(quantize.rounded(x, bits, axis))
    step = np.abs(x).max(axis, keepdims=True) / (2**(bits - 1) - 1)
    assert np.all(np.abs(rounded - x) <= step * (0.5 + 2**bits * EPS32))
    for row in rounded if axis else rounded.T:
        assert len(np.unique(row)) <= 2**bits - 1
    assert np.allclose(quantize.rounded(rounded, bits, axis), rounded, rtol=4 * EPS32)


def test_a_network_of_few_bits_is_that_of_its_rounded_weights():
    """With activations of 16 bits: the losses of a network whose blocks' weights were rounded."""
    config, params = network("shaped")
    params, windows = stirred(params, 0, 0.1), random_tokens(1, 2, T + 1)
    matrices = {name: quantize.rounded(w, 4, 1) if w.ndim == 3 else w
                for name, w in params["blocks"].items()}
    losses = [np.asarray(train.evaluate_batch(weights, {}, windows, config, bits)[0])
              for weights, bits in ((params, (4, 16)), (params | {"blocks": matrices}, None),
                                    (params, None))]
    assert np.max(np.abs(losses[0] - losses[1])) < 0.02 < np.max(np.abs(losses[0] - losses[2]))


@pytest.mark.parametrize("name", ["w8", "8", "w1a8", "w8a17", "W8A8", "w8a8 ", ""])
def test_bits_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="quantize must be"):
        quantize.bits_of(name)


def test_kurtosis_counts_outlier_features():
    """1 where all features are of one size; of one alone, d."""
    config, params = network("cutting-the-skip")
    windows = random_tokens(0, 4, T + 1)
    usual = train.evaluate(params, {}, windows, config, 4)[1]["kurtosis"]
    assert len(usual) == config.depth and 1 <= min(usual) and max(usual) < 3
    down = params["blocks"]["down"] * (np.arange(D) == 3)
    alone = train.evaluate(params | {"blocks": params["blocks"] | {"down": down}}, {}, windows,
                           config, 4)[1]
    assert np.allclose(alone["kurtosis"], D, rtol=1e-4) and alone["mean_square"][0] > 0.01


def test_rounding_errors_add_up_over_all_products_without_skips():
    """Each product adds the squares of its two relative roundings, (max / levels)^2 / 12.

    So 4 L of them in a chain, here within 1.5 times (a head's own token is not all that V and O
    see); beside skips branches are a small part of what passes, and so is their error.
    """
    def noise(preset, bits):
        config = resolve(preset, depth=12, token_collision_rate=0.01).model
        params = jax.jit(starts.init, static_argnums=(1, 2))(jax.random.key(0), config, V)
        tokens, constants = random_tokens(0, 4, 64), attention_constants(config)
        exact, rounded = (model.final_hidden(params, constants, tokens, config, ops)
                          for ops in (REFERENCE, quantize.few_bits(REFERENCE, bits)))
        return np.square(rounded - exact).mean() / np.square(exact).mean()

    def relative_error(bits, count):
        largest = np.abs(np.random.default_rng(0).standard_normal((200, count))).max(1)
        return np.square(largest / (2**(bits - 1) - 1)).mean() / 12

    for bits in ((8, 8), (6, 6)):
        predicted = 12 * sum(relative_error(each, count) for count in (64, 64, 64, 256)
                             for each in bits)
        assert predicted / 1.5 < noise("isometric", bits) < 1.5 * predicted
    assert noise("preln", (8, 8)) < noise("isometric", (8, 8)) / 20
