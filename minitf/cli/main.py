"""The command line. Whatever a user or a file gets wrong: one line, exit status 2."""
import argparse
import os
import re
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import jax

from ..config import FIELDS, SECTIONS, Sampling, kind, resolve, untuned
from ..errors import Parser, as_flag, look_up, require
from ..network.fast import hardware
from ..presets import PRESETS
from ..training import checkpoint, sharding
from . import curves, figures, inspection, loop, use
from .metrics import TRACKERS, read
from .pictures import require_place

DOING = "resume", "sample", "eval", "export", "inspect", "curves", "figure"     # else train
GOES_WITH = {"plot": ("inspect", "inspect DIR", "curves", "figure"), "log_axes": ("curves",),
             "init_from": ("train",), "log_to": ("train", "resume"), "quantize": ("eval",),
             "mesh": ("train", "resume", "sample", "eval", "inspect DIR")}
SETTINGS = ["preset", *(each.name for each in FIELDS)]
TAKES = {"sample": [each.name for each in fields(Sampling)], "eval": ["data"], "export": [],
         "curves": [], "inspect DIR": []}                         # else SETTINGS
OUT_OF_MEMORY = "out of memory: --accumulate 2, --remat, a smaller --batch or --length may help"
COMMON = ("help help-all out resume init-from sample eval inspect curves figure plot preset attn "
          "depth width heads length steps batch seed optimizer learning-rate accumulate mesh data "
          "val-data encoding prompt tokens").split()             # what --help shows


def main(arguments=None):
    """Trains, resumes, samples, evaluates or inspects, as the arguments say."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    prepare_streams()
    warnings.simplefilter("ignore")                               # of libraries: stderr is ours

    def refuse(line):
        sharding.leave(line)
        parser.error(line)

    try:
        start_processes(given.coordinator, given.process_id, given.processes)
        start_backend()
        if given.compilation_cache:
            keep_compiled_programs()
        act(given)
        sys.stdout.flush()                                        # else it fails after main
    except ValueError as error:
        refuse(str(error))
    except BrokenPipeError:                                       # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0 if given.sample else 141)                      # 128 + SIGPIPE
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:                                           # it is stdout: not once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        refuse(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        said = OUT_OF_MEMORY if full else sharding.lost(error)
        if not said:
            raise
        refuse(said)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def act(given):
    """Does what the arguments say."""
    doing = next((name for name in DOING if getattr(given, name) is not None), "train")
    if isinstance(given.inspect, Path):
        doing = "inspect DIR"
    for flag, allowed in GOES_WITH.items():
        require(getattr(given, flag) in (None, False) or doing in allowed,
                f"{as_flag(flag)} goes with {', '.join(allowed)}, not with {doing}")
    require(given.plot or doing not in ("curves", "figure"), f"--{doing} needs --plot FILE.png")
    if given.plot:
        require_place(given.plot)
    flags = {name: value for name, value in vars(given).items()
             if name in SETTINGS or name in TAKES["sample"]}          # those given, no others
    taken = figures.TAKES.get(given.figure) or TAKES.get(doing, SETTINGS)
    loop.refuse_others(flags, taken, f"cannot be given with {given.figure or doing}"
                       if doing in (*TAKES, "figure") else "can only be given with --sample")
    mesh = given.mesh
    if mesh is None and (jax.process_count() > 1 or doing in ("train", "resume")):
        mesh = "all"
    if doing == "resume":
        loop.resume(given.resume, flags, mesh, given.log_to)
    elif doing == "sample":
        use.sample(given.sample, Sampling(**flags), mesh)
    elif doing == "eval":
        use.evaluate(given.eval, flags.get("data"), mesh, given.quantize)
    elif doing == "export":
        use.export(*given.export)
    elif doing == "curves":
        runs = {str(folder): curves.summary(read(folder)) for folder in given.curves}
        curves.draw(runs, given.plot, given.log_axes)
    elif doing == "inspect DIR":
        inspection.inspect_run(given.inspect, given.plot, mesh)
    else:
        trained = checkpoint.newest(given.init_from)[0] if given.init_from else None
        if trained:
            flags = loop.with_network_of(trained.settings, flags)
        settings = use.reachable(resolve(**flags, backend=hardware()))
        note = doing == "train" and untuned(settings.preset, settings.flags)
        if note:
            print(note)
        if doing == "figure":
            look_up(figures.FIGURES, given.figure, "figure")(settings, given.plot)
        elif doing == "inspect":
            inspection.inspect(settings, given.plot)
        else:
            loop.train(settings, given.out, mesh, trained, given.log_to)
    if given.plot:
        print(f"drawn: {given.plot}")


def prepare_streams():
    """What a stream cannot print, or one that is closed, decides nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        with suppress(AttributeError, ValueError):                # a notebook's has no such thing
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        setattr(sys, name, stream)


