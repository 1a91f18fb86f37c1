"""minitf: transformers that train without shortcuts, as pure functions in JAX."""
from .checkpoint import load_model as load
from .config import Config
from .model import forward, init
from .theory import constants, initial_kernel, predict

__version__ = "0.1.0"
__all__ = ["Config", "constants", "forward", "init", "initial_kernel", "load", "predict"]
