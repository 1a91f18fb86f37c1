"""Hostile input: whatever is on the command line or in a file, there is one line and exit status 2, never a traceback.

MINITF_FUZZ=N makes N random cases of each kind.
"""
import json
import os
import random
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest

import run
from minitf import Config, checkpoint, data, model, theory, train
from minitf.config import Sampling

CASES = int(os.environ.get("MINITF_FUZZ", 150))
RANKS = Path(run.ENCODING)
NASTY = ["", " ", "0", "-1", "-0.0", "1", "2", "3", "0.5", "1e-300", "1e300", "1e999", "-inf", "nan", "1e5",
         "99999999999999999999", "9" * 5000, "0x10", "1_000", "٣", "½", "None", "True", "[]", "../..", "/dev/null", "/", "~", "*", "**", ",", ",,,",
         "a\nb", "\x1b[31m", "💥", "\udc80", "x" * 5000, "%s%n", "--depth", "softmax", "espa", "layer", "relu", "gelu",
         "tat", "dks", "rope"]


def refusal(arguments, capsys):
    """The one line with which main refuses; None if it does not."""
    try:
        run.main(arguments)
    except SystemExit as end:
        errors = capsys.readouterr().err
        assert end.code == 2 and errors.startswith("run.py: ") and errors.count("\n") == 1, (arguments, end.code, errors)
        return errors
    capsys.readouterr()
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one small checkpoint, made without training."""
    folder = tmp_path_factory.mktemp("saved")
    config = Config(depth=1, width=4, heads=1, length=4, attn="softmax", position="none", act="tanh", init="orthogonal", transform="tat",
                    repeat_rate=0.1, optimizer="adamw")
    encoding = data.load_encoding(str(RANKS))
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(0), config, encoding.n_vocab)
    opt_state = train.make_optimizer(config).init(params)
    checkpoint.save(folder, checkpoint.Checkpoint(7, config, encoding, "", params, opt_state))
    return folder


def test_command_lines(capsys, monkeypatch):
    configurations = []

    def all_but_training(config, out):
        train.require_memory(config, 1024)
        if config.depth * config.length**2 < 10**6:
            assert all(np.isfinite(each).all() or name == "bias"
                       for name, each in theory.constants(run.reachable(config)).items()), config
        configurations.append(config)

    monkeypatch.setattr(run, "train", all_but_training)
    monkeypatch.chdir("/")
    draw, refused = random.Random(0), 0
    names = [each.name for each in (*fields(Config), *fields(Sampling))]
    names += ["resume", "sample", "eval", "out", "none-such", ""]
    for _ in range(4 * CASES):
        arguments = []
        for _ in range(draw.randint(1, 3)):
            arguments += ["--" + draw.choice(names).replace("_", "-"), draw.choice(NASTY)][:draw.choice([1, 2, 2, 2, 2])]
        refused += refusal(arguments, capsys) is not None
    assert refused + len(configurations) == 4 * CASES and configurations
    print(f"\ncommand lines: {refused} refused, {len(configurations)} are configurations")


@pytest.mark.parametrize("flags", [
    "--depth 999999999", "--width 99999999", "--length 999999", "--batch 999999999", "--steps 3000000000", "--prompt x",
    "--resume a --sample b", "--far 5", "--far 1 --rescale plain", "--own", "--out /dev/null", "--out /proc/none/there --depth 1 --length 8"])
def test_what_no_machine_can_hold_or_no_run_could_mean(flags, capsys):
    assert refusal(flags.split() + ["--attn", "softmax"] * ("--resume" not in flags), capsys)


TEXTS = {"invalid UTF-8": b"To be, \xff\xfe or not", "NUL": b"To be\0or not",
         "late NUL": b"To be or not " * 9000 + b"\0", "empty": b"", "a byte": b"a", "an emoji": "🎭".encode(),
         "half an emoji": "🎭".encode()[:2], "surrogate": b"\xed\xa0\x80", "short": b"To be, or not to be"}


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


@pytest.mark.parametrize("text", ["ab" * 20_000, "the " * 10_000, "🎭" * 10_000, "\n\n\t" * 10_000, "\u0301" * 10_000])
def test_monotonous_text_is_text(text, tmp_path):
    (tmp_path / "text").write_text(text)
    encoding = data.load_encoding(str(RANKS))
    corpus = data.load(str(tmp_path / "text"), encoding, 64)
    rate = data.repeat_rate(corpus.train_counts)
    assert encoding.decode([*corpus.train, *corpus.held_out]) == text and 0 < rate <= 1


def test_one_token_repeated_is_refused_for_what_it_is(tmp_path, capsys):
    (tmp_path / "text").write_text(" the" * 20_000)
    line = refusal(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--depth", "1"], capsys)
    assert "one token" in line and not (tmp_path / "out").exists()


def test_evaluation_of_texts(saved, tmp_path, capsys):
    for name, content in {**TEXTS, "tokens": b"aaaa bbbb"}.items():
        (tmp_path / "text").write_bytes(content)
        fine = name in ("an emoji", "short", "tokens")
        assert (refusal(["--eval", str(saved), "--data", str(tmp_path / "text")], capsys) is None) == fine, name


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
        content[at:at + size] = [b"", piece * 2, bytes(len(piece)), draw.randbytes(size)][kind - 1]
    return bytes(content)


def test_rank_files(tmp_path):
    draw, refused, content = random.Random(1), 0, RANKS.read_bytes()
    for _ in range(CASES):
        (tmp_path / "ranks").write_bytes(mutated(content, draw))
        try:
            encoding = data.load_encoding(str(tmp_path / "ranks"))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert encoding.decode(encoding.encode("Exeunt 🎭\0\n")) == "Exeunt 🎭\0\n"
    print(f"\nrank files: {refused} of {CASES} refused, the others can encode any text")


def test_checkpoints_of_damaged_bytes(saved, tmp_path):
    draw, refused, path = random.Random(2), 0, checkpoint.checkpoints(saved)[0]
    content, expected = path.read_bytes(), checkpoint.load(path)
    for _ in range(CASES):
        (tmp_path / "c.npz").write_bytes(mutated(content, draw))
        try:
            found = checkpoint.load(tmp_path / "c.npz")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:                                             # a byte that says nothing, such as a date
            assert jax.tree.all(jax.tree.map(np.array_equal, found[4:], expected[4:])) and found[:2] == expected[:2]
    print(f"\ndamaged checkpoints: {refused} of {CASES} refused, the others hold the same")


def test_checkpoints_that_lie(saved, tmp_path):
    """Whole files with a checksum that holds, whose content was made up."""
    draw, refused, held = random.Random(3), 0, checkpoint.read(checkpoint.checkpoints(saved)[0])
    values = [None, True, -1, 0, 1, 3, 10**12, 10**400, 0.5, float("nan"), "", "espa", "(", "(a+)+$",
              [], {}, [[]], {"a": 1}, {"a": -1}, "é\n"]
    for _ in range(CASES):
        lying, name = dict(held), draw.choice([*held, *["meta"] * 20])
        if name == "meta":
            meta = json.loads(held["meta"].tobytes())
            inside = draw.choice([meta, meta["config"], meta["config"]])
            inside[draw.choice([*inside, "none such"])] = draw.choice(values)
            lying["meta"] = np.frombuffer(json.dumps(draw.choice([meta] * 9 + [[]])).encode(), np.uint8)
        else:
            array = held[name]
            as_text = array.astype("U3") if array.size < 5000 else array.view(np.uint8)
            lying[name] = draw.choice([array.astype(np.float64), array.reshape(-1)[1:], np.array(3), array[None], -array,
                                       array.ravel()[:0], as_text])
        np.savez(tmp_path / "c.npz", **lying, sha256=checkpoint.checksum(lying))
        try:
            found = checkpoint.load(tmp_path / "c.npz")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert isinstance(found.step, int) and found.encoding.decode(found.encoding.encode("é")) == "é"
    print(f"\nlying checkpoints: {refused} of {CASES} refused, the others are checkpoints")


def test_checkpoints_larger_inside_than_outside(saved, tmp_path):
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(10**7))
    with pytest.raises(ValueError, match="compressed"):
        checkpoint.load(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", a=np.zeros(10**3))
    content = (tmp_path / "c.npz").read_bytes()
    assert content.count(b"(1000,), }         ") == 1
    (tmp_path / "c.npz").write_bytes(content.replace(b"(1000,), }         ", b"(1000000000000,), }"))
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path / "c.npz")
