"""Other platforms and a machine's faults, imitated: what is missing there decides nothing."""
import ctypes
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from minitf import resolve
from minitf.cli import host, loop, progress
from minitf.cli.main import main, prepare_streams
from minitf.training import checkpoint, encoding as encodings

pytestmark = pytest.mark.usefixtures("no_sample")
TINY = "--preset preln --depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 3".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A run's folder, to be spoilt."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_windows(monkeypatch, tmp_path):
    """No fcntl, sysconf, C library by None, open folders, SIGPIPE, SIGHUP, SIGUSR1."""
    real_open, real_library = os.open, ctypes.CDLL

    def library(name, *arguments):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return real_library(name, *arguments)

    def open_file(path, *arguments, **others):
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *arguments, **others)

    monkeypatch.setattr(checkpoint, "fcntl", None)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(os, "open", open_file)
    for name in ("SIGPIPE", "SIGHUP", "SIGUSR1"):
        monkeypatch.delattr(signal, name)
    main([*TINY, "--out", str(tmp_path / "run")])
    assert "checkpoint-00000003.npz" in names(tmp_path / "run")


def test_the_command_line_is_imported_without_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import minitf.cli.main"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_file_systems_without_locks_and_without_sync_of_folders(monkeypatch, tmp_path, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def fsync(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    main([*TINY, "--out", str(tmp_path / "run")])
    assert "has no locks" in capsys.readouterr().err
    assert "checkpoint-00000003.npz" in names(tmp_path / "run")


