"""Several runs: what a sweep draws, takes up again and says of them; their pictures."""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import sweep
from hypothesis import given, strategies as st

from minitf import resolve
from minitf.cli import curves, figures
from minitf.cli.main import main
from minitf.cli.metrics import Metrics
from minitf.theory import spa
from minitf.training import checkpoint

TINY = "--depth 2 --width 8 --heads 2 --length 8 --batch 2 --steps 4 --save-every 2"


@pytest.fixture
def calls(no_sample, monkeypatch):
    """run.py in this process; the arguments of each run."""
    made = []

    def run(arguments, **_):
        made.append([*map(str, arguments[2:])])
        if made[-1][0] == "--eval":
            return SimpleNamespace(returncode=0, stdout="8 tokens, 9 bytes: 1.2345 nats a token")
        main(made[-1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return made


def asked(tmp_path, **others):
    """The sweep that the tests ask for; how many runs failed."""
    return sweep.run(**dict(file=tmp_path / "runs.jsonl", flags=[TINY], texts=(None, None),
                            seeds=[0], random=2, best=1, then="--steps 6", together=1) | others)


def test_a_search_goes_on_where_it_was_killed(tmp_path, calls, monkeypatch, capsys):
    """Killed between a run's end and its record: it is not trained again. Killed amid a run: what
    is left of it is taken up, and the record is that of a run never stopped.
    """
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            asked(tmp_path)
    assert asked(tmp_path) == 0
    assert len(calls) == 3                                # the second trial, and the best at length
    records = sweep.read(tmp_path / "runs.jsonl")
    first, second, longer = records
    best = min(first, second, key=sweep.loss)
    assert longer["flags"] == best["flags"] | dict(steps=6)
    assert first["number"] == 0 and first["flags"] == sweep.parse(TINY) | dict(seed=0)
    assert asked(tmp_path) == 0 and len(calls) == 3       # nothing is repeated

    (tmp_path / "runs.jsonl").unlink()
    folder = tmp_path / "runs" / "half"
    main([*sweep.arguments(first["flags"]), "--out", str(folder)])
    (folder / "checkpoint-00000004.npz").unlink()
    lines = curves.read(folder)
    until = next(i for i, line in enumerate(lines) if "loss" in line and line["step"] == 3)
    kept = "".join(json.dumps(line) + "\n" for line in lines[:until])
    (folder / "metrics.jsonl").write_text(kept)
    monkeypatch.setattr(sweep, "folder_of", lambda *_: folder)
    assert asked(tmp_path, random=0, best=0) == 0
    assert calls[-1] == ["--resume", str(folder)] and not folder.exists()
    record, = sweep.read(tmp_path / "runs.jsonl")
    assert record["validation_loss"] == first["validation_loss"] and record["loss"] == first["loss"]
    assert first["flags"] == record["flags"]
    sweep.report([tmp_path / "runs.jsonl"], "", None)
    assert f"{record['validation_loss']:.3f}" in capsys.readouterr().out

    (tmp_path / "runs.jsonl").unlink()
    assert asked(tmp_path, random=0, best=0, texts=(None, "a text")) == 0
    assert calls[-1][0] == "--eval" and calls[-1][2:] == ["--data", "a text"]
    sweep.report([tmp_path / "runs.jsonl"], "", None)
    output = capsys.readouterr().out
    assert "| test loss |" in output and "1.234" in output


@given(st.sampled_from(["isometric", "preln", "paper"]), st.integers(1, 1000))
def test_a_trial_is_drawn_around_the_presets_own_rates(preset, number):
    """Each value within its factor, the same again for the same number; what is 0 stays 0."""
    flags = dict(preset=preset, depth=2)
    drawn, own = sweep.drawn(flags, number), resolve(**flags)
    assert drawn == sweep.drawn(flags, number) and sweep.drawn(flags, 0) == flags
    values = vars(own.model) | vars(own.training)
    changed = resolve(**sweep.parse(" ".join(sweep.arguments(drawn))))
    kept = []                                              # three digits may be those of before
    for name, factor in sweep.FACTORS.items():
        value = (vars(changed.model) | vars(changed.training))[name]
        before, after = np.atleast_1d(values[name]), np.atleast_1d(value)
        assert np.all(after <= before * factor * 1.01) and np.all(after >= before / factor / 1.01)
        kept += [name] * (name in drawn and np.array_equal(after, before))
    assert len(kept) <= 1


@given(st.lists(st.floats(0, 10), min_size=1, max_size=7), st.integers(1, 7))
def test_the_best_of_k_is_the_mean_over_all_choices(losses, k):
    k = min(k, len(losses))
    each = [min(choice) for choice in itertools.combinations(losses, k)]
    assert sweep.best_of(losses, k) == pytest.approx(np.mean(each), abs=1e-12)


def test_flags_of_one_word_are_flags(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "run", lambda file, flags, *_: asked.extend(flags))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "run", str(tmp_path / "runs"), "--attn uspa",
                                      "--no-unit-embeddings", "--seeds", "1"])
    sweep.main()
    assert asked == ["--attn uspa", "--no-unit-embeddings"]


