"""One way to refuse: one line that says what is wrong and what is allowed. A ValueError; exit status 2 on a command line."""
import argparse


def require(condition, message):
    """Raises ValueError(message) unless the condition holds; not-a-number never passes a comparison."""
    if not condition:
        raise ValueError(message)


class OutOfReach(ValueError):
    """A target that no choice of the free parameters attains; `target` names it, `best` is the nearest value within reach."""

    def __init__(self, message, target, best):
        super().__init__(message)
        self.target, self.best = target, best


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message):
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        self.exit(2, f"{self.prog}: {line}\n")
