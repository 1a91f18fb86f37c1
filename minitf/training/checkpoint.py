"""Checkpoints: each is one .npz of plain arrays that needs no other file, whole or not there.

Its entries:
    params/..., opt_state/...   as JAX names their leaves
    bytes, lengths, ranks       the encoding's byte pairs
    meta                        JSON in UTF-8: format, step, settings, digest of the training
                                tokens, the encoding's name, pattern and special tokens
    sha256                      the checksum of all the others
Nothing in it is ever executed: there is no pickle.
"""
import errno
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tiktoken

try:
    import fcntl
except ImportError:                       # Windows has no such locks
    fcntl = None

from ..config import DataConfig, ModelConfig, Settings, TrainingConfig
from ..errors import require
from ..network.init import init
from ..theory.kernels import attention_constants
from . import sharding
from .encoding import pack_encoding, unpack_encoding, vocabulary
from .optimizer import make_optimizer
from .train import named_leaves

FORMAT, KEPT = 5, 2                       # of the meta data; how many checkpoints a run keeps
# What some file systems answer that have no locks, or cannot sync a folder: NFS, Lustre, CIFS.
UNABLE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)


class Damaged(ValueError):
    """A file that was read, and is not a usable checkpoint."""


class Checkpoint(NamedTuple):
    """A run after `step` steps. Step and settings say which batch and rate come next.

    Arrays are NumPy's in one that was loaded: sharding.place brings them to the devices.
    """
    step: int
    settings: Settings
    encoding: tiktoken.Encoding
    digest: str                           # of the training tokens: see data.Corpus
    params: dict
    opt_state: tuple


class Model(NamedTuple):
    """A trained model: forward(params, constants, encoding.encode(text), config)."""
    config: ModelConfig
    params: dict
    constants: dict
    encoding: tiktoken.Encoding


# --- Saving -----------------------------------------------------------------------------

