"""The loop: a run from its first step to its last, and one that is taken up again."""
import math
import shlex
import signal
import sys
import time
from functools import partial

import jax

from ..config import Sampling
from ..errors import as_flag, as_line, require
from ..network.init import init
from ..theory.kernels import attention_constants
from ..training import checkpoint as checkpoints
from ..training import data, encoding as encodings, optimizer, sharding, train as training
from . import curves, host
from .metrics import Metrics, read
from .progress import Progress, describe
from .use import read_corpus, show_sample
from .watch import Watch

SAVE_SECONDS = 600                         # between two checkpoints, at most
STOP = 2                                   # what a process asks for; 1: a checkpoint, 0: nothing
# On resuming; the data's tokens must be the same.
MAY_CHANGE = "steps", "learning_rate", "save_every", "accumulate", "remat", "data", "val_data"


def train(settings, out, mesh, trained=None, log_to=None):
    """A new run, in the folder `out` or the next one under runs/, on a mesh as sharding.use.

    trained: a Checkpoint, with whose weights and encoding it begins. log_to: of TRACKERS.
    """
    if sharding.first():
        host.require_new(out)
    corpus, settings = read_corpus(settings, trained and trained.encoding)
    digest = None
    if trained and jax.process_count() > 1:
        digest = checkpoints.checksum(training.named_leaves(trained.params))
    sharding.require_same("flags and data", f"{settings} {corpus.digest} {digest}")
    model, vocabulary = settings.model, encodings.vocabulary(corpus.encoding)
    host.require_memory(settings, vocabulary)
    constants = attention_constants(model)                        # refuses before there is a folder
    key = jax.random.key(settings.training.seed)
    with sharding.use(mesh, settings):
        params = sharding.place(trained.params) if trained else \
            sharding.make(partial(init, config=model, vocabulary=vocabulary), key)
        optimize = optimizer.make_optimizer(settings.training.optimizer)
        opt_state = sharding.make(optimize.init, params)
        name = f"{settings.preset}-{model.attn}"
        out = host.make_folder(out, name) if sharding.first() else host.aside()
        with checkpoints.lock(out):
            require(not checkpoints.checkpoints(out), f"{out} was just taken by another run")
            checkpoints.rewind(out / "metrics.jsonl", 0)          # of a run that never began
            run_steps(checkpoints.Checkpoint(0, settings, corpus.encoding, corpus.digest, params,
                                             opt_state), corpus, constants, out, log_to)


def with_network_of(settings, flags):
    """Flags of a new run with a trained run's network; ValueError for flags of another one."""
    own = {"preset", *vars(settings.model)} - {"dtype", "remat"}
    refuse_others(flags, settings.values.keys() - own - {"encoding"},
                  "cannot be given with --init-from: network and encoding are that run's")
    return {name: value for name, value in settings.values.items() if name in own} | flags


def resume(folder, flags, mesh, log_to=None):
    """Goes on with the run in a folder from its newest usable checkpoint, as if never stopped."""
    require(checkpoints.checkpoints(folder), f"{folder} has no checkpoint")
    out = folder if sharding.first() else host.aside()
    with checkpoints.lock(out):
        go_on(folder, out, flags, mesh, log_to)


