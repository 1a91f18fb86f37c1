"""What the scripts beside it share: records, one JSON object a line, tables, parsers, a start.

Importing it also makes minitf importable where it is not installed.
"""
import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import minitf                                          # noqa: E402
from minitf.training import optimizer                  # noqa: E402


def read(path):
    """Every record of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path, **record):
    """One record more."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def row(*cells):
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def header(*names):
    """A table's first two lines."""
    return row(*names) + "\n" + row(*["---"] * len(names))


def start(settings, vocabulary):
    """(params, optimizer state, constants, rates): what the first training step is given."""
    model, how = settings.model, settings.training
    init = jax.jit(minitf.init, static_argnames=("config", "vocabulary"))
    params = init(jax.random.key(how.seed), config=model, vocabulary=vocabulary)
    fixed = minitf.attention_constants(model), optimizer.group_rates(how, model)
    state = optimizer.make_optimizer(how.optimizer).init(params)
    return params, state, *jax.tree.map(jnp.asarray, fixed)


def parser(description):
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def command(description, names, run, report, **flags):
    """What a script does: run(names=[some of the names, or none], **flags), or report().

    flags: with their defaults.
    """
    made = parser(description)
    made.add_argument("what", choices=("run", "report"))
    made.add_argument("names", nargs="*", metavar="NAME", help="; ".join(names))
    for name, default in flags.items():
        made.add_argument("--" + name, type=type(default), default=default)
    given = vars(made.parse_args())
    for name in set(given["names"]) - set(names):
        made.error(f"no {name}: allowed are {'; '.join(names)}")
    run(**given) if given.pop("what") == "run" else report()
