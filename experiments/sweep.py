"""Many runs of run.py, each a line of a file: seeds, a random search, the best of it at length.

    python experiments/sweep.py run FILE "FLAGS" ... [--data DIR] [--test DIR] [--seeds 0,1,2]
                                [--together N] [--random N [--best K --then "FLAGS"]]
    python experiments/sweep.py report FILE ... [--match TEXT] [--plot FILE.png]

FLAGS are run.py's. What the file has is not repeated, and a run that was cut short goes on.
--test: text on which each trained network is evaluated as well, as data/prepare.py --test makes it.
--random N: of each FLAGS N trials, the first as it is, the others with rates, decay, pull and gamma
drawn around it. --best K: the K of them that are best in the mean over seeds once more, with the
flags of --then as well. A run that diverges counts, as the worst.
--together N: so many at a time, each on a GPU of its own, as far as there are, or on its share of
the cores. Several on one GPU: one computes while another compiles.
A report has means and spreads over seeds and, of searches, what the best of k trials comes to.
"""
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from records import HERE, add, header, parser, read, row

from minitf import __version__, resolve
from minitf.cli import curves
from minitf.cli.main import SETTINGS, make_parser
from minitf.errors import as_flag, require

DIVERGED = re.compile("loss is .* (at|after) step")                 # how run.py ends then
# What a random search varies, each between its own value over this number and times it.
FACTORS = dict(learning_rate=2, lr_mult_embed=2, lr_mult_qk=2, lr_mult_vo=2, weight_decay=4,
               orthogonal_pull=4, gamma=4)


def run(file, flags, texts, seeds, random, best, then, together):
    """Trains what `file` lacks; returns how many runs failed."""
    asked, later = [parse(text) for text in flags], parse(then)
    failed = train_all(file, [
        (dict(search=each, number=number) if random else {}, drawn(each, number) | dict(seed=seed))
        for number in range(random or 1) for seed in seeds for each in asked], texts, together)
    for each in asked if best else ():
        trials = {}                                               # number: its losses, by seed
        for record in read(file):
            if record.get("search") == each:
                trials.setdefault(record["number"], []).append(loss(record))
        numbers = sorted(trials, key=lambda number: np.mean(trials[number]))[:best]
        failed += train_all(file, [({}, drawn(each, number) | later | dict(seed=seed))
                                   for number in numbers for seed in seeds], texts, together)
    return failed


def parse(text):
    """FLAGS as a dict of settings; ValueError for what is no setting, or the sweep's own."""
    parser = make_parser()
    given = vars(parser.parse_args(shlex.split(text)))
    for name in [name for name in given if name not in SETTINGS or name == "seed"]:
        require(given.pop(name) == parser.get_default(name),
                f"--{as_flag(name)} is not for a sweep's FLAGS")
    return given


def arguments(flags):
    """A dict as run.py's arguments."""
    def one(name, value):
        name = as_flag(name)
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name}=" + (",".join(map(str, value)) if isinstance(value, (list, tuple))
                               else str(value))
    return [one(name, value) for name, value in flags.items()]


def drawn(flags, number):
    """Flags with the number-th multiples, log-uniform, of their own rates; 0: as they are."""
    settings, changed = resolve(**flags), dict(flags)
    values = settings.values
    random = np.random.default_rng(number)
    for name, factor in FACTORS.items() if number else ():
        times = factor ** random.uniform(-1, 1)
        if name == "gamma" and settings.model.attn == "espa":
            changed[name] = [float(f"{min(gamma * times, 100):.3g}") for gamma in values[name]]
        elif name != "gamma" and values[name]:
            changed[name] = float(f"{values[name] * times:.3g}")
    if "orthogonal_pull" in changed:
        changed["orthogonal_pull"] = min(changed["orthogonal_pull"], 1.0)
    return changed


def train_all(file, trials, texts, together):
    """Trains [(what else to record, flags)], in turn on each of so many places.

    texts: what to train on and what to test on, or None.
    """
    done = {key(each["flags"]) for each in read(file)}
    places = SimpleQueue()
    for place in range(together):
        places.put(place)

    def one(trial):
        also, flags = trial
        place = places.get()
        try:
            return train(file, also, flags, *texts, take_place(place, together))
        finally:
            places.put(place)

    missing = {key(flags): (also, flags) for also, flags in trials if key(flags) not in done}
    pool = ThreadPoolExecutor(together)
    try:
        return sum(pool.map(one, missing.values()))
    finally:
        pool.shutdown(cancel_futures=True)                        # interrupted: no further ones