def test_the_tables_that_are_kept_can_be_printed(capsys):
    for name in ("trials", "long", "laptop", "ladder"):
        sweep.report([sweep.HERE / f"{name}.jsonl"], "", None)
        rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[2:]
        assert len(rows) > 5 and all(row.startswith("| `") for row in rows), name


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch, capsys):
    """It is recorded, as the worst, and not tried again; what fails otherwise is not recorded."""
    def run(arguments, **_):
        folder = tmp_path / "runs" / arguments[-1].name
        folder.mkdir(parents=True)
        line = dict(step=0, loss=7.0, grad_norm=1.0, tokens_per_second=1.0)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        calls.append(folder)
        return SimpleNamespace(returncode=len(calls), stderr=problem)

    calls = []
    monkeypatch.setattr(sweep.subprocess, "run", run)
    problem = "run.py: the disk is full"
    assert asked(tmp_path, random=0, best=0) == 1
    assert not (tmp_path / "runs.jsonl").exists()
    calls[0].rename(tmp_path / "gone")
    problem = "run.py: loss is inf, gradient norm inf at step 1; the largest gradient"
    assert asked(tmp_path, random=0, best=0) == 0
    record, = sweep.read(tmp_path / "runs.jsonl")
    assert sweep.loss(record) == np.inf and record["ended"] == problem
    assert asked(tmp_path, random=0, best=0) == 0 and len(calls) == 2
    sweep.report([tmp_path / "runs.jsonl"], "", None)
    assert "inf" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--init-from a", "--mesh data=2", "--out a", "--seed 5",
                                   "--no-compilation-cache", "--processes 2"])
def test_what_is_no_setting_is_no_flag_of_a_sweep(flags):
    with pytest.raises(ValueError, match="not for a sweep"):
        sweep.parse("--depth 2 " + flags)


