"""Corpora: what is read comes back, once, whatever the sizes and the number of processes.

What is half done or damaged is never believed.
"""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prepare
import pytest
import train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile import CASES, mutated

import minitf
from minitf.cli.main import main
from minitf.config import DataConfig
from minitf.training import checkpoint, data, encoding as encodings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "data/shakespeare.txt").read_text()
WORDS = (st.text(st.sampled_from("ab <|>\n\t= é🎭\0"), max_size=30)
         | st.sampled_from(["<|endoftext|>", " = A = \n", "To be"]))
TINY = ("--depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 2 --attn softmax --act tanh "
        "--mlp-init orthogonal --transform tat --tau 0.05").split()


def documents(folder, part=None):
    """The texts in a prepared folder, in order: all, or those of one part."""
    tokens, end, _, encoding, *_ = data.read_tokens(str(folder), None)
    tokens = {None: tokens, "train": tokens[:end], "validation": tokens[end:]}[part]
    assert len(tokens) == 0 or tokens[-1] == encoding.n_vocab - 1
    pieces = np.split(tokens, np.flatnonzero(tokens == encoding.n_vocab - 1) + 1)[:-1]
    return [encoding.decode(piece[:-1].tolist()) for piece in pieces]


def make(tmp_path, *files, **flags):
    """Prepares a new folder."""
    out = tmp_path / f"prepared-{len([*tmp_path.glob('prepared-*')])}"
    flags = {"encoding": str(data.RANKS), "validation_share": 0.0, **flags}
    prepare.prepare([*map(str, files)], out, **flags)
    return out


def refusal(capsys, main, *arguments):
    """The one line with which a program refuses."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1, errors
    assert errors.startswith(("prepare.py: ", "run.py: ")), errors
    return errors


def write_lines(path, texts):
    """A JSON object a line, each with a text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- What is read comes back -------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.tuples(WORDS, st.sampled_from(["json", "file"])), min_size=1, max_size=12),
       st.integers(4, 40))
def test_every_document_comes_back_once_in_order(tmp_path_factory, texts, piece):
    """JSON lines hold any text, folders text without NUL.

    Documents are cut to pieces of 4 bytes and more.
    """
    tmp_path = tmp_path_factory.mktemp("corpus")
    (tmp_path / "in").mkdir()
    lines = [text for text, kind in texts if kind == "json"]
    files = [text for text, kind in texts if kind == "file"]
    with gzip.open(tmp_path / "c4.json.gz", "wt", encoding="utf-8") as file:
        for text in lines:
            line = json.dumps({"url": "", "text": text}, ensure_ascii=len(text) % 2 == 0)
            file.write(line + "\n")
    for number, text in enumerate(files):
        (tmp_path / f"in/{number:03}.txt").write_bytes(text.encode())
    without_nul = [text for text in files if "\0" not in text]
    expected = [*dict.fromkeys(text for text in lines + without_nul if text.encode().strip())]
    before, prepare.PIECE = prepare.PIECE, piece
    try:
        names = [tmp_path / "c4.json.gz"] + [tmp_path / "in"] * bool(files)
        if not expected:
            with pytest.raises(ValueError, match="no text"):
                make(tmp_path, *names)
            return
        out = make(tmp_path, *names)
        alone = make(tmp_path, *names, validation_share=0.5)
    finally:
        prepare.PIECE = before
    assert documents(out) == expected
    manifest = json.loads((alone / "manifest.json").read_text())
    total = lambda what: sum(manifest[part][what] for part in prepare.PARTS)
    assert total("documents") == len(expected)
    assert total("bytes") == sum(len(text.encode()) for text in expected)
    if manifest["validation"]["documents"]:   # the order is kept within each part; nothing is lost
        parts = documents(alone, "train"), documents(alone, "validation")
        assert [text for text in expected if text in set(parts[0])] == parts[0]
        assert sorted(parts[0] + parts[1]) == sorted(expected)


