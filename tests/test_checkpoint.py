"""Runs that survive: real processes, killed at random and within the phases of a save, end as if nothing had happened.

MINITF_KILLS=N kills N times in each phase and N times at random, instead of once.
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
from pathlib import Path

import jax
import numpy as np
import pytest

import minitf
from minitf import Config, checkpoint, data, model, train

ROOT = Path(__file__).parents[1]
TINY = ("--depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 400 --save-every 20 --attn softmax --act tanh --init orthogonal --transform tat "
        "--tau 0.05 --position none").split()
PHASES = ["write", "flush", "before rename", "after rename", "before removing", "metrics"]

# Runs run.py's main; in the n-th call of what a phase goes through, the process kills itself.
KILLER = """
import os, signal, sys, numpy, pathlib
phase, countdown = sys.argv[1], [int(sys.argv[2])]
def die():
    countdown[0] -= 1
    if countdown[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def first(f):
    return lambda *a, **k: (die(), f(*a, **k))[1]
def after(f):
    return lambda *a, **k: (f(*a, **k), die())[0]
if phase == "write":
    def half(file, **arrays):
        if countdown[0] == 1:
            file.write(b"PK" * 5000); file.flush()
        die()
        savez(file, **arrays)
    savez, numpy.savez = numpy.savez, half
if phase == "flush": os.fsync = first(os.fsync)
if phase == "before rename": os.replace = first(os.replace)
if phase == "after rename": os.replace = after(os.replace)
if phase == "before removing": pathlib.Path.unlink = first(pathlib.Path.unlink)
if phase == "metrics":
    import json
    dumps = json.dumps
    def half_a_line(value, **k):
        if isinstance(value, dict) and "grad_norm" in value and countdown[0] == 1:
            import gc, io
            for each in gc.get_objects():
                if isinstance(each, io.TextIOWrapper) and str(each.name).endswith("metrics.jsonl"):
                    each.write(dumps(value)[:20]); each.flush()
        if isinstance(value, dict) and "grad_norm" in value: die()
        return dumps(value, **k)
    json.dumps = half_a_line
import run
run.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts a process that runs run.py, in one phase or none; compiled programs are shared."""
    cache = tmp_path_factory.mktemp("compiled")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache),
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    return lambda *arguments, phase="", nth=0: subprocess.Popen(
        [sys.executable, "-c", KILLER, phase, str(nth), *map(str, arguments)], env=variables, text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """(status, output, errors)"""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, errors = finish(launch(*TINY, "--out", folder))
    assert status == 0, errors
    return folder


def arrays(folder):
    """What the newest checkpoint holds, its configuration aside."""
    return checkpoint.read(checkpoint.checkpoints(folder)[0])


def lines(folder):
    """The metrics, without the times taken."""
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder, other):
    got, expected = arrays(folder), arrays(other)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert lines(folder) == lines(other)


def wait_for(process, folder, step):
    """Until the checkpoint of a step or a later one is there."""
    while process.poll() is None and not any(checkpoint.number(path) >= step for path in checkpoint.checkpoints(folder)):
        time.sleep(0.005)


def test_killed_at_any_point_and_resumed_ends_the_same(launch, whole, tmp_path):
    kills = int(os.environ.get("MINITF_KILLS", 1))
    draw, counts = random.Random(0), {}
    folder, arguments = tmp_path / "run-0", [*TINY, "--out", tmp_path / "run-0"]
    for number, phase in enumerate((PHASES + ["random"]) * kills):
        if arguments[0] == "--resume" and checkpoint.newest(folder)[0].step >= 300:   # nearly done: finish, begin another
            assert checkpoint.newest(folder)[0].step == 400 or finish(launch(*arguments))[0] == 0
            assert_same(folder, whole)
            folder = tmp_path / f"run-{number}"
            arguments = [*TINY, "--out", folder]
        begun = arguments[0] == "--resume"
        if phase == "random":
            process = launch(*arguments)
            wait_for(process, folder, checkpoint.newest(folder)[0].step + 20 if begun else 0)
            time.sleep(draw.uniform(0, 0.05))              # a step takes about a millisecond
            process.kill()
        else:
            nth = draw.randint(1, 2) + (not begun) * 3 + 20 * (phase == "metrics")
            process = launch(*arguments, phase=phase, nth=nth)
        status, _, errors = finish(process)
        assert status == -signal.SIGKILL, (phase, status, errors)
        counts[phase] = counts.get(phase, 0) + 1
        arguments = ["--resume", folder]
    if checkpoint.newest(folder)[0].step < 400:           # killed after its last checkpoint, before its last words: nothing is left
        status, _, errors = finish(launch(*arguments))
        assert status == 0, errors
    assert_same(folder, whole)
    print("killed and resumed:", counts)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_signal_saves_and_says_how_to_go_on(launch, whole, tmp_path, number, status):
    folder = tmp_path / "run"
    process = launch(*TINY, "--out", folder)
    wait_for(process, folder, 20)
    if number == signal.SIGTERM:                          # a folder whose run lives is refused to others
        process.send_signal(signal.SIGSTOP)
        second = finish(launch("--resume", folder))
        assert second[0] == 2 and "another run" in second[2], second
        process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    got, _, errors = finish(process)
    assert got == status, errors
    assert errors.count("\n") == 1 and f"--resume {folder}" in errors
    assert finish(launch("--resume", folder))[0] == 0
    assert_same(folder, whole)


# --- What may be wrong with a folder, a disk, a loss ------------------------------------------------------------------------

@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def test_loads_in_one_call_from_another_folder(copy):
    config, params, constants, encoding = minitf.load(copy)
    logits = minitf.forward(params, constants, np.array(encoding.encode("Mark my w")[:8], np.int32), config)
    assert np.isfinite(logits).all() and logits.shape[1] == encoding.n_vocab == 1024
    assert minitf.load(checkpoint.checkpoints(copy)[1]).config == config


def test_what_is_loaded_is_what_was_saved(copy, tmp_path):
    before = checkpoint.newest(copy)[0]
    checkpoint.save(tmp_path, before)
    after = checkpoint.newest(tmp_path)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before[4:], after[4:])) and before[:2] == after[:2]
    assert after.encoding.encode("Exeunt omnes") == before.encoding.encode("Exeunt omnes")


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "foreign", "other shapes"])
def test_falls_back_to_the_checkpoint_before(copy, damage):
    newest, before = checkpoint.checkpoints(copy)
    content = newest.read_bytes()
    if damage == "other shapes":
        held = checkpoint.read(newest)
        held["params/embed"] = held["params/embed"][:-1]
        np.savez(newest, **held, sha256=checkpoint.checksum(held))
    elif damage == "foreign":
        np.savez(newest, a=np.arange(3))
    else:
        half = len(content) // 2
        newest.write_bytes({"truncated": content[:half], "empty": b"",
                            "one bit": content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]}[damage])
    found, [(path, problem)] = checkpoint.newest(copy)
    assert found.step == checkpoint.number(before) and path == newest and "\n" not in problem
    before.unlink()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        checkpoint.newest(copy)


def test_nothing_in_a_checkpoint_is_executed(copy):
    held = checkpoint.read(checkpoint.checkpoints(copy)[0])
    held["params/embed"] = np.array([open], object)
    np.savez(checkpoint.checkpoints(copy)[0], allow_pickle=True, **held)
    with pytest.raises(ValueError, match="allow_pickle"):
        checkpoint.load(checkpoint.checkpoints(copy)[0])


def test_resuming_refuses_by_name_and_continues_with_more_steps(launch, copy):
    status, _, errors = finish(launch("--resume", copy, "--width", 16, "--depth", 2))
    assert status == 2 and "--width" in errors and "--depth" not in errors and errors.count("\n") == 1
    status, _, errors = finish(launch("--resume", copy))
    assert status == 2 and "trained" in errors
    status, _, errors = finish(launch("--resume", copy, "--steps", 404, "--data", ROOT / "data/shakespeare.tiktoken"))
    assert status == 2 and "data" in errors and errors.count("\n") == 1
    newest = checkpoint.checkpoints(copy)[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    status, _, errors = finish(launch("--resume", copy, "--steps", 404, "--learning-rate", 1e-4))
    assert status == 0 and errors.count("\n") == 1 and "falling back" in errors, errors
    assert [line["step"] for line in lines(copy) if "loss" in line] == list(range(404))
    assert checkpoint.newest(copy)[0].config.learning_rate == 1e-4


def test_a_checkpoint_from_before_some_flags_means_what_it_meant(copy, tmp_path):
    config = Config(depth=1, width=8, length=256, own=False, far=0, vo=1.0, balance=0.0)
    encoding = checkpoint.newest(copy)[0].encoding
    params = model.init(jax.random.key(0), config, data.vocabulary(encoding))
    checkpoint.save(tmp_path, checkpoint.Checkpoint(0, config, encoding, "", params, train.make_optimizer(config).init(params)))
    arrays = checkpoint.read(checkpoint.checkpoints(tmp_path)[0])
    meta = json.loads(arrays["meta"].tobytes())
    for flag in ("own", "far", "vo", "balance"):
        del meta["config"][flag]
    restored = checkpoint.restore(arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    assert restored.config == config


def test_a_full_disk_leaves_what_was_saved(copy, tmp_path):
    before = {path: path.read_bytes() for path in checkpoint.checkpoints(copy)}
    state = checkpoint.newest(copy)[0]._replace(step=402)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(ValueError, match="untouched"):
            checkpoint.save(copy, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in copy.glob("checkpoint*")} == before


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(launch, tmp_path):
    folder = tmp_path / "run"
    status, _, errors = finish(launch(*TINY, "--learning-rate", 1e30, "--save-every", 1, "--out", folder))
    assert status == 1 and errors.count("\n") == 1 and "--learning-rate" in errors and "blocks/" in errors, errors
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.newest(folder)[0].params))
    with pytest.raises(ValueError, match="params/embed is not finite"):
        state = checkpoint.newest(folder)[0]
        checkpoint.save(folder, state._replace(params=state.params | {"embed": state.params["embed"] * np.nan}))


def test_evaluation_counts_every_token_but_the_first_once(launch, copy, tmp_path):
    config, params, constants, encoding = minitf.load(copy)
    text = tmp_path / "text"
    text.write_text("Now is the winter of our discontent made glorious summer. " * 3)
    tokens = np.array(encoding.encode(text.read_text()), np.int32)
    windows, counted = data.all_windows(tokens, config.length)
    assert counted.sum() == len(tokens) - 1 and np.array_equal(windows[:, 1:][counted], tokens[1:])
    nats = 0.0
    for start in range(0, len(tokens) - 1, config.length):
        window = tokens[start:start + config.length + 1]
        padded = np.pad(window[:-1], (0, config.length - len(window) + 1))
        log_p = jax.nn.log_softmax(minitf.forward(params, constants, padded, config))
        nats -= float(sum(log_p[place, target] for place, target in enumerate(window[1:])))
    status, output, errors = finish(launch("--eval", copy, "--data", text))
    assert status == 0 and output.startswith(f"{len(tokens) - 1} tokens"), errors
    said = float(re.search(r"([\d.]+) nats a token", output)[1])              # four decimals; float32 sums over a window
    assert abs(said - nats / (len(tokens) - 1)) <= 0.5e-4 + 2 * config.length * np.finfo(np.float32).eps * said


def test_sampling_streams_utf8_and_survives_a_closed_pipe(launch, copy):
    status, output, _ = finish(launch("--sample", copy, "--prompt", "é🎭", "--tokens", 20, "--top-k", 5, "--seed", 3))
    assert status == 0 and output.startswith("é🎭")
    process = launch("--sample", copy, "--tokens", 10**6)
    process.stdout.read(50)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
