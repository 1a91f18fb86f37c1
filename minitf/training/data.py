"""Tokens to batches: a corpus in memory or on disk, windows in an order fixed by the seed."""
import hashlib
import io
import json
import os
import threading
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tiktoken

from ..errors import require
from .encoding import dtype, encode_files, load_encoding, read_texts, unpack_encoding

PREPARED = 2                                          # the format that data/prepare.py writes
MANY = 20                                             # files: some of them are set aside whole
LAST = "the last tenth"
CHECKED = 2**32                                       # bytes of tokens, checked before a start
SAID_AFTER = 60                                       # seconds of a check, if there are more
INCLUDED = Path(__file__).parents[2] / "data"         # text and encoding where none are named
TEXT, RANKS = INCLUDED / "shakespeare.txt", INCLUDED / "shakespeare.tiktoken"

# --- A corpus ---------------------------------------------------------------------------

class Corpus(NamedTuple):
    """Tokens to train on and to validate on, in memory or on disk."""
    encoding: tiktoken.Encoding
    train: np.ndarray
    validation: np.ndarray
    train_counts: np.ndarray                          # how often each token is there, (V,)
    validation_counts: np.ndarray
    digest: str                                       # of the training tokens, for resuming
    held_out: str                                     # what the validation text is
    verify: Callable                                  # ValueError once it is known to be damaged


def load(config, length, encoding=None):
    """The Corpus of a DataConfig.

    Validation text is all of val_data, else what was set aside: by data/prepare.py, or whole files
    where there are many; else the last tenth. encoding: one to take instead of the configured.
    ValueError unless both parts have more than `length` tokens.
    """
    names, val_data = str(TEXT) if config.data is None else config.data, config.val_data
    tokens, end, counts, encoding, checksum, held_out = read_tokens(
        names, encoding or config.encoding)
    long = checksum and tokens.nbytes > CHECKED
    verify = check_whole(names, tokens, checksum, encoding.n_vocab) if long else lambda: None
    validation = tokens[end:]
    if val_data is not None:
        validation, _, others, *_ = read_tokens(val_data, encoding, whole=True)
        end, counts, held_out = len(tokens), (counts.sum(0), others.sum(0)), "val-data"
    require(end > length, f"data is too short: {end} tokens to train on, needed are {length + 1}")
    require(np.count_nonzero(counts[0]) > 1, "data is one token again and again")
    require(len(validation) > length,
            f"{'val-data' if val_data else 'data'} is too short: {len(validation)} tokens are for "
            f"validation, needed are {length + 1}")
    digest = f"{checksum} {end}" if checksum else \
        hashlib.sha256(tokens[:end].astype("<u4").tobytes()).hexdigest()
    return Corpus(encoding, tokens[:end], validation, *counts, digest, held_out, verify)


def read_tokens(names, encoding=None, whole=False):
    """The tokens of texts, and what is known of them.

    Returns (tokens, where validation begins, both parts' counts (2, V), encoding, checksum or
    None, what the validation text is).

    names: comma-separated, or a prepared folder. encoding: an Encoding, a name, or None for the
    prepared folder's, else the included one. whole: files stay in their order, none is set aside.
    """
    folder = os.path.expanduser(names)
    manifest = read_manifest(folder)
    if manifest:
        return read_prepared(Path(folder), manifest, encoding)
    require(not Path(folder, "tokens.bin").exists(),
            f"{folder} is not a whole prepared corpus: manifest.json is none; prepare it again")
    if not isinstance(encoding, tiktoken.Encoding):
        encoding = load_encoding(str(RANKS) if encoding is None else encoding)
    texts = read_texts(names)
    parts = [texts] if whole else set_aside(texts)
    tokens, *validation = (encode_files(part, encoding) for part in parts)
    if not validation:
        return tokens, *split(tokens, count(tokens, encoding.n_vocab)), encoding, None, LAST
    counts = np.array([count(part, encoding.n_vocab) for part in (tokens, *validation)])
    return (np.concatenate([tokens, *validation]), len(tokens), counts, encoding, None,
            f"{len(parts[1])} whole files")