def key(flags):
    return json.dumps(flags, sort_keys=True)


def folder_of(file, flags):
    """Where a run is until it has ended."""
    return file.with_suffix("") / hashlib.sha256(key(flags).encode()).hexdigest()[:12]


def train(file, also, flags, data, test, environment):
    """One run, from where it stopped, in a folder beside `file`; a line there. True if it fails."""
    program = [sys.executable, HERE.parent / "run.py"]
    call = lambda *arguments: subprocess.run([*program, *arguments], env=environment, text=True,
                                             capture_output=True)
    folder = folder_of(file, flags)
    steps, said, problem = resolve(**flags).training.steps, shlex.join(arguments(flags)), ""
    if not any(line["step"] == steps for line in lines_of(folder)):
        begun = any(folder.glob("checkpoint-*.npz"))
        where = ["--resume", folder] if begun else \
            [*arguments(flags), *["--data", data] * bool(data), "--out", folder]
        ended = call(*where)
        problem = ended.stderr.strip() if ended.returncode else ""
    tested = call("--eval", folder, "--data", test) if test and not problem else None
    problem = tested.stderr.strip() if tested and tested.returncode else problem
    if problem and not DIVERGED.search(problem):
        print(f"{said}: {problem}", flush=True)
        return True
    record = dict(flags=flags, **also, **measured(lines_of(folder)), revision=__version__)
    if problem:
        record |= dict(validation_loss=float("nan"), ended=problem)
    if tested:
        record["test_loss"] = float(re.search(r"([0-9.]+) nats", tested.stdout)[1])
    add(file, **record)
    shutil.rmtree(folder)
    print(f"{said}: {loss(record):.3f}", flush=True)
    return False


def lines_of(folder):
    """The metrics of a run; [] before there are any."""
    return curves.read(folder) if (folder / "metrics.jsonl").exists() else []


def take_place(place, together):
    """The environment of a run: the place's GPU, or this thread on its share of the cores."""
    cards = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and together > 1:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        cards = cards.split(",") if cards else [*map(str, range(max(listed.count("UUID: GPU"), 1)))]
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if together > len(cards) else {}
        return os.environ | shared | {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]}
    if together > 1 and hasattr(os, "sched_setaffinity"):         # what it runs inherits it
        cores = sorted(os.sched_getaffinity(os.getpid()))
        os.sched_setaffinity(0, cores[place % len(cores)::together])
    return os.environ


def measured(lines):
    """What is kept of a run, from its metrics."""
    steps = [line for line in lines if "loss" in line]
    norms = [line["grad_norm"] for line in steps]
    last = [line for line in lines if "val_loss" in line][-1:]
    of_last = lambda name: last[0].get(name) if last else None
    return dict(validation_loss=of_last("val_loss"), bits_per_byte=of_last("val_bits_per_byte"),
                gradient_ratio=max(norms[500:]) / norms[500] if len(norms) > 501 else None,
                tokens_per_second=float(np.median([line["tokens_per_second"] for line in steps])),
                mean_square=of_last("mean_square"), kurtosis=of_last("kurtosis"),
                **curves.summary(lines, 120))


# --- What came out ----------------------------------------------------------------------

def loss(record):
    """The validation loss; what is not a number counts as the largest."""
    return record["validation_loss"] if np.isfinite(record["validation_loss"]) else np.inf


def searches_of(records):
    """{what was varied: its trials}."""
    groups = {}
    for each in records:
        if "search" in each:
            groups.setdefault(key(each["search"]), []).append(each)
    return groups


def best_of(losses, k):
    """The mean over all choices of k of these losses of the least one."""
    ordered, n = sorted(losses), len(losses)
    return sum(comb(n - 1 - i, k - 1) * each for i, each in enumerate(ordered)) / comb(n, k)


def common(flags, others):
    """Those of the flags that all the others have too."""
    return {name: value for name, value in flags.items()
            if all(name in each and each[name] == value for each in others)}


def label(flags, others):
    """The flags, but for those that all the others have too, and the seed."""
    hidden = (*common(flags, others), "seed")
    shown = {name: value for name, value in flags.items() if name not in hidden}
    return shlex.join(arguments(shown)) or "as they are"


