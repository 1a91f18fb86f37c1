"""Several devices give what one gives: simulated ones, and real processes that are killed."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import ROOT, Running, wait_less

from minitf import load, resolve
from minitf.training import sharding

# By hand, with meshes.py, also ["preln", {"optimizer": "muon"}, "fsdp=4"], ["normless", {},
# "data=8"], ["paper", {"eta": 0.2}, "data=8"], ["identity-skip", {}, "data=2,fsdp=4"].
CASES = [("isometric", dict(accumulate=2), "data=2,fsdp=2")]


def devices(count):
    """What makes a process believe that it has so many."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"}


def test_meshes_give_what_one_device_gives():
    """Losses differ no more than one device's do when a batch's rows are in another order.

    Either way float32 sums of the same N = 512 terms are taken in another order. At first that is
    some units in the last place of a loss below 8, later what training makes of it.
    """
    done = subprocess.run([sys.executable, "tests/meshes.py", json.dumps(CASES)], cwd=ROOT,
                          capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["preset"], each["mesh"]) for each in found] == [(p, m) for p, _, m in CASES]
    for each, (_, _, mesh) in zip(found, CASES):
        fsdp = int((re.findall(r"fsdp=(\d)", mesh) or [1])[0])
        assert each["shard"] == [2, 32 // fsdp, 128]
        ulp = np.spacing(np.float32(7))
        assert max(each["apart"][:5]) <= 8 * ulp, each
        assert max(each["apart"]) <= max(3 * max(each["shuffled"]), 1e-3 * each["fall"]), each
        assert each["fall"] > 0.5                          # it did learn
        # Each entry of the gradient is a sum over N tokens of terms that partly cancel.
        assert each["gradient"] < 512**0.5 * np.finfo(np.float32).eps


@pytest.mark.parametrize("text, said", [
    ("data=3", "of 3 devices, there are 1"), *((text, "like data=2,fsdp=4") for text in (
        "rows=1", "data", "data=0", "data=2,data=2", "data=2,", "", "data=２"))])
def test_a_mesh_that_does_not_fit_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        sharding.use(text, resolve())


def test_refusals_name_the_numbers_that_do():
    command = ["--depth", "2", "--steps", "1", "--width", "36", "--heads", "2", "--data",
               "minitf/*/*.py"]
    for flags, said in [("--batch 12 --mesh data=8", "8 does not divide the sequences, 12; "
                         "1, 2, 3, 4, 6 would"),
                        ("--mesh fsdp=8", "8 does not divide the width, 36; 1, 2, 3, 4, 6 would")]:
        process = Running(command + flags.split(), variables=devices(8))
        _, errors = process.communicate(60)
        assert (process.returncode, errors.count("\n")) == (2, 1), errors
        assert said in errors


def start(folder, which, port, *flags):
    """One of two processes, each with two simulated devices, that train together."""
    command = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", which,
               "--mesh", "data=2,fsdp=2", *flags]
    if "--resume" not in flags:
        command += ["--preset", "preln", "--depth", "2", "--width", "32", "--length", "32",
                    "--data", "minitf/*/*.py", "--out", folder]
    return Running(command, wait_less, devices(2))


def two(folder, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(folder, which, port, *flags) for which in (0, 1)]


def wait_for(folder, step, processes):
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{step:08}.npz").exists():
        assert time.monotonic() < deadline and all(each.poll() is None for each in processes)
        time.sleep(0.05)


@pytest.mark.parametrize("victim", (0, 1))
def test_a_lost_process_ends_the_other(tmp_path, victim):
    """SIGKILL of either, the coordinator too: the other ends, a whole checkpoint is left."""
    processes = two(tmp_path, "--steps", "100000", "--save-every", "5")
    wait_for(tmp_path, 0, processes)
    processes[victim].send_signal(signal.SIGKILL)
    _, errors = processes[1 - victim].communicate(60)
    assert processes[1 - victim].returncode != 0
    assert "seems lost" in errors or "another task died" in errors, errors[-2000:]
    load(tmp_path)


def test_what_one_process_refuses_ends_both(tmp_path):
    """Flags that differ: a line each, status 2, no folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    processes = [start(out, which, port, "--seed", str(which)) for which in (0, 1)]
    ends = [each.communicate(60) for each in processes]
    assert [each.returncode for each in processes] == [2, 2], ends
    assert "must be the same in all processes" in ends[0][1] and not out.exists()


def test_a_signal_to_either_process_stops_both_and_both_go_on_to_the_end(tmp_path):
    """Evaluations of many batches included; one device can use what comes out."""
    processes = two(tmp_path, "--steps", "2000", "--save-every", "10", "--objective", "mlm")
    wait_for(tmp_path, 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = [each.communicate(60) for each in processes]
    assert [each.returncode for each in processes] == [128 + signal.SIGTERM] * 2
    assert "to go on" in ends[0][1] and "preset" in ends[0][0] and "preset" not in ends[1][0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    last = max(steps) + 4
    processes = two(tmp_path, "--resume", str(tmp_path), "--steps", str(last))
    ends = [each.communicate(150) for each in processes]
    assert [each.returncode for each in processes] == [0, 0], ends[0][1][-2000:]
    assert "validation loss" in ends[0][0] and "validation loss" not in ends[1][0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, last + 1)]
    load(tmp_path)