def test_a_run_begins_with_anothers_weights(no_sample, tmp_path, capsys):
    """Its network and its first loss are the other's; flags of another network are refused."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    main([*TINY.split(), "--preset", "preln", "--steps", "60", "--out", first])
    more = "--steps", "3", "--batch", "2", "--learning-rate", "1e-9"
    main(["--init-from", first, *more, "--out", second])
    trained, further = (checkpoint.newest(folder)[0] for folder in (first, second))
    assert further.settings.model == trained.settings.model and further.step == 3
    for one, other in zip(*map(jax.tree.leaves, (trained.params, further.params))):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    check_export(first, tmp_path, capsys)
    for wrong in (["--width", "16"], ["--preset", "paper"], ["--encoding", "gpt2"]):
        with pytest.raises(SystemExit) as end:
            main(["--init-from", first, *wrong])
        assert end.value.code == 2 and "--init-from" in capsys.readouterr().err


def check_export(folder, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.numpy")
    main(["--export", folder, str(tmp_path / "weights.safetensors")])
    found = safetensors.load_file(tmp_path / "weights.safetensors")
    params = checkpoint.newest(folder)[0].params
    np.testing.assert_array_equal(found["blocks.value"], params["blocks"]["value"])
    np.testing.assert_array_equal(found["embed"], params["embed"])
    assert "encoding.ranks" in found
    for path in (tmp_path / "no" / "such", tmp_path / "weights.safetensors"):
        with pytest.raises(SystemExit) as end:
            main(["--export", folder, str(path)])
        assert end.value.code == 2 and "such" in str(path) or "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_is_given_the_metrics(tmp_path, monkeypatch, name):
    """Numbers alone; what it raises loses no line; without its package it is refused at once."""
    for package in ("tensorboardX", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install"):
        Metrics(tmp_path, resolve(), name)
    seen = []

    class Writer:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, step):
            seen.append((step, name, value))
            if len(seen) == 1:
                raise RuntimeError("the tracker's disk is full")

        def flush(self):
            pass

        def log(self, values, step):
            for name, value in values.items():
                self.add_scalar(name, value, step)

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: Writer("")))
    lines = [{"step": 1, "loss": 1.5, "grad_norm": 2.0},
             {"step": 1, "mean_square": [1.0], "val_loss": 2.5}]
    with Metrics(tmp_path, resolve(), name) as metrics:
        for line in lines:
            metrics.add(line)
        assert curves.read(tmp_path) == lines
    assert seen == [(1, "loss", 1.5), (1, "val_loss", 2.5)]


def test_curves_of_runs(tmp_path, monkeypatch, capsys):
    """A picture in a run's own folder, and one of several runs; what is wrong in a line."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "SOON", -1)
    folder, picture = str(tmp_path / r"_a$\foo$"), tmp_path / "both.png"
    main([*TINY.split(), "--out", folder])
    begins = Path(folder, "loss.png").read_bytes()[:4]
    main(["--curves", folder, folder, "--plot", str(picture), "--log-axes"])
    assert begins == picture.read_bytes()[:4] == b"\x89PNG"
    for name, flags in (("c-maps", TINY.split()[:2]), ("attention", TINY.split()[:8])):
        main(["--figure", name, *flags, "--plot", str(tmp_path / f"{name}.png")])
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for arguments, said in (
            (["--curves", folder], "--plot"),
            (["--curves", str(tmp_path), "--plot", "a.png"], "metrics"),
            (["--curves", folder, "--plot", str(tmp_path / "a.pgf")], "cannot write"),
            (["--plot", "a.png"], "plot goes with"),
            (["--figure", "c-maps", "--act", "silu", "--plot", "a.png"], "--act"),
            (["--figure", "c-map", "--plot", "a.png"], "rank-collapse")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_attention_is_drawn_of_heads_that_have_a_gamma(monkeypatch):
    """Of the first and the last of them, in two rows, whether or not extra heads come after."""
    pytest.importorskip("matplotlib")
    drawn, titles = [], []

    def save(picture, path):
        panels = [axis for axis in picture.axes if axis.images]
        drawn.append([axis.images[0].get_array() for axis in panels])
        titles.append([axis.get_title() for axis in panels])

    monkeypatch.setattr(figures, "save", save)
    for extra in (0, 2):
        settings = resolve(depth=4, width=8, heads=2, length=8, gamma=(0.8, 0.1), extra_heads=extra)
        figures.attention(settings, None)
    assert len(drawn[0]) == 8 and not np.array_equal(*drawn[0][::7])
    assert np.array_equal(*drawn)
    gammas = [f"{gamma:.2g}" for last in (0.8, 0.1)
              for gamma in spa.exponential_schedule(last, 4)[1:]]
    assert [title.split()[-1] for title in titles[0]] == gammas
    figures.attention(resolve(attn="uspa", depth=4, width=8, length=256), None)
    assert len(drawn[2]) == 4 and drawn[2][0].shape == (figures.SHOWN, figures.SHOWN)


def test_figures_of_many_networks_are_drawn_of_any_depth_and_extra_heads(monkeypatch):
    """What a family has no room for is left out; eta is what the depth can attain."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "report", lambda settings, *_: settings.model)
    monkeypatch.setattr(figures, "read_windows", lambda settings: [settings])
    small = dict(depth=2, width=8, heads=2, length=8)
    reports = figures.reports_by_family(resolve("extra-heads", **small))
    assert {model.extra_heads for model in reports.values()} == {0} and "vskip" in reports
    lines = []
    monkeypatch.setattr(figures, "save", lambda picture, _: lines.extend(picture.axes[0].lines))
    figures.jacobian(resolve(**small), None)
    assert len(lines) == 4 and all(len(line.get_ydata()) == 2 for line in lines)