def go_on(folder, out, flags, mesh, log_to):
    """What `resume` does while no other run may write to `out`."""
    state, unusable = checkpoints.newest(folder)
    sharding.require_same("the newest checkpoint", f"{state.step} {state.settings}")
    new, old = state.settings.replace(**flags).values, state.settings.values
    changed = {name: value for name, value in flags.items() if new[name] != old[name]}
    allowed = ", ".join(map(as_flag, MAY_CHANGE))
    refuse_others(changed, MAY_CHANGE, f"cannot change on resuming; {allowed} can")
    if changed:                                                   # defaults are then made anew
        require(state.settings.replace() == state.settings, f"{folder} was begun with other "
                "defaults than today's: it goes on as it is, without other flags")
        before = optimizer.learning_rate(state.settings.training, state.step)
        state = state._replace(settings=state.settings.replace(**changed))
    how = state.settings.training
    require(how.steps > state.step, f"{folder} is trained, {state.step} steps: more --steps go on")
    if changed.keys() & {"steps", "learning_rate"}:
        print(f"note: the learning rate goes on at {optimizer.learning_rate(how, state.step):.3g}, "
              f"not at {before:.3g}; its peak is {how.learning_rate:.3g} now")
    corpus = data.load(state.settings.data, state.settings.model.length, state.encoding)
    require(corpus.digest == state.digest, "data has other tokens than the run was trained on")
    with sharding.use(mesh, state.settings):
        for path, problem in unusable if sharding.first() else ():
            print(f"run.py: {problem}; falling back to the one of step {state.step}",
                  file=sys.stderr)
            path.rename(path.with_suffix(".unusable"))            # for whoever wants to know
        checkpoints.rewind(out / "metrics.jsonl", state.step)
        params, opt_state = sharding.place((state.params, state.opt_state))
        state = state._replace(params=params, opt_state=opt_state)
        run_steps(state, corpus, attention_constants(state.settings.model), out, log_to)


