"""Presets and settings: what is stated, what a flag changes beside a preset, and nothing else."""
from dataclasses import asdict, fields
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import resolve
from minitf.cli import loop
from minitf.cli.main import main
from minitf.config import FIELDS, ModelConfig, TrainingConfig, untuned
from minitf.network.init import init
from minitf.presets import PRESETS
from minitf.theory.activations import NAMES
from minitf.theory.kernels import attention_constants, network_activation, attended_rms

RATE, BACKENDS = 0.0123, ("cpu", "gpu")


def values(settings):
    """{name: value} of all fields."""
    return {**asdict(settings.model), **asdict(settings.training), **asdict(settings.data)}


# --- Everything is stated ---------------------------------------------------------------


@given(st.sampled_from([*PRESETS]), st.floats(0, 1), st.sampled_from(BACKENDS))
def test_nothing_is_left_open_in_model_and_training(preset, rate, backend):
    """No field is None, and every one has a value of its type; only data may be None."""
    settings = resolve(preset, rate, backend)
    for part, kind in ((settings.model, ModelConfig), (settings.training, TrainingConfig)):
        for each in fields(kind):
            assert isinstance(getattr(part, each.name), each.type), each.name
    assert hash(settings.model) and hash(settings.training)
    assert settings.model.token_collision_rate == rate
    assert settings.model.dtype == ("float32" if backend == "cpu" else "bfloat16")


def test_the_paper_is_meant_literally():
    """gamma 0.005, row sums, TAT of a leaky ReLU, orthogonal weights, AdamW, nothing besides.

    C_f(0) = 0.9 at 36 blocks needs the slope 0.351121. rho_0 of uspa is the collision rate.
    """
    settings = resolve("paper", RATE)
    model, training = settings.model, settings.training
    assert model.gamma == (0.005,) * 4 and model.row_scale == "row-sum" and model.depth == 36
    assert model.attn == "espa" and not model.identity_skip
    assert (model.act, model.transform, model.eta) == ("leaky_relu", "tat", 0.9)
    assert network_activation(model).slope == pytest.approx(0.351121, abs=5e-7)
    assert (model.alpha, model.beta, model.norm) == (0.0, 1.0, "none")
    assert model.init == model.mlp_init == "orthogonal"
    assert training.optimizer == "adamw"
    assert training.weight_decay == training.orthogonal_pull == 0
    assert np.all(attended_rms(model) == 1)
    uspa = settings.replace(attn="uspa").model
    assert uspa.rho_first == RATE and uspa.rho == 0.8
    assert attention_constants(uspa)["row_scale"].shape == (36, 1, 64)


@pytest.mark.parametrize("preset, said", {
    "isometric": dict(attn="espa", alpha=0.0, beta=1.0, norm="none", act="gelu", transform="none",
                      mlp_init="looks_linear", row_scale="unit", identity_skip=False),
    "normless": dict(attn="espa", alpha=0.98, norm="none", act="relu", mlp_init="orthogonal"),
    "trained-skips": dict(attn="softmax", alpha=0.98, norm="none", trained_weights=True),
    "identity-skip": dict(attn="espa", alpha=0.0, identity_skip=True, mlp_init="looks_linear"),
    "preln": dict(attn="softmax", alpha=1.0, beta=1.0, norm="layer", act="gelu", init="gaussian",
                  mlp_init="gaussian", head_init="gaussian"),
}.items())
def test_presets_are_what_they_are_called(preset, said):
    model = values(resolve(preset))
    assert {name: model[name] for name in said} == said
    assert preset == "preln" or model["alpha"]**2 + model["beta"]**2 == pytest.approx(1)


@pytest.mark.parametrize("flags, expected", [
    (dict(), (0.4,) * 4), (dict(length=256), (0.1, 0.1, 0.1, 0.02)),
    (dict(length=2048), (0.0125,) * 4),
    (dict(length=1024, heads=8), (0.025,) * 6 + (0.005,) * 2), (dict(length=16), (0.8,) * 4),
    (dict(length=1025), (25.6 / 1025,) * 4), (dict(length=255), (25.6 / 255,) * 4),
    (dict(length=256, heads=2), (0.1,) * 2), (dict(length=256, row_scale="row-sum"), (0.1,) * 4),
    (dict(length=256, gamma=0.3), (0.3,) * 4),
    (dict(gamma=(0.1, 0.2, 0.3, 0.4)), (0.1, 0.2, 0.3, 0.4)),
    (dict(preset="paper", length=256), (0.005,) * 4)], ids=str)