def report(files, match, plot):
    """Prints tables as Markdown, and draws the mean over seeds of each line of the first.

    match: only of runs with this in their flags.
    """
    for file in files:
        require(file.exists(), f"{file}: no such file")
    records = [each for file in files for each in read(file)
               if match in shlex.join(arguments(each["flags"]))]
    require(records, f"{files[0]} has no runs{match and ' with '}{match} yet")
    groups, everyone = {}, [each["flags"] for each in records]
    for each in records:
        name = each.get("name")
        alike = [other["flags"] for other in records if other.get("name") == name]
        said = f"{name}: " * bool(name) + label(each["flags"], alike)
        groups.setdefault(said, []).append(each)
    ordered = sorted(groups.items(), key=lambda item: np.mean([*map(loss, item[1])]))
    shared = common(everyone[0], everyone) if everyone else {}
    long = any(each.get("gradient_ratio") for each in records)
    tested = any("test_loss" in each for each in records)
    print(f"All: `{shlex.join(arguments(shared))}`. Validation loss: the mean over seeds."
          + " Gradient norm: the largest after step 500 over that at step 500." * long + "\n")
    print(header("flags", "seeds", "validation loss", "spread", *["test loss"] * tested,
                 *["gradient norm, see above"] * long))
    for name, group in ordered:
        losses = [*map(loss, group)]
        print(row(f"`{name}`", ", ".join(str(each["flags"].get("seed", 0)) for each in group),
                  f"{np.mean(losses):.3f}", f"{max(losses) - min(losses):.3f}",
                  *[shown(np.mean([each.get("test_loss", np.nan) for each in group]), 3)] * tested,
                  *[", ".join(shown(each.get("gradient_ratio"), 1) for each in group)] * long))
    for search, group in searches_of(records).items():
        losses = [*map(loss, group)]
        around = shlex.join(arguments(json.loads(search)))
        print(f"\nThe best of k of {len(group)} trials around `{around}`:\n")
        counts = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k < len(group)} | {len(group)})
        print(header("k", *counts))
        print(row("loss", *(f"{best_of(losses, k):.3f}" for k in counts)))
    if plot:
        curves.draw({f"{name}: {np.mean([*map(loss, group)]):.3f}": mean_of(group)
                     for name, group in ordered if "loss" in group[0]}, plot, True)


def shown(number, digits):
    """A number in so many digits; nothing where there is none."""
    return f"{number:.{digits}f}" if number and np.isfinite(number) else ""


def mean_of(group):
    """What `curves.draw` takes, as a mean over runs of the same steps."""
    steps = lambda each: (each["at"], [at for at, _ in each["validation"]])
    same = [each for each in group if steps(each) == steps(group[0])]
    means = np.mean([each["validation"] for each in same], 0).tolist()
    mean = dict(at=group[0]["at"], validation=means)
    for name in ("loss", "grad_norm"):
        if all(name in each for each in same):
            mean[name] = np.mean([each[name] for each in same], 0)
    return mean


def main():
    made = parser(__doc__)
    made.add_argument("what", choices=("run", "report"))
    made.add_argument("file", type=Path)
    made.add_argument("more", nargs="*", metavar="FLAGS", help="or, of a report, further files")
    made.add_argument("--data", help="as run.py's; it is not recorded, nor is --test")
    made.add_argument("--test", metavar="DIR", help="a text, or a prepared folder, to test on")
    made.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0],
                      metavar="N,N,...", help="of each FLAGS (default: 0)")
    numbers = dict(random=(0, "trials of a search"), best=(0, "of these, to run once more"),
                   together=(1, "runs at a time (default: 1)"))
    for name, (default, text) in numbers.items():
        made.add_argument("--" + name, type=int, default=default, metavar="N", help=text)
    made.add_argument("--then", default="", metavar="FLAGS", help="what the best have as well")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="means over seeds, drawn")
    made.add_argument("--match", default="", metavar="TEXT", help="report runs whose FLAGS have it")
    given, single = made.parse_known_args()
    given.more += single                                # FLAGS of one word look like options
    try:
        require(given.what == "report" or given.more, "run needs FLAGS, as \"--attn espa\"")
        if given.what == "report":
            return report([given.file, *map(Path, given.more)], given.match, given.plot)
        return bool(run(given.file, given.more, (given.data, given.test), given.seeds,
                        given.random, given.best, given.then, given.together))
    except (ValueError, OSError) as error:
        made.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
