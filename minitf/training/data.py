"""Text to tokens to batches: UTF-8 files, tiktoken encodings, and windows of tokens in an order fixed by the seed."""
import base64
import binascii
import glob
import hashlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex                                              # what tiktoken depends on
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from .errors import require

RANK_FILE_BYTES = 2**26                                   # the largest in use has 2**22
PREPARED = 1                                              # the format that data/prepare.py writes


# --- Text and encodings -----------------------------------------------------------------

def find_files(names):
    """Files, folders (all that is in them, hidden files aside) and globs -> list of paths, sorted within each."""
    paths = []
    for name in filter(None, names):
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            found = [path] if path.exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        require(found, f"no text found at {name}: it must name a file, a folder with files or a glob")
        paths += found
    require(paths, "data must name at least one file, folder or glob")
    return paths


def read_text(path):
    """The file's text; ValueError where it cannot be read or is not UTF-8 text."""
    try:
        with open(path, "rb") as file:                    # a file of zeros may have any size: not to be read at all
            require(b"\0" not in file.read(2**16), f"{path} is not text: it has NUL characters")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    require("\0" not in text, f"{path} is not text: it has NUL characters")
    return text


def load_encoding(name):
    """A tiktoken.Encoding from a rank file's path (with GPT-2's split pattern) or by its name in tiktoken.

    A rank file must give ranks 0 to n - 1 to n distinct byte strings, all single bytes among them, so that any text
    can be encoded. Named encodings are downloaded by tiktoken unless it has them already.
    """
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:                        # whatever a network may raise
            raise ValueError(f"encoding {name} cannot be loaded: {type(error).__name__}; give a rank file's path") from None
    path = Path(name)
    require(path.is_file(), f"no encoding {name}: allowed are a rank file's path, {', '.join(tiktoken.list_encoding_names())}")
    require(path.stat().st_size < RANK_FILE_BYTES, f"{name} is too large for a rank file")
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ValueError(f"{name} is not a rank file: each line must be a token in base64, a space and its rank") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    require(sorted(ranks.values()) == list(range(len(ranks))), f"{name} is not a rank file: ranks must be 0 to n - 1, each once")
    return make_encoding(path.stem, ranks, r50k_pat_str, {})


def make_encoding(name, ranks, pattern, special_tokens):
    """A tiktoken.Encoding; ValueError unless it can encode any text: tiktoken itself would panic, or lose some of it."""
    every = [*ranks.values(), *special_tokens.values()]
    require(all(bytes([byte]) in ranks for byte in range(256)), f"{name} is not an encoding: it lacks some single bytes")
    require(all(ranks) and len(set(every)) == len(every) and min(every) >= 0,
            f"{name} is not an encoding: tokens must not be empty, nor ranks shared or negative")
    require(regex.match(pattern, "") is None, f"{name} is not an encoding: its pattern splits text into nothing")
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    probe = "A b, 1é\n"
    require(encoding.decode(encoding.encode(probe)) == probe, f"{name} is not an encoding: its pattern loses text")
    return encoding


def pack_encoding(encoding):
    """(arrays, names): all of an encoding, as {name: array} and as what JSON can hold."""
    pairs = encoding._mergeable_ranks
    return ({"bytes": np.frombuffer(b"".join(pairs), np.uint8), "lengths": np.array([*map(len, pairs)], np.int32),
             "ranks": np.array([*pairs.values()], np.int32)},
            {"encoding": encoding.name, "pattern": encoding._pat_str, "special": encoding._special_tokens})


def unpack_encoding(arrays, names):
    """The encoding that pack_encoding took apart; ValueError, TypeError or KeyError where they make up none."""
    ends = np.cumsum(arrays["lengths"])
    require(ends[-1] == len(arrays["bytes"]), "its encoding is not whole")
    pairs = {arrays["bytes"][end - length:end].tobytes(): int(rank)
             for end, length, rank in zip(ends, arrays["lengths"], arrays["ranks"], strict=True)}
    return make_encoding(names["encoding"], pairs, names["pattern"], names["special"])


