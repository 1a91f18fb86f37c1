"""A run's corpus, and what one does with a trained model: draw text, measure a text's loss."""
import codecs
import json
import math
from dataclasses import asdict, replace
from itertools import chain, takewhile

import numpy as np

from ..config import resolve
from ..errors import OutOfReach, require
from ..network import decode, fast
from ..network.quantize import bits_of
from ..theory.kernels import network_activation
from ..training import checkpoint, data, sharding, train
from ..training.encoding import END, byte_lengths, known, pack_encoding
from .progress import through


def reachable(settings):
    """Settings with an activation's target that is out of reach replaced by the nearest one."""
    try:
        network_activation(settings.model)
    except OutOfReach as error:
        print(f"note: {error}; taking that")
        return settings.replace(**{error.target: error.best})
    return settings


def read_corpus(settings, encoding=None):
    """(the Corpus of a new run, its Settings with the collision rate of these tokens)."""
    corpus = data.load(settings.data, settings.model.length, encoding)
    rate = data.token_collision_rate(corpus.train_counts)
    return corpus, resolve(settings.preset, rate, fast.hardware(), **settings.flags)


def sample(folder, sampling, mesh=None):
    """Streams a prompt and what a run's newest checkpoint makes of it."""
    try:
        sampling.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt is not UTF-8 text") from None
    saved = checkpoint.newest(folder)[0]
    prompt = saved.encoding.encode(sampling.prompt, disallowed_special=())
    with sharding.use(mesh, saved.settings):
        show_sample(checkpoint.model_of(saved), prompt, sampling)


def show_sample(model, prompt, sampling):
    """Prints the prompt's tokens and those drawn after them, each as soon as it is there.

    The end-of-text token ends it, and begins it where the prompt is empty; it is not printed.
    """
    config, params, constants, encoding = model
    end = encoding._special_tokens.get(END)
    drawn = decode.sample(params, constants, prompt or [end] * (end is not None), sampling.tokens,
                          config, sampling.seed, sampling.temperature, sampling.top_k,
                          known(encoding))
    shown = chain((token for token in prompt if token != end), takewhile(lambda t: t != end, drawn))
    pieces = map(encoding.decode_single_token_bytes, shown)
    for text in codecs.iterdecode(pieces, "utf-8", "replace"):    # a character once it is whole
        print(text, end="", flush=True)
    print(flush=True)


def evaluate(folder, names, mesh=None, quantize=None):
    """Prints the loss on a text, each token but the first predicted once, or of its masked tokens.

    names: as --data; None: the run's own validation text. quantize: as `bits_of`; a second line
    then says what the loss comes to with so few bits, and the kurtosis of the activations. All is
    then float32.
    """
    precisions = [None, bits_of(quantize)] if quantize is not None else [None]
    saved = checkpoint.newest(folder)[0]
    config, encoding, size = saved.settings.model, saved.encoding, saved.settings.training.at_once
    config = replace(config, dtype="float32") if quantize else config
    tokens = data.read_tokens(names, encoding, whole=True)[0] if names is not None else \
        data.load(saved.settings.data, config.length, encoding).validation
    if config.objective == "mlm":                                 # of whole windows
        require(len(tokens) > config.length, f"the text must have more than {config.length} tokens")
        tokens = tokens[:(len(tokens) - 1) // config.length * config.length + 1]
    nats, count = np.zeros(len(precisions)), len(tokens) - 1
    total = byte_lengths(encoding) @ data.count(tokens[1:], encoding.n_vocab)
    with sharding.use(mesh, saved.settings):
        _, params, constants, _ = checkpoint.model_of(saved)
        parts = data.every_window(tokens, config.length, size)
        for windows, counted in through(parts, -(-count // (config.length * size)), "batch"):
            losses = (train.evaluate_batch(params, constants, windows, config, bits)[0]
                      for bits in precisions)
            nats += [np.asarray(each, float)[counted].sum() for each in losses]
        if quantize:
            long_enough = np.resize(tokens, max(count, config.length) + 1)
            windows = data.spread_windows(long_enough, config.length, 4 * size)
            kurtosis = train.evaluate(params, constants, windows, config, size)[1]["kurtosis"]
    loss, *rounded = nats / count
    said = f"{loss:.4f} nats a masked token" if config.objective == "mlm" else \
        f"{loss:.4f} nats a token, {nats[0] / total / math.log(2):.4f} bits a byte"
    print(f"{count:,} tokens, {total:,.0f} bytes: {said}, "
          f"perplexity {math.exp(min(loss, 700)):.4g}")
    if quantize:
        print(f"{quantize}: {rounded[0]:.4f} nats, {rounded[0] - loss:+.4f}; kurtosis of "
              f"activations, 1 or more: mean {np.mean(kurtosis):.3g}, largest "
              f"{max(kurtosis):.3g}, behind block {np.argmax(kurtosis) + 1}")


def export(folder, path):
    """Writes the weights of a run's newest checkpoint as .safetensors.

    Names are those of the parameters, as blocks.value: `init` has their shapes; of the constants,
    as constants.slope: `attention_constants` says what B they make; and of the encoding's arrays,
    as encoding.ranks. The metadata, JSON, are the ModelConfig, the activation as `Activation` has
    it, and the encoding's name, pattern and special tokens.
    """
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ValueError("--export needs safetensors: pip install safetensors") from None
    require(path.suffix == ".safetensors", f"{path} must end in .safetensors")
    require(not path.exists(), f"{path} exists already")
    config, params, constants, encoding = checkpoint.model_of(checkpoint.newest(folder)[0])
    pairs, names = pack_encoding(encoding)
    tree = {**params, "constants": constants, "encoding": pairs}
    arrays = {name.replace("/", "."): np.ascontiguousarray(leaf)
              for name, leaf in train.named_leaves(tree)}
    metadata = {"config": asdict(config), "activation": asdict(network_activation(config)),
                "encoding": names}
    content = save(arrays, {name: json.dumps(value) for name, value in metadata.items()})
    checkpoint.write(path, lambda file: file.write(content))
    print(f"{path}: {len(arrays)} arrays, {len(content):,} bytes")
