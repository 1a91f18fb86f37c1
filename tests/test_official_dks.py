"""Activations against those that the authors' own package solves for.

google-deepmind/dks 0.1.2 at commit c9cf37b11e9d93ee469247bd56203f4774e8e318 (2025-07-01; the wheel
on PyPI is older), unmodified, with NumPy 2.4.6, SciPy 1.17.1 and autograd 1.9.1:

    from dks.base.activation_transform import _get_activations_params
    _get_activations_params((official_name,), method="DKS" or "TAT",
        dks_params={"c_slope_1_target": 1.5},
        tat_params={"c_val_0_target": 0.9, "c_curve_target": 0.3}, subnet_max_func=M)
    def M(x, r):                      # alpha = 0: a plain chain of `depth` layers
        branch = r(x)
        for _ in range(depth): x = alpha**2 * x + (1 - alpha**2) * r(x)
        return max(x, branch) if alpha else x

Official names: silu is swish, gelu is gelu_exact, arctan is atan. phi^ = c (phi(a x + b) + d) in
both packages. For leaky ReLUs the package leaves |b| < 3e-12 with DKS, and gives no a, b, d with
TAT: 1, 0, 0 here. For odd phi (b, d) and (-b, -d) are the same solution, and which one the package
finds is arbitrary: here, as in ours, b is above 0.
"""
import pytest

from minitf.theory import activations

# The package's bisection stops where a network's slope (DKS, 1.5), curvature (TAT, 0.3) or C(0)
# (TAT of leaky ReLUs, 0.9) is within 1e-8 of its target. Parameters depend on a slope's excess
# over 1, 0.5, or on a curvature, as its root or less: to 1e-8 / 0.3 / 2. Twice that for what the
# quadrature adds. They were written down with ten digits.
STOPS = 1e-8
RTOL = STOPS / 0.3

# (transform, activation, depth, alpha, slope, a, b, c, d)
OFFICIAL = [
    ("dks", "gelu", 36, 0.0, None, 0.1435803236, 0.2566869279,
     9.943732366, -0.1619672145),
    ("dks", "silu", 36, 0.0, None, 0.218552512, 0.3482633171,
     6.82218184, -0.2152734892),
    ("dks", "tanh", 36, 0.0, None, 0.1518620732, 0.5790001614,
     9.041540403, -0.5134131562),
    ("dks", "erf", 36, 0.0, None, 0.1313976823, 0.5944625823,
     9.598706317, -0.5915064294),
    ("dks", "softplus", 14, 0.0, None, 0.6596012053, 0.4165384951,
     2.516172145, -0.9728140174),
    ("dks", "arctan", 100, 0.0, None, 0.1135455969, 0.5228946909,
     11.21099759, -0.4777091716),
    ("dks", "asinh", 36, 0.0, None, 0.3510777541, 0.8035828413,
     3.631380956, -0.7134901844),
    ("dks", "gelu", 100, 0.0, None, 0.08539132823, 0.25907309,
     16.67823783, -0.1587260924),
    ("dks", "leaky_relu", 36, 0.0, 0.7639499288, 1, 0,
     1.13014792, -0.09417035408),
    ("dks", "gelu", 36, 0.9, None, 0.3458289691, 0.238826641,
     4.201453792, -0.1846954935),
    ("dks", "leaky_relu", 14, 0.9, 0.3190882789, 1, 0,
     1.447728503, -0.2716444759),
    ("dks", "tanh", 100, 0.9, None, 0.2102446839, 0.6043962833,
     6.693355906, -0.5240638473),
    ("tat", "gelu", 36, 0.0, None, 0.0964972214, 0.3266620575,
     13.77133039, -0.2037929779),
    ("tat", "silu", 14, 0.0, None, 0.2370082418, 0.4496751068,
     5.862606585, -0.2694852283),
    ("tat", "tanh", 36, 0.0, None, 0.09635399644, 0.5289753527,
     13.54504883, -0.4859569385),
    ("tat", "erf", 100, 0.0, None, 0.05068321361, 0.5435090645,
     23.48428869, -0.5583715925),
    ("tat", "softplus", 36, 0.0, None, 0.2510735475, 0.5420296573,
     6.291741822, -0.9974769954),
    ("tat", "arctan", 36, 0.0, None, 0.1186845114, 0.4994309654,
     10.51022332, -0.4649087137),
    ("tat", "asinh", 100, 0.0, None, 0.1243792676, 0.6323605811,
     9.50694312, -0.5975317209),
    ("tat", "gelu", 36, 0.9, None, 0.2272824145, 0.3237606312,
     5.832586271, -0.1958261869),
    ("tat", "leaky_relu", 100, 0.9, 0.1361074746, 1, 0,
     1.401293473, 0),
    ("tat", "leaky_relu", 14, 0.0, 0.0539894104, 1, 0,
     1.412156943, 0),
    ("tat", "leaky_relu", 36, 0.0, 0.3511212468, 1, 0,
     1.334350122, 0),
    ("tat", "leaky_relu", 100, 0.0, 0.5704395324, 1, 0,
     1.228404244, 0),
]


@pytest.mark.parametrize("transform, name, depth, alpha, slope, a, b, c, d", OFFICIAL)
def test_solutions_are_the_official_ones(transform, name, depth, alpha, slope, a, b, c, d):
    """All parameters. Leaky ReLUs with TAT: the official slope gives C_f(0) = 0.9 as it promises.

    There the slope can be small, and C_f(0) hardly depends on it: to 1e-6.
    """
    beta = (1 - alpha**2)**0.5
    found = activations.solve(name, transform, depth, alpha, beta, eta=0.9, zeta=1.5, tau=0.3)
    leaky_tat, rtol = (name, transform) == ("leaky_relu", "tat"), RTOL
    if leaky_tat:
        map_of = lambda c: activations.leaky_correlation(c, slope)
        whole = activations.network_correlation(map_of, 0.0, depth, alpha, beta)
        assert abs(max(whole, map_of(0.0)) - 0.9) <= 1.01 * STOPS
        rtol = 1e-6
    ours = [found.input_scale, found.input_shift, found.output_scale, found.output_shift]
    assert ours == pytest.approx([a, b, c, d], rel=rtol, abs=0)
    assert slope is None or found.slope == pytest.approx(slope, rel=rtol, abs=0)
