"""What the README shows is true: its code is the package's, its examples run, its flags exist."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from minitf.cli.main import main, make_parser
from minitf.config import FIELDS
from minitf.theory import spa

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
SHOWN = [block for block in BLOCKS if block.startswith("def ")]
EXAMPLES = [block for block in BLOCKS if not block.startswith("def ")]


def test_the_code_shown_is_the_code():
    """Each function, letter by letter."""
    sources = [path.read_text() for path in (ROOT / "minitf").rglob("*.py")]
    functions = [function.strip() for block in SHOWN for function in re.split(r"\n(?=def )", block)]
    assert len(functions) >= 3
    for function in functions:
        assert any(function + "\n" in source for source in sources), function


def test_the_commands_shown_are_commands():
    """Every `python run.py ...` and every flag in the tables is one that the parser takes."""
    parser = make_parser()
    commands = re.findall(r"python run\.py ([^`\n|]*)", README)
    flags = [flag for flag in re.findall(r"`(--[^`]*)`", README) if " " in flag]
    assert commands and flags
    for arguments in {*commands, *flags} - {"--help", "--help-all"}:
        parser.parse_args(arguments.split())


def test_the_examples_run():
    for example in EXAMPLES:
        names = {}
        exec(example, names)
    assert np.all(names["row_scale"] > 0) and names["bias"].shape == (128, 128)


def test_the_constants_for_other_frameworks_make_the_attention():
    """With W^Q = 0 the example's softmax is A; in PyTorch too, where that is installed.

    float32 rounds a bias of size |B| to |B| EPS32, a relative error of a weight.
    """
    gammas = spa.exponential_schedule(0.005, 36)
    for before, after in list(zip(gammas, gammas[1:]))[::12]:
        row_scale, bias = spa.row_scale_and_bias(spa.exponential_log_attention(before, after, 128))
        kernels = spa.exponential_kernel(before, 128), spa.exponential_kernel(after, 128)
        attention = spa.cholesky_attention(*kernels)
        assert np.allclose(row_scale[:, None] * softmax(bias, -1), attention, rtol=0, atol=1e-9)


def test_the_constants_work_in_pytorch():
    torch = pytest.importorskip("torch")
    gammas = spa.exponential_schedule(0.005, 36)
    row_scale, bias = spa.row_scale_and_bias(spa.exponential_log_attention(*gammas[10:12], 128))
    v = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
    q, k, tensor = torch.zeros(128, 8), torch.randn(128, 8), torch.tensor(v)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, tensor, attn_mask=torch.tensor(bias, dtype=torch.float32))
    out = row_scale[:, None] * out.numpy()
    expected = row_scale[:, None] * softmax(bias, -1) @ v
    largest = np.abs(bias[np.isfinite(bias)]).max()
    rounding = 8 * largest * np.finfo(np.float32).eps * np.abs(v).max()
    assert np.max(np.abs(out - expected) / row_scale[:, None]) <= rounding


def test_help_is_short_and_help_all_is_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = []
    for flag in ("--help", "--help-all"):
        monkeypatch.setattr(sys, "argv", ["run.py", flag])
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert end.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].count("\n") < 60
    for each in FIELDS:
        assert f"--{each.name.replace('_', '-')} " in shown[1] or each.type is bool, each.name


CHANGES = {                               # file of the package: (before this, that is added)
    "theory/families.py": ('    "softmax": Family(', '    "mine": prescribed(lambda config: ['
                           'np.linspace(0, 0.5, config.depth + 1)], spa.uniform_kernel),\n'),
    "theory/activations.py": ('    "silu": ', '    "sine": lambda x, np, special: np.sin(x),\n'),
    "network/init.py": ('MLP_INITS = {"looks', 'mine = independent(orthogonal_matrices)\n'),
    "training/optimizer.py": ('    "query": "qk"', '    "up": "first",\n')}   # a group of rates
REPLACED = {
    "network/init.py": ('"gaussian": independent(gaussian_matrices)}',
                        '"gaussian": independent(gaussian_matrices), "mine": mine}'),
    "config.py": ('"looks_linear", "orthogonal", "gaussian")',
                  '"looks_linear", "orthogonal", "gaussian", "mine")'),
    "training/optimizer.py": ('"up": "mlp", "down"', '"down"')}
AGAIN = {
    "training/optimizer.py": [
        ('MATRIX_GROUPS = "qk"', 'MATRIX_GROUPS = "first", "qk"'),
        ('{"embed": training', '{"first": 0.0, "embed": training')]}


def test_changing_something_as_the_readme_says(tmp_path):
    """A family, an activation, an initialisation and a group of rates, each where it says."""
    shutil.copytree(ROOT / "minitf", tmp_path / "minitf")
    for name in ("run.py", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, (before, added) in CHANGES.items():
        change(tmp_path / "minitf" / name, before, added + before)
    for name, (old, new) in REPLACED.items():
        change(tmp_path / "minitf" / name, old, new)
    for name, pairs in AGAIN.items():
        for pair in pairs:
            change(tmp_path / "minitf" / name, *pair)
    flags = ("--depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 2 --attn mine --act sine "
             "--mlp-init mine --orthogonal-pull 0 --lr-mult-path 1 --out run").split()
    done = subprocess.run([sys.executable, "-c", "import minitf.cli.main as m, sys; "
                           f"assert m.__file__.startswith({str(tmp_path)!r}), m.__file__; "
                           f"m.main({flags!r})"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
    # The new group's rate is 0: its matrix is where it was, all others moved.
    first, last = (np.load(tmp_path / "run" / f"checkpoint-0000000{step}.npz") for step in (1, 2))
    moved = {name for name in first if name.startswith("params/blocks")
             and not np.array_equal(first[name], last[name])}
    assert "params/blocks/up" in first and "params/blocks/up" not in moved
    assert {"params/blocks/down", "params/blocks/value"} <= moved


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))