def test_gamma_by_length(flags, expected):
    """25.6 / T, at most 0.8; from 256 to 1,024 tokens a fifth of it for a quarter of the heads."""
    assert resolve(**flags).model.gamma == pytest.approx(expected, rel=1e-12)


# --- A flag changes one thing -----------------------------------------------------------

CHAINS = ("isometric", "extra-heads", "paper", "identity-skip")   # rates fall with depth
FOLLOWS = {                                                # of each flag, what else changes
    "width": {"learning_rate"}, "heads": {"gamma"},
    "alpha": {"beta", "mlp_alpha", "mlp_beta"}, "beta": {"mlp_beta"},
    "identity_skip": {"pull_groups"}, "mlp_init": {"pull_groups"},
    "identity_values": {"pull_groups"}, "extra_heads": {"mlp_ratio"},
    "token_collision_rate": {"rho_first"}, "steps": {"warmup", "save_every"}}
OF_RATES = {"learning_rate", "lr_mult_embed", "lr_mult_qk", "lr_mult_vo", "decay_groups"}
OTHERS = dict(                                             # two values each: one is another
    depth=(20, 36), width=(128, 64), heads=(2, 4), length=(32, 64), attn=("vskip", "espa"),
    gamma=(0.33, 0.4), rho=(0.7, 0.8), rho_first=(0.2, 0.0), act=("tanh", "relu"),
    transform=("dks", "none"), eta=(0.8, 0.9), zeta=(1.4, 1.5), tau=(0.2, 0.3),
    alpha=(0.6, 0.0), norm=("rms", "none"), position=("learned", "rope"),
    row_scale=("unit", "row-sum"), identity_skip=(False, True), init=("orthogonal", "gaussian"),
    mlp_init=("looks_linear", "orthogonal"), head_init=("zero", "gaussian"),
    token_collision_rate=(0.5, 0.0), dtype=("bfloat16", "float32"), remat=(True, False),
    steps=(1000, 400), batch=(3, 16), accumulate=(4, 1), seed=(5, 0), optimizer=("muon", "adamw"),
    learning_rate=(0.123, 1.0), warmup=(7, 20), save_every=(9, 80), lr_mult_embed=(3.3, 1.0),
    lr_mult_qk=(3.3, 1.0), lr_mult_vo=(3.3, 1.0), weight_decay=(0.77, 0.0),
    decay_groups=("vo", "qk"), orthogonal_pull=(0.77, 0.0), pull_groups=("mlp", "vo"),
    extra_heads=(3, 0), mlp_ratio=(5.0, 4.0), lr_mult_path=(0.77, 1.0),
    unit_embeddings=(True, False), query_init=("near-identity", "gaussian"),
    objective=("mlm", "clm"), identity_values=(True, False), qk_norm=(True, False),
    mlp_alpha=(0.2, 0.0), mlp_beta=(0.98, 1.0), trained_weights=(True, False),
    parallel=(True, False),
    data=("a", None), val_data=("b", None), encoding=("c", None))
NOT_ALLOWED = {
    ("identity-skip", "alpha"): "identity-skip needs", ("identity-skip", "attn"): "needs attn espa",
    ("identity-skip", "objective"): "objective mlm goes",
    ("normless", "identity_skip"): "alpha 0",
    **{(preset, "identity_skip"): "needs attn espa" for preset in ("preln", "trained-skips")},
    ("preln", "transform"): "alpha^2",
    **{(preset, "parallel"): "parallel needs alpha 0" for preset in ("preln", "trained-skips")},
    **{(preset, name): "alpha^2" for preset in ("paper", "normless", "trained-skips")
       for name in ("mlp_alpha", "mlp_beta")},
    **{("extra-heads", name): "extra-heads go neither" for name in ("identity_values", "attn")},
    ("identity-skip", "identity_values"): "goes neither with",
    ("identity-skip", "trained_weights"): "nor with trained-weights",
    **{(preset, name): said for preset in (*CHAINS, "normless")
       for name, said in dict(parallel="parallel does not go", query_init="needs query-init zero",
                              qk_norm="qk-norm needs").items()}}