def run_steps(state, corpus, constants, out, log_to):
    """Trains from a Checkpoint to the last step: checkpoints and metrics.jsonl in `out`."""
    host.keep_freed_memory()
    start, settings, encoding, digest, params, opt_state = state
    model, how = settings.model, settings.training
    started, read = time.perf_counter(), partial(data.batch, corpus.train, model.length, how.batch)
    constants, rates = sharding.place((constants, optimizer.group_rates(how, model)))
    host.note_machine(out, settings)
    describe(settings, params, corpus, out)
    metrics = Metrics(out, settings, log_to if sharding.first() else None)
    with metrics, Progress(how, model.length) as progress, host.stop_signals() as stop:
        if not start:
            save(out, metrics, state)
        watch = begin_watch(settings, params, constants, corpus, start, out, metrics, progress)
        record = partial(record_step, metrics, progress, watch, how)
        pending = last = None                                     # the device is one step ahead
        asked, saved_at = 0, time.monotonic()
        for step in range(start, how.steps):
            batch = sharding.batch(partial(read, how.seed, step), how.batch, model.length)
            params, opt_state, values = training.train_step(
                params, opt_state, constants, rates, optimizer.learning_rate(how, step), batch,
                model, how.optimizer, how.accumulate, step)
            late = sharding.first() and not asked and time.monotonic() - saved_at > SAVE_SECONDS
            told, asked = int(asked), sharding.largest(STOP if stop else int(late))
            if pending:
                last = record(*pending, last)
            pending, done = (step + 1, values), step + 1
            evaluating = done % how.save_every == 0 or done == how.steps
            saving = evaluating or told
            if step == start or saving:
                last, pending = record(*pending, last), None
            if evaluating:
                count = (64 if done == how.steps else 4) * how.batch
                said = evaluate(settings, params, constants, corpus, count, done, metrics, watch,
                                progress)
            if saving:
                state = checkpoints.Checkpoint(done, settings, encoding, digest, params, opt_state)
                save(out, metrics, state, watch.best)
                saved_at = time.monotonic()
                progress.rest()
            if told == STOP and done < how.steps:
                say_last(progress, f"stopped and saved after step {done} of {how.steps}; to go on: "
                         f"python run.py --resume {shlex.quote(str(out))}")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])     # the first of its own signals
    print(f"\n{said}, after {how.steps} steps, {time.perf_counter() - started:.0f} s; {out}")
    if model.objective == "clm":
        print("\nA sample, from a beginning in the validation text:\n")
        prompt = corpus.validation[:min(16, model.length // 2)].tolist()
        show_sample(checkpoints.Model(model, params, constants, encoding), prompt, Sampling())


def begin_watch(settings, params, constants, corpus, start, out, metrics, progress):
    """The Watch of a run that begins, or of one that is taken up again, from its metrics."""
    watch = Watch(settings.training.warmup, out, len(corpus.validation))
    if not start:
        windows = data.spread_windows(corpus.validation, settings.model.length,
                                      settings.training.at_once)
        loss, blocks = training.evaluate(params, constants, windows, settings.model, len(windows))
        metrics.add({"step": 0, **blocks})
        progress.note(f"step 0: loss {loss:.3f} on {len(windows)} windows of validation text; now "
                      "the step is compiled")
    for line in read(out):
        watch.recall(line)
    return watch


def record_step(metrics, progress, watch, how, step, values, last):
    """Waits for a step, adds its line to the metrics; exits if it is not finite.

    step: from 1. last: what was returned for the step before. Returns (step, values).
    """
    line = {"step": step, "loss": float(values["loss"]),
            "learning_rate": float(optimizer.learning_rate(how, step - 1)),
            "grad_norm": float(values["grad_norm"]), "tokens_per_second": progress.step_done()}
    if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
        metrics.add(line)
        progress.show(line)
        progress.note(watch.gradient(line, values["grad_norms"]))
        return step, values
    at, found = last if last and not math.isfinite(line["loss"]) else (step, values)
    name, norm = training.largest_gradient(found["grad_norms"])
    cause = watch.help() if step > 1 else "no step was taken: it is not the learning rate"
    say_last(progress, f"loss is {line['loss']:.3g}, gradient norm {line['grad_norm']:.3g} at step "
             f"{step}; the largest gradient at step {at} is that of {name}, {norm:.3g}; {cause}")
    sys.exit(1)


def say_last(progress, line):
    """A line on stderr before a run ends early; of several processes the first says it."""
    if sharding.first():
        progress.end_line()
        print(f"run.py: {as_line(line)}", file=sys.stderr)


def evaluate(settings, params, constants, corpus, count, step, metrics, watch, progress):
    """The loss on `count` windows of validation text, as a sentence.

    It is noted, with a warning if there is one. Loss, mean squares and kurtosis behind the blocks
    go into the metrics. It exits where the loss is not finite. ValueError if the tokens have turned
    out to be damaged.
    """
    corpus.verify()
    windows = data.spread_windows(corpus.validation, settings.model.length, count)
    value, blocks = training.evaluate(params, constants, windows, settings.model,
                                      settings.training.at_once)
    if not math.isfinite(value):
        say_last(progress, f"validation loss is {value:.3g} after step {step}; {watch.help()}")
        sys.exit(1)
    size = corpus.validation_counts @ encodings.byte_lengths(corpus.encoding)
    bits = len(corpus.validation) / size / math.log(2)            # per byte, of a nat per token
    unigram = data.unigram_loss(corpus.train_counts, corpus.validation_counts)
    line = {"step": step, "val_loss": value, "val_windows": len(windows),
            "val_tokens": len(corpus.validation), **blocks}
    said = f"validation loss {value:.3f} nats a masked token (unigram {unigram:.3f})"
    if settings.model.objective == "clm":
        line["val_bits_per_byte"] = value * bits
        said = (f"validation loss {value:.3f} nats a token, {value * bits:.3f} bits a byte "
                f"(unigram {unigram:.3f}, {unigram * bits:.3f})")
    metrics.add(line)
    watch.recall(line)
    progress.note(f"step {step}: {said}, on {len(windows):,} windows")
    progress.note(watch.activations(step, blocks["mean_square"]))
    return said


def save(out, metrics, state, best=None):
    """A checkpoint, after the metrics of all steps before it are on disk; then a picture."""
    metrics.sync()
    checkpoints.save(out, state, best)
    if sharding.first():
        curves.renew(out, state.step == state.settings.training.steps)


def refuse_others(flags, names, why):
    """ValueError, by name, if any flag is given that is not one of the names."""
    others = ", ".join("--" + as_flag(name) for name in flags if name not in names)
    require(not others, f"{others} {why}")
