"""Hostile input: whatever is on the command line or in a file, one line and exit status 2.

Never a traceback. MINITF_FUZZ=N makes N random cases of each kind.
"""
import json
import os
import random
import shutil
from dataclasses import fields

import jax
import numpy as np
import pytest

from minitf import resolve
from minitf.cli import host, loop, main as commands, metrics
from minitf.cli.main import main
from minitf.config import FIELDS, DataConfig, Sampling
from minitf.network.init import init
from minitf.presets import PRESETS
from minitf.theory.families import FAMILIES
from minitf.theory.kernels import attention_constants, network_activation
from minitf.training import checkpoint, data
from minitf.training.encoding import find_files, load_encoding
from minitf.training.optimizer import group_rates, make_optimizer

CASES = int(os.environ.get("MINITF_FUZZ", 60))
SWITCHES = ("identity_skip", "remat", "identity_values", "qk_norm", "trained_weights", "parallel")
NASTY = ["", " ", "0", "-1", "-0.0", "1", "2", "3", "0.5", "1e-300", "1e300", "1e999", "-inf",
         "nan", "1e5", "99999999999999999999", "9" * 5000, "0x10", "1_000", "٣", "½", "None",
         "True", "[]", "../..", "/dev/null", "/", "~", "*", "**", ",", ",,,", "a\nb", "\x1b[31m",
         "💥", "\udc80", "x" * 5000, "%s%n", "--depth", "layer", "0.1,0.2", "0.1,0.1,0.1,0.02",
         "1e-9,1,2,3", "0.5,nan,1,1", "0.3,", "qk", "qk,vo,mlp", "muon", "adamw", "float32",
         "looks_linear", "gaussian", "row-sum", "tat", "dks", "rope", "relu", "gelu", *FAMILIES,
         *PRESETS]