def test_wikitext_is_split_at_the_headings_of_articles(tmp_path):
    article = (" = NAME = \n \n Text = of it . \n = 2 = \n \n = = Section = = \n \n More . \n \n"
               " = = = Sub = = = \n \n")
    articles = [article.replace("NAME", name) for name in ("A", "B : C = D", "1")]
    (tmp_path / "wiki.train.tokens").write_text(" \n" + "".join(articles) + articles[0])
    assert documents(make(tmp_path, tmp_path / "wiki.train.tokens")) == articles
    (tmp_path / "other.tokens").write_text("".join(articles))
    assert documents(make(tmp_path, tmp_path / "other.tokens")) == ["".join(articles)]


def test_long_documents_are_cut_alike_wherever_they_are(tmp_path):
    """Of three megabytes, in a file of its own and in a line of JSON.

    A word of two megabytes is no matter of minutes.
    """
    long = TEXT[:3_100_000]
    (tmp_path / "a.txt").write_text(long)
    others = [long + "y", "X" + long[1:]]
    write_lines(tmp_path / "b.jsonl", ["x", long, *others])
    (tmp_path / "c.txt").write_text("a" + "🎭" * 300_000 + "a" * 2_000_000)
    started = time.perf_counter()
    found = documents(make(tmp_path, *(tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt"))))
    assert found == [long, "x", *others, (tmp_path / "c.txt").read_text()]
    assert time.perf_counter() - started < 30
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.txt").write_bytes(long.encode() + b"\xff")
    (tmp_path / "in/good.txt").write_text("To be")
    found = documents(make(tmp_path, tmp_path / "b.jsonl", tmp_path / "in"))
    assert found == ["x", long, *others, "To be"]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 9))
def test_duplicates_are_dropped_whatever_fits_in_memory(tmp_path_factory, names, block):
    """Digests that agree in their first or second half only are different."""
    folder = tmp_path_factory.mktemp("digests")
    digests = np.array([(name // 6, name % 6) for name in names], "<u8").reshape(-1, 2)
    lengths = [name % 5 + 1 for name in names]
    tokens = np.repeat(np.array(names, "<u2"), lengths)
    digests.tofile(folder / "digests")
    tokens.tofile(folder / "tokens")
    before, prepare.BLOCK = prepare.BLOCK, block
    try:
        kept = prepare.first_ones(folder / "digests", folder / "kept", len(names))
        blocks = [*prepare.kept_tokens(folder / "tokens", "<u2", np.cumsum(lengths), kept)]
    finally:
        prepare.BLOCK = before
    firsts = np.array([*dict.fromkeys(names)], int)
    assert [*kept] == [name not in names[:place] for place, name in enumerate(names)]
    assert np.array_equal(np.concatenate(blocks or [[]]), np.repeat(firsts, firsts % 5 + 1))


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    """In processes of their own: a fork within this one, where JAX has threads, could hang."""
    (tmp_path / "in").mkdir()
    draw = random.Random(0)
    for number in range(60):
        start, size = draw.randrange(10**6), draw.choice([10, 1000, 30_000])
        text = TEXT[start:start + size] if number % 7 else TEXT[:9000]
        (tmp_path / f"in/{number:02}.txt").write_text(text)
    program = ("import sys; sys.path[:0] = [sys.argv.pop(1)]; import prepare; "
               "prepare.PIECE = 2000; prepare.main(sys.argv[1:])")
    for count in (1, 5):
        subprocess.run([sys.executable, "-c", program, ROOT / "data",
                        "--out", tmp_path / f"out-{count}", "--validation-share", "0.3",
                        "--processes", str(count), tmp_path / "in"],
                       check=True, stdout=subprocess.DEVNULL)
    one, five = (tmp_path / f"out-{count}" for count in (1, 5))
    assert bytes_of(one) == bytes_of(five)
    # A share of 0.3 of 52, by hashes: 15.6, three standard deviations of 3.3 up and down.
    assert len(documents(one)) == 52 and 5 < len(documents(one, "validation")) < 26


def test_folders_are_read_by_suffix_and_what_is_no_text_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in/.git").mkdir(parents=True)
    contents = {"a.py": b"a = 1\n", "b.md": b"# B\n", "c.py": b"\xff\xfe", "d.py": b"\0",
                "e.py": b" \n", ".git/f.py": b"f"}
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    out = make(tmp_path, "~/in", suffix=".py")
    assert documents(out) == ["a = 1\n"]
    assert json.loads((out / "manifest.json").read_text())["skipped"] == {"no text": 2, "blank": 1}
    assert documents(make(tmp_path, tmp_path / "in")) == ["a = 1\n", "# B\n"]


# --- What is refused ---------------------------------------------------------------------


def test_hostile_corpora_are_refused_in_one_line_and_leave_nothing(tmp_path, capsys):
    packed = gzip.compress(json.dumps({"text": TEXT[:9000]}).encode() * 2)
    cases = {"latin.txt": b"caf\xe9", "nul.txt": b"a\0b", "empty.txt": b"",
             "cut.json.gz": packed[:-20], "not.json.gz": b"text",
             "flipped.json.gz": packed[:300] + b"\0\0" + packed[302:],
             "line.jsonl": b'{"text": "a"}\n{"text": 1}\n', "none.jsonl": b'{"url": ""}\n',
             "list.jsonl": b'["text"]\n', "deep.jsonl": b"[" * 100_000,
             "half.jsonl": b'{"text": "a'}
    refused = lambda *arguments: refusal(capsys, prepare.main, "--out", tmp_path / "out",
                                         "--processes", 1, *arguments)
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        line = refused(tmp_path / name)
        assert name in line or name == "empty.txt", line
        assert "line 2 of" in line or name != "line.jsonl", line
    (tmp_path / "fine.txt").write_text("To be")
    (tmp_path / "taken").mkdir()
    for arguments in (["--out", tmp_path / "taken"], ["--out", tmp_path / "fine.txt"],
                      ["--out", "/proc/none"], ["--out", tmp_path / "fine.txt/out"],
                      ["--validation-share", 1], ["--validation-share", "nan"],
                      ["--test-share", 0.99], ["--test"],
                      ["--processes", 0], ["--encoding", "gpt3"],
                      ["--encoding", tmp_path / "fine.txt"], [tmp_path / "none*"],
                      [tmp_path / "taken"], [""], ["--suffix", ".none", ROOT / "data"]):
        refused(tmp_path / "fine.txt", *arguments)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        assert "File too large" in refused(ROOT / "data/shakespeare.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "something is left"


def test_killed_at_any_moment_nothing_is_believed_and_the_next_run_succeeds(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / f"in/{number}.txt").write_text(TEXT[number * 100_000:(number + 1) * 100_000])
    texts = sorted(path.read_text() for path in (tmp_path / "in").iterdir())
    command = [sys.executable, ROOT / "data/prepare.py", "--out", tmp_path / "out",
               "--processes", "2", tmp_path / "in"]
    beside = tmp_path / ".out.part"
    # These have bytes while workers work, and after they have ended.
    for moment in ("train.bin", "tables.npz"):
        process, file = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.PIPE), beside / moment
        while process.poll() is None and not (file.exists() and file.stat().st_size):
            time.sleep(0.001)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2 * (moment == "train.bin")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        assert not (tmp_path / "out").exists() and beside.exists()
        if (beside / "manifest.json").exists():  # written last: all is there and lacks but its name
            assert sorted(documents(beside)) == texts
        else:
            with pytest.raises(ValueError):
                load(beside)
        time.sleep(0.3)
        assert not any(alive(child) for child in children), "a worker outlives its process"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not beside.exists(), done.stderr
    assert sorted(documents(tmp_path / "out")) == texts


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# --- What run.py makes of it -------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    texts = [TEXT[at:at + 300] for at in range(0, 60_000, 300)]
    write_lines(folder / "lines.jsonl", texts)
    return make(folder, folder / "lines.jsonl", validation_share=0.2)


def test_a_run_trains_resumes_and_is_evaluated(no_sample, prepared, tmp_path, capsys):
    main([*TINY, "--data", str(prepared), "--out", str(tmp_path / "whole"), "--steps", "4",
          "--save-every", "2"])
    output = capsys.readouterr().out
    counts = json.loads((prepared / "manifest.json").read_text())
    assert f"{counts['train']['tokens']:,} tokens, vocabulary 1,025" in output
    assert f"{counts['validation']['tokens']:,} for validation" in output
    os.mkdir(tmp_path / "half")
    for name in ("checkpoint-00000002.npz", "config.json"):
        os.link(tmp_path / "whole" / name, tmp_path / "half" / name)
    main(["--resume", str(tmp_path / "half")])
    whole, half = (checkpoint.read(tmp_path / name / "checkpoint-00000004.npz")
                   for name in ("whole", "half"))
    assert all(np.array_equal(whole[name], half[name]) for name in whole)
    capsys.readouterr()
    main(["--eval", str(tmp_path / "whole"), "--data", str(prepared)])
    total = sum(counts[part]["tokens"] for part in prepare.PARTS) - 1
    size = sum(counts[part]["bytes"] for part in prepare.PARTS)
    line = capsys.readouterr().out
    assert f"{total:,} tokens, " in line
    assert size - 30 < int(line.split()[2].replace(",", "")) <= size
    main(["--eval", str(tmp_path / "whole")])
    assert capsys.readouterr().out.startswith(f"{counts['validation']['tokens'] - 1:,} tokens, ")
    assert "trained on" in refusal(capsys, main, "--resume", tmp_path / "whole", "--steps", 6,
                                   "--val-data", prepared)
    assert "encoding" in refusal(capsys, main, "--data", prepared,
                                 "--encoding", make_ranks(tmp_path))
    line = refusal(capsys, main, *TINY, "--val-data", prepared, "--out", tmp_path / "other")
    assert "encoding" in line and not (tmp_path / "other").exists()


def make_ranks(tmp_path):
    """A rank file of other tokens: all single bytes."""
    lines = data.RANKS.read_bytes().splitlines(keepends=True)
    (tmp_path / "ranks").write_bytes(b"".join(lines[:256]))
    return tmp_path / "ranks"


def load(folder, val_data=None):
    """The Corpus of a folder, for windows of eight tokens."""
    flags = {"data": str(folder)} | ({"val_data": str(val_data)} if val_data else {})
    return data.load(minitf.resolve(**flags).data, 8)


def test_val_data_is_for_validation_and_all_of_data_is_trained_on(prepared, tmp_path):
    (tmp_path / "text").write_text(TEXT[-5000:])
    corpus, own = load(prepared, tmp_path / "text"), load(prepared)
    train, validation = corpus.train, corpus.validation
    assert np.array_equal(train, data.read_tokens(str(prepared), None)[0])
    assert corpus.encoding.decode(validation.tolist()) == TEXT[-5000:]
    for each in (corpus, own):
        assert np.array_equal(each.train_counts, np.bincount(each.train, minlength=1025))
        counted = np.bincount(each.validation, minlength=1025)
        assert np.array_equal(each.validation_counts, counted)
    assert np.array_equal(own.train, train[:len(own.train)])
    assert np.array_equal(own.validation, train[len(own.train):])
    assert np.array_equal(load(prepared, prepared).validation, train)
    assert own.digest != corpus.digest


def test_where_no_documents_were_set_aside_the_last_tenth_is(tmp_path):
    (tmp_path / "text").write_text(TEXT[:20_000])
    corpus = load(make(tmp_path, tmp_path / "text"))
    assert len(corpus.train) == (len(corpus.train) + len(corpus.validation)) * 9 // 10
    counted = np.bincount(corpus.validation, minlength=1025)
    assert np.array_equal(corpus.validation_counts, counted)


def test_what_is_for_a_test_is_in_the_other_folder_alone(tmp_path, monkeypatch):
    """Short documents and long ones: each in one part, the same for validation as before."""
    monkeypatch.setattr(prepare, "PIECE", 64)
    texts = [f"{number} " * (number % 40 + 1) for number in range(400)]
    write_lines(tmp_path / "texts.jsonl", texts)
    shares = dict(validation_share=0.2, test_share=0.3)
    before = make(tmp_path, tmp_path / "texts.jsonl", validation_share=0.2)
    rest = make(tmp_path, tmp_path / "texts.jsonl", **shares)
    tested = documents(make(tmp_path, tmp_path / "texts.jsonl", **shares, test=True))
    assert sorted(documents(rest) + tested) == sorted(texts)
    assert documents(rest, "validation") == documents(before, "validation")
    assert 80 < len(tested) < 160 and max(map(len, tested)) > 64
    assert json.loads((rest / "manifest.json").read_text())["skipped"]["left out"] == len(tested)


def test_tokens_too_long_to_wait_for_are_checked_meanwhile(prepared, tmp_path, monkeypatch,
                                                           capsys):
    """One changed token between the pieces that are looked at first: the run ends, in a line."""
    folder = tmp_path / "corpus"
    shutil.copytree(prepared, folder)
    monkeypatch.setattr(data, "CHECKED", 0)
    monkeypatch.setattr(data, "SAID_AFTER", -1)
    monkeypatch.setattr(data, "sample_checksum", lambda tokens: json.loads(
        (folder / "manifest.json").read_text())["files"]["tokens.bin"]["sample"])
    load = lambda: data.load(DataConfig(data=str(folder), val_data=None, encoding=None), 8)
    whole = load()
    wait_until(lambda: "being checked" in capsys.readouterr().out)
    whole.verify()
    tokens = np.memmap(folder / "tokens.bin", "<u2", "r+")
    tokens[5], tokens[6] = tokens[6], tokens[5] + 1
    tokens.flush()
    corpus = load()
    with pytest.raises(ValueError, match="not what was written"):
        wait_until(corpus.verify)


def wait_until(happens, seconds=30):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not happens():
        time.sleep(0.01)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(0, 10**6))
def test_what_is_set_aside_is_a_fair_share(sizes, seed):
    """3 to 10 % of the characters, equal texts together, each text once; or nothing."""
    texts = [(chr(97 + number % 20) + str(seed % 7)) * size for number, size in enumerate(sizes)]
    parts = data.set_aside(texts)
    assert sorted(text for part in parts for text in part) == sorted(texts)
    if len(parts) == 2:
        share = len("".join(parts[1])) / len("".join(texts))
        assert 0.03 <= share <= 0.1 and not {*parts[0]} & {*parts[1]}
    else:
        assert parts == [texts]
    book = ["b" * 10**5, *(f"note {number}" for number in range(30))]
    assert data.set_aside(book) == [book]
    assert len(data.set_aside([f"note {number:2}" for number in range(30)])[1]) == 3


def test_of_many_files_some_are_set_aside_whole(tmp_path):
    """A tenth, the same under other names; between files is a line break, and no text is lost."""
    texts = [f"file {number} ends here" + "\n" * (number % 2) for number in range(25)]
    for folder, name in (("a", "{}"), ("b", "x{:03}")):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / name.format(number)).write_text(text)
    load = lambda names, length: data.load(
        DataConfig(data=names, val_data=None, encoding=None), length)
    one, other = (load(str(tmp_path / folder), 8) for folder in ("a", "b"))
    assert one.held_out == "2 whole files"
    said = [each.encoding.decode(each.validation.tolist()) for each in (one, other)]
    chosen = [text for text in texts if text in said[0]]
    assert len(chosen) == 2 and sorted(said[0].split()) == sorted(said[1].split())
    trained = one.encoding.decode(one.train.tolist())
    assert len(trained) == sum(map(len, texts)) - sum(map(len, chosen)) + 22
    assert all(text in trained for text in texts if text not in chosen)
    assert "here" + "file" not in trained
    text = str(data.TEXT)
    few = load(f"{text},{tmp_path / 'a' / '3'}", 1)
    assert few.held_out == "the last tenth"


def test_what_spells_the_end_of_a_text_is_text_unless_it_is_said_to_be_that_token(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    as_text, as_token = (make(tmp_path, tmp_path / "a.txt", special_tokens=special)
                         for special in (False, True))
    assert documents(as_text) == ["one<|endoftext|>two"]
    assert documents(as_token) == ["one", "two"]


def test_folders_of_damaged_bytes(prepared, tmp_path):
    """Any bytes of any file changed: refused in one line, or the same tokens, counts, encoding."""
    draw, refused = random.Random(3), 0
    parts = "_mergeable_ranks", "_pat_str", "_special_tokens"
    expected = data.read_tokens(str(prepared))
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for _ in range(CASES):
        path = draw.choice(sorted(prepared.iterdir()))
        (tmp_path / path.name).write_bytes(mutated(path.read_bytes(), draw))
        try:
            tokens, end, counts, encoding, *_ = data.read_tokens(str(tmp_path))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert np.array_equal(tokens, expected[0]) and end == expected[1], path
            assert np.array_equal(counts, expected[2]), path
            for part in parts:
                assert getattr(encoding, part) == getattr(expected[3], part), path
        (tmp_path / path.name).write_bytes(path.read_bytes())
    print(f"\ncorpora: {refused} of {CASES} refused, the others are the same")


@pytest.mark.parametrize("damage", ["cut", "longer", "swapped", "gone", "tables", "manifest",
                                    "lies", "foreign", "byte", "brackets"])
def test_damaged_folders_are_refused(prepared, tmp_path, capsys, damage):
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokens, manifest = tmp_path / "tokens.bin", tmp_path / "manifest.json"
    content, saved = tokens.read_bytes(), json.loads(manifest.read_text())
    if damage in ("cut", "longer", "swapped", "byte"):         # one, that no sample would find
        third = len(content) // 3
        other = content[:third] + bytes([content[third] ^ 1]) + content[third + 1:]
        tokens.write_bytes({"cut": content[:-2], "longer": content + b"\0\0", "byte": other,
                            "swapped": content[::-1]}[damage])
    elif damage == "brackets":
        manifest.write_text("[" * 10**6)
    elif damage == "tables":
        (tmp_path / "tables.npz").write_bytes(bytes((tmp_path / "tables.npz").stat().st_size))
    elif damage == "gone":
        tokens.unlink()
    else:
        lie = {"encoding": 1, "pattern": "(", "special": []}
        strange = np.full(len(content) // 2, 1025, "<u2").tobytes()
        file = {"bytes": len(strange), "sha256": hashlib.sha256(strange).hexdigest()}
        saved.update({"manifest": {"files": None}, "lies": {"encoding": lie}, "foreign": {
            "files": saved["files"] | {"tokens.bin": file}}}[damage])
        if damage == "foreign":
            tokens.write_bytes(strange)
        manifest.write_text(json.dumps(saved | {"sha256": data.checksum_of(saved)}))
    line = refusal(capsys, main, *TINY, "--data", tmp_path)
    assert str(tmp_path) in line and "prepare it again" in line


def test_large_vocabularies_are_rounded_up_and_spare_tokens_never_drawn():
    encoding = prepare.with_end_of_text(encodings.load_encoding(str(data.RANKS)))
    assert prepare.with_end_of_text(encoding) is encoding
    assert encoding.n_vocab == encodings.vocabulary(encoding) == 1025
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes([a, b]): 256 + 256 * a + b for a in range(8) for b in range(256)}
    large = encodings.make_encoding("large", ranks, encoding._pat_str, {"<|x|>": 2400})
    known = encodings.known(large)
    assert encodings.vocabulary(large) == len(known) == 2432 and known.sum() == 2305
    arrays, names = encodings.pack_encoding(large)
    assert encodings.unpack_encoding(arrays, names)._mergeable_ranks == ranks


# --- Formats -----------------------------------------------------------------------------

TEXTS = ["To be", "or not", "to be, that", "is é🎭"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name, content", [
    ("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
    ("a.JSON", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
    ("a.ndjson", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
    ("a.txt", "\ufeff" + "\r\n".join(TEXTS))])
def test_compressed_files(tmp_path, name, content, suffix):
    """A byte order mark is dropped, line ends are kept."""
    (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](content.encode()))
    expected = ["\r\n".join(TEXTS)] if name == "a.txt" else TEXTS
    assert documents(make(tmp_path, tmp_path / (name + suffix))) == expected


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_damaged_file_ends_it_or_is_skipped_and_counted(tmp_path, suffix):
    """With the lines before the damage; a text that is begun is no text."""
    texts = [f"{number} {random.Random(number).random()}" for number in range(4_000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = COMPRESS[suffix](lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[:len(packed) // 2])
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](2 * lines)[:len(packed) // 2])
    (tmp_path / "c.txt").write_text("whole")
    names = [tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}", tmp_path / "c.txt"]
    with pytest.raises(ValueError, match="a.jsonl.* is damaged"):
        make(tmp_path, *names)
    folder = make(tmp_path, *names, skip_damaged=True)
    found = documents(folder)
    assert found[-1] == "whole" and found[:-1] == texts[:len(found) - 1]
    skipped = json.loads((folder / "manifest.json").read_text())["skipped"]
    assert skipped["damaged files"] == 2


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(ValueError, match="line 1 of .*a.json is not a JSON object with a .text"):
        make(tmp_path, tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"body": "a b c"}))
    assert documents(make(tmp_path, tmp_path / "b.json", text_key="body")) == ["a b c"]
    (tmp_path / "c.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        make(tmp_path, tmp_path / "c.txt")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "id": range(5)}),
                        tmp_path / "a.parquet", row_group_size=2)
    assert documents(make(tmp_path, tmp_path / "a.parquet")) == TEXTS
    with pytest.raises(ValueError, match="no column body: it has text, id"):
        make(tmp_path, tmp_path / "a.parquet", text_key="body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        make(tmp_path, tmp_path / "b.parquet")


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"To be"))
    assert documents(make(tmp_path, tmp_path / "a.txt.zst")) == ["To be"]


# --- train_bpe.py ------------------------------------------------------------------------

def test_an_encoding_of_any_text(tmp_path, capsys):
    """The shipped one begins with what fewer tokens give; a text comes back; wrong ones refused."""
    text, out = str(ROOT / "data/shakespeare.txt"), tmp_path / "ranks"
    train_bpe.main(["--out", str(out), "--size", "266", "--share", "0.9", text])
    assert data.RANKS.read_bytes().startswith(out.read_bytes())
    encoding = encodings.load_encoding(str(out))
    assert encoding.n_vocab == 266 and encoding.decode(encoding.encode("é🎭 the")) == "é🎭 the"
    (tmp_path / "latin").write_bytes(b"\xe9")
    for arguments, said in [([text], "exists"), ([str(tmp_path / "latin")], "UTF-8"),
                            ([str(tmp_path / "none")], "no text"), ([text, "--size", "9"], "size")]:
        target = out if said == "exists" else tmp_path / "new"
        with pytest.raises(SystemExit) as end:
            train_bpe.main(["--out", str(target), *arguments])
        errors = capsys.readouterr().err
        assert end.value.code == 2 and said in errors and errors.count("\n") == 1
        assert not (tmp_path / "new").exists()
