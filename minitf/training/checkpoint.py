"""Checkpoints: each is one .npz of plain arrays that needs no other file, and is there whole or not at all.

Its entries: params/... and opt_state/... as JAX names their leaves; bytes, lengths and ranks of the encoding's byte
pairs; meta, JSON in UTF-8: configuration, step, digest of the training tokens, the encoding's name, pattern and
special tokens; sha256, the checksum of all the others. Nothing in it is ever executed: there is no pickle.
"""
import fcntl
import hashlib
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from . import data, model, theory, train
from .config import Config
from .errors import require

FORMAT, KEPT = 1, 2                       # of the meta data; how many checkpoints a run keeps


class Checkpoint(NamedTuple):
    """A run after `step` steps: the next batch, learning rate and so on follow from step and config alone."""
    step: int
    config: Config
    encoding: tiktoken.Encoding
    digest: str                           # of the training tokens: see data.Corpus
    params: dict
    opt_state: tuple


class Model(NamedTuple):
    """What it takes to run a trained model: forward(params, constants, encoding.encode(text), config)."""
    config: Config
    params: dict
    constants: dict
    encoding: tiktoken.Encoding


# --- Saving -----------------------------------------------------------------------------

def save(folder, checkpoint):
    """Writes checkpoint-STEP.npz, removes all but the last two; ValueError if anything is not finite, or the disk full."""
    step, config, encoding, digest, *trees = checkpoint
    arrays = {name: np.asarray(leaf) for name, leaf in train.named_leaves(dict(zip(("params", "opt_state"), trees)))}
    for name, array in arrays.items():
        require(np.isfinite(array).all(), f"{name} is not finite after step {step}: not saved")
    pairs, names = data.pack_encoding(encoding)
    meta = {"format": FORMAT, "step": step, "config": asdict(config), "digest": digest, **names}
    arrays |= pairs
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    write(Path(folder) / f"checkpoint-{step:08}.npz", lambda file: np.savez(file, **arrays, sha256=checksum(arrays)))
    older = [path for path in checkpoints(folder) if number(path) <= step][KEPT:]
    for path in [*older, *Path(folder).glob("checkpoint-*.part")]:           # the latter: of a process that was killed
        path.unlink()


def checksum(arrays):
    """SHA-256 of names, types, shapes and contents, (32,) of uint8."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return np.frombuffer(total.digest(), np.uint8)


def write(path, fill):
    """fill(file) under another name until all is on disk, then renamed, and the name too: a crash leaves old or new."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}; what was saved before is untouched") from None


def rewind(metrics, step):
    """Drops all lines but those of steps before `step`, evaluations after it included, and a half-written last line."""
    def belongs(line):
        try:
            record = json.loads(line)
            return record["step"] < step + ("val_loss" in record)
        except (ValueError, TypeError, KeyError):
            return False

    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    write(metrics, lambda file: file.writelines(line for line in lines if line.endswith(b"\n") and belongs(line)))


def lock(folder):
    """Keeps a folder for this process until it ends, however it ends; ValueError if another has it. Keep the result."""
    try:
        file = open(Path(folder) / "lock", "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


# --- Loading ----------------------------------------------------------------------------

def load_model(place):
    """Model of a run's folder (its newest usable checkpoint) or of one checkpoint's file; ValueError if there is none."""
    place = Path(place)
    checkpoint = newest(place)[0] if place.is_dir() else load(place)
    return Model(checkpoint.config, checkpoint.params, theory.constants(checkpoint.config), checkpoint.encoding)


def newest(folder):
    """(the newest usable checkpoint, [(path, problem)] of those newer); ValueError, with one line, if there is none."""
    require(Path(folder).is_dir(), f"{folder} is not a folder")
    problems = []
    for path in checkpoints(folder):
        try:
            return load(path), problems
        except ValueError as error:
            problems.append((path, str(error)))
    require(problems, f"{folder} has no checkpoint")
    raise ValueError(f"{folder} has no usable checkpoint: {problems[0][1]}")


def checkpoints(folder):
    """Paths, the latest step's first."""
    return sorted((path for path in Path(folder).glob("checkpoint-*.npz") if number(path) is not None),
                  key=number, reverse=True)


def number(path):
    """The step in a checkpoint's name; None where it is not one's name."""
    digits = path.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def load(path):
    """The Checkpoint in a file; ValueError, with one line, unless it is whole and what its configuration says."""
    try:
        return restore(read(path))
    except Exception as error:            # whatever zip, npy and JSON readers raise on what is none
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path} is not a usable checkpoint: {reason}".replace("\n", " ")) from None


def read(path):
    """{name: array} of a file whose checksum holds. Takes no more memory than the file has bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    require(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), "it is compressed")
    require(sum(entry.file_size for entry in entries) <= os.path.getsize(path), "it is larger inside than outside")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    require("sha256" in arrays, "it has no checksum")
    require(np.array_equal(arrays.pop("sha256"), checksum(arrays)), "its checksum does not hold")
    return arrays


def restore(arrays):
    """The Checkpoint that the arrays make up; ValueError, TypeError or KeyError where they make up none."""
    meta = json.loads(arrays["meta"].tobytes())
    require(meta["format"] == FORMAT, f"its format is {meta['format']!r}, known is {FORMAT}")
    require(type(meta["step"]) is int and meta["step"] >= 0, f"its step is {meta['step']!r}")
    config = Config(**{"vo": 1.0, "own": False, "far": 0, "balance": 0.0, **meta["config"]})   # as all was before there were these
    encoding = data.unpack_encoding(arrays, meta)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config, data.vocabulary(encoding)))
    template = {"params": params, "opt_state": jax.eval_shape(train.make_optimizer(config).init, params)}
    for name, leaf in train.named_leaves(template):
        require(name in arrays, f"it lacks {name}")
        found = f"{arrays[name].dtype}{list(arrays[name].shape)}"
        require(found == f"{leaf.dtype}{list(leaf.shape)}", f"{name} must be {leaf.dtype}{list(leaf.shape)}, not {found}")
    leaves = [jnp.array(arrays[name]) for name, _ in train.named_leaves(template)]
    return Checkpoint(meta["step"], config, encoding, meta["digest"],
                      **jax.tree.unflatten(jax.tree.structure(template), leaves))