def set_aside(texts):
    """[texts to train on, texts to validate on], or [all] where that is no fair share.

    Of MANY texts or more, equal ones counted once: those of the least SHA-256, the same wherever
    they lie, up to a tenth of all characters; a text that would exceed it stays. At least 3 % must
    come together.
    """
    count, total, chosen = Counter(texts), sum(map(len, texts)), set()
    room = total / 10
    for text in sorted(count, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(text) * count[text] <= room:
            chosen.add(text)
            room -= len(text) * count[text]
    if len(count) < MANY or room > 0.07 * total:
        return [texts]
    return [[text for text in texts if text not in chosen],
            [text for text in texts if text in chosen]]


def split(tokens, counts):
    """(where the last tenth begins, counts (2, V) before and in it), from the counts of all."""
    end = len(tokens) * 9 // 10
    last = count(tokens[end:], len(counts))
    return end, np.array([counts - last, last])


def read_manifest(folder):
    """What data/prepare.py wrote last into the folder; None if it is not one of those."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
        return manifest if "minitf" in manifest else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def checksum_of(manifest):
    """SHA-256 of all that a manifest says but this."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_prepared(folder, manifest, encoding):
    """As read_tokens; the tokens stay on disk. A given encoding must be the folder's."""
    try:
        require(manifest["minitf"] == PREPARED,
                f"its format is {manifest['minitf']!r}, known is {PREPARED}")
        require(manifest["sha256"] == checksum_of(manifest),
                "manifest.json is not what was written")
        for name, file in manifest["files"].items():
            size = (folder / name).stat().st_size
            require(size == file["bytes"], f"{name} has {size:,} bytes, not {file['bytes']:,}")
        tables, files = (folder / "tables.npz").read_bytes(), manifest["files"]
        require(hashlib.sha256(tables).hexdigest() == files["tables.npz"]["sha256"],
                "tables.npz is not what was written")
        arrays = np.load(io.BytesIO(tables), allow_pickle=False)
        own, counts = unpack_encoding(arrays, manifest["encoding"]), arrays["counts"]
        tokens = np.memmap(folder / "tokens.bin", dtype(own), "r").view(np.ndarray)
        whole = tokens.nbytes <= CHECKED                 # of more, pieces first: see check_whole
        found = hashlib.sha256(tokens).hexdigest() if whole else sample_checksum(tokens)
        require(found == files["tokens.bin"]["sha256" if whole else "sample"],
                "tokens.bin is not what was written")
        require(not (whole and foreign(tokens, own.n_vocab)), "its encoding lacks some tokens")
        end, checksum = int(counts[0].sum()), files["tokens.bin"]["sha256"]
        require(counts.shape == (2, own.n_vocab) and counts.sum() == len(tokens),
                "its counts are not those of its tokens")
    except Exception as error:                        # a manifest may lack anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{folder} is not a whole prepared corpus: {' '.join(reason.split())}; "
                         "prepare it again") from None
    given = load_encoding(encoding) if isinstance(encoding, str) else encoding
    parts = "_mergeable_ranks", "_pat_str", "_special_tokens"
    parts = parts[:2] if isinstance(encoding, str) else parts       # of a name, not special tokens
    require(given is None or all(getattr(given, part) == getattr(own, part) for part in parts),
            f"{folder} was prepared with another encoding, {own.name} of {own.n_vocab:,} tokens")
    if end < len(tokens):
        return tokens, end, counts, own, checksum, "set aside"
    return tokens, *split(tokens, counts[0]), own, checksum, LAST


def check_whole(folder, tokens, checksum, vocabulary):
    """Begins to read all tokens beside what else is done.

    Returns a function that raises ValueError if they turned out not to be what was written, or none
    of the vocabulary's.
    """
    found, content, piece = [], tokens.view(np.uint8), 2**26

    def read():
        digest, began, said = hashlib.sha256(), time.monotonic(), False
        for start in range(0, len(content), piece):
            digest.update(content[start:start + piece])
            if foreign(content[start:start + piece].view(tokens.dtype), vocabulary):
                found.append("foreign")
            if not said and time.monotonic() - began > SAID_AFTER:
                said = True
                print(f"note: {folder}/tokens.bin is being checked, {start / len(content):.0%} "
                      "so far", flush=True)
        found.append(digest.hexdigest())

    threading.Thread(target=read, daemon=True).start()
    return lambda: require(found in ([], [checksum]),
                           f"{folder}/tokens.bin is not what was written; prepare it again")


def foreign(tokens, vocabulary):
    """Whether any is none of the vocabulary's."""
    return len(tokens) > 0 and tokens.max() >= vocabulary


def sample_checksum(tokens):
    """SHA-256 of 64 pieces of 4,096 bytes, evenly spread: gigabytes would take minutes."""
    content = tokens.view(np.uint8)
    starts = np.linspace(0, max(len(content) - 4096, 0), 64).astype(int)
    pieces = (content[start:start + 4096].tobytes() for start in starts)
    return hashlib.sha256(b"".join(pieces)).hexdigest()


# --- Statistics -------------------------------------------------------------------------

def count(tokens, vocabulary):
    """How often each token is there, (V,); never an array of all tokens' size."""
    blocks = (tokens[start:start + 2**22] for start in range(0, len(tokens), 2**22))
    return sum((np.bincount(block, minlength=vocabulary) for block in blocks),
               np.zeros(vocabulary, int))


def token_collision_rate(counts):
    """r = sum_v p(v)^2: the chance that two tokens that occur so often are equal."""
    return float(np.sum((counts / counts.sum()) ** 2))


def unigram_loss(train_counts, validation_counts):
    """Cross-entropy in nats per validation token of the training tokens' frequencies, plus one."""
    log_p = np.log((train_counts + 1) / (train_counts + 1).sum())
    return float(-(validation_counts @ log_p) / validation_counts.sum())


# --- Batches ----------------------------------------------------------------------------

def batch(tokens, length, size, seed, step, rows=slice(None)):
    """The batch of a step, (size, length + 1) of int32, or some of its rows.

    Windows in an order drawn anew for each pass over the tokens. A pure function of its arguments,
    so that a run can be taken up at any step.
    """
    windows = (len(tokens) - 1) // length             # a window's last target begins the next one
    index = np.arange(step * size, (step + 1) * size)[rows]
    starts = np.array([window_order(windows, seed, int(i // windows))[i % windows]
                       for i in index]) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


@lru_cache(maxsize=2)
def window_order(windows, seed, epoch):
    """The order of windows in one pass."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def spread_windows(tokens, length, count):
    """At most `count` windows, (n, length + 1) of int32, without overlap and evenly spread."""
    windows = (len(tokens) - 1) // length
    starts = np.unique(np.linspace(0, windows - 1, min(count, windows)).astype(int)) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def every_window(tokens, length, size):
    """Windows that predict every token but the first once, and which targets count.

    Yields (size, length + 1) of int32 and (size, length) of bool; the last ones are padded.
    """
    require(len(tokens) > 1, f"at least two tokens are needed, not {len(tokens)}")
    index = np.arange(size)[:, None] * length + np.arange(length + 1)
    for start in range(0, len(tokens) - 1, size * length):
        piece = tokens[start:start + size * length + 1].astype(np.int32)
        padded = np.pad(piece, (0, size * length + 1 - len(piece)))
        yield padded[index], index[:, 1:] < len(piece)
