"""Text and encodings: UTF-8 files to text, tiktoken encodings to and from arrays."""
import base64
import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import regex                                          # what tiktoken depends on
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from ..errors import require

RANK_FILE_BYTES = 2**26                               # the largest in use has 2**22
JSON_LINES = ".json", ".jsonl", ".ndjson"
END = "<|endoftext|>"                                 # what ends a document
LONE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")

# --- Text --------------------------------------------------------------------------------

def find_files(names):
    """Files, folders (all in them but hidden files) and globs -> paths, sorted within each.

    names: a list, or one text, as `split_names`. Links are followed; what several lead to in a
    folder or glob counts once.
    """
    paths = []
    for name in split_names(names):
        path = Path(name)
        if path.is_dir():
            found = once(files_in(path))
        elif path.exists():
            found = [path]
        else:
            found = once(each for each in map(Path, matches(name)) if each.is_file())
        require(found, f"no text found at {name}: it must name a file, a folder of files or a glob")
        paths += found
    require(paths, "data must name at least one file, folder or glob")
    return paths


def split_names(names):
    """A list of names, or one text with commas between them, unless that is a path itself.

    ~ is the home.
    """
    if isinstance(names, str):
        names = [names] if os.path.exists(os.path.expanduser(names)) else names.split(",")
    return [*map(os.path.expanduser, filter(None, names))]


