"""Real processes that run run.py's main, forked from one that has imported all: they start fast."""
import atexit
import gc
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["processes", "minitf.cli.main"])


class Running:
    """A process; what is read of it is as of subprocess.Popen.

    arguments: run.py's. before: what is called in it first. variables: of its environment.
    """

    def __init__(self, arguments, before=None, variables=()):
        self.folder = tempfile.TemporaryDirectory(prefix="minitf-tests-")
        self.process = server.Process(target=run, args=(
            self.folder.name, [*map(str, arguments)], before, dict(variables)))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def communicate(self, timeout):
        self.process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("run.py", timeout)
        return [(Path(self.folder.name) / name).read_text() for name in ("stdout", "stderr")]


# --- In the process -----------------------------------------------------------------------

def run(folder, arguments, before, variables):
    """run.py, its output into two files."""
    from minitf.cli import loop, main
    for number, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = ["run.py", *arguments]
    loop.show_sample = lambda *_: None                 # its programs take a second to trace
    if before:
        before()
    try:
        main.main(arguments)
    finally:                                           # which multiprocessing leaves out
        atexit._run_exitfuncs()


def wait_less():
    """For other processes that are lost."""
    from minitf.training import sharding
    sharding.LOST_AFTER = 5


def die_in(phase, nth):
    """In the n-th call of what a phase of saving goes through, the process kills itself."""
    place, name, changed = PHASES[phase]
    countdown, before = [nth], getattr(place, name)

    def die():
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, lambda *a, **k: changed(before, die, countdown, *a, **k))


def first(function, die, countdown, *arguments, **others):
    die()
    return function(*arguments, **others)


def after(function, die, countdown, *arguments, **others):
    function(*arguments, **others)
    die()


def half_an_array(write, die, countdown, file, array, **others):
    if countdown[0] == 1:
        file.write(b"PK" * 50)
        file.flush()
    die()
    write(file, array, **others)


def half_a_line(dumps, die, countdown, value, **others):
    if isinstance(value, dict) and "grad_norm" in value:
        if countdown[0] == 1:
            for each in gc.get_objects():
                if isinstance(each, io.TextIOWrapper) and \
                        str(each.name).endswith("metrics.jsonl"):
                    each.write(dumps(value)[:20])
                    each.flush()
        die()
    return dumps(value, **others)


PHASES = {"write": (np.lib.format, "write_array", half_an_array), "flush": (os, "fsync", first),
          "before rename": (os, "replace", first), "after rename": (os, "replace", after),
          "before removing": (Path, "unlink", first), "metrics": (json, "dumps", half_a_line)}
