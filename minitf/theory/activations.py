"""Activations whose kernel maps are chosen: TAT and DKS. float64 NumPy.

For phi with Gaussian input, Q(q) = E phi(sqrt(q) z)^2 and C(c) = E phi(z1) phi(z2) / Q(1) with
corr(z1, z2) = c: an MLP layer with orthogonal weights multiplies a token's mean square by Q(1) and
maps the cosine of two tokens by C. DKS (Martens et al. 2021, arXiv 2110.01765) and TAT (Zhang et
al. 2022, arXiv 2203.08120) bend phi so that C_f, the C of the whole network, keeps its shape. With
skips a block maps c to alpha^2 c + beta^2 C(c). Attention is left out.
"""
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import scipy                       # whose parts are imported where they are first used

from ..errors import OutOfReach, require, require_one_of

# Each is written once, for NumPy and JAX: x, NumPy or jax.numpy, and its special functions.
SMOOTH = {
    "gelu": lambda x, np, special: x * (0.5 + 0.5 * special.erf(x * 0.5**0.5)),
    "silu": lambda x, np, special: x * special.expit(x),
    "tanh": lambda x, np, special: np.tanh(x),
    "erf": lambda x, np, special: special.erf(x),
    "softplus": lambda x, np, special: np.logaddexp(x, 0.0),
    "arctan": lambda x, np, special: np.arctan(x),
    "asinh": lambda x, np, special: np.arcsinh(x),
}
SLOPES = {"leaky_relu": 0.01, "relu": 0.0}             # of the leaky ReLUs, where it is not chosen
NAMES = (*SLOPES, *SMOOTH)
TRANSFORMS = ("tat", "dks", "none")
LOOK_LINEAR = (*SLOPES, "gelu", "silu", "softplus")    # phi(x) - phi(-x) is a multiple of x


@dataclass(frozen=True)
class Activation:
    """phi^(x) = output_scale (phi(input_scale x + input_shift) + output_shift).

    The papers' c, a, b, d. `slope` is that of a leaky ReLU for x < 0.
    """
    name: str
    slope: float = 1.0
    input_scale: float = 1.0
    input_shift: float = 0.0
    output_scale: float = 1.0
    output_shift: float = 0.0

    def __post_init__(self):                           # NumPy's floats turn bfloat16 into float32
        for name in list(vars(self))[1:]:
            object.__setattr__(self, name, float(getattr(self, name)))

    def __call__(self, x, np=np, special=scipy.special):
        """Elementwise, in x's dtype. For JAX: np = jax.numpy, special = jax.scipy.special."""
        if self.name in SLOPES:                        # scaled first, in one pass with the product
            y = self.output_scale * x
            return np.where(y > 0, y, self.slope * y) + self.output_scale * self.output_shift
        phi = SMOOTH[self.name](self.input_scale * x + self.input_shift, np, special)
        return self.output_scale * (phi + self.output_shift)

    def correlation_map(self, c):
        """C(c) for -1 <= c <= 1, any shape: its closed form, or a Hermite series."""
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

    def odd_slope(self):
        """m of phi^(x) - phi^(-x) = m x; ValueError for those that have none."""
        linear = self.name in SLOPES or self.name in LOOK_LINEAR and self.input_shift == 0
        require(linear, f"looks_linear needs act {', '.join(SLOPES)}, or with transform none "
                f"{', '.join(LOOK_LINEAR)}, not this {self.name}; mlp-init orthogonal takes all")
        return self.output_scale * (1 + self.slope if self.name in SLOPES else self.input_scale)


def plain(name):
    """The Activation as it is, with nothing chosen; ValueError for a name that is not of NAMES."""
    require_one_of(NAMES, name, "act")
    return Activation(name, slope=SLOPES.get(name, 1.0))


@lru_cache                                             # a search takes a tenth of a second
def solve(name, transform, depth, alpha=0.0, beta=1.0, eta=0.9, zeta=1.5, tau=0.3):
    """The Activation for a network of `depth` blocks with skips alpha and branches beta.

    name, transform: of NAMES and TRANSFORMS; "none" only makes Q(1) = 1. eta: C_f(0), for TAT of a
    leaky ReLU, in (0, 1). zeta: the network's slope C_f'(1), for DKS, above 1. tau: its curvature
    C_f''(1), for TAT of a smooth activation, above 0. ValueError for arguments out of range;
    OutOfReach, with the best value attained, for a target that this activation cannot meet.
    """
    require_one_of(TRANSFORMS, transform, "transform")
    phi = plain(name)
    if transform == "none":
        return replace(phi, output_scale=phi.mean_square()**-0.5)
    if transform == "dks":
        require(zeta > 1, f"zeta must be above 1, not {zeta:g}")
        return attain("zeta", zeta, 1.0, lambda z: dks(name, local_slope(z, depth, alpha, beta)))
    if name in SLOPES:
        require(0 < eta < 1, f"eta must be above 0 and below 1, not {eta:g}")
        return tat_leaky(eta, depth, alpha, beta)
    require(tau > 0, f"tau must be above 0, not {tau}")
    return attain("tau", tau, 0.0, lambda t: tat_smooth(name, t / max(depth * beta**2, 1)))


