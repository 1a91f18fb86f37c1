"""Signal-preserving attention: which matrices, and what they do to kernels.

Theory only: float64 NumPy, no network. He et al., ICLR 2023 (arXiv 2302.10322), sections 3 and 4.

A token kernel is Sigma = X X^T / d for tokens X of shape (T, d). With orthogonal value and output weights and one
attention matrix A for every head, an attention layer maps Sigma to A Sigma A^T (if heads differ: in the mean over
weights to the mean of their A Sigma A^T). So to move from the kernel Sigma_in
to Sigma_out, both prescribed, we take their Cholesky factors L and set A = L_out L_in^-1: lower triangular, because
the model is causal. A softmax can make it because A >= 0: A = D P, with D the row sums of A and P row-stochastic, and
P = softmax(B) for B = log P. B and D are constants of the network.

Attention matrices are handled by their logarithm (zero is -inf): their entries fall below what a float64 can hold.
"""
from functools import partial

import numpy as np
from scipy import signal

from .errors import require

EXACT_LENGTH = 1024                       # positions over which a network's recursion, O(T^2) or more a layer, is run: see `propagate`

# --- Kernels, and their schedules over depth -----------------------------------------------------------------------

def exponential_kernel(gamma, length):
    """Sigma_ij = exp(-gamma |i - j|), shape (T, T). gamma = inf is the identity."""
    require(gamma > 0, f"gamma must be above 0, not {gamma}")
    position = np.arange(length)
    lag = np.abs(position[:, None] - position[None, :])
    return np.where(lag == 0, 1.0, np.exp(-gamma * np.maximum(lag, 1)))


def uniform_kernel(rho, length):
    """Sigma = (1 - rho) I + rho 1 1^T, shape (T, T), for 0 <= rho < 1."""
    require(0 <= rho < 1, f"rho must be at least 0 and below 1, not {rho}")
    return (1 - rho) * np.eye(length) + rho


def exponential_schedule(gamma_final, depth):
    """gamma_0 = inf, ..., gamma_L = gamma_final, shape (L + 1,), strictly decreasing.

    With s = sqrt(1 - exp(-2 gamma)), the innovation of the AR(1) process, s_l = s_L^(l/L): the ratio
    lambda = s_l / s_(l-1), which is the diagonal of A_l, is then the same in every layer.
    """
    require(np.isfinite(gamma_final) and gamma_final > 0, f"gamma must be above 0 and finite, not {gamma_final}")
    log_s = 0.5 * log1mexp(2 * gamma_final) * np.arange(1, depth + 1) / depth
    with np.errstate(divide="ignore"):                 # s = 1 to rounding, gamma = inf: distinct refuses it
        gammas = np.concatenate([[np.inf], -0.5 * log1mexp(-2 * log_s)])
    gammas[-1] = gamma_final                           # not a rounding error beside it
    distinct(gammas[1:], "gamma", gamma_final)
    return gammas


def uniform_schedule(rho_final, depth, rho_first=0.0):
    """rho_0 = rho_first, ..., rho_L = rho_final, shape (L + 1,), strictly increasing; 1 - rho falls geometrically."""
    require(0 <= rho_first < rho_final < 1, f"rho must be above {rho_first:g} and below 1, not {rho_final}")
    share = np.arange(depth + 1) / depth
    rhos = 1 - (1 - rho_first) ** (1 - share) * (1 - rho_final) ** share
    rhos[0], rhos[-1] = rho_first, rho_final
    distinct(rhos, "rho", rho_final)
    return rhos


def distinct(values, name, final):
    """ValueError where rounding makes two kernels of a schedule one: A = I could never learn to attend."""
    require(np.all(values[1:] != values[:-1]), f"{name} = {final:g} is too extreme: two layers' kernels would be equal")


def log1mexp(x):
    """log(1 - exp(-x)) for x > 0, to full precision at both ends."""
    return np.where(x < 0.7, np.log(-np.expm1(-np.minimum(x, 0.7))), np.log1p(-np.exp(-np.maximum(x, 0.7))))


# --- Attention matrices between two kernels ------------------------------------------------------------------------

