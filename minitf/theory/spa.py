"""Signal-preserving attention (He et al., ICLR 2023, arXiv 2302.10322, section 3). float64 NumPy.

The kernel of tokens X, shape (T, d), is Sigma = X X^T / d, shape (T, T). With orthogonal W^V and
W^O and one attention matrix A in every head, attention maps Sigma to A Sigma A^T. So to go from a
prescribed kernel Sigma_in to the next one, Sigma_out, take their Cholesky factors L and

    A = L_out L_in^-1,

which is lower triangular, as causal attention must be. A softmax can make it because A >= 0:
A = D softmax(B), D the row sums of A and B = log(A / D). B and D are constants.

First the definition, then the same in closed form, then in O(T). A is handled by its logarithm:
its entries fall below what a float64 can hold.
"""
import numpy as np
import scipy

from ..errors import require

# --- Prescribed kernels, and their schedules over depth ---------------------------------

def exponential_kernel(gamma, length):
    """E-SPA: Sigma_ij = exp(-gamma |i - j|), shape (T, T), for gamma > 0; inf is the identity."""
    require(gamma > 0, f"gamma must be above 0, not {gamma}")
    lag = np.abs(np.arange(length)[:, None] - np.arange(length))
    return np.where(lag == 0, 1.0, np.exp(-gamma * np.maximum(lag, 1)))


def uniform_kernel(rho, length):
    """U-SPA: Sigma = (1 - rho) I + rho 1 1^T, shape (T, T), for 0 <= rho < 1."""
    require(0 <= rho < 1, f"rho must be at least 0 and below 1, not {rho}")
    return (1 - rho) * np.eye(length) + rho


def exponential_schedule(gamma_last, depth):
    """gamma_0 = inf, ..., gamma_L = gamma_last: shape (L + 1,), strictly decreasing.

    With s = sqrt(1 - exp(-2 gamma)), s_l = s_L^(l/L). Then the diagonal of A_l, which is
    s_l / s_(l-1), is the same in every layer. ValueError where rounding makes two layers equal.
    """
    require(0 < gamma_last < np.inf, f"gamma must be above 0 and finite, not {gamma_last}")
    log_s = 0.5 * log1mexp(2 * gamma_last) * np.arange(1, depth + 1) / depth
    with np.errstate(divide="ignore"):                 # s = 1 to rounding: refused below
        gammas = np.concatenate([[np.inf], -0.5 * log1mexp(-2 * log_s)])
    gammas[-1] = gamma_last                            # not a rounding error beside it
    return distinct(gammas, "gamma", gamma_last)


def uniform_schedule(rho_last, depth, rho_first=0.0):
    """rho_0 = rho_first, ..., rho_L = rho_last: shape (L + 1,), strictly increasing.

    1 - rho falls geometrically (our choice). rho_0 is the chance that two tokens are equal.
    """
    require(0 <= rho_first < rho_last < 1,
            f"rho must be above rho_first, {rho_first:g}, and below 1, not {rho_last}")
    share = np.arange(depth + 1) / depth
    rhos = 1 - (1 - rho_first) ** (1 - share) * (1 - rho_last) ** share
    rhos[0], rhos[-1] = rho_first, rho_last
    return distinct(rhos, "rho", rho_last)


def distinct(values, name, last):
    """values; ValueError where two layers' are equal: A = I could never learn to attend."""
    require(np.all(values[1:] != values[:-1]),
            f"{name} = {last:g} is too extreme: two layers' kernels would be equal")
    return values


def log1mexp(x):
    """log(1 - exp(-x)) for x > 0, to full precision at both ends."""
    return np.where(x < 0.7, np.log(-np.expm1(-np.minimum(x, 0.7))),
                    np.log1p(-np.exp(-np.maximum(x, 0.7))))


# --- The definition: A from two kernels, D and B from A ---------------------------------

def cholesky_attention(kernel_in, kernel_out):
    """A = L_out L_in^-1, shape (T, T): E-SPA, U-SPA or any other pair of kernels."""
    return np.linalg.solve(np.linalg.cholesky(kernel_in).T, np.linalg.cholesky(kernel_out).T).T


def symmetric_attention(kernel_in, kernel_out):
    """The non-causal form: A = Sigma_out^(1/2) Sigma_in^(-1/2), shape (T, T).

    A Sigma_in A^T = Sigma_out for any two kernels. Between two of one family, in the order of its
    schedule, A was >= 0 in every case tried.
    """
    def power(kernel, exponent):
        values, vectors = np.linalg.eigh(kernel)
        return (vectors * values**exponent) @ vectors.T

    return non_negative(power(kernel_out, 0.5) @ power(kernel_in, -0.5))


def non_negative(attention):
    """A without the negative entries that rounding made; ValueError for those beyond it."""
    require(attention.min() > -1e-12,
            f"no softmax makes this matrix: an entry is {attention.min():.3g}, allowed is >= 0")
    return np.maximum(attention, 0.0)


