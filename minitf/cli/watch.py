"""Notices when a run leaves its early course, and says so, once a process: where, what helps."""
import numpy as np

from ..training.train import largest_gradient

GRADIENT, SQUARE = 100.0, 1000.0              # times its early level
HELPS = ("what helps, in a new run: --unit-embeddings where there are no norms, a smaller "
         "--learning-rate, more --weight-decay, and of all matrices (--decay-groups qk,vo,mlp). "
         "Each block: python run.py --inspect {}")


class Watch:
    """A run's early level, and whether it has been left.

    The gradient norm's is its median over the steps after warm-up, as many as warm-up has and at
    least 10. That of the activations' mean square is the one at the start, for each block.
    """

    def __init__(self, warmup, folder, tokens=0):
        self.first, self.last, self.folder = warmup, warmup + max(warmup, 10), folder
        self.early, self.squares, self.said, self.losses = [], None, set(), {}
        self.tokens = tokens                              # of the validation text

    @property
    def best(self):
        """The step with the least validation loss so far; None before there is one."""
        return min(self.losses, key=self.losses.get, default=None)

    def help(self):
        """What helps, and what is left of the run from before."""
        kept = f"the best checkpoint, of step {self.best}, is kept; " if self.losses else ""
        return kept + HELPS.format(self.folder)

    def recall(self, line):
        """A line of the metrics, also of those of a run that is taken up again."""
        if line.get("val_tokens") == self.tokens and np.isfinite(line["val_loss"]):
            self.losses[line["step"]] = line["val_loss"]
        if self.first < line["step"] <= self.last and "grad_norm" in line:
            self.early.append(line["grad_norm"])
        if line["step"] == 0 and "mean_square" in line:
            self.squares = line["mean_square"]

    def gradient(self, line, norms):
        """What to say after a step, from its line of metrics and its gradients' norms; or None."""
        self.recall(line)
        if line["step"] <= self.last or not self.early or "gradient" in self.said:
            return None                       # a run's metrics may have been lost
        times = line["grad_norm"] / max(np.median(self.early), 1e-30)
        if not times >= GRADIENT:
            return None
        self.said.add("gradient")
        return (f"warning: the gradient norm is {line['grad_norm']:.3g} at step {line['step']}, "
                f"{times:.3g} times its early level; the largest gradient is that of "
                f"{largest_gradient(norms)[0]}; {self.help()}")

    def activations(self, step, squares):
        """What to say after an evaluation, from the mean square behind each block; or None."""
        times = np.asarray(squares) / np.maximum(self.squares or squares, 1e-30)
        block = int(np.argmax(np.maximum(times, 1 / np.maximum(times, 1e-30))))
        if 1 / SQUARE < times[block] < SQUARE or "activations" in self.said:
            return None
        self.said.add("activations")
        return (f"warning: the activations' mean square behind block {block + 1} is "
                f"{squares[block]:.3g} after step {step}, {times[block]:.3g} times that at the "
                f"start; {self.help()}")
