"""The order of the house: who may import whom, what needs no JAX, and how wide a line is."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
FLOORS = dict(errors=0, theory=1, presets=2, config=2, network=3, training=4, cli=5)
FILES = sorted((HOUSE / "minitf").rglob("*.py"))
MODULES = [path for path in FILES if path != HOUSE / "minitf" / "__init__.py"]    # it is the door
relative = lambda path: str(path.relative_to(HOUSE))


def imported(path):
    """The floors' names that a module of minitf imports from."""
    package = path.relative_to(HOUSE).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1], node.module or ""] if node.level \
                else [node.module]
            names = [".".join(filter(None, [*base, each.name])) for each in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("minitf."))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down_only(path):
    """errors < theory < presets, config < network < training < cli."""
    floor = Path(path.relative_to(HOUSE).parts[1]).stem
    above = [name for name in imported(path) if FLOORS[name] > FLOORS[floor]]
    assert not above, f"{floor} must not import {', '.join(above)}"


def test_the_theory_needs_no_jax():
    """Constants of attention from a fresh process, in which JAX is never loaded."""
    script = ("import sys, minitf; minitf.attention_constants(minitf.resolve().model); "
              "print([name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib')])")
    done = subprocess.run([sys.executable, "-c", script], cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [HOUSE / "run.py", *sorted(HOUSE.glob("[demt]*/**/*.py"))],
                         ids=relative)
def test_no_line_is_over_100_columns(path):
    wide = [number for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 100]
    assert not wide, f"lines {wide}"


@pytest.mark.parametrize("path", sorted(HOUSE.glob("experiments/*.py")), ids=relative)
def test_what_an_experiment_imports_is_there(path):
    importlib.import_module(path.stem)
