"""Activations whose kernel maps are chosen: TAT and DKS. float64 NumPy, except where an `Activation` is called.

For phi with Gaussian input, Q(q) = E phi(sqrt(q) z)^2 and C(c) = E phi(z1) phi(z2) / Q(1) with corr(z1, z2) = c: an
MLP layer with orthogonal weights multiplies a token's mean square by Q(1) and maps the cosine of two tokens by C.
DKS (Martens et al. 2021, arXiv 2110.01765) and TAT (Zhang et al. 2022, arXiv 2203.08120) bend phi so that C_f, the C
of the whole network, keeps its shape. A block with a skip maps c to alpha^2 c + beta^2 C(c); attention is left out.
"""
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq, root
from scipy.special import erf, expit, ndtr, roots_hermitenorm

from .errors import OutOfReach, require

SMOOTH = {  # name: (in NumPy, in JAX)
    "gelu": (lambda x: x * ndtr(x), lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))),
    "silu": (lambda x: x * expit(x), jax.nn.silu),
    "tanh": (np.tanh, jnp.tanh),
    "erf": (erf, jax.scipy.special.erf),
    "softplus": (lambda x: np.logaddexp(x, 0), jax.nn.softplus),
    "arctan": (np.arctan, jnp.arctan),
    "asinh": (np.arcsinh, jnp.arcsinh),
}
SLOPES = {"leaky_relu": 0.01, "relu": 0.0}               # the kinked ones, with their slope where it is not chosen
NAMES = (*SLOPES, *SMOOTH)
TRANSFORMS = ("tat", "dks", "none")
LOOK_LINEAR = (*SLOPES, "gelu", "silu", "softplus")      # phi(x) - phi(-x) is a multiple of x


@dataclass(frozen=True)
class Activation:
    """phi^(x) = output_scale (phi(input_scale x + input_shift) + output_shift); c, a, b, d in both papers."""
    name: str
    slope: float = 1.0                                   # s, of the leaky ReLUs
    input_scale: float = 1.0
    input_shift: float = 0.0
    output_scale: float = 1.0
    output_shift: float = 0.0

    def __post_init__(self):
        for name in ("slope", "input_scale", "input_shift", "output_scale", "output_shift"):
            object.__setattr__(self, name, float(getattr(self, name)))      # NumPy's numbers would turn bfloat16 into float32

    def __call__(self, x):
        """In the network: any shape, elementwise, in x's own dtype."""
        if self.name in SLOPES:                          # scaled first: max(c x, 0) can be part of the next product
            y = leaky(self.output_scale * x, self.slope)
            return y + self.output_scale * self.output_shift if self.output_shift else y
        smooth = jax.checkpoint(SMOOTH[self.name][1])        # the backward pass keeps its input, not its many steps
        return self.output_scale * (smooth(self.input_scale * x + self.input_shift) + self.output_shift)

    def correlation_map(self, c):
        """C(c) for -1 <= c <= 1, any shape: a power series with coefficients >= 0 (Hermite), or its closed form."""
        if self.name in SLOPES:
            return leaky_correlation(c, self.slope, self.output_shift)
        square = hermite(self)**2 / np.sum(hermite(self)**2)
        last = np.flatnonzero(square > 1e-17)[-1]
        return np.polynomial.polynomial.polyval(c, square[:last + 1])

    def mean_square(self):
        """Q(1)."""
        if self.name in SLOPES:
            return self.output_scale**2 * leaky_moment(self.slope, self.output_shift)
        return np.sum(hermite(self)**2)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def leaky(x, slope):
    """max(x, slope x) for 0 <= slope <= 1. Its own gradient: the sign is known from the output, nothing else is kept."""
    return jnp.maximum(x, slope * x if slope else 0)


leaky.defvjp(lambda x, slope: (leaky(x, slope),) * 2,
             lambda slope, y, gradient: (jnp.where(y > 0, gradient, slope * gradient),))


def odd_slope(activation):
    """The m of phi^(x) - phi^(-x) = m x, for LOOK_LINEAR without an input shift."""
    return activation.output_scale * (1 + activation.slope if activation.name in SLOPES else activation.input_scale)


