"""Text to tokens to batches: UTF-8 files, tiktoken encodings, and windows of tokens in an order fixed by the seed."""
import base64
import binascii
import glob
import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex                                              # what tiktoken depends on
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from .errors import require

RANK_FILE_BYTES = 2**26                                   # the largest in use has 2**22


# --- Text and encodings ---------------------------------------------------------------------------------------------

def find_files(names):
    """Comma-separated files, folders (all that is in them, hidden files aside) and globs -> list of paths, sorted."""
    paths = []
    for name in filter(None, names.split(",")):
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


def encode(texts, encoding):
    """All texts, one after the other, as one array of tokens (uint16 where that is enough)."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    return np.concatenate([encoding.encode_to_numpy(text, disallowed_special=()).astype(dtype) for text in texts])


def load(names, encoding, length):
    """(train, held_out): the tokens of the named text, its last tenth held out. Each must fill one window at least."""
    tokens = encode([read_text(path) for path in find_files(names)], encoding)
    require((tokens != tokens[:1]).any(), "data is one token again and again: there is nothing to learn")
    train, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    require(len(held_out) > length,
            f"data is too short: {len(tokens)} tokens, but a held-out tenth of more than {length} is needed")
    return train, held_out


def digest(tokens):
    """SHA-256 of tokens, in hexadecimal: a run that is taken up again must have the same."""
    return hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()


# --- Statistics -------------------------------------------------------------------------------------------------------

def repeat_rate(tokens, vocabulary):
    """r = sum_v p(v)^2: the chance that two tokens are equal."""
    return float(np.sum((np.bincount(tokens, minlength=vocabulary) / len(tokens)) ** 2))


def unigram_loss(train, held_out, vocabulary):
    """Cross-entropy in nats per held-out token of the training tokens' frequencies (each count plus one)."""
    count = np.bincount(train, minlength=vocabulary) + 1
    return float(-np.mean(np.log(count / count.sum())[held_out]))


def bytes_per_token(tokens, encoding):
    """Mean bytes of text that a token stands for."""
    count = np.bincount(tokens, minlength=encoding.n_vocab)
    return sum(int(count[t]) * len(encoding.decode_single_token_bytes(t)) for t in np.flatnonzero(count)) / len(tokens)


# --- Batches ------------------------------------------------------------------------------------------------------------

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


def all_windows(tokens, length):
    """Windows that predict every token but the first once, (n, length + 1) of int32; which targets count, (n, length).

    The last window is padded where the tokens end within it.
    """
    require(len(tokens) > 1, f"at least two tokens are needed, to predict one from the other, not {len(tokens)}")
    windows = -(-(len(tokens) - 1) // length)
    padded = np.pad(tokens.astype(np.int32), (0, windows * length + 1 - len(tokens)))
    index = np.arange(windows)[:, None] * length + np.arange(length + 1)
    return padded[index], index[:, 1:] < len(tokens)
