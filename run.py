"""Trains a transformer without shortcuts on text: python run.py --depth 36 --attn espa"""
import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

HERE = Path(__file__).parent
DATA, ENCODING = HERE / "data/shakespeare.txt", HERE / "data/shakespeare.tiktoken"
MAY_CHANGE = "steps", "learning_rate", "save_every", "data", "val_data"   # on resuming; the data's tokens must be the same


def main(arguments=None):
    """Parses the flags; trains, resumes, samples, evaluates. Whatever a user can get wrong: one line, exit status 2."""
    parser, config_class = make_parser()
    flags = vars(parser.parse_args(arguments))                             # the configuration's: those given, no others
    modes = {name: flags.pop(name) for name in ("out", "resume", "sample", "eval", "inspect", "plot")}
    try:
        if modes["resume"]:
            resume(modes["resume"], flags)
        elif modes["sample"]:
            sample(modes["sample"], flags)
        elif modes["eval"]:
            evaluate(modes["eval"], flags)
        else:
            refuse_others(flags, [each.name for each in fields(config_class)], "can only be given with --sample")
            config = config_class(**flags)
            if modes["inspect"] or modes["plot"]:
                inspect(config, modes["plot"])
            else:
                train(config, modes["out"])
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:                                                # nobody reads on: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0 if modes["sample"] else 128 + signal.SIGPIPE)
    except OSError as error:
        parser.error(f"{error.filename or 'cannot write'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parser.error("out of memory: a smaller --batch, --length or --width may help")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def make_parser():
    """(parser, Config): one flag for each field of Config and of Sampling, and what to do and where."""
    from minitf.config import Config, Sampling, kind
    from minitf.errors import Parser
    from minitf.report import THRESHOLDS

    parser = Parser(prog="run.py", description=__doc__, allow_abbrev=False)
    for each in {each.name: each for each in (*fields(Sampling), *fields(Config))}.values():
        default = "" if each.default is None or each.name == "prompt" else f" (default: {each.default})"
        how = dict(action=argparse.BooleanOptionalAction) if kind(each) is bool else \
            dict(type=kind(each), metavar="|".join(each.metadata["choices"]) or kind(each).__name__.upper())
        parser.add_argument("--" + each.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(each.metadata["text"] + default).replace("%", "%%"), **how)
    where = parser.add_mutually_exclusive_group()
    for name, text in {"out": "a new folder for checkpoints and metrics (default: the next one under runs/)",
                       "resume": f"go on with the run in a folder; {', '.join(MAY_CHANGE)} may be given anew",
                       "sample": "draw text from a run's newest checkpoint: prompt, tokens, temperature, top_k, seed",
                       "eval": "loss of a run's newest checkpoint on --data (default: its held-out text)"}.items():
        where.add_argument("--" + name, type=Path, metavar="DIR", help=text)
    where.add_argument("--inspect", action="store_true", help="train nothing: show what the initialised network does to "
                       f"real text, block by block, beside the prediction; {THRESHOLDS}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what --inspect shows, beside softmax; needs matplotlib")
    return parser, Config


def refuse_others(flags, names, why):
    """ValueError, by name, if any flag is given that is not one of the names."""
    from minitf.errors import require
    others = ", ".join("--" + name.replace("_", "-") for name in flags if name not in names)
    require(not others, f"{others} {why}")


# --- A run ------------------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Where the C library is glibc: arrays of one step are made in the memory of the last, not in pages that the system
    takes back, clears and maps again, which costs a CPU up to a fifth of a step."""
    with suppress(OSError, AttributeError):
        for parameter in (-3, -1):                                             # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


def train(config, out, checkpoint=None):
    """Trains as configured, from a checkpoint if given, with checkpoints, config.json and metrics.jsonl in `out`."""
    keep_freed_memory()
    import jax
    from minitf import checkpoint as checkpoints, data, model, theory, train
    from minitf.errors import require
    from minitf.show import Progress, describe

    started = time.perf_counter()
    if not checkpoint:
        require_new(out)
    corpus, config = load(config, checkpoint and checkpoint.encoding)
    encoding, tokens, held_out, train_counts, held_out_counts, digest = corpus
    if checkpoint:
        require(digest == checkpoint.digest, "data is not what the run was trained on: its tokens must be the same")
        params, opt_state, start = checkpoint.params, checkpoint.opt_state, checkpoint.step
        constants = theory.constants(config)
    else:
        constants, key = theory.constants(config), jax.random.key(config.seed)
        params = jax.jit(model.init, static_argnums=(1, 2))(key, config, data.vocabulary(encoding))
        opt_state, start = train.make_optimizer(config).init(params), 0
        out = make_folder(out, f"{config.block}-{config.attn}")
        lock = checkpoints.lock(out)
        require(not (out / "config.json").exists(), f"{out} was just taken by another run")
    bits = len(held_out) / (held_out_counts @ data.byte_lengths(encoding)) / math.log(2)   # per byte, of a nat per token
    unigram = data.unigram_loss(train_counts, held_out_counts)
    schedule = train.make_schedule(config)
    resume_with = f"python run.py --resume {out}"

    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    describe(config, params, corpus, out)
    with open(out / "metrics.jsonl", "a") as metrics, Progress(config) as progress, stop_signals() as stop:
        def record(step, values):
            """One line of metrics for a step that was sent off; waits for it. Exits where it is not finite."""
            line = {"step": step, "loss": float(values["loss"]), "learning_rate": float(schedule(step)),
                    "grad_norm": float(values["grad_norm"]), "tokens_per_second": progress.step_done()}
            if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
                last = recorded if recorded and not math.isfinite(line["loss"]) else (step, values)
                name, norm = train.largest_gradient(last[1]["grad_norms"])
                sys.exit(progress.last_words(
                    f"loss is {line['loss']:.3g}, gradient norm {line['grad_norm']:.3g} at step {step}; "
                    f"the largest gradient at step {last[0]} is that of {name}, {norm:.3g}. The checkpoint of step {saved} is kept; try "
                    f"{resume_with} --learning-rate {config.learning_rate / 4:.2g}"))
            metrics.write(json.dumps(line) + "\n")
            progress.show(line)
            return step, values

        def evaluate(step, count):
            windows = data.spread_windows(held_out, config.length, count)
            value = train.evaluate(params, constants, windows, config)
            metrics.write(json.dumps({"step": step, "val_loss": value, "val_bits_per_byte": value * bits}) + "\n")
            progress.note(f"step {step}: held out {value:.3f} nats a token, {value * bits:.3f} bits a byte "
                          f"(token frequencies alone: {unigram:.3f}, {unigram * bits:.3f})")
            return value

        def save(step):
            """A checkpoint, after the metrics of all steps before it are on disk."""
            metrics.flush()
            os.fsync(metrics.fileno())
            checkpoints.save(out, checkpoints.Checkpoint(step, config, encoding, digest, params, opt_state))
            return step

        saved = save(start) if start == 0 else start
        sent = recorded = None                                                 # one step ahead: the device never waits
        for step in range(start, config.steps):
            batch = data.batch(tokens, config.length, config.batch, config.seed, step)
            params, opt_state, values = train.train_step(params, opt_state, constants, batch, config)
            if sent:
                recorded = record(*sent)
            sent, done = (step, values), step + 1
            evaluating = done % max(config.steps // 4, 1) == 0 or done == config.steps
            saving = done % config.save_every == 0 or done == config.steps or stop
            if step == start or evaluating or saving:
                recorded, sent = record(*sent), None
            if evaluating:
                value = evaluate(done, (64 if done == config.steps else 4) * config.batch)
            if saving:
                saved = save(done)
            if stop and done < config.steps:
                said = f"stopped and saved after step {done} of {config.steps}; to go on: {resume_with}"
                print(progress.last_words(said), file=sys.stderr)
                sys.exit(128 + stop[0])
            if evaluating or saving:
                progress.rest()

    print(f"\nheld out {value:.3f} nats a token, {value * bits:.3f} bits a byte, after {config.steps} steps, "
          f"{time.perf_counter() - started:.0f} s; token frequencies alone {unigram:.3f}; {out}\n")
    print("A sample, from a held-out beginning:\n")
    prompt = held_out[:min(16, config.length // 2)].tolist()
    show_sample(checkpoints.Model(config, params, constants, encoding), prompt, 120)


def resume(folder, flags):
    """Goes on with the run in a folder from its newest usable checkpoint, as if it had never stopped."""
    from minitf import checkpoint as checkpoints
    from minitf.errors import require
    require(folder.is_dir(), f"{folder} is not a folder")
    lock = checkpoints.lock(folder)
    checkpoint, unusable = checkpoints.newest(folder)
    for path, problem in unusable:
        print(f"run.py: {problem}; falling back to the one of step {checkpoint.step}", file=sys.stderr)
    changed = [name for name in flags if name not in MAY_CHANGE and flags[name] != getattr(checkpoint.config, name, None)]
    refuse_others(changed, MAY_CHANGE, f"cannot change on resuming; {', '.join(MAY_CHANGE)} can")
    config = replace(checkpoint.config, **{name: flags[name] for name in flags if name in MAY_CHANGE})
    require(config.steps > checkpoint.step, f"{folder} is trained: {checkpoint.step} of {config.steps} steps; "
            "more --steps would go on")
    for path, _ in unusable:                                                   # kept for whoever wants to know why
        path.rename(path.with_suffix(".unusable"))
    checkpoints.rewind(folder / "metrics.jsonl", checkpoint.step)
    train(config, folder, checkpoint)


def sample(folder, flags):
    """Streams the prompt and what the model makes of it."""
    from minitf.checkpoint import load_model
    from minitf.config import Sampling
    refuse_others(flags, [each.name for each in fields(Sampling)], "cannot be given with --sample")
    sampling = Sampling(**flags)
    try:
        sampling.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt is not UTF-8 text") from None
    trained = load_model(folder)
    prompt = trained.encoding.encode(sampling.prompt, disallowed_special=())
    sys.stdout.reconfigure(encoding="utf-8")
    show_sample(trained, prompt, sampling.tokens, sampling.seed, sampling.temperature, sampling.top_k)


def show_sample(trained, prompt, count, seed=0, temperature=0.8, top_k=None):
    """Prints the prompt's tokens and `count` drawn after them, each as soon as it is there."""
    from itertools import chain
    from minitf import data, decode
    from minitf.show import stream
    config, params, constants, encoding = trained
    drawn = decode.sample(params, constants, prompt, count, config, seed, temperature, top_k, data.known(encoding))
    stream(chain(prompt, drawn), encoding, lambda text: print(text, end="", flush=True))
    print(flush=True)


def evaluate(folder, flags):
    """Prints the loss on a text, every token but the first predicted once; default: the run's own held-out text."""
    from minitf import data, train
    from minitf.checkpoint import load_model
    refuse_others(flags, ["data"], "cannot be given with --eval")
    config, params, constants, encoding = load_model(folder)
    tokens = data.read_tokens(flags["data"], encoding)[0] if "data" in flags else load(config, encoding)[0].held_out
    lengths, nats, size, count = data.byte_lengths(encoding), 0.0, 0, len(tokens) - 1
    for span in data.spans(tokens, 64 * config.batch * config.length):
        nats += train.total_loss(params, constants, *data.all_windows(span, config.length), config)
        size += lengths[span[1:]].sum()
    print(f"{count:,} tokens, {size:,.0f} bytes: {nats / count:.4f} nats a token, "
          f"{nats / size / math.log(2):.4f} bits a byte, perplexity {math.exp(min(nats / count, 700)):.4g}")


def inspect(config, plot):
    """Trains nothing: prints the kernel report of the initialised network on held-out text; draws it into `plot`."""
    from minitf import data, report

    corpus, config = load(config)
    vocabulary = data.vocabulary(corpus.encoding)
    windows = data.spread_windows(corpus.held_out, config.length, report.WINDOWS)[:, :-1]
    out = report.report(config, windows, vocabulary)
    print(report.table(out))
    if plot:
        report.plot(out, report.report(replace(config, attn="softmax", own=False), windows, vocabulary), config, plot)
    print(report.verdict(out, config))


@contextmanager
def stop_signals():
    """A list that gains the first SIGINT or SIGTERM, for the loop to see; a second one does what it always does."""
    received, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(number, _):
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def load(config, encoding=None):
    """(data.Corpus, the configuration with what theory and the training tokens say); a given Encoding goes before its own."""
    from minitf import data, train
    corpus = data.load(config.data or str(DATA), encoding or config.encoding, config.length, config.val_data, str(ENCODING))
    train.require_memory(config, data.vocabulary(corpus.encoding))
    rate = data.repeat_rate(corpus.train_counts) if config.repeat_rate is None else config.repeat_rate
    return corpus, replace(reachable(config), repeat_rate=rate)


def reachable(config):
    """The configuration, with an activation target that is out of reach replaced by the nearest one, and a note of that."""
    from minitf import theory
    from minitf.errors import OutOfReach
    try:
        theory.activation(config)
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


if __name__ == "__main__":
    main()
