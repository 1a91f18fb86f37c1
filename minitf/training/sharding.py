"""Several devices, of one host or more: who holds what. XLA's partitioner does the rest.

A mesh has two axes, data and fsdp. Both split a batch's sequences. fsdp also splits what RULES
names: parameters, their moments and their gradients. Without a mesh in use nothing here does
anything. Functions of a tree look a leaf's rule up by the last name on its path.
"""
import hashlib
import math
import os
import re
import sys
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, get_abstract_mesh

from ..errors import require

LOST_AFTER = 30                      # seconds without a word from a process until all end
LOST = "gloo", "nccl", "unavailable", "aborted", "deadline", "heartbeat", "connection", "coordin"
AXES = "data", "fsdp"
BATCH = P(AXES)                                                               # of sequences
RULES = {"embed": P(None, "fsdp"), "head": P("fsdp")} | dict.fromkeys(
    ("query", "key", "value", "output", "up", "down"), P(None, "fsdp"))       # (L, in, out)


# --- Processes and mesh -------------------------------------------------------------------

def start(coordinator, process_id, processes):
    """Makes this process one of several, through JAX's own runtime; only the first is heard.

    coordinator: HOST:PORT of the first process, or "auto": what JAX finds out by itself.
    """
    own = (None,) * 3 if coordinator == "auto" else (coordinator, processes, process_id)
    try:
        jax.distributed.initialize(*own, heartbeat_timeout_seconds=LOST_AFTER,
                                   shutdown_timeout_seconds=LOST_AFTER)
    except RuntimeError as error:
        raise ValueError(f"no other processes: {str(error).splitlines()[0]}") from None
    if not first():
        sys.stdout = open(os.devnull, "w")


def first():
    """Whether this process is the one that logs and saves."""
    return jax.process_index() == 0


def leave(line):
    """Ends this process, where it is one of several, with a line, and without a wait for others."""
    if jax.distributed.is_initialized():
        print(f"run.py: {line}", file=sys.stderr, flush=True)
        os._exit(2)


def lost(error):
    """What an error says of another process that is gone; None where it is of something else."""
    told = str(error).lower()
    if jax.distributed.is_initialized() and any(word in told for word in LOST):
        return ("another process of this run seems lost; the last checkpoint is whole, --resume "
                f"goes on from it ({told.splitlines()[0][:200]})")


def require_same(what, text):
    """ValueError unless all processes have the same text."""
    if jax.process_count() > 1:
        said = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        every = multihost_utils.process_allgather(said)
        require((every == said).all(), f"{what} must be the same in all processes")


