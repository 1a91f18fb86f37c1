"""What a run needs of the machine that it is on: memory, a folder, signals."""
import atexit
import ctypes
import json
import math
import os
import shutil
import signal
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

import jax

from ..errors import require
from ..training.checkpoint import write

CGROUP = Path("/sys/fs/cgroup")                                   # of a container
STOPPING = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"               # a closed terminal, Slurm


def require_memory(settings, vocabulary):
    """ValueError if what a step needs at the least exceeds the devices' or the machine's memory.

    Parameters and their moments, dense biases, a batch's logits and activations.
    """
    model, batch = settings.model, settings.training.at_once
    d, length, depth = model.width, model.length, model.depth
    of_block = 4 * model.attention_width + 2 * model.hidden
    numbers = 3 * (of_block * d * depth + 2 * d * vocabulary)
    dense = model.attn == "uspa" or model.objective == "mlm" and model.attn == "espa"
    biases = model.all_heads if model.extra_heads else len(set(model.gamma))
    numbers += depth * length**2 * dense * biases
    numbers += batch * length * (vocabulary + d * depth)
    device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = device * jax.device_count() if device else memory()
    require(4 * numbers < there, f"this needs {4 * numbers / 2**30:,.0f} GiB of memory at the "
            f"least, there are {there / 2**30:.0f}: depth, width, length or batch must be smaller")


def memory():
    """Bytes of this machine or container; infinite where not known."""
    limits = [math.inf]
    with suppress(AttributeError, OSError, ValueError):           # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):                           # "max"
        limits.append(int((CGROUP / "memory.max").read_text()))
    return min(limits)


def cores():
    """How many this process, or its container, may use."""
    count = len(getattr(os, "sched_getaffinity", lambda _: ())(0)) or os.cpu_count() or 1
    with suppress(OSError, ValueError):                           # "max 100000"
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return count


def require_new(out):
    """ValueError if the folder is there already with more in it than a run that never began."""
    leftover = {"lock", "config.json", "metrics.jsonl", "loss.png"}
    new = out is None or not out.exists() or out.is_dir() and all(
        path.name in leftover or path.suffix == ".part" for path in out.iterdir())
    require(new, f"{out} exists and is not an empty folder: a run never overwrites another")


def make_folder(out, name):
    """Creates `out`, or the next free folder runs/NAME-N."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    Path("runs").mkdir(exist_ok=True)
    for number in count(1):
        with suppress(FileExistsError):                           # several may begin at once
            out = Path("runs", f"{name}-{number}")
            out.mkdir()
            return out


def aside():
    """A folder for what only the first of several processes writes where it is to be."""
    folder = tempfile.mkdtemp(prefix="minitf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def keep_freed_memory():
    """With glibc: a step's arrays are made in the memory of the last step's.

    Not in pages that the system takes back, clears and maps again, which costs a CPU up to a fifth
    of a step.
    """
    with suppress(OSError, AttributeError, TypeError):            # as on Windows
        for parameter in (-3, -1):                                # M_MMAP_THRESHOLD, M_TRIM_...
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


@contextmanager
def stop_signals():
    """A list that gains the first signal to stop; a second one does what it always does.

    Outside of the main thread none is received.
    """
    received, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(number, _):
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in signal.Signals:
            if number.name in STOPPING and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def note_machine(out, settings):
    """config.json; and a note where the run began on another machine."""
    path = out / "config.json"
    machine = dict(device=jax.devices()[0].device_kind, devices=jax.device_count(),
                   cores=cores(), jax=jax.__version__)
    with suppress(OSError, ValueError, AttributeError):
        before = json.loads(path.read_text()).get("machine", machine)
        if before != machine:
            print(f"note: this run began with {before}, now {machine}: it goes on the same to "
                  "rounding, not to the last bit")
    text = json.dumps(asdict(settings) | {"machine": machine}, indent=1) + "\n"
    write(path, lambda file: file.write(text.encode()))