def vocabulary(encoding):
    """How many tokens the network is built for: beyond 2,048 a multiple of 64, to which accelerators are fastest."""
    return encoding.n_vocab if encoding.n_vocab <= 2048 else -(-encoding.n_vocab // 64) * 64


def byte_lengths(encoding):
    """How many bytes of text each token stands for, (V,); 0 for special tokens."""
    lengths = np.zeros(encoding.n_vocab, int)
    lengths[[*encoding._mergeable_ranks.values()]] = [*map(len, encoding._mergeable_ranks)]
    return lengths


def known(encoding):
    """Which of the network's tokens the encoding has, (vocabulary(encoding),) of bool: others must never be drawn."""
    every = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
    return np.isin(np.arange(vocabulary(encoding)), every)


def dtype(encoding):
    """Of arrays and files of tokens."""
    return np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")


def encode(texts, encoding):
    """All texts, one after the other, as one array of tokens."""
    return np.concatenate([encoding.encode_to_numpy(text, disallowed_special=()).astype(dtype(encoding)) for text in texts])


# --- A corpus ---------------------------------------------------------------------------

class Corpus(NamedTuple):
    """Tokens to train on and tokens held out, in memory or on disk; how often each of the encoding's is in them, (V,)."""
    encoding: tiktoken.Encoding
    train: np.ndarray
    held_out: np.ndarray
    train_counts: np.ndarray
    held_out_counts: np.ndarray
    digest: str                           # of the training tokens: a run that is taken up again must have the same


def load(names, encoding, length, val_names=None, default=None):
    """The Corpus of the named text or prepared folder; held out: all of val_names, else what was set aside or the last tenth.

    encoding: an Encoding, a name or None: the prepared folder's, or `default`. ValueError unless both parts fill a window.
    """
    tokens, end, counts, encoding, checksum = read_tokens(names, encoding, default)
    held_out, held_out_counts = tokens[end:], counts[1]
    if val_names:
        end, counts = len(tokens), counts.sum(0)[None]
        held_out, _, held_out_counts, *_ = read_tokens(val_names, encoding)
        held_out_counts = held_out_counts.sum(0)
    require(np.count_nonzero(counts.sum(0)) > 1, "data is one token again and again: there is nothing to learn")
    require(end > length, f"data is too short: {end} tokens to train on, but more than {length} are needed")
    require(len(held_out) > length, f"{'val_data' if val_names else 'data'} is too short: {len(held_out)} tokens are held out "
            f"of {len(tokens)}, but more than {length} are needed")
    digest = f"{checksum} {end}" if checksum else hashlib.sha256(tokens[:end].astype("<u4").tobytes()).hexdigest()
    return Corpus(encoding, tokens[:end], held_out, counts[0], held_out_counts, digest)


def read_tokens(names, encoding, default=None):
    """(tokens, where those held out begin, both parts' counts (2, V), encoding, checksum of a prepared folder or None)."""
    manifest = read_manifest(names)
    if manifest:
        return read_prepared(Path(names), manifest, encoding)
    encoding = load_encoding(encoding or default) if isinstance(encoding or default, str) else encoding
    tokens = encode([read_text(path) for path in find_files(names.split(","))], encoding)
    return tokens, *split(tokens, count(tokens, encoding.n_vocab)), encoding, None


def split(tokens, counts):
    """(where the last tenth begins, counts (2, V) of what is before and in it), from the counts of all."""
    end = len(tokens) * 9 // 10
    held_out = count(tokens[end:], len(counts))
    return end, np.array([counts - held_out, held_out])


def read_manifest(folder):
    """What data/prepare.py wrote last into the folder; None if it is not one of those."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
        return manifest if "minitf" in manifest else None
    except (OSError, ValueError, TypeError):
        return None


def read_prepared(folder, manifest, encoding):
    """As read_tokens; the tokens stay on disk. A given encoding must be the folder's (a name: its special tokens aside)."""
    try:
        require(manifest["minitf"] == PREPARED, f"its format is {manifest['minitf']!r}, known is {PREPARED}")
        for name, file in manifest["files"].items():
            size = (folder / name).stat().st_size
            require(size == file["bytes"], f"{name} has {size:,} bytes, not {file['bytes']:,}")
        tables, files = (folder / "tables.npz").read_bytes(), manifest["files"]
        require(hashlib.sha256(tables).hexdigest() == files["tables.npz"]["sha256"], "tables.npz is not what was written")
        arrays = np.load(io.BytesIO(tables), allow_pickle=False)
        own, counts = unpack_encoding(arrays, manifest["encoding"]), arrays["counts"]
        tokens = np.memmap(folder / "tokens.bin", dtype(own), "r").view(np.ndarray)
        require(sample_checksum(tokens) == files["tokens.bin"]["sample"], "tokens.bin is not what was written")
        end, checksum = int(counts[0].sum()), files["tokens.bin"]["sha256"]
        require(counts.shape == (2, own.n_vocab) and counts.sum() == len(tokens), "its counts are not those of its tokens")
    except Exception as error:            # whatever may be missing from a manifest, or be of another type
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise ValueError(f"{folder} is not a whole prepared corpus: {reason}; prepare it again") from None
    given = load_encoding(encoding) if isinstance(encoding, str) else encoding
    same = given is None or (given._mergeable_ranks == own._mergeable_ranks and given._pat_str == own._pat_str
                             and (isinstance(encoding, str) or given._special_tokens == own._special_tokens))
    require(same, f"{folder} was prepared with another encoding, {own.name} of {own.n_vocab:,} tokens")
    end, counts = (end, counts) if end < len(tokens) else split(tokens, counts[0])
    return tokens, end, counts, own, checksum


def sample_checksum(tokens):
    """SHA-256 of 64 pieces of 4,096 bytes, evenly spread: a whole look at gigabytes would take minutes at every start."""
    content = tokens.view(np.uint8)
    starts = np.linspace(0, max(len(content) - 4096, 0), 64).astype(int)
    return hashlib.sha256(b"".join(content[start:start + 4096].tobytes() for start in starts)).hexdigest()


# --- Statistics -------------------------------------------------------------------------

def count(tokens, vocabulary):
    """How often each token is there, (V,); never an array of all tokens' size."""
    return sum((np.bincount(tokens[start:start + 2**22], minlength=vocabulary) for start in range(0, len(tokens), 2**22)),
               np.zeros(vocabulary, int))


def repeat_rate(counts):
    """r = sum_v p(v)^2: the chance that two tokens are equal, which occur so often."""
    return float(np.sum((counts / counts.sum()) ** 2))


def unigram_loss(train_counts, held_out_counts):
    """Cross-entropy in nats per held-out token of the training tokens' frequencies (each count plus one)."""
    log_p = np.log((train_counts + 1) / (train_counts + 1).sum())
    return float(-(held_out_counts @ log_p) / held_out_counts.sum())


# --- Batches ----------------------------------------------------------------------------

def batch(tokens, length, size, seed, step):
    """The batch of a step, (size, length + 1) of int32: windows in an order drawn anew for each pass over the tokens.

    A pure function of its arguments: a run can be taken up at any step.
    """
    windows = (len(tokens) - 1) // length                                    # a window's last target is the next one's first
    index = np.arange(step * size, (step + 1) * size)
    starts = np.array([window_order(windows, seed, int(i // windows))[i % windows] for i in index]) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


@lru_cache(maxsize=2)
def window_order(windows, seed, epoch):
    """The order of windows in one pass."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def spread_windows(tokens, length, count):
    """At most `count` windows, (n, length + 1) of int32, without overlap and evenly spread over the tokens."""
    windows = (len(tokens) - 1) // length
    starts = np.unique(np.linspace(0, windows - 1, min(count, windows)).astype(int)) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def spans(tokens, size):
    """Pieces of at most `size` targets, one after the other, each with the token before them: (size + 1,) at most."""
    require(len(tokens) > 1, f"at least two tokens are needed, to predict one from the other, not {len(tokens)}")
    return (tokens[start:start + size + 1] for start in range(0, len(tokens) - 1, size))


def all_windows(tokens, length):
    """Windows that predict every token but the first once, (n, length + 1) of int32; which targets count, (n, length).

    The last window is padded where the tokens end within it.
    """
    windows = -(-(len(tokens) - 1) // length)
    padded = np.pad(tokens.astype(np.int32), (0, windows * length + 1 - len(tokens)))
    index = np.arange(windows)[:, None] * length + np.arange(length + 1)
    return padded[index], index[:, 1:] < len(tokens)
