"""Runs that survive: real processes, killed at random and within the phases of a save.

They end as if nothing had happened. MINITF_KILLS=N kills N times in each phase and N times at
random, instead of once.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
import scipy.special
from processes import PHASES, ROOT, Running, die_in

import minitf
from minitf.cli.main import main
from minitf.presets import PRESETS
from minitf.training import checkpoint, data, train

TINY = ("--depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 200 --save-every 20 "
        "--attn softmax --act tanh --mlp-init orthogonal --transform tat --tau 0.05 "
        "--position none --data").split() + [f"{ROOT}/minitf/*/*.py"]


def launch(*arguments, phase="", nth=0):
    """Starts a process that runs run.py, and is killed in a phase if one is named."""
    return Running(arguments, partial(die_in, phase, nth) if phase else None)


def finish(process):
    """(status, output, errors)"""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def refusal(capsys, *arguments):
    """The one line with which run.py refuses."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1, errors
    return errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, errors = finish(launch(*TINY, "--out", folder))
    assert status == 0, errors
    return folder


def arrays(folder):
    """What the newest checkpoint holds."""
    return checkpoint.read(checkpoint.checkpoints(folder)[0])


def lines(folder):
    """The metrics, without the times taken."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


def assert_same(folder, other):
    got, expected = arrays(folder), arrays(other)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert lines(folder) == lines(other)


def step_of(folder):
    """The step of the newest usable checkpoint."""
    return checkpoint.newest(folder)[0].step


def wait_for(process, folder, step):
    """Until the checkpoint of a step or a later one is there."""
    while process.poll() is None and not any(
            checkpoint.number(path) >= step for path in checkpoint.checkpoints(folder)):
        time.sleep(0.005)


def test_killed_at_any_point_and_resumed_ends_the_same(whole, tmp_path):
    """Bit for bit, metrics and all."""
    kills = int(os.environ.get("MINITF_KILLS", 1))
    draw, counts = random.Random(0), {}
    folder, arguments = tmp_path / "run-0", [*TINY, "--out", tmp_path / "run-0"]
    phases = [*PHASES] if kills > 1 else [*PHASES][::2]
    for number, phase in enumerate((phases + ["random"]) * kills):
        if arguments[0] == "--resume" and step_of(folder) >= 150:  # nearly done: begin another
            assert step_of(folder) == 200 or finish(launch(*arguments))[0] == 0
            assert_same(folder, whole)
            folder = tmp_path / f"run-{number}"
            arguments = [*TINY, "--out", folder]
        begun = arguments[0] == "--resume"
        if phase == "random":
            process = launch(*arguments)
            wait_for(process, folder, step_of(folder) + 20 if begun else 0)
            time.sleep(draw.uniform(0, 0.05))              # a step takes about a millisecond
            process.send_signal(signal.SIGKILL)
        else:
            nth = draw.randint(1, 2) + (not begun) * 6 + 20 * (phase == "metrics")
            nth *= 25 if phase == "write" else 1           # arrays in a checkpoint, about
            process = launch(*arguments, phase=phase, nth=nth)
        status, _, errors = finish(process)
        late = phase == "random" and status == 0           # it had ended: a busy machine
        assert status == -signal.SIGKILL or late, (phase, status, errors)
        counts[phase] = counts.get(phase, 0) + (not late)
        arguments = ["--resume", folder]
    if step_of(folder) < 200:              # else killed after its last checkpoint: nothing is left
        status, _, errors = finish(launch(*arguments))
        assert status == 0, errors
    assert_same(folder, whole)
    print("killed and resumed:", counts)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_signal_saves_and_says_how_to_go_on(whole, tmp_path, capsys, number, status):
    """SIGTERM's is taken up again and ends as if nothing had happened; SIGINT's saves alike."""
    folder = tmp_path / "run"
    process = launch(*TINY, "--out", folder)
    wait_for(process, folder, 20)
    if number == signal.SIGTERM:           # a folder whose run lives is refused to others
        process.send_signal(signal.SIGSTOP)
        assert "another run" in refusal(capsys, "--resume", folder)
        process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    got, _, errors = finish(process)
    assert got == status, errors
    assert errors.count("\n") == 1 and f"--resume {folder}" in errors
    if number == signal.SIGTERM:
        assert finish(launch("--resume", folder))[0] == 0
        assert_same(folder, whole)
    assert 20 <= step_of(folder) == len([line for line in lines(folder) if "loss" in line])


# --- What may be wrong with a folder, a disk, a loss ------------------------------------


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def test_loads_in_one_call_from_another_folder(copy):
    config, params, constants, encoding = minitf.load(copy)
    tokens = np.array(encoding.encode("Mark my words, and do not")[:8], np.int32)
    logits = minitf.forward(params, constants, tokens, config)
    assert np.isfinite(logits).all() and logits.shape == (8, encoding.n_vocab) == (8, 1024)
    assert minitf.load(checkpoint.checkpoints(copy)[1]).config == config


def test_what_is_loaded_is_what_was_saved(copy, tmp_path):
    """Step, settings, parameters, state and encoding, also where gamma differs by head."""
    saved = checkpoint.newest(copy)[0]
    for flags in ({}, dict(attn="espa", gamma=(0.1, 0.02))):
        before = saved._replace(settings=saved.settings.replace(**flags))
        checkpoint.save(tmp_path, before)
        after = checkpoint.newest(tmp_path)[0]
        assert jax.tree.all(jax.tree.map(np.array_equal, before[4:], after[4:]))
        assert before[:2] == after[:2] and before.digest == after.digest
        text = "Exeunt omnes"
        assert after.encoding.encode(text) == before.encoding.encode(text)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "foreign", "other shapes",
                                    "another format", "bytes more", "bytes less"])
def test_falls_back_to_the_checkpoint_before(copy, damage):
    newest, before, *best = checkpoint.checkpoints(copy)
    for path in best:
        path.unlink()
    content, half = newest.read_bytes(), newest.stat().st_size // 2
    if damage in ("other shapes", "another format"):
        held = checkpoint.read(newest)
        if damage == "other shapes":
            held["params/embed"] = held["params/embed"][:-1]
        else:
            meta = {**json.loads(held["meta"].tobytes()), "format": checkpoint.FORMAT - 1}
            held["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(newest, **held, sha256=checkpoint.checksum(sorted(held.items())))
    elif damage == "foreign":
        np.savez(newest, a=np.arange(3))
    else:
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
        newest.write_bytes({
            "truncated": content[:half], "empty": b"", "one bit": flipped,
            "bytes more": content[:half] + b"1234567" + content[half:],
            "bytes less": content[:half] + content[half + 7:]}[damage])
    found, [(path, problem)] = checkpoint.newest(copy)
    assert found.step == checkpoint.number(before) and path == newest and "\n" not in problem
    assert damage != "another format" or "format" in problem
    before.unlink()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        checkpoint.newest(copy)


def test_nothing_in_a_checkpoint_is_executed(copy):
    held = checkpoint.read(checkpoint.checkpoints(copy)[0])
    held["params/embed"] = np.array([open], object)
    np.savez(checkpoint.checkpoints(copy)[0], allow_pickle=True, **held)
    with pytest.raises(ValueError, match="allow_pickle"):
        checkpoint.load_checkpoint(checkpoint.checkpoints(copy)[0])


def test_resuming_refuses_by_name_and_continues_with_more_steps(copy, capsys, monkeypatch):
    line = refusal(capsys, "--resume", copy, "--width", 16, "--depth", 2)
    assert "--width" in line and "--depth" not in line
    assert "trained" in refusal(capsys, "--resume", copy)
    assert "data" in refusal(capsys, "--resume", copy, "--steps", 204, "--data", data.RANKS)
    with monkeypatch.context() as patch:                   # a run of before a preset was changed
        patch.setitem(PRESETS, "isometric", PRESETS["isometric"] | dict(orthogonal_pull=0.3))
        assert "other defaults" in refusal(capsys, "--resume", copy, "--steps", 204)
    newest = checkpoint.checkpoints(copy)[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    status, said, errors = finish(launch("--resume", copy, "--steps", 204, "--learning-rate", 1e-4))
    assert "goes on at" in said and "peak is 0.0001 now" in said
    assert status == 0 and errors.count("\n") == 1 and "falling back" in errors, errors
    assert [line["step"] for line in lines(copy) if "loss" in line] == [*range(1, 205)]
    assert checkpoint.newest(copy)[0].settings.training.learning_rate == 1e-4


def test_a_resume_that_is_refused_changes_nothing(copy, capsys):
    newest = checkpoint.checkpoints(copy)[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in copy.iterdir() if path.name != "lock"}
    for flags in (["--data", data.RANKS], ["--mesh", "data=9"], ["--depth", 3]):
        refusal(capsys, "--resume", copy, "--steps", 204, *flags)
    assert {path: path.read_bytes() for path in copy.iterdir() if path.name != "lock"} == before


def test_an_output_that_is_full_is_said_in_a_line(copy):
    given = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "run.py", "--sample", copy, "--tokens", "3"],
                              cwd=ROOT, env=given, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_full_disk_leaves_what_was_saved(copy):
    before = {path: path.read_bytes() for path in checkpoint.checkpoints(copy)}
    state = checkpoint.newest(copy)[0]._replace(step=202)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(ValueError, match="untouched"):
            checkpoint.save(copy, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in copy.glob("checkpoint*")} == before


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    folder = tmp_path / "run"
    status, _, errors = finish(launch(*TINY, "--learning-rate", 1e5, "--save-every", 1,
                                      "--out", folder))
    assert status == 1 and errors.count("\n") == 1, errors
    assert "--learning-rate" in errors, errors
    named = r"gradient at step \d+ is that of (embed|head|blocks/\w+ in block \d), "
    assert re.search(named, errors), errors
    status, _, errors = finish(launch(*TINY, "--learning-rate", 1e30, "--steps", 1,
                                      "--out", tmp_path / "one"))
    assert status == 1 and "validation loss is nan after step 1" in errors, errors
    name, norm = train.largest_gradient({"head": 3.0, "blocks": {"up": np.nan, "down": 1e9}})
    assert name == "blocks/up" and np.isnan(norm)
    state = checkpoint.newest(folder)[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    broken = state.params | {"embed": state.params["embed"] * np.nan}
    with pytest.raises(ValueError, match="params/embed is not finite"):
        checkpoint.save(folder, state._replace(params=broken))


def test_evaluation_counts_every_token_but_the_first_once(copy, tmp_path, capsys):
    """Four decimals are said; float32 sums over a window."""
    config, params, constants, encoding = minitf.load(copy)
    text = tmp_path / "text"
    text.write_text("Now is the winter of our discontent made glorious summer. " * 3)
    tokens = np.array(encoding.encode(text.read_text()), np.int32)
    windows, counted = map(np.concatenate, zip(*data.every_window(tokens, config.length, 3)))
    assert counted.sum() == len(tokens) - 1
    assert np.array_equal(windows[:, 1:][counted], tokens[1:])
    nats = 0.0
    for start in range(0, len(tokens) - 1, config.length):
        window = tokens[start:start + config.length + 1]
        padded = np.pad(window[:-1], (0, config.length - len(window) + 1))
        logits = np.asarray(minitf.forward(params, constants, padded, config), float)
        log_p = logits - scipy.special.logsumexp(logits, 1, keepdims=True)
        nats -= sum(log_p[place, target] for place, target in enumerate(window[1:]))
    main(["--eval", str(copy), "--data", str(text)])
    output = capsys.readouterr().out
    assert output.startswith(f"{len(tokens) - 1} tokens"), output
    said = float(re.search(r"([\d.]+) nats a token", output)[1])
    rounding = 0.5e-4 + 2 * config.length * np.finfo(np.float32).eps * said
    assert abs(said - nats / (len(tokens) - 1)) <= rounding


def test_sampling_streams_utf8_and_survives_a_closed_pipe(copy):
    command = [sys.executable, "run.py", "--sample", copy, "--prompt", "é🎭", "--tokens", "1000000",
               "--top-k", "5", "--seed", "3"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.read(50).startswith("é🎭")
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
