"""Which networks learn to copy: to go on with a sequence that repeats itself.

    python experiments/copying.py run [NAME ...]     trains what copying.jsonl lacks
    python experiments/copying.py report             prints a table, draws copying.png

Every sequence of 65 tokens is 16 to 32 random ones out of 16, over and over. The first time round
costs log 16 = 2.77 nats a token at best. What follows is known to whoever finds the same few tokens
further back, but for the first token of it: 0.07 nats in the mean. Six blocks of width 64, 32
sequences a step, the rates that run.py takes by default, but without weight decay. A far head has a
gamma of 0.005, the other three have 0.4. About a minute each on two cores.
"""
import numpy as np
from records import HERE, add, command, header, read, row, start

import minitf
from minitf.cli.pictures import figure, save
from minitf.network import fast
from minitf.training import optimizer, train

RECORDS, TOKENS, EVERY = HERE / "copying.jsonl", 16, 25
SHAPE = dict(depth=6, batch=32, steps=400, token_collision_rate=1 / TOKENS, weight_decay=0.0)
FAR = dict(gamma=[0.4, 0.4, 0.4, 0.005])
PRELN, DEEP = dict(preset="preln", optimizer="muon"), dict(preset="isometric", depth=36)
RUNS = {                                               # name: (flags, line in the picture)
    "Pre-LN, softmax": (PRELN, "C7:"),
    "Pre-LN, espa": (PRELN | dict(attn="espa"), "C7--"),
    "Pre-LN, espa, one far head": (PRELN | FAR | dict(attn="espa"), "C7-"),
    "isometric": (dict(preset="isometric"), "k--"),
    "isometric, gamma 0.05": (dict(preset="isometric", gamma=0.05), None),
    "isometric, gamma 0.005": (dict(preset="isometric", gamma=0.005), None),
    "isometric, uspa": (dict(preset="isometric", attn="uspa"), None),
    "isometric, one far head": (dict(preset="isometric") | FAR, "k-"),
    "identity-skip, one far head": (dict(preset="identity-skip") | FAR, "C3-"),
    "normless, softmax": (dict(preset="normless", attn="softmax"), "C0:"),
    "normless, espa": (dict(preset="normless"), "C0--"),
    "normless, espa, one far head": (dict(preset="normless") | FAR, "C0-"),
    "isometric, 36 blocks": (DEEP, "C2--"),
    "isometric, 36 blocks, gamma 0.05": (DEEP | dict(gamma=0.05), None),
    "isometric, 36 blocks, one far head": (DEEP | FAR, "C2-"),
    "identity-skip, 36 blocks, one far head": (DEEP | FAR | dict(preset="identity-skip"), "C1-"),
}


def sequences(count, length, seed):
    """(count, length) of tokens, and which of them but the first repeat, (count, length - 1)."""
    random = np.random.default_rng(seed)
    periods = random.integers(length // 4, length // 2 + 1, count)
    tokens = [np.resize(random.integers(0, TOKENS, period), length) for period in periods]
    return np.array(tokens, np.int32), np.arange(1, length) >= periods[:, None]


def run(names):
    """The loss on what repeats, every EVERY steps, on sequences that were not trained on."""
    done = [each["name"] for each in read(RECORDS)]
    for name in (name for name in names or RUNS if name not in done):
        settings = minitf.resolve(backend=fast.hardware(), **SHAPE | RUNS[name][0])
        model, how, losses = settings.model, settings.training, []
        params, state, *fixed = start(settings, TOKENS)
        test, repeats = sequences(256, model.length + 1, 10**6)
        for step in range(how.steps):
            batch, _ = sequences(how.batch, model.length + 1, step)
            params, state, _ = train.train_step(
                params, state, *fixed, optimizer.learning_rate(how, step), batch, model,
                how.optimizer)
            if (step + 1) % EVERY == 0:
                values = np.asarray(train.evaluate_batch(params, fixed[0], test, model)[0])
                losses.append(float(values[repeats].mean()))
        add(RECORDS, name=name, flags=SHAPE | RUNS[name][0], loss=losses)
        print(f"{name}: {losses[-1]:.3f}", flush=True)


def report():
    steps = np.arange(EVERY, SHAPE["steps"] + 1, EVERY)
    picture, axes = figure((10, 4.5))
    print(header("", "after 100 steps", "200", "400"))
    for each in sorted(read(RECORDS), key=lambda each: list(RUNS).index(each["name"])):
        name, loss = each["name"], dict(zip(steps.tolist(), each["loss"]))
        print(row(name, *(f"{loss[step]:.2f}" for step in (100, 200, 400))))
        if RUNS[name][1]:
            axes.plot(loss.keys(), loss.values(), RUNS[name][1], label=name)
    axes.set(xlabel="step", ylabel="nats a token, where the sequence repeats", ylim=(0, 2.9))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(picture, HERE / "copying.png")


if __name__ == "__main__":
    command(__doc__, RUNS, run, report)
