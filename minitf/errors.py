"""One way to refuse: one line that says what is wrong and what is allowed.

A ValueError in the library, exit status 2 on the command line.
"""
import argparse


def require(condition, message):
    """Raises ValueError(message) unless the condition holds; NaN never passes a comparison."""
    if not condition:
        raise ValueError(message)


def require_one_of(names, name, what):
    """ValueError, with all names, unless the name is one of them."""
    known = isinstance(name, str) and name in names
    require(known, f"{what} must be one of {', '.join(names)}, not {name!r}")


def as_flag(name):
    """A setting's name as the command line has it."""
    return name.replace("_", "-")


def look_up(table, name, what):
    """table[name]; ValueError with the names that it has, for one that it lacks."""
    require_one_of(table, name, what)
    return table[name]


def as_line(text):
    """A text as one line of printable characters."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class OutOfReach(ValueError):
    """A target that no choice of the free parameters attains.

    `target` is its name, `best` the nearest value that is attained.
    """

    def __init__(self, message, target, best):
        super().__init__(message)
        self.target, self.best = target, best


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, of at most 300 printable characters."""

    def error(self, message):
        line = as_line(message)
        line = line if len(line) <= 280 else f"{line[:200]} ... {line[-75:]}"
        self.exit(2, f"{self.prog}: {line}\n")