def exponential_log_attention(gamma_in, gamma_out, length):
    """log A for A = L_out L_in^-1 between exponential kernels, shape (T, T); needs gamma_out < gamma_in.

    With phi = exp(-gamma), lambda = s_out / s_in and positions from 1:
    A_11 = 1, A_ii = lambda, A_i1 = phi_out^(i-2) (phi_out - lambda phi_in),
    A_ij = lambda phi_out^(i-j-1) (phi_out - phi_in) for 1 < j < i.
    """
    require(0 < gamma_out < gamma_in, f"needs 0 < gamma_out < gamma_in, not {gamma_out}, {gamma_in}")
    log_lambda, first, later = exponential_entries(gamma_in, gamma_out)
    position = np.arange(length)
    lag = position[:, None] - position[None, :]
    log_a = later - gamma_out * (lag - 1.0)
    log_a[:, 0] = first - gamma_out * (position - 1.0)
    np.fill_diagonal(log_a, log_lambda)
    log_a[0, 0] = 0.0
    return np.where(lag >= 0, log_a, -np.inf)


def exponential_entries(gamma_in, gamma_out):
    """The three numbers that make up A: log of lambda, of A_21 and of A_32, each free of cancellation."""
    phi_in, phi_out = np.exp(-gamma_in), np.exp(-gamma_out)
    log_lambda = 0.5 * (log1mexp(2 * gamma_out) - log1mexp(2 * gamma_in))
    gap = phi_out * -np.expm1(gamma_out - gamma_in)                           # phi_out - phi_in
    return log_lambda, np.log(gap - phi_in * np.expm1(log_lambda)), log_lambda + np.log(gap)


def exponential_decay(gamma_in, gamma_out):
    """(slope, first, own): the flash form. Less a constant of each row, log A_ij = -slope (i - j), for j = 1 with `first`
    on top and for j = i with `own`: a decay with distance, and two exceptions.
    """
    log_lambda, first, later = exponential_entries(gamma_in, gamma_out)
    return gamma_out, first - later, log_lambda - later - gamma_out


def exponential_own(gamma_in, gamma_out):
    """(c, lambda): A = c I + P, c = lambda phi_in / phi_out, where log P is the flash form with own = 0: nothing but decay.

    So a row of P is a softmax without a preference for the own token. In partial fractions, S the shift by one token:
    lambda (1 - phi_in S) / (1 - phi_out S) = c + lambda (1 - phi_in / phi_out) / (1 - phi_out S).
    """
    ratio = np.exp(exponential_entries(gamma_in, gamma_out)[0])
    return ratio * np.exp(gamma_out - gamma_in), ratio


def exponential_attend(gamma_in, gamma_out, x):
    """A x for the same A, x (T, n) -> (T, n), in O(T): y_i = phi_out y_(i-1) + lambda (x_i - phi_in x_(i-1)), y_1 = x_1."""
    ratio = np.exp(exponential_entries(gamma_in, gamma_out)[0])
    numerator, denominator = ratio * np.array([1, -np.exp(-gamma_in)]), np.array([1, -np.exp(-gamma_out)])
    return signal.lfilter(numerator, denominator, x, axis=0, zi=(1 - ratio) * x[:1])[0]


def uniform_log_attention(rho_in, rho_out, length):
    """log A for A = L_out L_in^-1 between uniform kernels, shape (T, T); needs rho_in < rho_out.

    With a_k = 1 + rho_out (k - 1), b_k = 1 + rho_in (k - 1) and kappa = sqrt((1 - rho_out) / (1 - rho_in)):
    A_jj = kappa sqrt(a_j b_(j-1) / (a_(j-1) b_j)) and A_ij = P_j - R_i below the diagonal. The difference cancels:
    with rho_out - rho_in under 1e-9 no digit would be left, and that is refused.
    """
    require(0 <= rho_in and rho_in + 1e-9 < rho_out < 1, f"needs 0 <= rho_in < rho_out < 1, not {rho_in}, {rho_out}")
    k = np.arange(1, length + 1)
    a, b = 1 + rho_out * (k - 1), 1 + rho_in * (k - 1)
    a_before, b_before = a - rho_out, b - rho_in                              # a_(k-1), b_(k-1)
    kappa = np.sqrt((1 - rho_out) / (1 - rho_in))
    step = kappa * rho_out * rho_in / np.sqrt(a_before * a * b_before * b)
    step[0] = 0.0
    total = np.cumsum(step)                                                   # S_k
    p = kappa * rho_out * np.sqrt(b_before / (a_before * a * b)) + total
    r = total - step + kappa * rho_in * np.sqrt(a / (a_before * b_before * b))
    matrix = np.tril(p[None, :] - r[:, None], -1)
    np.fill_diagonal(matrix, kappa * np.sqrt(a * b_before / (a_before * b)))
    with np.errstate(divide="ignore"):
        return np.log(matrix)