def solve(name, transform, depth, alpha=0.0, beta=1.0, eta=0.9, zeta=1.5, tau=0.3):
    """The Activation for a network of `depth` blocks with these skip weights.

    eta: C_f(0) of a leaky ReLU's TAT. zeta: the network slope of DKS. tau: the network curvature of a smooth TAT.
    "none" only scales, so that Q(1) = 1: for ReLU the sqrt(2) of He initialisation.
    ValueError for arguments out of range; OutOfReach, with the best attainable value, for a target out of reach.
    """
    require(name in NAMES, f"act must be one of {', '.join(NAMES)}, not {name!r}")
    require(transform in TRANSFORMS, f"transform must be one of {', '.join(TRANSFORMS)}, not {transform!r}")
    if transform == "none":
        plain = Activation(name, slope=SLOPES.get(name, 1.0))
        return replace(plain, output_scale=plain.mean_square()**-0.5)
    if transform == "dks":
        require(zeta > 1, f"zeta must be above 1, not {zeta:g}")
        return reach("zeta", zeta, lambda value: dks(name, local_slope(value, depth, alpha, beta)))
    if name in SLOPES:
        require(0 < eta < 1, f"eta must be above 0 and below 1, not {eta:g}")
        return tat_leaky(eta, depth, alpha, beta)
    require(tau > 0, f"tau must be above 0, not {tau:g}")
    return reach("tau", tau, lambda value: tat_smooth(name, value / max(depth * beta**2, 1)))


# --- Leaky ReLUs: closed forms -----------------------------------------------------------------------------------------

def leaky_correlation(c, slope, shift=0.0):
    """C(c) of LReLU_s + d; without d it is c + (1-s)^2 / (pi (1+s^2)) (sqrt(1-c^2) - c arccos c), TAT's eq. for it."""
    c = np.clip(c, -1.0, 1.0)
    bend = (1 - slope)**2 / (np.pi * (1 + slope**2))
    plain = c + bend * (np.sqrt((1 - c) * (1 + c)) - c * np.arccos(c))
    whole = leaky_moment(slope, shift)
    return 1 + (plain - 1) * leaky_moment(slope, 0.0) / whole


def leaky_moment(slope, shift):
    """E (LReLU_s(z) + d)^2."""
    return (1 + slope**2) / 2 + 2 * shift * (1 - slope) / np.sqrt(2 * np.pi) + shift**2


def network_correlation(correlation_map, c, depth, alpha, beta):
    """C_f(c): `depth` blocks, each c <- alpha^2 c + beta^2 C(c)."""
    for _ in range(depth):
        c = alpha**2 * c + beta**2 * correlation_map(c)
    return c


def tat_leaky(eta, depth, alpha, beta):
    """TAT for leaky ReLUs: the slope in [0, 1] whose C_f(0), the largest over sub-networks, is eta."""
    def attained(slope):
        correlation_map = partial(leaky_correlation, slope=slope)
        return max(network_correlation(correlation_map, 0.0, depth, alpha, beta), correlation_map(0.0))

    if attained(0.0) < eta - 1e-12:
        raise OutOfReach(f"eta = {eta:g} is out of reach: the most that depth {depth} with alpha = {alpha:g} "
                         f"attains is {attained(0.0):.6g}", "eta", attained(0.0))
    slope = brentq(lambda s: attained(s) - eta, 0.0, 1.0, xtol=1e-14) if attained(0.0) > eta else 0.0
    return Activation("leaky_relu", slope, output_scale=float(np.sqrt(2 / (1 + slope**2))))


# --- DKS, and TAT for smooth activations ---------------------------------------------------------------------------------

def local_slope(zeta, depth, alpha, beta):
    """psi = C'(1) of one layer, where the network's slope max((alpha^2 + beta^2 psi)^L, psi) is zeta."""
    return min(zeta, 1 + (zeta**(1 / depth) - alpha**2 - beta**2) / beta**2)


def dks(name, psi):
    """Q(1) = 1, Q'(1) = 1, C(0) = 0, C'(1) = psi; None where no activation of this name does it."""
    if name in SMOOTH:
        return smallest_shift(name, dks_conditions, psi)
    k = np.pi * (1 - 1 / psi)
    if k > 1:
        return None
    slope = (1 - np.sqrt(1 - (1 - k)**2)) / (1 - k) if k < 1 else 0.0
    shift = -(1 - slope) / np.sqrt(2 * np.pi)
    return Activation("leaky_relu", slope, output_scale=leaky_moment(slope, shift)**-0.5, output_shift=shift)


def tat_smooth(name, curvature):
    """Q(1) = 1, Q'(1) = 1, C'(1) = 1, C''(1) = curvature (that of one layer; curvatures add along the network)."""
    found = [smallest_shift(name, partial(tat_conditions, sign=sign), curvature) for sign in (1, -1)]
    return min(filter(None, found), key=lambda activation: abs(activation.input_shift), default=None)


NODES, WEIGHTS = roots_hermitenorm(400)
DEGREES = np.arange(240)