# --- Leaky ReLUs: closed forms ----------------------------------------------------------

def leaky_correlation(c, slope, shift=0.0):
    """C(c) of LReLU_s + shift; without it c + bend (sqrt(1 - c^2) - c arccos c), TAT's equation."""
    c = np.clip(c, -1.0, 1.0)
    bend = (1 - slope)**2 / (np.pi * (1 + slope**2))
    unshifted = c + bend * (np.sqrt((1 - c) * (1 + c)) - c * np.arccos(c))
    return 1 + (unshifted - 1) * leaky_moment(slope, 0.0) / leaky_moment(slope, shift)


def leaky_moment(slope, shift):
    """E (LReLU_s(z) + shift)^2."""
    return (1 + slope**2) / 2 + 2 * shift * (1 - slope) / np.sqrt(2 * np.pi) + shift**2


def network_correlation(correlation_map, c, depth, alpha, beta):
    """C_f(c): `depth` blocks, each c <- alpha^2 c + beta^2 C(c)."""
    for _ in range(depth):
        c = alpha**2 * c + beta**2 * correlation_map(c)
    return c


def tat_leaky(eta, depth, alpha, beta):
    """TAT of a leaky ReLU: the slope in [0, 1] whose C_f(0), the most over sub-networks, is eta."""
    def attained(slope):
        correlation_map = partial(leaky_correlation, slope=slope)
        whole = network_correlation(correlation_map, 0.0, depth, alpha, beta)
        return max(whole, correlation_map(0.0))

    most = attained(0.0)
    if most < eta - 1e-12:
        raise OutOfReach(f"eta = {eta:g} is out of reach: the most that depth {depth} with alpha = "
                         f"{alpha:g} attains is {most:.6g}", "eta", most)
    slope = 0.0
    if most > eta:
        slope = scipy.optimize.brentq(lambda s: attained(s) - eta, 0.0, 1.0, xtol=1e-14)
    return Activation("leaky_relu", slope, output_scale=np.sqrt(2 / (1 + slope**2)))


# --- DKS, and TAT of smooth activations -------------------------------------------------

def local_slope(zeta, depth, alpha, beta):
    """psi = C'(1) of a layer: max((alpha^2 + beta^2 psi)^L, psi), the network's slope, is zeta."""
    return min(zeta, 1 + (zeta**(1 / depth) - alpha**2 - beta**2) / beta**2)


def dks(name, psi):
    """Q(1) = 1, Q'(1) = 1, C(0) = 0, C'(1) = psi; None where no activation of this name does it."""
    if name in SMOOTH:
        return meet(name, dks_conditions, psi)
    k = np.pi * (1 - 1 / psi)
    if k > 1:
        return None
    slope = (1 - np.sqrt(1 - (1 - k)**2)) / (1 - k) if k < 1 else 0.0
    shift = -(1 - slope) / np.sqrt(2 * np.pi)
    return Activation("leaky_relu", slope, output_scale=leaky_moment(slope, shift)**-0.5,
                      output_shift=shift)


def tat_smooth(name, curvature):
    """Q(1) = 1, Q'(1) = 1, C'(1) = 1, C''(1) = curvature, of one layer: they add along depth."""
    attempt = lambda sign: meet(name, partial(tat_conditions, sign=sign), curvature)
    return smallest_shift(map(attempt, (1, -1)))


def attain(name, target, low, attempt):
    """attempt(target), or OutOfReach with the largest target that succeeds, by bisection."""
    activation = attempt(target)
    if activation is not None:
        return activation
    high = target
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if attempt(middle) else (low, middle)
    raise OutOfReach(f"{name} = {target:g} is out of reach with this activation and depth: "
                     f"the most is {low:.6g}", name, low)


# --- The solver of both: Hermite coefficients, a grid, a quasi-Newton search ------------