def cholesky_attention(kernel_in, kernel_out):
    """A = L_out L_in^-1 by the definition, shape (T, T): what the closed forms above are held against."""
    return np.linalg.solve(np.linalg.cholesky(kernel_in).T, np.linalg.cholesky(kernel_out).T).T


def symmetric_attention(kernel_in, kernel_out):
    """The non-causal form: A = Sigma_out^(1/2) Sigma_in^(-1/2), shape (T, T).

    A Sigma_in A^T = Sigma_out for any two kernels. Uniform kernels share their eigenvectors, which makes A symmetric;
    exponential ones do not, nor is it. Between kernels of one family, in the order of the schedules, A is non-negative
    in exact arithmetic in every case tried: entries that rounding made negative become 0; ValueError for those beyond it.
    """
    def power(kernel, exponent):
        values, vectors = np.linalg.eigh(kernel)
        return (vectors * values**exponent) @ vectors.T

    matrix = power(kernel_out, 0.5) @ power(kernel_in, -0.5)
    require(matrix.min() > -1e-12, f"no softmax makes this matrix: it has an entry of {matrix.min():.3g}, allowed is >= 0")
    return np.maximum(matrix, 0.0)


# --- From a matrix to a softmax: A = D softmax(B) ---------------------------------------------------------------------

def rescale_and_bias(log_attention):
    """(D, B), shapes (T,) and (T, T): A = diag(D) softmax(B), with D the row sums of A and B = log P."""
    rescale = np.exp(log_attention).sum(-1)
    return rescale, log_attention - np.log(rescale)[:, None]


# --- A whole network's kernels at initialisation ----------------------------------------------------------------------

def repeat_kernel(repeat_rate, length):
    """E Sigma_0 = (1 - r) I + r 1 1^T when two tokens are equal with probability r."""
    return uniform_kernel(repeat_rate, length)


def propagate(attentions, kernel, correlation_map, alpha=0.0, beta=1.0, norm=False, rescale=True):
    """Section 4's recursion: yields (n, Sigma) for each block, shapes (T,) and (T, T).

    attentions: for each block its kinds of heads, [(share, log A (T, T) or a function that multiplies (T, n) by A)]; shares
    add up to 1. kernel: Sigma before the first block. correlation_map: C of the MLP.
    alpha, beta: the weights of skip and branch. norm: does a normalisation stand before each branch?
    rescale: are positions brought back to mean square 1 after attention, by D = rowsum(A) / n (--rescale expected)?
    Where they are not, the mean square is exact for positively homogeneous activations, the leaky ReLUs.
    """
    for heads in attentions:
        given = correlation(kernel) if norm else kernel
        heads = [(share, a if callable(a) else partial(np.matmul, np.exp(a))) for share, a in heads]
        attended = sum(share * attend(attend(given).T) for share, attend in heads)
        n = np.sqrt(np.diag(attended)) if rescale else np.ones(len(kernel))
        kernel = alpha**2 * kernel + beta**2 * attended / np.outer(n, n)
        size = 1.0 if norm else np.sqrt(np.outer(np.diag(kernel), np.diag(kernel)))
        kernel = alpha**2 * kernel + beta**2 * size * correlation_map(correlation(kernel))
        yield n, kernel


def correlation(kernel):
    """The kernel of the same tokens at mean square 1: the cosines between them."""
    scale = np.sqrt(np.diag(kernel))
    return np.clip(kernel / np.outer(scale, scale), -1.0, 1.0)
