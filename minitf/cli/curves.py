"""How runs went, as a picture: loss.png in a run's folder, and --curves DIR ... --plot FILE."""
import time
from contextlib import suppress

import numpy as np

from .metrics import read
from .pictures import figure, save

PARTS = 200                                # of a run's steps, each a point of its line
SOON = 10                                  # seconds: of a run as young as that nothing is drawn


def summary(lines, parts=PARTS):
    """What is drawn of a run's metrics, from equal parts of its steps.

    {"at": the last step of each part, "loss": means, "grad_norm": the largest of each part,
    "validation": [[step, loss]]}; empty lists before the first step.
    """
    steps = [line for line in lines if "loss" in line]
    each = np.array_split(steps, min(parts, len(steps))) if steps else []
    of_parts = lambda how, name: [float("%.4g" % how([line[name] for line in part]))
                                  for part in each]
    return dict(at=[part[-1]["step"] for part in each],
                loss=of_parts(np.mean, "loss"), grad_norm=of_parts(np.max, "grad_norm"),
                validation=[[line["step"], line["val_loss"]] for line in lines
                            if "val_loss" in line])


def draw(runs, path, logarithmic=False):
    """Losses above, gradient norms below; lines are of training, dots of validation.

    What is said of a part of the steps stands at its middle.

    Args:
      runs: {label: dict as `summary` returns, perhaps without grad_norm}.
      path: of the picture, .png, .pdf or .svg.
      logarithmic: the axes of steps and of losses.
    """
    picture, (upper, lower) = figure((9, 7), 2, 1, sharex=True, height_ratios=(3, 1))
    scale = "log" if logarithmic else "linear"
    for number, (label, run) in enumerate(runs.items()):
        style = dict(color=f"C{number % 10}", lw=1, ls=("-", "--", ":")[number // 10 % 3])
        middle = np.array(run["at"]) - np.diff(run["at"], prepend=0) / 2
        shown = " " + label.replace("$", r"\$")           # matplotlib hides _a, and typesets $a$
        upper.plot(middle, run["loss"], label=shown, **style)
        if run["validation"]:
            upper.plot(*zip(*run["validation"]), "o", ms=4, color=style["color"])
        if "grad_norm" in run:
            lower.semilogy(middle, run["grad_norm"], **style)
    lower.set(xlabel="step", ylabel="gradient norm, largest", xscale=scale)
    upper.set(ylabel="nats a token: training (lines), validation (dots)", yscale=scale)
    for ticks in (upper.yaxis.set_major_formatter, upper.yaxis.set_minor_formatter):
        ticks("{x:g}")
    picture.legend(fontsize="small", loc="outside lower center", ncols=2)
    upper.grid(alpha=0.3, which="both")
    save(picture, path)


def renew(folder, last):
    """loss.png of a run, if matplotlib is there: of one that goes on, or of its last step.

    It never stops a run.
    """
    with suppress(Exception):
        if last or time.time() - (folder / "config.json").stat().st_mtime > SOON:
            draw({folder.name: summary(read(folder))}, folder / "loss.png")
