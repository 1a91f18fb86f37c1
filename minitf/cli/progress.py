"""What a person sees of a run: what is trained, how far it is, text as it is made."""
import codecs
import sys
import time

import jax

from . import model, theory


def describe(config, params, corpus, out):
    """What is about to be trained, in five lines."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    skips = "no skips" if config.alpha == 0 else f"skips {config.alpha:.3g} + {config.beta:.3g}"
    norms = "no norms" if config.norm == "none" else f"{config.norm} norms"
    far = f" ({config.far} of {config.heads} heads far: {config.gamma_far:g})" if config.far else ""
    own = ", a matrix of its own for what a token keeps" * config.own
    target = {"espa": f", gamma {config.gamma:g}{far}{own}", "uspa": f", rho {config.rho:g}"}.get(config.attn, "")
    rescale = f", rescale {config.rescale}" if target else ""
    balance = theory.balance(config)
    least, most = balance.min(), balance.max()
    span = lambda multiple: f"{multiple * least:.3g}" + (f" to {multiple * most:.3g}" if most > least else "")
    phi = theory.activation(config)
    shape = f"slope {phi.slope:.4f}" if phi.name.endswith("relu") else \
        f"{phi.output_scale:.3f} phi({phi.input_scale:.3f} x {phi.input_shift:+.3f}) {phi.output_scale * phi.output_shift:+.3f}"
    print(f"model       {config.depth} blocks, width {config.width}, {config.heads} heads, {skips}, {norms}: "
          f"{count:,} parameters\n"
          f"attention   {config.attn}{target}{rescale}, positions {config.position}\n"
          f"activation  {phi.name}, {shape}, transform {config.transform}; init {config.init}\n"
          f"data        {len(corpus.train):,} tokens of {corpus.encoding.n_vocab:,}, r = {config.repeat_rate:.4f}; "
          f"held out {len(corpus.held_out):,}\n"
          f"training    {config.steps} steps of {config.batch} x {config.length} tokens, {config.optimizer} at {config.learning_rate:.3g} "
          f"(ends x {config.ends:g}, queries and keys x {span(config.qk)}, values and outputs x {span(config.vo)}), "
          f"{model.compute_dtype(config)} on {jax.devices()[0].device_kind}; {out}")


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


def stream(tokens, encoding, write):
    """Writes the text of tokens as they come: a character once all its bytes are there, U+FFFD for what is none."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        write(decoder.decode(encoding.decode_single_token_bytes(token)))
    write(decoder.decode(b"", final=True))