def save(folder, checkpoint, best=None):
    """Writes checkpoint-STEP.npz; removes all but the last two and that of step `best`.

    Of several processes the first does it. One array at a time: no host has more of them in memory.
    ValueError, and nothing written, if anything is not finite or the disk is full.
    """
    step, settings, encoding, digest, params, opt_state = checkpoint
    pairs, names = pack_encoding(encoding)
    meta = {"format": FORMAT, "step": step, "settings": asdict(settings), "digest": digest, **names}
    arrays = {**dict(named_leaves({"params": params, "opt_state": opt_state})), **pairs,
              "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}

    def each():
        for name in sorted(arrays):
            array = sharding.fetch(arrays[name])
            require(np.isfinite(array).all(), f"{name} is not finite after step {step}: not saved")
            yield name, array

    if not sharding.first():
        for _ in each():                               # takes part in bringing them together
            pass
        return
    write(Path(folder) / f"checkpoint-{step:08}.npz", partial(write_arrays, arrays=each()))
    older = [path for path in checkpoints(folder) if number(path) <= step][KEPT:]
    older = [path for path in older if number(path) != best]
    leftover = Path(folder).glob("checkpoint-*.part")      # of a process that was killed
    for path in [*older, *leftover]:
        path.unlink(missing_ok=True)


def write_arrays(file, arrays):
    """As np.savez, of (name, array), one after the other, by name; their checksum last."""
    with zipfile.ZipFile(file, "w") as archive:
        def put(name, array):
            with archive.open(name + ".npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
            return name, array

        put("sha256", checksum(put(*pair) for pair in arrays))


def checksum(arrays):
    """SHA-256 of names, types, shapes and contents, (32,) of uint8; of (name, array), by name."""
    total = hashlib.sha256()
    for name, array in arrays:
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return np.frombuffer(total.digest(), np.uint8)


def write(path, fill):
    """fill(file), then a rename once all is on disk: a crash leaves the old file or the new."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, ValueError) as error:             # ValueError: what there is no saving of
        beside.unlink(missing_ok=True)
        problem = getattr(error, "strerror", None)
        require(not problem, f"cannot write {path}: {problem}; what was saved before is untouched")
        raise
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:                           # EACCES: Windows
        require(error.errno in (*UNABLE, errno.EACCES),
                f"cannot write to {path.parent}: {error.strerror}")


def rewind(metrics, step):
    """Drops all lines of metrics but those up to `step`, of 0 all; and a half-written last line."""
    def belongs(line):
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    lines = metrics.read_bytes().splitlines(keepends=True) if step and metrics.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and belongs(line)]
    write(metrics, lambda file: file.writelines(kept))


def lock(folder):
    """A file that keeps a folder for this process until it is closed, or the process ends.

    ValueError if another process has it.
    """
    file = open(Path(folder) / "lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}") from None
    except OSError as error:
        require(error.errno in UNABLE, f"cannot lock {folder}: {error.strerror}")
        print(f"note: {folder} has no locks: let no other run write there", file=sys.stderr)
    return file


# --- Loading ----------------------------------------------------------------------------

def load(place: str | Path) -> Model:
    """The Model of a run's folder, its newest usable checkpoint, or of a checkpoint's file.

    ValueError, with one line, if there is none.
    """
    place = Path(place)
    return model_of(newest(place)[0] if os.path.isdir(place) else load_checkpoint(place))


def model_of(checkpoint):
    """The Model in a Checkpoint."""
    config = checkpoint.settings.model
    params, constants = sharding.place((checkpoint.params, attention_constants(config)))
    return Model(config, params, constants, checkpoint.encoding)


def newest(folder):
    """(the newest usable checkpoint, [(path, problem)] of those newer); ValueError if none is."""
    require(Path(folder).is_dir(), f"{folder} is not a folder")
    problems = []
    for path in checkpoints(folder):
        try:
            return load_checkpoint(path), problems
        except Damaged as error:
            problems.append((path, str(error)))
    require(problems, f"{folder} has no checkpoint")
    raise ValueError(f"{folder} has no usable checkpoint: {problems[0][1]}")


def checkpoints(folder):
    """Paths, the latest step's first."""
    paths = [path for path in Path(folder).glob("checkpoint-*.npz") if number(path) is not None]
    return sorted(paths, key=number, reverse=True)


def number(path):
    """The step in a checkpoint's name; None where it is not one's name."""
    digits = path.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def load_checkpoint(path):
    """The Checkpoint in a file; Damaged, with one line, unless it is whole.

    A ValueError that is not Damaged where the machine failed, not the file.
    """
    try:
        return restore(read(path))
    except Exception as error:            # whatever zip, npy and JSON readers raise on what is none
        reason = " ".join(str(error).split()) or type(error).__name__
        # Where an entry is said to lie before the file's beginning, zipfile seeks there: EINVAL.
        system = isinstance(error, OSError) and error.errno != errno.EINVAL
        machine = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason or system
        require(not machine, f"{path} cannot be read: {getattr(error, 'strerror', None) or reason}")
        raise Damaged(f"{path} is not a usable checkpoint: {reason}") from None


def read(path):
    """{name: array} of a file whose checksum holds. Takes no more memory than the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    require(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), "it is compressed")
    require(sum(entry.file_size for entry in entries) <= os.path.getsize(path),
            "it is larger inside than outside")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    require("sha256" in arrays, "it has no checksum")
    require(np.array_equal(arrays.pop("sha256"), checksum(sorted(arrays.items()))),
            "its checksum does not hold")
    return arrays


def restore(arrays):
    """The Checkpoint that arrays make up; ValueError, TypeError or KeyError where they do not."""
    meta = json.loads(arrays["meta"].tobytes())
    require(meta["format"] == FORMAT, f"its format is {meta['format']!r}, known is {FORMAT}")
    require(type(meta["step"]) is int and meta["step"] >= 0, f"its step is {meta['step']!r}")
    settings, encoding = restore_settings(meta["settings"]), unpack_encoding(arrays, meta)
    params = jax.eval_shape(lambda: init(jax.random.key(0), settings.model, vocabulary(encoding)))
    opt_state = jax.eval_shape(make_optimizer(settings.training.optimizer).init, params)
    template = {"params": params, "opt_state": opt_state}
    for name, leaf in named_leaves(template):
        require(name in arrays, f"it lacks {name}")
        found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
        wanted = f"{leaf.dtype}{list(leaf.shape)}"
        require(found == wanted, f"{name} must be {wanted}, not {found}")
    leaves = [arrays[name] for name, _ in named_leaves(template)]
    return Checkpoint(meta["step"], settings, encoding, meta["digest"],
                      **jax.tree.unflatten(jax.tree.structure(template), leaves))


def restore_settings(saved):
    """The Settings in a dict that JSON gave back."""
    tuples = lambda part: {name: tuple(value) if isinstance(value, list) else value
                           for name, value in part.items()}
    settings = Settings(saved["preset"], tuples(saved["flags"]),
                        ModelConfig(**tuples(saved["model"])),
                        TrainingConfig(**saved["training"]), DataConfig(**saved["data"]))
    settings.replace()                    # its flags must be flags
    return settings