def use(text, settings):
    """A context in which all is computed on the mesh "data=2,fsdp=4"; None: on one device.

    "all": as many devices, on data, as divide the batch. ValueError, with the numbers that would
    do, for a mesh that does not fit devices, batch or features.
    """
    sequences, model = settings.training.at_once, settings.model
    count, sizes = jax.device_count(), dict.fromkeys(AXES, 1)
    if text == "all":
        sizes["data"] = max(n for n in range(1, count + 1) if sequences % n == 0)
        if sizes["data"] < count and jax.process_count() == 1:
            print(f"note: {sizes['data']} of {count} devices are used, as many as divide "
                  f"{sequences} sequences")
    elif text is not None:
        parts = [re.fullmatch(r"(data|fsdp)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
        require(all(parts) and len({part[1] for part in parts}) == len(parts),
                f"mesh must be like data=2,fsdp=4, not {text!r}")
        sizes |= {part[1]: int(part[2]) for part in parts}
    used = math.prod(sizes.values())
    require(used <= count and (used == count or jax.process_count() == 1),
            f"mesh is of {used} devices, there are {count}; several processes use all of them")
    fsdp = sizes["fsdp"]
    for what, number, size in (("sequences", sequences, used), ("width", model.width, fsdp),
                               ("features of all heads", model.attention_width, fsdp),
                               ("hidden features", model.hidden, fsdp)):
        fitting = [str(n) for n in range(1, count + 1) if number % n == 0]
        require(number % size == 0, f"mesh: {size} does not divide the {what}, {number}; "
                f"{', '.join(fitting)} would")
    if used == 1:
        return nullcontext()
    return jax.set_mesh(jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 2,
                                      devices=jax.devices()[:used]))


def largest(number):
    """The largest of what the processes say: an array, to be read when it is there."""
    if jax.process_count() == 1:
        return number
    said = from_rows((jax.device_count(),), BATCH, lambda index: np.full(1, number, np.int32))
    return whole_maximum(said)


whole_maximum = jax.jit(lambda said: whole(said.max()))


def devices():
    """How many the mesh in use has; 1 without one."""
    return max(get_abstract_mesh().size, 1)


# --- Where arrays are ---------------------------------------------------------------------

def specs(tree):
    """The PartitionSpec of each leaf."""
    def of_leaf(path, leaf):
        spec = RULES.get(getattr(path[-1], "key", None), P()) if path else P()
        return spec if np.ndim(leaf) >= len(spec) else P()
    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def place(tree):
    """Arrays that each host has whole, on the devices, as RULES say."""
    if devices() == 1:
        return jax.tree.map(jnp.array, tree)
    return jax.tree.map(lambda leaf, spec: from_rows(leaf.shape, spec, leaf.__getitem__),
                        jax.tree.map(np.asarray, tree), specs(tree))


def from_rows(shape, spec, read):
    """An array of a shape: each device gets read(its slices)."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(shape, sharding, read)


def fetch(leaf):
    """An array of all processes as NumPy's, whole, in each of them."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def make(function, *arguments):
    """function(*arguments), a tree that is made where RULES want it."""
    shardings = None
    if devices() > 1:
        shardings = jax.tree.map(partial(NamedSharding, jax.sharding.get_mesh()),
                                 specs(jax.eval_shape(function, *arguments)))
    # It runs once: on a CPU half the time to compile, and the same bits.
    quickly = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, out_shardings=shardings, compiler_options=quickly)(*arguments)


def batch(read, sequences, length):
    """A batch (B, T + 1) on the devices: read(rows) -> those of its rows that are needed here."""
    if devices() == 1:
        return read(slice(None))
    return from_rows((sequences, length + 1), BATCH, lambda index: read(index[0])[:, index[1]])


# --- Inside of what is compiled -----------------------------------------------------------

def constrain(tree, spec=None):
    """A tree as `spec` says, or each leaf as RULES do."""
    if devices() == 1:
        return tree
    wanted = specs(tree) if spec is None else jax.tree.map(lambda _: spec, tree)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, wanted)


def whole(tree):
    """A tree that every device has whole."""
    return constrain(tree, P())


def by_matrix(tree, back=False):
    """A tree of which each device has its share of the L matrices of each array (L, in, out).

    back: the other way, to where RULES want them.
    """
    ways = [P("fsdp"), P(("fsdp", "data"))]     # first an all-to-all, then each takes its part
    for way in reversed(ways) if back else ways:
        tree = jax.tree.map(lambda leaf: constrain(leaf, way) if leaf.ndim == 3 else leaf, tree)
    return constrain(tree) if back else tree


def distribute(ops):
    """Operations for the mesh in use: attention and loss by shards, weights gathered when due."""
    if devices() == 1:
        return ops

    def attend(qkv, constants, config):
        return by_shard(partial(ops.attend, config=config), BATCH, P())(qkv, constants)

    def repeat(step, x, layers):
        def gathered(x, layer):
            weights, constants = layer
            return step(constrain(x, BATCH), (whole(weights), constants))
        return ops.repeat(gathered, x, layers)

    def cross_entropy(x, head, targets):
        return by_shard(ops.cross_entropy, BATCH, P(), BATCH)(x, head, targets)

    return ops._replace(attend=attend, repeat=repeat, cross_entropy=cross_entropy)


def by_shard(function, *specs):
    """function, run by each device on its own sequences: our kernels cannot be partitioned."""
    return jax.shard_map(function, in_specs=specs, out_specs=BATCH, check_vma=False)