def start_backend():
    """ValueError where JAX has no device to compute on."""
    jax.config.update("jax_enable_x64", False)                    # states are float32
    try:
        hardware()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["see JAX_PLATFORMS"])[0]
        raise ValueError(f"no device to compute on: {reason}") from None


def start_processes(coordinator, process_id, processes):
    """Joins the other processes of a run on several hosts, if there are any."""
    alone = coordinator in (None, "auto")
    require((process_id is None) == (processes is None) == alone
            and (alone or re.fullmatch(r".+:\d+", coordinator)),
            "coordinator HOST:PORT, process-id and processes go together; auto stands alone")
    if coordinator:
        sharding.start(coordinator, process_id, processes)


def keep_compiled_programs():
    """Where compiling takes long, on an accelerator: by JAX's own cache, in the user's folder."""
    if hardware() == "cpu" or jax.config.jax_compilation_cache_dir:
        return
    with suppress(OSError, RuntimeError):                         # a user may have no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitf"
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def make_parser():
    """One flag for each setting, in groups, and for what to do and where."""
    parser = Parser(prog="run.py", description="Trains a transformer without shortcuts on text.",
                    usage="run.py [--out DIR] [--preset NAME] [flags]", allow_abbrev=False)
    parser.add_argument("--help-all", action="help", help="all flags")
    where = parser.add_mutually_exclusive_group()
    for name, text in {
            "out": "a new folder for checkpoints and metrics (default: the next under runs/)",
            "resume": "go on with a run; anew may be given "
                      f"{', '.join(map(as_flag, loop.MAY_CHANGE))}",
            "sample": "draw text from a run's newest checkpoint",
            "eval": "loss of a run's newest checkpoint on --data (default: all its validation "
                    "text)",
    }.items():
        where.add_argument("--" + name, type=Path, metavar="DIR", help=text)
    where.add_argument("--inspect", nargs="?", type=Path, const=True, metavar="DIR",
                       help="kernels and gradients by block, of a run beside its start; without "
                       "DIR of a new network, beside the prediction")
    where.add_argument("--export", nargs=2, type=Path, metavar=("DIR", "FILE"),
                       help="a run's weights as FILE.safetensors")
    where.add_argument("--curves", nargs="+", type=Path, metavar="DIR", help="draw runs' losses")
    where.add_argument("--figure", metavar="NAME", help="draw, of networks at their start, "
                       f"{', '.join(figures.FIGURES)}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="where to draw it, .png, .pdf or .svg; by matplotlib")
    parser.add_argument("--log-axes", action="store_true", help="--curves: steps and losses")
    parser.add_argument("--quantize", metavar="w8a8|w4a8|...", help="--eval: with so few bits for "
                        "the blocks' weights and activations as well")
    parser.add_argument("--init-from", type=Path, metavar="DIR",
                        help="begin with a run's network and weights, on any data")
    parser.add_argument("--log-to", choices=TRACKERS, help="metrics go there too, by its package")
    parser.add_argument("--compilation-cache", action=argparse.BooleanOptionalAction, default=True,
                        help="keep what is compiled for an accelerator in ~/.cache/minitf")
    parser.add_argument("--mesh", metavar="data=N,fsdp=N",
                        help="devices that share each batch (data), and the parameters (fsdp); "
                        "default: to train, all on data")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="one run by several processes: "
                        "where the first is; auto: as Slurm, Kubernetes or a TPU pod say")
    for name, text in ("process-id", "which one this is, from 0"), ("processes", "how many"):
        parser.add_argument("--" + name, type=int, metavar="N", help=text)
    add_settings(parser)
    if "--help-all" not in sys.argv:
        for action in parser._actions:
            if action.option_strings[-1].strip("-") not in COMMON:
                action.help = argparse.SUPPRESS
    return parser


def add_settings(parser):
    """A flag for each field of config.py, by group."""
    groups = {name: parser.add_argument_group(name) for name in SECTIONS}
    groups["method"].add_argument("--preset", default=argparse.SUPPRESS, metavar="|".join(PRESETS),
                                  help="a whole network with its rates (default: isometric)")
    listed = {each.name: each for each in (*fields(Sampling), *FIELDS)}    # seed serves both
    for each in listed.values():
        groups[each.metadata["group"]].add_argument(
            "--" + as_flag(each.name), default=argparse.SUPPRESS,
            help=each.metadata["text"].replace("%", "%%"), **how_to_parse(each))


def how_to_parse(each):
    """argparse's way for a field: a switch, a choice of names, a number, or several."""
    if kind(each) is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if kind(each) is tuple:
        return dict(type=numbers, metavar="FLOAT,...")
    names = "|".join(each.metadata["choices"])
    return dict(type=kind(each), metavar=names or kind(each).__name__.upper())


def numbers(text):
    """"0.1,0.02" -> (0.1, 0.02)."""
    return tuple(float(part) for part in text.split(","))