def walk(folder):
    """(a folder, the names in it that are no folders') of it and all in it but hidden ones, once.

    OSError where one cannot be read.
    """
    def fail(error):
        raise error

    seen = {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        places = {name: os.path.realpath(os.path.join(here, name)) for name in folders}
        folders[:] = [name for name in sorted(folders)
                      if not (name.startswith(".") or places[name] in seen)]
        seen.update(places[name] for name in folders)
        yield here, names


def files_in(folder):
    """The paths of all files in a folder and those in it, but hidden ones."""
    paths = (Path(here) / name for here, names in walk(folder) for name in names)
    return (path for path in paths if path.is_file() and not path.name.startswith("."))


def matches(pattern):
    """What a glob stands for; ** is any folders. The standard library's goes around loops."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not after:
        return glob.glob(pattern)
    return [match for top in glob.glob(before or ".") for here, _ in walk(top)
            for match in matches(os.path.join(glob.escape(here), after[0] or "*"))]


def once(paths):
    """The paths, sorted, without those that lead to the same place as an earlier one."""
    first = {os.path.realpath(path): path for path in sorted(paths, reverse=True)}
    return sorted(first.values())


class NotText(ValueError):
    """A file has something else than text."""


def read_texts(names):
    """The texts of what `find_files` finds.

    A named file that is no text is refused. In a folder such files are left out, and counted.
    """
    named, texts, others = {*map(Path, split_names(names))}, [], 0
    for path in find_files(names):
        try:
            if path.name.lower().removesuffix(".part").endswith(JSON_LINES):    # or half of one
                raise NotText(f"{path} is JSON: data/prepare.py makes a corpus of it")
            texts.append(read_text(path))
        except NotText:
            if path in named:
                raise
            others += 1
    if others:
        print(f"note: {others} files that are JSON or no text are left out")
    require(texts, f"no text found at {names}")
    return texts


def read_text(path):
    """The file's text, without a byte order mark; NotText where there is no UTF-8 text.

    It is opened once, as a pipe can be, and read no further than to the first NUL.
    """
    pieces = []
    try:
        with open(path, "rb") as file:
            for piece in iter(partial(file.read, 2**20), b""):
                if b"\0" in piece:
                    raise NotText(f"{path} is not text: it has NUL characters")
                pieces.append(piece)
        return b"".join(pieces).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NotText(f"{path} is not UTF-8 text") from None


# --- Encodings ----------------------------------------------------------------------------

def load_encoding(name):
    """A tiktoken.Encoding from a rank file, with GPT-2's split pattern, or by its name in tiktoken.

    A rank file must give ranks 0 to n - 1 to n distinct byte strings, all single bytes among them,
    so that any text can be encoded. tiktoken downloads named encodings unless it has them already.
    """
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:                    # whatever a network may raise
            raise ValueError(f"encoding {name} cannot be loaded: {type(error).__name__}; "
                             "give a rank file's path") from None
    path = Path(name)
    require(path.is_file(), f"no encoding {name}: allowed are a rank file's path, "
            f"{', '.join(tiktoken.list_encoding_names())}")
    require(path.stat().st_size < RANK_FILE_BYTES, f"{name} is too large for a rank file")
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{name} is not a rank file: each line must be a token in base64, "
                         "a space and its rank") from None
    require(sorted(ranks.values()) == list(range(len(ranks))),
            f"{name} is not a rank file: ranks must be 0 to n - 1, each once")
    return make_encoding(path.stem, ranks, r50k_pat_str, {})


def make_encoding(name, ranks, pattern, special_tokens):
    """A tiktoken.Encoding; ValueError unless it can encode any text."""
    every, wrong = [*ranks.values(), *special_tokens.values()], f"{name} is not an encoding: "
    require(all(bytes([byte]) in ranks for byte in range(256)), wrong + "it lacks single bytes")
    require(all(ranks) and len(set(every)) == len(every) and min(every) >= 0,
            wrong + "tokens must not be empty, nor ranks shared or negative")
    require(regex.match(pattern, "") is None, wrong + "its pattern splits text into nothing")
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special_tokens)
    probe = "A b, 1é\n"
    require(encoding.decode(encoding.encode(probe)) == probe, wrong + "its pattern loses text")
    return encoding


def pack_encoding(encoding):
    """(arrays, names): all of an encoding, as {name: array} and as what JSON can hold."""
    pairs = encoding._mergeable_ranks
    arrays = {"bytes": np.frombuffer(b"".join(pairs), np.uint8),
              "lengths": np.array([*map(len, pairs)], np.int32),
              "ranks": np.array([*pairs.values()], np.int32)}
    return arrays, {"encoding": encoding.name, "pattern": encoding._pat_str,
                    "special": encoding._special_tokens}


def unpack_encoding(arrays, names):
    """What pack_encoding took apart; ValueError, TypeError or KeyError where they make up none."""
    ends = np.cumsum(arrays["lengths"])
    require(ends[-1] == len(arrays["bytes"]), "its encoding is not whole")
    pairs = {arrays["bytes"][end - length:end].tobytes(): int(rank)
             for end, length, rank in zip(ends, arrays["lengths"], arrays["ranks"], strict=True)}
    return make_encoding(names["encoding"], pairs, names["pattern"], names["special"])


def vocabulary(encoding):
    """How many tokens the network is built for: beyond 2,048 a multiple of 64, which is faster."""
    return encoding.n_vocab if encoding.n_vocab <= 2048 else -(-encoding.n_vocab // 64) * 64


def byte_lengths(encoding):
    """How many bytes of text each token stands for, (V,); 0 for special tokens."""
    lengths = np.zeros(encoding.n_vocab, int)
    lengths[[*encoding._mergeable_ranks.values()]] = [*map(len, encoding._mergeable_ranks)]
    return lengths


def known(encoding):
    """Which of the network's tokens the encoding has, (vocabulary(encoding),) of bool."""
    every = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
    return np.isin(np.arange(vocabulary(encoding)), every)


def dtype(encoding):
    """Of arrays and files of tokens."""
    return np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")


def encode(texts, encoding, special=False):
    """Pieces of a text, one after the other, as one array of tokens.

    special: what spells the end-of-text token is that token, else text as any other.
    """
    allowed = {END} if special else set()
    return np.concatenate([
        encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        .astype(dtype(encoding)) for text in texts])


def encode_files(texts, encoding):
    """Whole texts as one array of tokens, encoded on all cores.

    Between them is the end-of-text token; where the encoding has none, a line break.
    """
    end = encoding._special_tokens.get(END)
    between = np.array(encoding.encode("\n") if end is None else [end], dtype(encoding))
    made = lambda part: between if part is None else encode([part], encoding)
    parts = [part for text in texts for part in (None, *apart(text, encoding))]
    with ThreadPoolExecutor() as threads:
        return np.concatenate([*threads.map(made, parts[1:])])


def apart(text, encoding, size=2**18):
    """Parts of a text, of about so many characters, whose tokens are those of the text.

    GPT-2's pattern never joins a lone line break to the character after it; of other patterns
    nothing is known, and the text stays whole.
    """
    start = 0
    known = encoding._pat_str == r50k_pat_str
    while known and (found := LONE_BREAK.search(text, start + size)):
        yield text[start:found.end()]
        start = found.end()
    yield text[start:]
