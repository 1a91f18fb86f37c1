"""Simulated quantisation: the numbers of few bits, computed with in the usual arithmetic.

As is customary (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438): symmetric and rounded to the
nearest, weights with a scale for each output, activations with one for each token. It concerns
the products of the blocks; embeddings, attention itself, norms and the head stay as they are.
"""
import re
from functools import partial

import jax.numpy as jnp

from ..errors import require


def bits_of(name):
    """"w4a8" -> (4, 8), the bits of weights and of activations; ValueError for anything else."""
    found = re.fullmatch(r"w([0-9]{1,2})a([0-9]{1,2})", name)
    bits = tuple(map(int, found.groups())) if found else ()
    require(bits and min(bits) >= 2 and max(bits) <= 16,
            f"quantize must be w, 2 to 16 bits, a, 2 to 16 bits, as w8a8 or w4a8, not {name}")
    return bits


def few_bits(ops, bits):
    """Operations whose products are of weights and activations of so many bits; None: as before.

    For float32: bfloat16 has no room for the levels of 8 bits and a step.
    """
    return ops._replace(project=partial(project, bits=bits)) if bits else ops


def project(x, w, bits):
    """x (N, in) and w (in, out) rounded -> (N, out)."""
    return rounded(x, bits[1], -1) @ rounded(w, bits[0], 0)


def rounded(x, bits, axis):
    """x on 2^bits - 1 levels, as many of either sign, up to the largest along the axis."""
    levels = 2**(bits - 1) - 1
    exact = x.astype(jnp.float32)
    step = jnp.maximum(jnp.abs(exact).max(axis, keepdims=True), 1e-30) / levels
    return (step * jnp.round(exact / step)).astype(x.dtype)
