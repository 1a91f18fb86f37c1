"""Turns text of any size into tokens, once: python data/prepare.py --out DIR FILES...

Reads WikiText (wiki.train.tokens: an article a document), JSON lines (*.json, *.jsonl, *.ndjson: a
line a document), Parquet (a row a document) and plain text (a file a document), all of them also
as .gz, .bz2, .xz or .zst; FILES are files, folders or globs. Drops exact duplicates, ends every
document with the end-of-text token and writes DIR for run.py --data: tokens.bin (raw,
little-endian, to be memory-mapped; validation documents last), tables.npz (the encoding; how often
each token is in either part) and manifest.json.

DIR appears when it is whole. Memory does not grow with the corpus, nor do the bytes depend on the
number of processes.
"""
import argparse
import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from minitf.cli import host                                             # noqa: E402
from minitf.cli.progress import clock, on_terminal                         # noqa: E402
from minitf.errors import Parser, require                                  # noqa: E402
from minitf.training import checkpoint, data, encoding as encodings        # noqa: E402
from minitf.training.encoding import END                                   # noqa: E402

PIECE = 2**20    # bytes of text that tiktoken gets at once: the longer a word, the slower each byte
OWN, OF_EACH = 2**29, 2**28    # bytes of memory, about, of this process and of each other one
LINE = 2**26     # bytes of a line of JSON, which must be in memory as a whole
BLOCK = 2**21    # tokens, or documents, in memory at once while duplicates are dropped
POINTER = b"version https://git-lfs.github.com/spec/"                    # of Git LFS, not the file
WIKITEXT = re.compile(r"wiki\..*\.(tokens|raw)")
# Of an article; those of sections have " = = ".
HEADING = re.compile(rb" = (?!= )[^\n]*(?<! =) = \r?\n")
PARTS = ("train", "validation")


