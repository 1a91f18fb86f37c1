"""A run that leaves its early course is told of, once, with the block; what it became is shown."""
import json

import jax
import numpy as np
import pytest

from minitf.cli import watch
from minitf.cli.main import main
from minitf.training import train

RUINED = ("--depth 3 --width 8 --heads 2 --length 8 --batch 2 --steps 60 --warmup 4 --optimizer "
          "adamw --weight-decay 0 --orthogonal-pull 0 --learning-rate 1").split()


def line(step, norm):
    return {"step": step, "grad_norm": norm}


@pytest.mark.parametrize("warmup, last", [(0, 10), (40, 80)])
def test_the_early_level_is_the_median_after_warm_up(warmup, last):
    """Neither an early spike nor one below a hundred times the level is told of; what is, once."""
    seen = watch.Watch(warmup, "DIR")
    norms = {"head": 1.0, "blocks": {"up": np.array([1.0, 9.0, 2.0])}}
    for step in range(1, last + 1):
        early = 1e6 if step <= warmup or step == last else 2.0
        assert seen.gradient(line(step, early), norms) is None
    assert seen.gradient(line(last + 1, 199.0), norms) is None
    said = seen.gradient(line(last + 2, 201.0), norms)
    assert "step 82" in said if warmup else "step 12" in said
    assert "blocks/up in block 2" in said and "--learning-rate" in said
    assert seen.gradient(line(last + 3, 1e9), norms) is None
    lost = watch.Watch(warmup, "DIR")                       # a run that goes on without its metrics
    assert lost.gradient(line(last + 1, 1e9), norms) is None


def test_activations_are_held_against_those_at_the_start():
    seen = watch.Watch(0, "DIR")
    seen.recall({"step": 0, "mean_square": [1.0, 10.0, 1.0]})
    assert seen.activations(5, [1.0, 9000.0, 1.0]) is None
    assert "behind block 3" in seen.activations(6, [1.0, 9000.0, 1e-4])
    assert seen.activations(7, [1.0, 1e9, 1.0]) is None


def test_a_run_that_explodes_says_so_and_shows_where(no_sample, tmp_path, capsys):
    """A warning, the gradient norm in the progress line, and --inspect of what it became.

    How it explodes, and which of the two warnings comes first, is chaos.
    """
    main([*RUINED, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    warnings = [each for each in said.splitlines() if each.startswith("warning: ")]
    assert 1 <= len(warnings) <= 2 and all("block" in each for each in warnings), said
    assert "  gradient norm " in said
    metrics = [json.loads(each) for each in
               (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    squares = [each["mean_square"] for each in metrics if "mean_square" in each]
    assert len(squares) == 6 and all(len(each) == 3 for each in squares)
    losses = {each["step"]: each["val_loss"] for each in metrics if "val_loss" in each}
    best = min(losses, key=losses.get)
    assert (tmp_path / "run" / f"checkpoint-{best:08}.npz").exists()
    assert "best checkpoint" in said
    main(["--inspect", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "(start)" in shown and "size of the weights" in shown
    assert len(shown.splitlines()) == 1 + 4 + 3 + 3


def test_gradients_are_told_by_block():
    """Each parameter's norm; of the blocks', that of each."""
    rng = np.random.default_rng(0)
    gradient = {"embed": rng.normal(size=(5, 4)), "blocks": {"up": rng.normal(size=(3, 4, 16))}}
    norms = train.gradient_norms(jax.tree.map(np.float32, gradient))
    assert np.isclose(norms["embed"], np.linalg.norm(gradient["embed"]))
    expected = np.linalg.norm(gradient["blocks"]["up"].reshape(3, -1), axis=1)
    assert np.allclose(norms["blocks"]["up"], expected)
    assert train.largest_gradient(norms)[0] == f"blocks/up in block {np.argmax(expected) + 1}"
