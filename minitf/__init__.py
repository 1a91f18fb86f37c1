"""minitf: transformers that train without shortcuts, as pure functions in JAX.

    resolve(preset, **flags)                 every setting of a run
    attention_constants(config)              D and B, and what B is made of
    input_kernel(config, length)             Sigma_0, expected
    predict_kernels(config, kernel)          D's scale and Sigma of every block
    init(key, config, vocabulary)            parameters, a nested dict
    forward(params, constants, tokens, config)   logits
    load(path)                               (config, params, constants, encoding) of a run

Names are loaded when they are first used: the theory needs NumPy and SciPy alone.
"""
from importlib import import_module

__version__ = "0.2.0"
_HOME = {
    "resolve": "config",
    "attention_constants": "theory.kernels",
    "input_kernel": "theory.kernels",
    "predict_kernels": "theory.kernels",
    "forward": "network.model",
    "init": "network.init",
    "load": "training.checkpoint",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'minitf' has no attribute {name!r}")
    return getattr(import_module("minitf." + _HOME[name]), name)