def refusal(arguments, capsys):
    """The one line with which main refuses; None if it does not."""
    try:
        main(arguments)
    except SystemExit as end:
        errors = capsys.readouterr().err
        one_line = errors.startswith("run.py: ") and errors.count("\n") == 1
        assert end.code == 2 and one_line, (arguments, end.code, errors)
        return errors
    capsys.readouterr()
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one small checkpoint, made without training."""
    folder = tmp_path_factory.mktemp("saved")
    settings = resolve("isometric", 0.1, depth=1, width=4, heads=1, length=4, attn="softmax",
                       position="none", act="tanh", mlp_init="orthogonal", transform="tat",
                       optimizer="adamw")
    encoding = load_encoding(str(data.RANKS))
    params = jax.jit(init, static_argnums=(1, 2))(jax.random.key(0), settings.model,
                                                  encoding.n_vocab)
    opt_state = make_optimizer("adamw").init(params)
    checkpoint.save(folder, checkpoint.Checkpoint(7, settings, encoding, "", params, opt_state))
    return folder


# --- The command line -------------------------------------------------------------------


def test_command_lines(capsys, monkeypatch):
    """Any flags with any values: refused, or settings whose numbers are all finite."""
    accepted = []

    def all_but_training(settings, *_):
        host.require_memory(settings, 1024)
        settings = resolve(settings.preset, 0.012, **settings.flags)     # as loop.train does
        model = settings.model
        if model.depth * model.length**2 < 10**6:
            for name, table in attention_constants(model).items():
                assert np.isfinite(table).all() or name == "bias", (settings, name)
            rates = jax.tree.leaves(group_rates(settings.training, model))
            assert all(np.isfinite(rate).all() for rate in rates), settings
            phi = network_activation(model)
            assert np.isfinite([*vars(phi).values()][1:]).all(), settings
        accepted.append(settings)

    monkeypatch.setattr(loop, "train", all_but_training)
    monkeypatch.chdir("/")
    draw, refused = random.Random(0), 0
    choices = {each.name: each.metadata["choices"] for each in (*FIELDS, *fields(Sampling))}
    choices |= dict(preset=PRESETS, resume=(), sample=(), eval=(), out=())
    choices |= {"none-such": (), "": ()}
    for _ in range(4 * CASES):
        arguments = []
        for name in draw.sample([*choices], draw.randint(1, 3)):
            fitting = [*choices[name]] or ["1", "2", "8", "0.5", "0.9", "0.1"]
            value = draw.choice(fitting if draw.random() < 0.6 else NASTY)
            switch = name in SWITCHES and draw.random() < 0.7
            pair = ["--" + draw.choice(["", "no-"]) * switch + name.replace("_", "-"), value]
            arguments += pair[:1 if switch or draw.random() < 0.1 else 2]
        refused += refusal(arguments, capsys) is not None
    assert refused + len(accepted) == 4 * CASES and len(accepted) > CASES / 2
    print(f"\ncommand lines: {refused} refused, {len(accepted)} are settings")


@pytest.mark.parametrize("name", ["identity_skip", "espa", "uspa", "vskip", "softmax"])
def test_no_accepted_configuration_has_constants_that_are_not_finite(name):
    """Extreme values of what the constants are made of, all at once: refused, or finite.

    B of uspa is -inf where A is 0.
    """
    draw, fine = random.Random(1), 0
    extreme = lambda low, high: 10 ** draw.uniform(low, high)
    for _ in range(CASES):
        flags = dict(attn=name, depth=draw.choice([1, 2, 7, 40]), heads=draw.choice([1, 2]),
                     width=4, length=draw.choice([2, 3, 9]), rho=1 - extreme(-12, -0.01),
                     rho_first=extreme(-9, -0.01), row_scale=draw.choice(["unit", "row-sum"]),
                     token_collision_rate=draw.choice([0.0, 1.0, 1e-300, 0.5]))
        least, count = draw.choice([-12, -12, -300]), draw.choice([1, flags["heads"]])
        flags["gamma"] = tuple(extreme(least, 2) for _ in range(count))
        if name == "identity_skip":
            flags |= dict(attn="espa", identity_skip=True)
        try:
            constants = attention_constants(resolve(**flags).model)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        fine += 1
        for table, values in constants.items():
            infinite = table == "bias" and not np.isnan(values).any()
            assert np.isfinite(values).all() or infinite, flags
    assert fine > CASES / 5


@pytest.mark.parametrize("flags", [
    "--depth 999999999", "--width 99999999", "--length 999999", "--batch 999999999",
    "--steps 3000000000", "--prompt x", "--resume a --sample b", "--gamma 0.1,0.2",
    "--heads 99999999999999999999 --width 99999999999999999999", "--preset paper --depth 99999999",
    "--learning-rate 1e300", "--weight-decay 1e300", "--lr-mult-qk 1e300",
    "--identity-skip", "--preset identity-skip --alpha 0.9",
    "--length 2048 --gamma 0.1,0.1,0.1,0.2 --attn espa", "--decay-groups qk,none", "--warmup 400",
    "--out /dev/null",
    "--out /proc/none/there --depth 1 --length 8"])
def test_what_no_machine_can_hold_or_no_run_could_mean(flags, capsys):
    attn = [] if "--attn" in flags or "--resume" in flags else ["--attn", "softmax"]
    assert refusal(flags.split() + attn, capsys)


# --- Texts ------------------------------------------------------------------------------

TEXTS = {"invalid UTF-8": b"To be, \xff\xfe or not", "NUL": b"To be\0or not",
         "late NUL": b"To be or not " * 9000 + b"\0", "empty": b"", "a byte": b"a",
         "an emoji": "🎭".encode(), "half an emoji": "🎭".encode()[:2],
         "surrogate": b"\xed\xa0\x80", "short": b"To be, or not to be"}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_refused(name, tmp_path, capsys):
    (tmp_path / "text").write_bytes(TEXTS[name])
    assert refusal(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_sparse_gigabyte_is_not_read(saved, tmp_path, capsys):
    for name in ("text", "checkpoint-00000009.npz"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**30)
    assert "NUL" in refusal(["--data", str(tmp_path / "text")], capsys)
    assert "too large" in refusal(["--encoding", str(tmp_path / "text")], capsys)
    assert "no usable" in refusal(["--sample", str(tmp_path)], capsys)


def test_a_named_pipe_among_other_files_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("Exeunt omnes")
    assert find_files(str(tmp_path / "*")) == [tmp_path / "text"]


@pytest.mark.parametrize("arguments, said", [
    (["--figure", ""], "--figure needs --plot"), (["--encoding", ""], "no encoding"),
    (["--data", ""], "data must name"), (["--val-data", ""], "data must name"),
    (["--quantize", ""], "quantize goes with eval")], ids=str)
def test_what_is_empty_is_not_the_default(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(arguments, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("line", [
    '{"step": 1, "loss": "x", "grad_norm": 1.0}', '{"step": 1, "loss": null, "grad_norm": 1.0}',
    '{"step": 1, "loss": 1.0}', '{"step": 1, "loss": 1.0, "grad_norm": 1' + "0" * 400 + "}",
    '{"step": 1' + "0" * 400 + "}", '{"step": 1, "val_tokens": 9}', '{"loss": 1.0}', "{}", "[{}",
    '{"step": 0, "mean_square": [null, 0.0]}', '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_metrics_of_another_format(line, saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "}" * (line == "[{}") + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl cannot be read"):
        metrics.read(tmp_path / "run")
    checkpoint.rewind(tmp_path / "run" / "metrics.jsonl", 1)


@pytest.mark.parametrize("text", ["ab" * 20_000, "the " * 10_000, "🎭" * 10_000, "\n\n\t" * 10_000,
                                  "\u0301" * 10_000])
def test_monotonous_text_is_text(text, tmp_path):
    (tmp_path / "text").write_text(text)
    config = DataConfig(data=str(tmp_path / "text"), val_data=None, encoding=str(data.RANKS))
    corpus = data.load(config, 64)
    rate = data.token_collision_rate(corpus.train_counts)
    assert corpus.encoding.decode([*corpus.train, *corpus.validation]) == text and 0 < rate <= 1


def test_one_token_repeated_is_refused_for_what_it_is(tmp_path, capsys):
    (tmp_path / "text").write_text(" the" * 20_000)
    line = refusal(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"),
                    "--depth", "1"], capsys)
    assert "one token" in line and not (tmp_path / "out").exists()


def test_evaluation_of_texts(saved, tmp_path, capsys):
    for name, content in {**TEXTS, "tokens": b"aaaa bbbb"}.items():
        (tmp_path / "text").write_bytes(content)
        refused = refusal(["--eval", str(saved), "--data", str(tmp_path / "text")], capsys)
        assert (refused is None) == (name in ("an emoji", "short", "tokens")), name


# --- Damaged files ----------------------------------------------------------------------


def mutated(content, draw):
    """Bytes with one piece flipped, cut, doubled, zeroed, moved or replaced."""
    content, at = bytearray(content), draw.randrange(len(content))
    size = draw.choice([1, 1, 2, 8, 100, 5000])
    piece = bytes(content[at:at + size])
    kind = draw.randrange(6)
    if kind == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 5:
        return bytes(content[:at])
    else:
        others = [b"", piece * 2, bytes(len(piece)), draw.randbytes(size)]
        content[at:at + size] = others[kind - 1]
    return bytes(content)


def test_rank_files(tmp_path):
    """Refused in one line, or an encoding that can encode any text."""
    draw, refused, content = random.Random(1), 0, data.RANKS.read_bytes()
    for _ in range(CASES):
        (tmp_path / "ranks").write_bytes(mutated(content, draw))
        try:
            encoding = load_encoding(str(tmp_path / "ranks"))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert encoding.decode(encoding.encode("Exeunt 🎭\0\n")) == "Exeunt 🎭\0\n"
    print(f"\nrank files: {refused} of {CASES} refused, the others can encode any text")


def test_checkpoints_of_damaged_bytes(saved, tmp_path):
    """Refused in one line, or the same: a byte that says nothing, such as a date."""
    draw, refused, path = random.Random(2), 0, checkpoint.checkpoints(saved)[0]
    content, expected = path.read_bytes(), checkpoint.load_checkpoint(path)
    for _ in range(CASES):
        (tmp_path / "c.npz").write_bytes(mutated(content, draw))
        try:
            found = checkpoint.load_checkpoint(tmp_path / "c.npz")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert jax.tree.all(jax.tree.map(np.array_equal, found[4:], expected[4:]))
            assert found[:2] == expected[:2]
    print(f"\ndamaged checkpoints: {refused} of {CASES} refused, the others hold the same")


def test_checkpoints_that_lie(saved, tmp_path):
    """Whole files with a checksum that holds, whose content was made up."""
    draw, refused = random.Random(3), 0
    held = checkpoint.read(checkpoint.checkpoints(saved)[0])
    values = [None, True, -1, 0, 1, 3, 10**12, 10**400, 0.5, float("nan"), "", "espa", "(",
              "(a+)+$", [], {}, [[]], [0.1], {"a": 1}, {"a": -1}, "é\n"]
    for _ in range(CASES):
        lying, name = dict(held), draw.choice([*held, *["meta"] * 20])
        if name == "meta":
            meta = json.loads(held["meta"].tobytes())
            settings = meta["settings"]
            inside = draw.choice([meta, settings, settings["model"], settings["model"],
                                  settings["training"], settings["data"], settings["flags"]])
            inside[draw.choice([*inside, "none such"])] = draw.choice(values)
            text = json.dumps(draw.choice([meta] * 9 + [[]]))
            lying["meta"] = np.frombuffer(text.encode(), np.uint8)
        else:
            array = held[name]
            as_text = array.astype("U3") if array.size < 5000 else array.view(np.uint8)
            lying[name] = draw.choice([
                array.astype(np.float64), array.reshape(-1)[1:], np.array(3), array[None], -array,
                array.ravel()[:0], as_text])
        np.savez(tmp_path / "c.npz", **lying, sha256=checkpoint.checksum(sorted(lying.items())))
        try:
            found = checkpoint.load_checkpoint(tmp_path / "c.npz")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert isinstance(found.step, int) and found.settings.replace()
            assert found.encoding.decode(found.encoding.encode("é")) == "é"
    print(f"\nlying checkpoints: {refused} of {CASES} refused, the others are checkpoints")


def test_checkpoints_larger_inside_than_outside(saved, tmp_path):
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(10**7))
    with pytest.raises(ValueError, match="compressed"):
        checkpoint.load_checkpoint(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", a=np.zeros(10**3))
    content = (tmp_path / "c.npz").read_bytes()
    assert content.count(b"(1000,), }         ") == 1
    larger = content.replace(b"(1000,), }         ", b"(1000000000000,), }")
    (tmp_path / "c.npz").write_bytes(larger)
    with pytest.raises(ValueError):
        checkpoint.load_checkpoint(tmp_path / "c.npz")


@pytest.mark.parametrize("hardware, home, kept", [
    ("gpu", "made", True), ("tpu", "made", True), ("cpu", "made", False), ("gpu", "a file", False)])
def test_compiled_programs_are_kept_in_the_users_folder(hardware, home, kept, tmp_path,
                                                       monkeypatch):
    """For accelerators; where there can be no such folder, none is used and nothing is said."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    monkeypatch.setattr(commands, "hardware", lambda: hardware)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        commands.keep_compiled_programs()
        expected = str(tmp_path / home / "minitf") if kept else None
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