@lru_cache
def hermite_table():
    """he_k(z) w(z): shape (240, 400). The normalised polynomials, by their three-term recursion, times the weights."""
    rows = [np.ones_like(NODES), NODES]
    for k in DEGREES[1:-1]:
        rows.append((NODES * rows[k] - np.sqrt(k) * rows[k - 1]) / np.sqrt(k + 1))
    return np.array(rows) * (WEIGHTS / WEIGHTS.sum())


@lru_cache
def hermite(activation):
    """The coefficients f_k = E phi^(z) he_k(z). Then Q(1) = sum f_k^2 and C(c) = sum f_k^2 c^k / Q(1)."""
    base = SMOOTH[activation.name][0](activation.input_scale * NODES + activation.input_shift)
    return activation.output_scale * (hermite_table() @ (base + activation.output_shift))


def moments(f):
    """From coefficients (K, ...): variance, C' = E phi'^2, C'' = E phi''^2, and Q' in two parts: without and with f_0."""
    k = DEGREES.reshape(-1, *[1] * (f.ndim - 1))
    variance, slope = np.sum(f[1:]**2, 0), np.sum(k * f**2, 0)
    curvature = np.sum(k * (k - 1) * f**2, 0)
    q_slope = slope + np.sum(np.sqrt(k[3:] * (k[3:] - 1)) * f[3:] * f[1:-2], 0)          # z he_k = he_(k+1), he_(k-1)
    return variance, slope, curvature, q_slope, np.sqrt(2) * f[2]


def dks_conditions(f, psi):
    """(C'(1) - psi, Q'(1) - 1, c, mean): zero, zero, the output scale and the mean that phi^ / c has."""
    variance, slope, _, q_slope, _ = moments(f)
    return slope / variance - psi, q_slope / variance - 1, variance**-0.5, 0 * variance


def tat_conditions(f, curvature, sign):
    """(C''(1) - curvature, Q'(1) - 1, c, mean): C'(1) = 1 gives c, Q(1) = 1 gives the mean up to its sign."""
    variance, slope, second, q_slope, q_mean = moments(f)
    mean = sign * np.sqrt(np.maximum(slope - variance, 0))
    return second / slope - curvature, (q_slope + q_mean * mean) / slope - 1, slope**-0.5, mean


SCALES, SHIFTS = np.geomspace(1e-3, 8, 60), np.linspace(-4, 4, 81)


@lru_cache
def hermite_grid(name):
    """Coefficients of phi(a x + b) for all a in SCALES, b in SHIFTS: shape (240, 60, 81)."""
    x = SCALES[:, None] * NODES[:, None, None] + SHIFTS
    return np.tensordot(hermite_table(), SMOOTH[name][0](x), 1)


def smallest_shift(name, conditions, target):
    """The Activation that meets both conditions with the smallest |b|, or None.

    On the grid: for each b the first a at which the first condition changes sign; along that curve, the places where
    the second one does. From there a quasi-Newton search. Roots with a c >= 2 have an unstable Q map: refused.
    """
    first, second, _, _ = conditions(hermite_grid(name), target)
    crosses = (first[:-1] < 0) & (first[1:] >= 0)
    at = crosses.argmax(0)
    columns = np.arange(len(SHIFTS))
    share = -first[at, columns] / (first[at + 1, columns] - first[at, columns])
    along = np.where(crosses.any(0), second[at, columns] * (1 - share) + second[at + 1, columns] * share, np.nan)

    def residual(point):
        return conditions(hermite(Activation(name, 1.0, np.exp(point[0]), point[1])), target)[:2]

    found = []
    for i in np.flatnonzero(along[:-1] * along[1:] <= 0):
        start = np.log(SCALES[at[i]]), (SHIFTS[i] * along[i + 1] - SHIFTS[i + 1] * along[i]) / (along[i + 1] - along[i])
        solution = root(residual, start, tol=1e-13)
        a, b = np.exp(solution.x[0]), solution.x[1]
        if np.max(np.abs(residual(solution.x))) > 1e-9:
            continue
        f = hermite(Activation(name, 1.0, a, b))
        _, _, scale, mean = conditions(f, target)
        if a * scale < 2:
            found.append(Activation(name, 1.0, float(a), float(b), float(scale), float(mean - f[0])))
    return min(found, key=lambda activation: abs(activation.input_shift), default=None)


def reach(name, target, attempt):
    """attempt(target), or OutOfReach with the largest target that can be attempted with success, by bisection."""
    activation = attempt(target)
    if activation is not None:
        return activation
    low, high = {"zeta": 1.0, "tau": 0.0}[name], target
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if attempt(middle) else (low, middle)
    raise OutOfReach(f"{name} = {target:g} is out of reach with this activation and depth: the most is {low:.6g}",
                     name, low)
