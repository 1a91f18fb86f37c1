"""A run's metrics: metrics.jsonl, and with --log-to a tracker beside it, if it is installed.

A line for each step, from 1, one for each evaluation, after so many steps, and one for the start.
"""
import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict

from ..errors import require


def read(folder):
    """The metrics of a run, a dict for each line; ValueError if they are none."""
    try:
        text = (folder / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        require(all(map(sound, lines)), "its lines are none of a run's")
        return lines
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/metrics.jsonl cannot be read: {error}") from None


def sound(line):
    """Whether what is read of a line is there, and a number."""
    told = [line[name] for name in ("loss", "grad_norm", "val_loss") if name in line]
    squares = line.get("mean_square", [1.0])
    return (type(line.get("step")) is int and 0 <= line["step"] < 2**31
            and ("loss" in line) == ("grad_norm" in line)
            and ("val_loss" in line or "val_tokens" not in line)
            and type(squares) is list and all(type(each) is float for each in told + squares))


def tensorboard(folder, settings):
    """TensorBoard's event files in the run's folder, by tensorboardX or PyTorch."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder))

    def track(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return track


def wandb(folder, settings):
    """Weights & Biases: project minitf, a run of the folder's name, taken up again on resuming."""
    import wandb
    run = wandb.init(project="minitf", name=folder.name, id=folder.name, resume="allow",
                     dir=str(folder), config=asdict(settings))
    return lambda step, values: run.log(values, step=step)


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def start_tracker(name, folder, settings):
    """(step, {name: value}) -> None; ValueError where its package is missing or refuses."""
    try:
        return TRACKERS[name](folder, settings)
    except ImportError:
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        raise ValueError(f"--log-to {name} needs a package: pip install {package}") from None
    except Exception as error:                 # whatever a tracker's package may raise
        raise ValueError(f"--log-to {name}: {type(error).__name__}: {error}") from None


class Metrics(AbstractContextManager):
    """Lines of metrics, each a dict with its step. What a tracker raises never stops a run.

    log_to: of TRACKERS, or None.
    """

    def __init__(self, folder, settings, log_to):
        self.track = start_tracker(log_to, folder, settings) if log_to else None
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)          # line by line

    def __exit__(self, *_):
        self.file.close()

    def add(self, line):
        self.file.write(json.dumps(line) + "\n")
        if self.track:
            values = {name: value for name, value in line.items() if isinstance(value, float)}
            with suppress(Exception):
                self.track(line["step"], values)

    def sync(self):
        """All lines are on disk."""
        os.fsync(self.file.fileno())