def main(arguments=None):
    """Parses the flags and prepares. Whatever a user can get wrong: one line, exit status 2."""
    parser = Parser(prog="prepare.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders or globs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--encoding", default=str(HERE / "shakespeare.tiktoken"), metavar="NAME",
                        help="a tiktoken encoding, which tiktoken may download, or a rank file "
                        "(default: 1,024 byte pairs)")
    parser.add_argument("--suffix", default="", metavar=".py,.md",
                        help="read only such files of folders")
    parser.add_argument("--validation-share", type=float, default=0.01, metavar="SHARE",
                        help="of the documents (default: 0.01)")
    parser.add_argument("--test-share", type=float, default=0.0, metavar="SHARE",
                        help="of the documents, left out, to test on (default: 0)")
    parser.add_argument("--test", action="store_true", help="only those of --test-share, whole")
    parser.add_argument("--text-key", default="text", metavar="NAME",
                        help="where JSON lines and Parquet have the text (default: text)")
    parser.add_argument("--special-tokens", action="store_true",
                        help=f"{END} in a text is the end-of-text token, not text")
    parser.add_argument("--skip-damaged", action="store_true",
                        help="go on after a file that is not whole, with what is before that")
    most = min(host.cores(), (host.memory() - OWN) // OF_EACH)
    parser.add_argument("--processes", type=int, default=max(int(most), 1), metavar="N",
                        help="default: one a core, as far as memory allows")
    flags = parser.parse_args(arguments)
    try:
        prepare(**vars(flags))
    except ValueError as error:
        parser.error(str(error))
    except BrokenProcessPool:
        parser.error("a worker process was killed, perhaps for want of memory: "
                     "fewer --processes need less")
    except OSError as error:
        parser.error(f"{error.filename or f'cannot write {flags.out}'}: {error.strerror}")
    except MemoryError:
        parser.error("out of memory: fewer --processes need less")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def prepare(files, out, encoding, suffix="", validation_share=0.01, test_share=0.0, test=False,
            processes=1, text_key="text", skip_damaged=False, special_tokens=False):
    """Writes the folder `out`, whole; ValueError or OSError, and no folder, where it cannot."""
    require(0 <= validation_share and 0 <= test_share and validation_share + test_share < 1,
            "validation-share and test-share must be at least 0 and together below 1, not "
            f"{validation_share} and {test_share}")
    require(test_share or not test, "--test needs the --test-share of the other part")
    require(1 <= processes <= 1024,
            f"processes must be at least 1 and at most 1024, not {processes}")
    require(not os.path.lexists(out), f"{out} exists: a prepared corpus never overwrites anything")
    encoding = with_end_of_text(encodings.load_encoding(encoding))
    files = [*map(os.path.expanduser, files)]
    sources = [(name, Path(name).is_dir(), find_files(name, suffix)) for name in files]
    sizes = [sum(map(os.path.getsize, paths)) for _, _, paths in sources]
    beside = out.absolute().with_name(f".{out.absolute().name}.part")
    beside.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.lock(beside)
    try:
        for leftover in set(beside.iterdir()) - {beside / "lock"}:   # of a process that was killed
            leftover.unlink()
        damaged = [] if skip_damaged else None
        with workers((encoding, text_key, special_tokens), processes, lock) as encode:
            encoded = encode(tasks(pieces(sources, text_key, damaged)))
            skipped = write_documents(
                beside, encoded,
                partial(part_of, share=validation_share, test_share=test_share, test=test),
                progress(sum(sizes)))
        skipped |= {"damaged files": len(damaged)} if damaged else {}
        manifest = write_corpus(beside, encoding)
        manifest |= {"skipped": skipped, "validation_share": validation_share,
                     "test_share": test_share, "test": test, "sources": [
            {"name": name, "files": len(paths), "bytes": size}
            for (name, _, paths), size in zip(sources, sizes)]}
        manifest["sha256"] = data.checksum_of(manifest)
        checkpoint.write(beside / "manifest.json",
                         lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        (beside / "lock").unlink()
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for part in PARTS:
        print(f"{part:12}" + listed(manifest[part]))
    print(f"{'skipped':12}" + (listed(skipped) or "nothing"))
    print(f"{out}: {encoding.n_vocab:,} tokens in the encoding; "
          f"to train on it: python run.py --data {out}")


def listed(counts):
    """{name: n} as a person reads it."""
    return ", ".join(f"{value:,} {name}" for name, value in counts.items())


def with_end_of_text(encoding):
    """The encoding, with an end-of-text token at the next free rank if it has none."""
    special = encoding._special_tokens
    return encoding if END in special else encodings.make_encoding(
        encoding.name, encoding._mergeable_ranks, encoding._pat_str,
        special | {END: encoding.n_vocab})


def find_files(name, suffix):
    """The paths that a name stands for.

    Of a folder only those with one of the comma-separated suffixes, if any.
    """
    paths, suffixes = encodings.find_files([name]), tuple(filter(None, suffix.split(",")))
    if Path(name).is_dir() and suffixes:
        paths = [path for path in paths if path.name.endswith(suffixes)]
        require(paths, f"no file in {name} ends with {' or '.join(suffixes)}")
    return [*map(str, paths)]                                # of which there may be millions


# --- Reading: documents in pieces, as a stream -------------------------------------------

class Piece(NamedTuple):
    """A document, or a part of one that is too long.

    And where it is from: its number there, what is read of all by then.
    """
    raw: bytes
    is_json: bool
    first: bool
    last: bool
    path: Path
    may_be_skipped: bool
    number: int
    read: int


class Damaged(ValueError):
    """A file that is not whole."""


def pieces(sources, text_key, damaged=None):
    """Yields the pieces of all files, in order.

    damaged: a list that gains the files that are not whole; None: the first of them ends all.
    """
    before = 0
    for _, is_folder, paths in sources:
        for path in map(Path, paths):
            with open(path, "rb") as file:
                require(not file.peek(64).startswith(POINTER),
                        f"{path} is a Git LFS pointer, not the file: git lfs pull")
                first, is_json = True, unpacked(path).suffix.lower() in encodings.JSON_LINES
                position = file.tell if file.seekable() else int     # of a pipe it is not known
                try:
                    for number, (raw, last) in enumerate(split_file(path, file, text_key), 1):
                        yield Piece(raw, is_json, first, last, path, is_folder, number,
                                    before + position())
                        first = last
                except Damaged as error:
                    if damaged is None:
                        raise
                    damaged.append(str(error))
                    if not first:                      # NUL: the document that was begun is no text
                        yield Piece(b"\0", False, False, True, path, True, 0, before + position())
                before += position()


def zst_open(file):
    """ValueError where there is no reader of it: Python has one from 3.14 on."""
    try:
        import zstandard
    except ImportError:
        raise ValueError("a .zst file needs zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True,
                                                      closefd=False)


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zst_open}


def unpacked(path):
    """Its name without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in OPENERS else path


def split_file(path, file, text_key):
    """Yields (bytes, does a document end with them) of an open file."""
    opener = OPENERS.get(path.suffix.lower())
    try:
        content = io.BufferedReader(opener(file)) if opener else file
        yield from split(path, unpacked(path), content, text_key)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:                    # the machine's trouble, not the file's
            raise
        raise Damaged(f"{path} is damaged: {error}") from None
    except Exception as error:                         # zstandard's and pyarrow's own
        if type(error).__module__.partition(".")[0] not in ("zstandard", "zstd", "pyarrow"):
            raise
        raise Damaged(f"{path} is damaged: {error}") from None


def split(path, name, file, text_key):
    """As split_file, of what is not compressed: a file of this name."""
    if name.suffix.lower() in encodings.JSON_LINES:
        for number, line in enumerate(iter(lambda: file.readline(LINE), b""), 1):
            require(len(line) < LINE, f"line {number} of {path} is longer than {LINE:,} bytes")
            yield line, True
    elif name.suffix.lower() == ".parquet":
        for text in parquet_column(path, file, text_key):
            yield from cut([text.encode()])
    elif WIKITEXT.fullmatch(name.name):
        for _, lines in groupby(articles(file), key=lambda pair: pair[0]):
            yield from cut(line for _, line in lines)
    else:
        yield from cut(iter(lambda: file.read(PIECE), b""))


def parquet_column(path, file, name):
    """Yields the texts of a column."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("a .parquet file needs pyarrow: pip install -e '.[corpora]'") from None
    table = parquet.ParquetFile(file)
    require(name in table.schema_arrow.names, f"{path} has no column {name}: it has "
            f"{', '.join(table.schema_arrow.names)}; --text-key names another")
    for rows in table.iter_batches(1024, columns=[name]):
        yield from (text for text in rows.column(0).to_pylist() if isinstance(text, str))


def articles(file):
    """Yields (how many articles have begun, line) of WikiText.

    A heading stands after an empty line.
    """
    begun, after_empty = 0, True
    for line in iter(lambda: file.readline(PIECE), b""):
        begun += after_empty and HEADING.fullmatch(line) is not None
        after_empty = not line.strip()
        yield begun, line


def cut(blocks):
    """A document in blocks of any size -> (piece of PIECE bytes at most, is it the last).

    It is cut after a line if there is one. The cuts depend on the document alone. None is within
    a character.
    """
    held, size = [], 0
    for block in blocks:
        held.append(block)
        size += len(block)
        while size > PIECE:
            whole = b"".join(held)
            end = whole.rfind(b"\n", PIECE // 2, PIECE) + 1 or PIECE
            while end > PIECE - 4 and whole[end] & 0xC0 == 0x80:
                end -= 1
            yield whole[:end], False
            held, size = [whole[end:]], size - end
    yield b"".join(held), True


def tasks(stream):
    """Puts whole documents together to lists of about PIECE bytes.

    A piece of a longer one stays alone.
    """
    task, size = [], 0
    for piece in stream:
        alone = not (piece.first and piece.last)
        if task and (alone or size + len(piece.raw) > PIECE):
            yield task
            task, size = [], 0
        task.append(piece)
        size += PIECE + 1 if alone else len(piece.raw)
    if task:
        yield task


# --- Encoding, in processes of its own ---------------------------------------------------

@contextmanager
def workers(how, processes, lock):
    """A function of tasks: yields (task, what encode_task makes of it).

    In their order, with a few under way at a time. how: (encoding, text_key, special_tokens).
    """
    global ENCODING, TEXT_KEY, SPECIAL                       # forked processes have it without ado
    (ENCODING, TEXT_KEY, SPECIAL), pipe = how, os.pipe()
    try:
        forking = multiprocessing.get_context("fork")
    except ValueError:                                       # Windows has none
        forking, processes = None, 1
    pool = ProcessPoolExecutor(processes, forking, start_worker, (lock, *pipe))

    def encode(stream):
        waiting = deque()
        for task in stream:
            sent = [piece[:4] for piece in task]
            if processes == 1:
                yield task, encode_task(sent)
                continue
            waiting.append((task, pool.submit(encode_task, sent)))
            if len(waiting) > 2 * processes:
                task, future = waiting.popleft()
                yield task, future.result()
        yield from ((task, future.result()) for task, future in waiting)

    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)
        for end in pipe:
            os.close(end)


def start_worker(lock, reading, writing):
    """Leaves Ctrl-C and the lock to the main process, and ends with it.

    However that ends: the pipe is closed then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock.close()
    os.close(writing)
    threading.Thread(target=lambda: os.read(reading, 1) or os._exit(1), daemon=True).start()


def encode_task(task):
    """n pieces, [(raw, is_json, first, last)] -> (tokens, counts, digests, firsts, problems).

    Their tokens; how many of each, (n,); their digests, (n, 32); those of their first parts,
    (n, 32); {which: why it is no text}. What is blank or no text has no tokens.
    """
    tokens, digests, firsts, problems = [], [], [], {}
    for which, (raw, is_json, first, last) in enumerate(task):
        parts = []
        try:
            raw = raw.removeprefix(codecs.BOM_UTF8) if first else raw
            parts = texts(raw, is_json, blank=first and last)
        except ValueError as error:
            problems[which] = str(error)
        end = np.array([ENCODING._special_tokens[END]] * (last and len(parts) > 0),
                       encodings.dtype(ENCODING))
        tokens.append(np.concatenate([encodings.encode(parts or [""], ENCODING, SPECIAL), end]))
        own = [hashlib.sha256(part.encode()).digest() for part in parts or [""]]
        digests.append(combine(own))
        firsts.append(own[0])
    array = lambda hashes: np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    counts = np.array([*map(len, tokens)])
    return np.concatenate(tokens), counts, array(digests), array(firsts), problems


def texts(raw, is_json, blank):
    """The text of a piece in parts of PIECE bytes at most; none where it may be blank and is.

    ValueError if it is no text.
    """
    try:
        if is_json and raw.strip():
            text = json.loads(raw)[TEXT_KEY]           # JSON can escape what UTF-8 has no place for
            raw = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        require(is_json or b"\0" not in raw, "is not text: it has NUL characters")
        return [] if blank and not raw.strip() else [part.decode() for part, _ in cut([raw])]
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'is not a JSON object with a "{TEXT_KEY}"') from None


def combine(digests):
    """The digest of a document from those of its pieces."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


# --- Writing -----------------------------------------------------------------------------

def part_of(firsts, share, test_share, test):
    """Of documents, by the digests (n, 32) of their first parts: 0, 1 (validation) or -1 (neither).

    The `share` with the least digests is for validation, the `test_share` with the largest for
    tests: it is left out. With `test` it is part 0, and all others are left out.
    """
    place = firsts[:, :8].copy().view("<u8")[:, 0] / 2**64
    tested = place >= 1 - test_share
    return np.where(tested, 0, -1) if test else np.where(tested, -1, place < share)


def write_documents(folder, encoded, choose, show):
    """Writes both parts' tokens (.bin), and their documents' digests (.digests) and ends (.ends).

    choose: as `part_of`, of digests alone. Returns {why: how many are skipped}.
    """
    skipped, ends = Counter(), [0, 0]
    with ExitStack() as stack:
        def open_both(kind):
            return [stack.enter_context(open(folder / f"{part}.{kind}", "wb")) for part in PARTS]

        bins, digest_files, end_files = map(open_both, ("bin", "digests", "ends"))

        def add(part, counts, digests):
            """Documents whose tokens are written already."""
            stops = ends[part] + np.cumsum(counts)
            digest_files[part].write(digests[:, :16].tobytes())
            end_files[part].write(stops.astype("<i8").tobytes())
            ends[part] = int(stops[-1])

        for task, (tokens, counts, digests, firsts, problems) in encoded:
            for which, problem in problems.items():
                piece = task[which]
                place = f"line {piece.number} of {piece.path}" if piece.is_json else piece.path
                require(piece.may_be_skipped, f"{place} {problem}")
            parts = choose(firsts)
            if task[0].first and task[0].last:
                blank = int((counts == 0).sum()) - len(problems)
                left_out = int(((parts == -1) & (counts > 0)).sum())
                skipped += Counter({"no text": len(problems), "blank": blank, "left out": left_out})
                for part in range(len(PARTS)):
                    chosen = (parts == part) & (counts > 0)
                    if chosen.any():
                        bins[part].write(tokens[np.repeat(chosen, counts)].tobytes())
                        add(part, counts[chosen], digests[chosen])
            else:                                            # a piece of a long document
                if task[0].first:
                    part, size, own = max(parts[0], 0), 0, []
                    why = "left out" if parts[0] == -1 else None
                bins[part].write(tokens.tobytes())
                size, own = size + len(tokens), own + [digests[0].tobytes()]
                why = "no text" if problems else why
                if task[0].last and not why:
                    add(part, [size], np.frombuffer(combine(own), np.uint8)[None])
                elif task[0].last:
                    bins[part].truncate(bins[part].seek(ends[part] * tokens.itemsize))
                    skipped[why] += 1
            show(task[-1].read, sum(ends))
    return dict(skipped)


def write_corpus(folder, encoding):
    """Drops duplicates; writes tokens.bin and tables.npz. Returns what the manifest says of them.

    tokens.bin takes train.bin's place, so that the disk holds the tokens once.
    """
    manifest, checksum = {"minitf": data.PREPARED}, hashlib.sha256()
    counts, kind = np.zeros((2, encoding.n_vocab), np.int64), encodings.dtype(encoding)
    with open(folder / "train.bin", "r+b") as out:
        for number, part in enumerate(PARTS):
            stops = mapped(folder / f"{part}.ends", "<i8")
            kept = first_ones(folder / f"{part}.digests", folder / "kept", len(stops))
            for block in kept_tokens(folder / f"{part}.bin", kind, stops, kept):
                out.write(block)                             # never beyond what is read already
                checksum.update(block)
                counts[number] += np.bincount(block, minlength=encoding.n_vocab)
            manifest[part] = {"documents": int(kept.sum()),
                              "duplicates": len(kept) - int(kept.sum()),
                              "tokens": int(counts[number].sum()),
                              "bytes": int(counts[number] @ encodings.byte_lengths(encoding))}
        out.truncate()
        os.fsync(out.fileno())
    require(counts.any(), "there is no text in any of the files")
    pairs, names = encodings.pack_encoding(encoding)
    checkpoint.write(folder / "tables.npz", lambda file: np.savez(file, counts=counts, **pairs))
    (folder / "train.bin").rename(folder / "tokens.bin")
    stays = {folder / name for name in ("lock", "tokens.bin", "tables.npz")}
    for path in {*folder.iterdir()} - stays:
        path.unlink()
    tables, tokens = (folder / "tables.npz").read_bytes(), mapped(folder / "tokens.bin", kind)
    files = {
        "tokens.bin": {"bytes": tokens.nbytes, "sha256": checksum.hexdigest(),
                       "sample": data.sample_checksum(tokens)},
        "tables.npz": {"bytes": len(tables), "sha256": hashlib.sha256(tables).hexdigest()}}
    return manifest | {"encoding": names, "vocabulary": encoding.n_vocab,
                       "dtype": tokens.dtype.str, "files": files}


def mapped(path, kind, mode="r"):
    """A file as an array that stays on disk; mmap itself refuses an empty one."""
    empty = path.stat().st_size == 0
    return np.zeros(0, kind) if empty else np.memmap(path, kind, mode).view(np.ndarray)


def first_ones(source, target, count):
    """Which of the documents are the first with their digest: (n,) of bool, in the file `target`.

    source: the file of digests, (n, 2). BLOCK documents or so are in memory at a time: those whose
    digests leave the same remainder.
    """
    target.write_bytes(b"")
    os.truncate(target, count)
    dropped, slices = mapped(target, bool, "r+"), count // BLOCK + 1
    for remainder in range(slices):
        found, index = [], []
        with open(source, "rb") as file:
            for start in range(0, count, BLOCK):
                block = np.fromfile(file, "<u8", 2 * BLOCK).reshape(-1, 2)
                chosen = np.flatnonzero(block[:, 0] % slices == remainder)
                found.append(block[chosen])
                index.append(start + chosen)
        if found:
            found, index = np.concatenate(found), np.concatenate(index)
            order = np.lexsort(found.T)              # stable: the first of equal ones stays first
            dropped[index[order[1:]]] = (found[order[1:]] == found[order[:-1]]).all(1)
    return np.logical_not(dropped, out=dropped)


def kept_tokens(path, kind, stops, kept):
    """Yields the tokens of the documents kept, BLOCK read at a time.

    stops: where documents end.
    """
    with open(path, "rb") as file:
        for start in range(0, int(stops[-1]) if len(stops) else 0, BLOCK):
            block = np.fromfile(file, kind, BLOCK)
            first, last = np.searchsorted(stops, [start, start + len(block) - 1], side="right")
            ends = np.clip(stops[first:last + 1], start, start + len(block))
            lengths = np.diff(ends, prepend=start)
            yield block[np.repeat(kept[first:last + 1], lengths)]


def progress(total):
    """A function that shows how far it is.

    In place on a terminal, elsewhere now and then by a line of its own.
    """
    started = shown = time.monotonic()
    terminal = on_terminal()

    def say(read, tokens):
        nonlocal shown
        now, whole = time.monotonic(), read >= total
        if now - shown > (0.5 if terminal else 30) or terminal and whole:
            shown, rate = now, read / (now - started)
            left = clock((total - read) / max(rate, 1))
            line = (f"{read / max(total, 1):4.0%} of {total / 1e6:,.0f} MB, "
                    f"{rate / 1e6:.1f} MB/s, {tokens:,} tokens, {left} left")
            print(f"\r{line:79}" if terminal else line,
                  end="" if terminal and not whole else "\n", flush=True)

    return say


if __name__ == "__main__":
    main()
