"""What a person sees of a run: what is trained, and how far it is."""
import sys
import time
from contextlib import AbstractContextManager

import jax

from ..network.fast import hardware
from ..theory.families import identity_parts
from ..theory.kernels import network_activation


def describe(settings, params, corpus, out):
    """Prints what is about to be trained, in six lines."""
    model, how = settings.model, settings.training
    lines = {
        "preset": f"{settings.preset}; {out}",
        "model": f"{model.depth} blocks, width {model.width}, {model.heads} heads"
                 f"{f' and {model.extra_heads} extra' if model.extra_heads else ''}, "
                 f"{describe_skips(model)}, {model.norm.replace('none', 'no')} norms, "
                 f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters",
        "attention": describe_attention(model),
        "MLP": f"{describe_activation(network_activation(model))}, transform {model.transform}, "
               f"initialisation {model.mlp_init}",
        "data": f"{len(corpus.train):,} tokens, vocabulary {corpus.encoding.n_vocab:,}, "
                f"token collision rate {model.token_collision_rate:.4f}, "
                f"{len(corpus.validation):,} for validation ({corpus.held_out})",
        "training": f"{model.objective}, {how.steps} steps of {how.batch} x {model.length} tokens, "
                    f"{how.optimizer}, learning rate {how.learning_rate:.3g} (embed x "
                    f"{how.lr_mult_embed:.3g}, qk x {how.lr_mult_qk:g}, vo x {how.lr_mult_vo:g}), "
                    f"{model.dtype} on {describe_device()}",
    }
    print("\n".join(f"{name:12}{line}" for name, line in lines.items()))


def describe_device():
    plainly = ", without fast kernels" if hardware() == "other" else ""
    mesh = jax.sharding.get_abstract_mesh().shape                 # {axis: size}
    several = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)
    return jax.devices()[0].device_kind + plainly + f", mesh {several}" * bool(several)


def describe_skips(model):
    if model.identity_skip:
        c = identity_parts(model)[0]
        return f"a skip of {c.min():.2f} to {c.max():.2f} around attention"
    pairs = (model.alpha, model.beta), (model.mlp_alpha, model.mlp_beta)
    one, other = (f"skips {alpha:.3g} + {beta:.3g}" if alpha else "no skips"
                  for alpha, beta in pairs)
    return one if one == other else f"{one} around attention, {other} around MLPs"


def describe_attention(model):
    gammas = dict.fromkeys(f"{gamma:g}" for gamma in model.gamma)
    parameter = {"espa": f", gamma {', '.join(gammas)}", "uspa": f", rho {model.rho:g}"}
    scale = f", row scale {model.row_scale}" if model.attn in parameter else ""
    return f"{model.attn}{parameter.get(model.attn, '')}{scale}, positions {model.position}"


def describe_activation(phi):
    if phi.name.endswith("relu"):
        return phi.name + (f", slope {phi.slope:.4f}" if phi.slope else "")
    solved = phi.input_scale != 1                      # for more than a mean square of 1
    inner = f"{phi.input_scale:.3f} x {phi.input_shift:+.3f}" if solved else "x"
    return (f"{phi.output_scale:.3f} {phi.name}({inner})"
            + f" {phi.output_scale * phi.output_shift:+.3f}" * solved)


class Progress(AbstractContextManager):
    """How far a run is: a line that changes on a terminal, elsewhere a new one now and then."""

    def __init__(self, training, length):
        self.steps, self.tokens, self.width = training.steps, training.batch * length, 0
        self.terminal = on_terminal()
        self.every = 1 if self.terminal else max(training.steps // 20, 1)
        self.seconds, self.compiled = None, False          # of a step, smoothed
        self.rest()

    def __exit__(self, *_):
        self.end_line()

    def rest(self):
        """Time spent on something else does not count."""
        self.clock = time.perf_counter()

    def step_done(self):
        """Tokens a second of the step just finished."""
        now = time.perf_counter()
        last, self.clock = now - self.clock, now
        if self.compiled:                                  # the first step is all compilation
            self.seconds = last if self.seconds is None else 0.9 * self.seconds + 0.1 * last
        self.compiled = True
        return round(self.tokens / last, 1)

    def show(self, line):
        step = line["step"]
        if step % self.every and step not in (1, self.steps):
            return
        rate = "" if self.seconds is None else f"  {self.tokens / self.seconds:,.0f} tokens/s" \
            f"  {clock(self.seconds * (self.steps - step))} left"
        self.write(f"step {step}/{self.steps}  loss {line['loss']:.3f}  "
                   f"gradient norm {line['grad_norm']:.3g}{rate}")

    def note(self, text):
        """A line that stays, unless there is nothing to say."""
        if text:
            self.write(text)
            self.end_line()

    def end_line(self):
        if self.width:
            print()
            self.width = 0

    def write(self, text):
        if not self.terminal:
            print(text, flush=True)
            return
        print("\r" + text.ljust(self.width), end="", flush=True)
        self.width = len(text)


def through(items, count, what):
    """Yields `count` items; on a terminal a line says how many are done, until all are."""
    begun, terminal = time.perf_counter(), on_terminal()
    for done, item in enumerate(items, 1):
        yield item
        if terminal:
            left = clock((time.perf_counter() - begun) / done * (count - done))
            line = f"{what} {done:,} of {count:,}, {left} left" if done < count else ""
            print(f"\r{line:79}", end="" if line else "\r", flush=True)


def on_terminal():
    """Whether a line that is printed can be changed. There may be no stdout."""
    return getattr(sys.stdout, "isatty", bool)()


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