NODES, WEIGHTS = scipy.special.roots_hermitenorm(400)
DEGREES = np.arange(240)
SCALES, SHIFTS = np.geomspace(1e-3, 8, 60), np.linspace(-4, 4, 81)


@lru_cache
def hermite_table():
    """he_k(z) w(z), (240, 400): normalised polynomials, by recursion, times the weights."""
    rows = [np.ones_like(NODES), NODES]
    for k in DEGREES[1:-1]:
        rows.append((NODES * rows[k] - np.sqrt(k) * rows[k - 1]) / np.sqrt(k + 1))
    return np.array(rows) * (WEIGHTS / WEIGHTS.sum())


@lru_cache
def hermite(activation):
    """The coefficients f_k = E phi^(z) he_k(z): Q(1) = sum f_k^2, C(c) = sum f_k^2 c^k / Q(1)."""
    return hermite_table() @ activation(NODES)


@lru_cache
def hermite_grid(name):
    """Coefficients of phi(a x + b) for all a in SCALES, b in SHIFTS: shape (240, 60, 81)."""
    x = SCALES[:, None] * NODES[:, None, None] + SHIFTS
    return np.tensordot(hermite_table(), SMOOTH[name](x, np, scipy.special), 1)


def moments(f):
    """From coefficients (K, ...): variance, E phi'^2, E phi''^2; Q' without f_0, and its factor."""
    k = DEGREES.reshape(-1, *[1] * (f.ndim - 1))
    variance, slope = np.sum(f[1:]**2, 0), np.sum(k * f**2, 0)
    curvature = np.sum(k * (k - 1) * f**2, 0)
    q_slope = slope + np.sum(np.sqrt(k[3:] * (k[3:] - 1)) * f[3:] * f[1:-2], 0)
    return variance, slope, curvature, q_slope, np.sqrt(2) * f[2]


def dks_conditions(f, psi):
    """(C'(1) - psi, Q'(1) - 1, c, mean): two zeros, the output scale, the mean of phi^ / c."""
    variance, slope, _, q_slope, _ = moments(f)
    return slope / variance - psi, q_slope / variance - 1, variance**-0.5, 0 * variance


def tat_conditions(f, curvature, sign):
    """(C''(1) - curvature, Q'(1) - 1, c, mean): C'(1) = 1 gives c, Q(1) = 1 the mean's size."""
    variance, slope, second, q_slope, q_mean = moments(f)
    mean = sign * np.sqrt(np.maximum(slope - variance, 0))
    return second / slope - curvature, (q_slope + q_mean * mean) / slope - 1, slope**-0.5, mean


def smallest_shift(found):
    """The Activation with the smallest |b|, or None. Of two mirror images, of an odd phi, b > 0.

    Their |b| are equal but for rounding, which must not decide: machines round differently.
    """
    order = lambda phi: (round(abs(phi.input_shift), 9), -phi.input_shift)
    return min(filter(None, found), key=order, default=None)


def meet(name, conditions, target):
    """The Activation that meets both conditions with the smallest |b|, or None.

    On the grid: for each b the first a where the first condition changes sign; along that curve
    the places where the second does; from there a quasi-Newton search. Roots with a c >= 2, whose
    Q map is unstable, are refused (by the official package for TAT alone).
    """
    first, second, _, _ = conditions(hermite_grid(name), target)
    crosses = (first[:-1] < 0) & (first[1:] >= 0)
    at, columns = crosses.argmax(0), np.arange(len(SHIFTS))
    share = -first[at, columns] / (first[at + 1, columns] - first[at, columns])
    between = second[at, columns] * (1 - share) + second[at + 1, columns] * share
    along = np.where(crosses.any(0), between, np.nan)

    def residual(point):
        f = hermite(Activation(name, 1.0, np.exp(point[0]), point[1]))
        return conditions(f, target)[:2]

    found = []
    for i in np.flatnonzero(along[:-1] * along[1:] <= 0):
        b = (SHIFTS[i] * along[i + 1] - SHIFTS[i + 1] * along[i]) / (along[i + 1] - along[i])
        solution = scipy.optimize.root(residual, (np.log(SCALES[at[i]]), b), tol=1e-13)
        a, b = np.exp(solution.x[0]), solution.x[1]
        if np.max(np.abs(residual(solution.x))) > 1e-9:
            continue
        f = hermite(Activation(name, 1.0, a, b))
        _, _, scale, mean = conditions(f, target)
        if a * scale < 2:
            found.append(Activation(name, 1.0, a, b, scale, mean - f[0]))
    return smallest_shift(found)
