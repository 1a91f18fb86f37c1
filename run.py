"""Trains a transformer without shortcuts on text: python run.py --depth 36 --attn espa"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import get_args

os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))           # XLA's CPU threads: a pool of two was seen to deadlock
HERE = Path(__file__).parent
DATA, ENCODING = HERE / "data/shakespeare.txt", HERE / "data/shakespeare.tiktoken"


def main(arguments=None):
    """Parses the flags, trains, shows. Whatever a user can get wrong: one line, exit status 2."""
    parser, config_class = make_parser()
    flags = vars(parser.parse_args(arguments))
    out, plot, only_inspect = flags.pop("out"), flags.pop("plot"), flags.pop("inspect")
    try:
        config = config_class(**flags)
        if only_inspect or plot:
            inspect(config, plot)
        else:
            train(config, out)
    except ValueError as error:
        parser.error(str(error))


def make_parser():
    """(parser, Config): one flag for each field of Config, and --out."""
    from minitf.config import Config
    from minitf.report import THRESHOLDS

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"run.py: {' '.join(message.split())}\n")

    parser = Parser(prog="run.py", description=__doc__, allow_abbrev=False)
    for each in fields(Config):
        kind = (get_args(each.type) or [each.type])[0]
        default = "" if each.default is None else f" (default: {each.default})"
        parser.add_argument("--" + each.name.replace("_", "-"), type=kind, default=each.default,
                            metavar="|".join(each.metadata["choices"]) or kind.__name__.upper(),
                            help=(each.metadata["text"] + default).replace("%", "%%"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder for config.json and metrics.jsonl "
                        "(default: the next one under runs/)")
    parser.add_argument("--inspect", action="store_true", help="train nothing: show what the initialised network does to "
                        f"real text, block by block, beside the prediction. The verdict: {THRESHOLDS}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="--inspect, drawn, beside softmax attention")
    return parser, Config


# --- A run ------------------------------------------------------------------------------------------------------------

def train(config, out):
    """Trains as configured; writes config.json and metrics.jsonl into `out`; shows progress, held-out loss, a sample."""
    import jax
    from minitf import data, model, train

    jax.config.update("jax_cpu_enable_async_dispatch", False)                 # with two cores it can wait for itself for ever
    started = time.perf_counter()
    require_new(out)
    config = reachable(config)
    encoding = data.load_encoding(config.encoding or str(ENCODING))
    tokens, held_out = data.load(config.data or str(DATA), encoding, config.length)
    vocabulary = encoding.n_vocab
    if config.repeat_rate is None:
        config = replace(config, repeat_rate=data.repeat_rate(tokens, vocabulary))
    constants = model.constants(config)
    params = jax.jit(model.init, static_argnums=(1, 2))(jax.random.key(config.seed), config, vocabulary)
    opt_state = train.make_optimizer(config).init(params)
    bits = 1 / math.log(2) / data.bytes_per_token(held_out, encoding)          # per byte, of a nat per token
    unigram = data.unigram_loss(tokens, held_out, vocabulary)
    schedule = train.make_schedule(config)

    out = make_folder(out, f"{config.block}-{config.attn}")
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    describe(config, params, tokens, held_out, encoding, out)
    with open(out / "metrics.jsonl", "w") as metrics, Progress(config) as progress:
        def record(step, values):
            """One line of metrics for a step that was sent off; waits until it is computed."""
            line = {"step": step, "loss": float(values["loss"]), "learning_rate": float(schedule(step)),
                    "grad_norm": float(values["grad_norm"]), "tokens_per_second": progress.step_done()}
            metrics.write(json.dumps(line) + "\n")
            progress.show(line)
            if not math.isfinite(line["loss"]):
                sys.exit(progress.last_words(f"loss is {line['loss']} at step {step}: a lower --learning-rate may help"))

        def evaluate(step, count):
            windows = data.spread_windows(held_out, config.length, count)
            value = train.evaluate(params, constants, windows, config)
            metrics.write(json.dumps({"step": step, "val_loss": value, "val_bits_per_byte": value * bits}) + "\n")
            metrics.flush()
            progress.note(f"step {step}: held out {value:.3f} nats a token, {value * bits:.3f} bits a byte "
                          f"(token frequencies alone: {unigram:.3f}, {unigram * bits:.3f})")
            return value

        sent = None                                                            # one step ahead: the device never waits
        for step in range(config.steps):
            batch = data.batch(tokens, config.length, config.batch, config.seed, step)
            params, opt_state, values = train.train_step(params, opt_state, constants, batch, config)
            if sent:
                record(*sent)
            sent = step, values
            if step == 0 or (step + 1) % max(config.steps // 4, 1) == 0 and step + 1 < config.steps:
                record(*sent)
                sent = None
                if step:
                    evaluate(step + 1, 4 * config.batch)
                    progress.rest()
        if sent:
            record(*sent)
        value = evaluate(config.steps, 64 * config.batch)

    print(f"\nheld out {value:.3f} nats a token, {value * bits:.3f} bits a byte, after {config.steps} steps, "
          f"{time.perf_counter() - started:.0f} s; token frequencies alone {unigram:.3f}; {out}\n")
    prompt = held_out[:min(16, config.length // 2)].tolist()
    text = encoding.decode(prompt + list(train.sample(params, constants, prompt, 120, config, temperature=0.8)))
    print("A sample, from a held-out beginning:\n\n" + text)


def reachable(config):
    """The configuration, with an activation target that is out of reach replaced by the nearest one, and a note of that."""
    from minitf import model
    from minitf.errors import OutOfReach
    try:
        model.activation(config)
    except OutOfReach as error:
        print(f"note: {error}; taking that")
        return replace(config, **{error.target: error.best})
    return config


def require_new(out):
    """ValueError if the folder is there already, with anything in it, or could not be a folder."""
    from minitf.errors import require
    require(out is None or not out.exists() or out.is_dir() and not any(out.iterdir()),
            f"{out} exists and is not an empty folder: a run never overwrites another")


def make_folder(out, name):
    """Creates `out`, or the next free folder runs/NAME-N; ValueError where that is not possible."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        Path("runs").mkdir(exist_ok=True)
        for number in range(1, 10**6):
            out = Path("runs") / f"{name}-{number}"
            if not out.exists():
                out.mkdir()
                return out
    except OSError as error:
        raise ValueError(f"cannot create {error.filename}: {error.strerror}") from None