RATE_GIVEN = dict(learning_rate=1e-3)
OWN = ("isometric", "extra-heads", "paper", "normless", "trained-skips", "identity-skip", "preln")


def followers(preset, name):
    """What changes beside a flag, if it is given beside a preset."""
    if name == "depth":
        return {"learning_rate", "lr_mult_embed"} if preset in CHAINS else set()
    if name == "attn":                                     # of softmax, W^Q is not 0
        return {"query_init"} if preset in ("preln", "trained-skips") else set()
    if name == "heads" and preset == "extra-heads":
        return {"gamma", "extra_heads"}
    if name == "alpha" and preset == "preln":
        return {"beta", "mlp_alpha", "mlp_beta"}
    if name == "length":                                   # the paper's gamma is one for all
        return set() if preset == "paper" else {"gamma"}
    return FOLLOWS.get(name, set())


@pytest.mark.parametrize("name", [each.name for each in FIELDS])
@pytest.mark.parametrize("preset", OWN)
def test_a_flag_changes_its_field_and_what_follows_from_it(preset, name):
    """And nothing else. With another optimizer come the rates that were tuned for it."""
    before = values(resolve(preset, RATE))
    choices = OTHERS.get(name) or [before["beta"] * 1.001]
    value = next(each for each in choices if each != before[name])
    if (preset, name) in NOT_ALLOWED:
        with pytest.raises(ValueError, match=NOT_ALLOWED[preset, name].replace("^", r"\^")):
            resolve(preset, RATE, **{name: value})
        return
    settings = resolve(preset, RATE, **{name: value})
    after = values(settings)
    changed = {each for each in after if after[each] != before[each]}
    assert after[name] == (value if name != "gamma" else (value,) * 4)
    assert settings.flags == {name: value} and settings.preset == preset
    if name == "optimizer":
        rates = PRESETS[preset]["rates"][value]
        assert changed <= {name} | OF_RATES
        assert after["learning_rate"] == rates.learning_rate
        assert after["decay_groups"] == rates.decay_groups
        assert [after[f"lr_mult_{group}"] for group in ("embed", "qk", "vo")] == [*rates[1:4]]
    else:
        assert changed == {name} | followers(preset, name)


@given(st.sampled_from([*PRESETS]), st.sampled_from([*OTHERS]), st.data())
def test_a_flag_changes_no_more_beside_any_preset(preset, name, data):
    """Of all presets, the successors' too: refused in one line, or its field and what follows."""
    before, value = values(resolve(preset)), data.draw(st.sampled_from(OTHERS[name]))
    try:
        after = values(resolve(preset, **{name: value}))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    changed = {each for each in after if after[each] != before[each]}
    others = OF_RATES | {"query_init"} if name in ("optimizer", "attn") else followers(preset, name)
    assert changed <= {name} | others


def test_the_rules_of_what_follows():
    """beta of alpha, warm-up and checkpoints of steps, one gamma for every head."""
    settings = resolve(alpha=0.6, steps=1000, heads=2, gamma=0.2, collision_rate=1.0)
    assert settings.model.beta == pytest.approx(0.8) and settings.model.gamma == (0.2, 0.2)
    assert settings.training.warmup == 50 and settings.training.save_every == 200
    assert settings.model.rho_first == 0.999               # below 1, though all tokens are equal
    assert resolve(steps=1).training.save_every == 1