@pytest.mark.parametrize("fault", [
    OSError(errno.EIO, "Input/output error"), MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1024 bytes")])
def test_a_machine_that_fails_is_no_damaged_checkpoint(copy, monkeypatch, capsys, fault):
    """The newest cannot be read for now: one line, status 2, and nothing is touched."""
    before = names(copy)

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(zipfile.ZipFile, "__init__", fail)
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(copy), "--steps", "5"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "cannot be read" in said
    assert names(copy) == before


def test_no_device(capsys):
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], env=dict(os.environ, JAX_PLATFORMS="cuda"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("run.py: no device")
    assert "Traceback" not in done.stderr


def test_a_thread_of_its_own_trains_without_signals(tmp_path):
    errors = []

    def train():
        try:
            main([*TINY, "--out", str(tmp_path / "run")])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors and "checkpoint-00000003.npz" in names(tmp_path / "run")


def test_a_stream_that_cannot_print_decides_nothing(monkeypatch, tmp_path):
    """Closed, or of few characters, or one that cannot be told otherwise."""
    for number, stream in enumerate((None, open(tmp_path / "said", "w", encoding="ascii"))):
        monkeypatch.setattr(sys, "stdout", stream)
        main([*TINY, "--out", str(tmp_path / f"é{number}")])
        assert "checkpoint-00000003.npz" in names(tmp_path / f"é{number}")
    monkeypatch.setattr(sys, "stdout", object())                 # a notebook's
    prepare_streams()


def test_a_long_work_is_seen_on_a_terminal_alone(monkeypatch):
    for terminal, said in ((True, "\rbatch 1 of 2, 0:00 left"), (False, "")):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stdout", stream)
        assert [*progress.through("ab", 2, "batch")] == ["a", "b"]
        assert stream.getvalue().rstrip("\r ") == said


def test_a_folder_whose_run_never_began_can_be_used(copy, capsys):
    """It has no checkpoint: --out takes it, --resume says so and leaves any folder as it is."""
    for path in copy.glob("checkpoint-*"):
        path.unlink()
    (copy / "lock").unlink()
    before = names(copy)
    with pytest.raises(SystemExit):
        main(["--resume", str(copy)])
    assert "has no checkpoint" in capsys.readouterr().err and names(copy) == before
    main([*TINY, "--out", str(copy)])
    steps = (copy / "metrics.jsonl").read_text().count('"grad_norm"')
    assert steps == 3


def test_a_long_run_is_saved_by_the_clock(monkeypatch, tmp_path):
    """Here after each step; metrics stay whole and the newest two and the best are kept."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    saved = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, state, best=None:
                        saved.append(state.step) or real(folder, state, best))
    main([*TINY, "--steps", "6", "--save-every", "6", "--out", str(tmp_path / "run")])
    assert saved == [0, 2, 4, 6]                   # what the clock says is heard a step later


@pytest.mark.parametrize("arguments, said", [
    (["--data", "a\x1b[31mb"], r"a\x1b[31mb"), (["--data", "x" * 5000], " ... "),
    (["--accumulate", "5"], "accumulate must divide batch, 16"),
    (["--coordinator", "auto", "--processes", "2"], "stands"),
    (["--coordinator", "", "--processes", "2", "--process-id", "0"], "HOST:PORT"),
    (["--steps", "1" * 400], "steps must be"), (["--sample", "none", "--plot", "a.png"], "plot")])
def test_a_refusal_is_a_short_printable_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and said in line and len(line) <= 300
    assert line.rstrip("\n").isprintable()


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path, capsys):
    """Not where it is the same machine; not, and without an error, where nothing is known."""
    settings, path = resolve(), tmp_path / "config.json"
    for before in ("{}", "[]", "no JSON"):
        path.write_text(before)
        host.note_machine(tmp_path, settings)
    host.note_machine(tmp_path, settings)
    assert capsys.readouterr().out == ""
    path.write_text(path.read_text().replace('"cores": ', '"cores": 1'))
    host.note_machine(tmp_path, settings)
    assert "not to the last bit" in capsys.readouterr().out


def test_a_containers_limits_are_its_memory_and_cores(tmp_path, monkeypatch):
    """Half a core is one; "max" is no limit."""
    free = host.memory(), host.cores()
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    for said, cores in (("50000 100000", 1), ("max 100000", free[1]), ("", free[1])):
        (tmp_path / "cpu.max").write_text(said)
        assert host.cores() == cores
    (tmp_path / "memory.max").write_text("12345\n")
    assert host.memory() == 12345
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory() >= free[0]


def test_links_are_followed_and_what_they_lead_to_counts_once(tmp_path):
    """A linked folder is read; loops end; hidden files, dangling links and second ways are none."""
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    (inside / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (inside / "a", inside / "deep" / "b", elsewhere / "c", inside / ".hidden"):
        path.write_text(path.name)
    (inside / "loop").symlink_to(inside)
    (inside / "deep" / "up").symlink_to(tmp_path)
    (inside / "linked").symlink_to(elsewhere)
    (inside / "again").symlink_to(elsewhere)
    (inside / "same").symlink_to(inside / "a")
    (inside / "dangling").symlink_to(tmp_path / "nothing")
    for name in (inside, inside / "**"):
        found = encodings.find_files([str(name)])
        read = sorted(path.read_text() for path in found)
        assert read == ["a", "b", "c"], found
    assert encodings.find_files([str(inside / "a"), str(inside / "same")]) == [
        inside / "a", inside / "same"]                              # what is named is meant


def test_what_is_no_text_is_refused_by_name_and_left_out_of_folders(tmp_path, capsys):
    """JSON, whatever its case, is for data/prepare.py; what cannot be read is no such thing."""
    for name, content in dict(a=b"words", b=b"a\0b", c=b"\xff\xfe!", d=b"more").items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "e.JSONL").write_text('{"text": "x"}')
    assert encodings.read_texts(str(tmp_path)) == ["words", "more"]
    assert "3 files that are JSON or no text" in capsys.readouterr().out
    for name in ("b.txt", "c.txt", "e.JSONL"):
        with pytest.raises(ValueError, match="is not|is JSON"):
            encodings.read_texts(f"{tmp_path / 'a.txt'},{tmp_path / name}")
    with pytest.raises(ValueError, match="no text found"):
        encodings.read_texts(str(tmp_path / "*.JSONL"))


def test_a_home_and_a_comma_in_a_name(tmp_path, monkeypatch):
    """~ in any place of a list; a name with a comma where there is such a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a, b"):
        (tmp_path / name).write_text(name)
    assert encodings.find_files("a,~/b") == [Path("a"), tmp_path / "b"]
    assert encodings.find_files("a, b") == [Path("a, b")]
    assert encodings.find_files("~/a, b") == [tmp_path / "a, b"]
    with pytest.raises(ValueError, match="no text found at c"):
        encodings.find_files("a,c")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(OSError):
        encodings.find_files([str(tmp_path)])