def inspect(config, plot):
    """Trains nothing: prints the kernel report of the initialised network on held-out text; draws it into `plot`."""
    import jax
    from minitf import data, report

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    config = reachable(config)
    encoding = data.load_encoding(config.encoding or str(ENCODING))
    tokens, held_out = data.load(config.data or str(DATA), encoding, config.length)
    if config.repeat_rate is None:
        config = replace(config, repeat_rate=data.repeat_rate(tokens, encoding.n_vocab))
    windows = data.spread_windows(held_out, config.length, report.WINDOWS)[:, :-1]
    out = report.report(config, windows, encoding.n_vocab)
    print(report.table(out))
    if plot:
        report.plot(out, report.report(replace(config, attn="softmax"), windows, encoding.n_vocab), config, plot)
    print(report.verdict(out))


# --- What a person sees ---------------------------------------------------------------------------------------------------

def describe(config, params, tokens, held_out, encoding, out):
    """What is about to be trained, in five lines."""
    import jax
    from minitf import model
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    skips = "no skips" if config.alpha == 0 else f"skips {config.alpha:.3g} + {config.beta:.3g}"
    norms = "no norms" if config.norm == "none" else f"{config.norm} norms"
    target = {"espa": f", gamma {config.gamma:g}", "uspa": f", rho {config.rho:g}"}.get(config.attn, "")
    rescale = f", rescale {config.rescale}" if target else ""
    phi = model.activation(config)
    shape = f"slope {phi.slope:.4f}" if phi.name.endswith("relu") else \
        f"{phi.output_scale:.3f} phi({phi.input_scale:.3f} x {phi.input_shift:+.3f}) {phi.output_scale * phi.output_shift:+.3f}"
    print(f"model       {config.depth} blocks, width {config.width}, {config.heads} heads, {skips}, {norms}: "
          f"{count:,} parameters\n"
          f"attention   {config.attn}{target}{rescale}, positions {config.position}\n"
          f"activation  {phi.name}, {shape}, transform {config.transform}\n"
          f"data        {len(tokens):,} tokens of {encoding.n_vocab:,}, r = {config.repeat_rate:.4f}; "
          f"held out {len(held_out):,}\n"
          f"training    {config.steps} steps of {config.batch} x {config.length} tokens, {config.optimizer} at "
          f"{config.learning_rate:.3g}, {model.compute_dtype(config)} on {jax.devices()[0].device_kind}; {out}")


class Progress:
    """The line that tells how far a run is: updated in place on a terminal, now and then a line of its own elsewhere."""

    def __init__(self, config):
        self.steps, self.tokens, self.width = config.steps, config.batch * config.length, 0
        self.terminal = sys.stdout.isatty()
        self.every = 1 if self.terminal else max(config.steps // 20, 1)
        self.rest()
        self.seconds = None                                                    # of a step, smoothed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.width:
            print()

    def rest(self):
        """Time spent on something else does not count."""
        self.clock = time.perf_counter()

    def step_done(self):
        """Tokens a second of the step just finished."""
        now = time.perf_counter()
        last, self.clock = now - self.clock, now
        self.first, first = False, getattr(self, "first", True)                # it is all compilation
        if not first:
            self.seconds = last if self.seconds is None else 0.9 * self.seconds + 0.1 * last
        return round(self.tokens / last, 1)

    def show(self, line):
        step = line["step"] + 1
        if step % self.every and step not in (1, self.steps):
            return
        rate = "" if self.seconds is None else \
            f"  {self.tokens / self.seconds:,.0f} tokens/s  {clock(self.seconds * (self.steps - step))} left"
        self.write(f"step {step}/{self.steps}  loss {line['loss']:.3f}{rate}")

    def note(self, text):
        """A line that stays."""
        self.write(text)
        if self.terminal:
            print()
            self.width = 0

    def last_words(self, text):
        self.__exit__()
        return "run.py: " + text

    def write(self, text):
        if not self.terminal:
            print(text, flush=True)
            return
        print("\r" + text.ljust(self.width), end="", flush=True)
        self.width = len(text)


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}" if seconds >= 3600 else \
        f"{int(seconds // 60)}:{int(seconds % 60):02}"


if __name__ == "__main__":
    main()