@given(st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([96, 192]))
def test_extra_heads_need_no_more_parameters(heads, width):
    """Half as many more, at least one, and smaller MLPs: the isometric network's number."""
    def count(preset):
        config = resolve(preset, heads=heads, width=width).model
        shapes = jax.eval_shape(partial(init, config=config, vocabulary=50), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))
    all_heads = resolve("extra-heads", heads=heads, width=width).model.all_heads
    assert all_heads == max(heads * 3 // 2, 2)
    assert count("extra-heads") == count("isometric")


SOME = {name: st.sampled_from(choices) for name, choices in OTHERS.items()}
SOME |= dict(
    depth=st.integers(1, 99), width=st.sampled_from([8, 64, 96]), heads=st.sampled_from([1, 2, 4]),
    length=st.integers(2, 2000), gamma=st.sampled_from([0.1, (0.1, 0.2), (0.1, 0.1, 0.1, 0.02)]),
    act=st.sampled_from(NAMES), beta=st.sampled_from([0.6, 1.0]), steps=st.integers(1, 999))
FLAGS = st.fixed_dictionaries({}, optional=SOME)
few_flags = FLAGS.flatmap(lambda flags: st.sampled_from(
    [dict([*flags.items()][start:start + 3]) for start in range(max(len(flags), 1))]))


@given(st.sampled_from([*PRESETS]), st.sampled_from([0.0, RATE, 1.0]), st.sampled_from(BACKENDS),
       few_flags, few_flags, few_flags)
def test_replacing_is_resolving_anew(preset, rate, backend, first, second, third):
    """No default stays from before: the same as with all flags at once, the later ones winning.

    What follows from the data and the machine, the collision rate and the dtype, stays.
    """
    settings, together = outcome(resolve, preset, rate, backend, **first), first
    for more in (second, third):
        together = {**together, **more}
        expected = outcome(resolve, preset, rate, backend, **together)
        settings = outcome(settings.replace, **more) if settings else expected
        assert settings == expected


def outcome(make, *arguments, **flags):
    """Settings, or None where they are refused."""
    try:
        return make(*arguments, **flags)
    except ValueError as error:
        assert "\n" not in str(error)
        return None


# --- What run.py says and does ----------------------------------------------------------


@pytest.mark.parametrize("preset", OWN)
def test_rates_that_were_not_tuned_are_noted(preset):
    """By the flags' names, unless a learning rate is given or all is as the preset has it."""
    assert "with unit-embeddings False" in untuned("isometric", dict(unit_embeddings=False))
    assert "sas are those of preln" in untuned("sas", {}) and not untuned("op", RATE_GIVEN)
    same = {name: value for name, value in PRESETS[preset].items() if name in ("attn", "act")}
    assert untuned(preset, {}) is untuned(preset, dict(same, depth=3, gamma=0.1)) is None
    note = untuned(preset, dict(act="silu", position="none", depth=3))
    assert preset in note and "act silu, position none;" in note and "\n" not in note
    assert untuned(preset, dict(act="silu", learning_rate=1e-3)) is None
    own = {name: getattr(resolve(preset).model, name) for name in ("extra_heads", "query_init")}
    assert untuned(preset, own) is None
    assert ("with adamw" in (untuned(preset, dict(optimizer="adamw")) or "")) == (
        preset == "trained-skips")


@pytest.fixture
def settings_of(monkeypatch, capsys):
    """(the settings that main would train with given arguments, what it prints before)"""
    def settings_of(line):
        found = []
        monkeypatch.setattr(loop, "train", lambda settings, *_: found.append(settings))
        main(line.split())
        return found[0], capsys.readouterr().out
    return settings_of


def test_the_main_job_is_the_default(settings_of):
    """`python run.py` and `--depth 36 --attn espa` are one network, trained alike, with no note."""
    (plain, said), (named, said_too) = map(settings_of, ("", "--depth 36 --attn espa"))
    assert said == said_too == ""
    assert (plain.model, plain.training, plain.data) == (named.model, named.training, named.data)
    assert plain.preset == named.preset == "isometric"
    assert plain.flags == {} and named.flags == dict(depth=36, attn="espa")
    assert settings_of("--act relu")[1].startswith("note: the learning rates of preset isometric")


def test_a_target_out_of_reach_is_replaced_and_nothing_else(settings_of):
    """eta = 0.9 takes 13 blocks: with 3 the nearest that there is, and the corpus's own rate."""
    settings, said = settings_of("--preset paper --depth 3")
    assert said.startswith("note: eta = 0.9 is out of reach") and said.count("\n") == 1
    assert settings.flags == dict(depth=3, eta=pytest.approx(0.604826, abs=1e-6))
    trained = resolve(settings.preset, RATE, "gpu", **settings.flags).model
    assert trained.token_collision_rate == RATE and trained.dtype == "bfloat16"