def row_scale_and_bias(log_attention):
    """(D, B), shapes (T,) and (T, T): A = diag(D) softmax(B), from log A."""
    row_scale = np.exp(log_attention).sum(-1)
    return row_scale, log_attention - np.log(row_scale)[:, None]


# --- The same in closed form ------------------------------------------------------------

def exponential_log_attention(gamma_in, gamma_out, length):
    """log A of E-SPA, shape (T, T); needs gamma_out < gamma_in.

    With phi = exp(-gamma), lambda = s_out / s_in and positions from 1:
    A_11 = 1, A_ii = lambda, A_i1 = phi_out^(i-2) (phi_out - lambda phi_in),
    A_ij = lambda phi_out^(i-j-1) (phi_out - phi_in) for 1 < j < i.
    """
    require(0 < gamma_out < gamma_in,
            f"needs 0 < gamma_out < gamma_in, not {gamma_out}, {gamma_in}")
    log_lambda, first, later = exponential_entries(gamma_in, gamma_out)
    position = np.arange(length)
    lag = position[:, None] - position
    log_a = later - gamma_out * (lag - 1.0)
    log_a[:, 0] = first - gamma_out * (position - 1.0)
    np.fill_diagonal(log_a, log_lambda)
    log_a[0, 0] = 0.0
    return np.where(lag >= 0, log_a, -np.inf)


def exponential_entries(gamma_in, gamma_out):
    """log lambda, log A_21 and log A_32, each free of cancellation: all that A is made of."""
    phi_in, phi_out = np.exp(-gamma_in), np.exp(-gamma_out)
    log_lambda = 0.5 * (log1mexp(2 * gamma_out) - log1mexp(2 * gamma_in))
    gap = phi_out * -np.expm1(gamma_out - gamma_in)                       # phi_out - phi_in
    return log_lambda, np.log(gap - phi_in * np.expm1(log_lambda)), log_lambda + np.log(gap)


def uniform_log_attention(rho_in, rho_out, length):
    """log A of U-SPA, shape (T, T); needs rho_in < rho_out.

    With a_k = 1 + rho_out (k - 1), b_k = 1 + rho_in (k - 1) and kappa^2 = (1-rho_out) / (1-rho_in):
    A_jj = kappa sqrt(a_j b_(j-1) / (a_(j-1) b_j)) and A_ij = P_j - R_i below the diagonal, which
    cancels: no digit is left where the two are within 1e-9 of each other, and that is refused.
    """
    require(0 <= rho_in and rho_in + 1e-9 < rho_out < 1,
            f"needs 0 <= rho_in < rho_out < 1, not {rho_in}, {rho_out}")
    k = np.arange(1, length + 1)
    a, b = 1 + rho_out * (k - 1), 1 + rho_in * (k - 1)
    a_before, b_before = a - rho_out, b - rho_in                          # a_(k-1), b_(k-1)
    kappa = np.sqrt((1 - rho_out) / (1 - rho_in))
    step = kappa * rho_out * rho_in / np.sqrt(a_before * a * b_before * b)
    step[0] = 0.0
    total = np.cumsum(step)
    p = kappa * rho_out * np.sqrt(b_before / (a_before * a * b)) + total
    r = total - step + kappa * rho_in * np.sqrt(a / (a_before * b_before * b))
    matrix = np.tril(p - r[:, None], -1)
    np.fill_diagonal(matrix, kappa * np.sqrt(a * b_before / (a_before * b)))
    with np.errstate(divide="ignore"):
        return np.log(matrix)


# --- The same for E-SPA in O(T) ---------------------------------------------------------

def espa_bias(gamma_in, gamma_out):
    """B of E-SPA as three numbers: (slope, first_key_bias, self_bias).

    Less a constant of each row, which softmax ignores, log A_ij = -slope (i - j), as in ALiBi
    (arXiv 2108.12409), with first_key_bias on top for the first key and self_bias for j = i.
    """
    log_lambda, first, later = exponential_entries(gamma_in, gamma_out)
    return gamma_out, first - later, log_lambda - later - gamma_out


def espa_matvec(gamma_in, gamma_out, x):
    """A x, x (T, n) -> (T, n): y_i - phi_out y_(i-1) = lambda (x_i - phi_in x_(i-1)), y_1 = x_1."""
    ratio = np.exp(exponential_entries(gamma_in, gamma_out)[0])
    right = np.concatenate([x[:1], ratio * (x[1:] - np.exp(-gamma_in) * x[:-1])])
    bands = np.ones((2, len(x))) * [[1.0], [-np.exp(-gamma_out)]]
    return scipy.linalg.solve_banded((1, 0), bands, right)


def espa_identity_part(gamma_in, gamma_out):
    """(c, lambda): A = c I + P with c = lambda phi_in / phi_out, and lambda the diagonal of A.

    log P is that of `espa_bias` with self_bias = 0. In partial fractions, S the shift by a token:
    lambda (1 - phi_in S) / (1 - phi_out S) = c + lambda (1 - phi_in / phi_out) / (1 - phi_out S).
    """
    ratio = np.exp(exponential_entries(gamma_in, gamma_out)[0])
    return ratio * np.exp(gamma_out - gamma_in), ratio
