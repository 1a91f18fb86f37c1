"""Profiles of the search for counterexamples.

`ci` is derandomised and taken where CI is set, `quick` otherwise. `search` is long:
pytest tests --hypothesis-profile=search
"""
import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# Workers and the processes that tests start share what is compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="minitf-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")              # tolerances are those of float32
# Nearly all of the time is compilation: of the same programs, but with less care for their speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):                  # later ones do not know the flag
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = given + " --xla_cpu_use_fusion_emitters=false"
# Threads of many small QR decompositions wait for each other where other processes work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest                                              # noqa: E402
from hypothesis import settings                            # noqa: E402

from minitf.training import data                           # noqa: E402

settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


@pytest.fixture(autouse=True, scope="session")
def little_text(tmp_path_factory):
    """Runs in this process read a tenth of the included text: to encode all takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        text = tmp_path_factory.mktemp("text") / "shakespeare.txt"
        text.write_text(data.TEXT.read_text()[:500_000])
        patch.setattr(data, "TEXT", text)
        yield


@pytest.fixture
def no_sample(monkeypatch):
    """Runs in this process end without a sample, whose programs take a second to compile."""
    monkeypatch.setattr("minitf.cli.loop.show_sample", lambda *_: None)
