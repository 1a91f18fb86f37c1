"""Presets: whole networks by name, each with the learning rates that were tuned for it.

A flag given beside a preset changes that one thing and the defaults that follow from it: gamma from
the length, rates from optimizer, width, depth and steps. Those rules are functions below.
"""
from math import sqrt
from typing import NamedTuple


LONG = 6000                                # steps up to which one rate serves a skipless network


class Rates(NamedTuple):
    """Of 36 blocks of width 64; `scaled` carries them to other sizes. Tuned at width 256."""
    learning_rate: float
    lr_mult_embed: float                   # times it: embeddings, positions, final gain, head
    lr_mult_qk: float                      # times it: queries and keys
    lr_mult_vo: float                      # times it: values and outputs
    decay_groups: str = "qk,vo,mlp"        # whose matrices decay, where there is a weight decay
    tuned: bool = True                     # else a note says that it was not


PRESETS = {
    # The paper's architecture, with other constants, initialisation and optimisation: the default.
    "isometric": dict(
        attn="espa", alpha=0.0, beta=1.0, norm="none", act="gelu", transform="none",
        init="orthogonal", mlp_init="looks_linear", head_init="zero",
        optimizer="muon", lr_mult_path=0.1, orthogonal_pull=0.2, weight_decay=0.1,
        unit_embeddings=True, rate_power=0.5,
        rates=dict(muon=Rates(6e-4, 128.0, 16.0, 8.0, "qk,vo"),
                   adamw=Rates(1.5e-4, 1024.0, 16.0, 8.0))),
    # He et al. (ICLR 2023). Not known to us: their positions, head, schedule, batch, width, weight
    # decay and rates. 16 for embeddings and head is the best of a few multiples that we tried.
    "paper": dict(
        attn="espa", gamma=0.005, row_scale="row-sum",
        alpha=0.0, beta=1.0, norm="none", act="leaky_relu", transform="tat",
        init="orthogonal", mlp_init="orthogonal", head_init="zero",
        optimizer="adamw", rate_power=0.5,
        rates=dict(muon=Rates(1e-3, 1.0, 1.0, 1.0), adamw=Rates(2e-4, 16.0, 1.0, 1.0))),
    # No norms, weighted skips (section 5 of the paper): alpha^2 + beta^2 = 1.
    "normless": dict(
        attn="espa", alpha=0.98, beta=sqrt(1 - 0.98**2), norm="none", act="relu", transform="none",
        init="orthogonal", mlp_init="orthogonal", head_init="zero",
        optimizer="muon", weight_decay=0.1, unit_embeddings=True,
        rates=dict(muon=Rates(3e-3, 32.0, 4.0, 0.5), adamw=Rates(2e-3, 64.0, 4.0, 0.5))),
    # The standard transformer: skips, layer norm, GELU.
    "preln": dict(
        attn="softmax", alpha=1.0, beta=1.0, norm="layer", act="gelu", transform="none",
        init="gaussian", mlp_init="gaussian", head_init="gaussian",
        optimizer="adamw", weight_decay=0.1,
        rates=dict(muon=Rates(8e-3, 16.0, 1.0, 2.0), adamw=Rates(2e-3, 48.0, 1.0, 1.0))),
}
# Isometric with half as many extra heads as heads, of ordinary attention, W^O zero at the start.
PRESETS["extra-heads"] = PRESETS["isometric"] | dict(
    half_extra=True, rates=dict(muon=Rates(6e-4, 128.0, 16.0, 4.0, "qk,vo"),
                                adamw=Rates(1.5e-4, 1024.0, 4.0, 2.0)))
# Isometric, but what E-SPA's softmax keeps of the own token goes past it: a skip.
PRESETS["identity-skip"] = PRESETS["isometric"] | dict(
    identity_skip=True, rates=dict(muon=Rates(3e-4, 270.0, 16.0, 11.0, "qk,vo"),
                                   adamw=Rates(2e-4, 512.0, 18.0, 12.0)))

# Normless with ordinary attention; each block trains the weights of its skips and branches.
PRESETS["trained-skips"] = PRESETS["normless"] | dict(
    attn="softmax", trained_weights=True, weight_decay=0.3,
    rates=dict(muon=Rates(4e-3, 32.0, 4.0, 2.0), adamw=Rates(2e-3, 64.0, 4.0, 2.0, tuned=False)))

# --- Successors, for comparison, with what is published of them -------------------------
# Everywhere ours: rotary positions, the schedule, Adam's second moment (0.95), embeddings of mean
# square 1. What else differs is named. Rates are Pre-LN's, as all that is not said here.

SUCCESSORS = {
    # Shaped attention in the standard transformer (He and Hofmann 2023, arXiv 2311.01906).
    "shaped": dict(attn="shaped"),
    # The simplified block of that paper: no W^V, no W^O, no skip around attention, a trained weight
    # of the MLP of 0.1 at 18 blocks, as 1 / sqrt(L): here that of 36. W^V of the first block, which
    # they keep, is left out.
    "sas": dict(attn="shaped", identity_values=True, alpha=0.0, beta=1.0, mlp_alpha=1.0,
                mlp_beta=0.07, trained_weights=True, norm="rms", act="relu"),
    # The same with both sublayers side by side, and no skip at all. Each has a gain of its own.
    "sas-p": dict(attn="shaped", identity_values=True, parallel=True, alpha=0.0, beta=1.0,
                  mlp_beta=0.07, trained_weights=True, norm="rms", act="relu"),
    # No norms but of queries and keys (He et al. 2024, arXiv 2405.19279): branches of 0.2 at 18
    # blocks, as 1 / sqrt(L): here that of 36. The norm before the first attention and the last one
    # are left out.
    "op": dict(qk_norm=True, alpha=1.0, beta=0.14, norm="none", act="relu"),
    # No skips, layer norm, their initialisation (Ji et al. 2025, arXiv 2510.00345), here causal.
    # They train it by SOAP; here by Muon, or AdamW.
    "cutting-the-skip": dict(alpha=0.0, beta=1.0, init="orthogonal-3", query_init="near-identity",
                             mlp_init="orthogonal", optimizer="muon"),
}
PRESETS |= {name: PRESETS["preln"] | own for name, own in SUCCESSORS.items()}


# Of what neither a flag nor the preset says. Switches are off then.
DEFAULTS = dict(depth=36, width=64, heads=4, length=64, rho=0.8, eta=0.9, zeta=1.5, tau=0.3,
                position="rope", row_scale="unit", objective="clm", steps=400, batch=16,
                accumulate=1, seed=0, weight_decay=0.0, lr_mult_path=1.0, orthogonal_pull=0.0,
                data=None, val_data=None, encoding=None)


def scaled(rates, width, depth, steps, power):
    """Rates for another width, and where `power` is above 0 another depth and more steps.

    An update of one size an entry has a spectral norm that grows as sqrt(width), so the rate falls
    with it. Without skips the relative changes of all blocks add up in their product, so there
    blocks' rates fall as the root of the depth (measured from 6 to 72 blocks); and as the root of
    the steps beyond LONG (measured at 6,000 and 24,000, width 256, one seed). Embeddings and head
    stand once in the network: their own rate stays, unless there is one rate for all.
    """
    of_blocks = (36 / depth) ** power * max(steps / LONG, 1) ** -power
    embed = rates.lr_mult_embed / (of_blocks if rates.lr_mult_embed != 1 else 1)
    return rates._replace(learning_rate=rates.learning_rate * (64 / width) ** 0.5 * of_blocks,
                          lr_mult_embed=embed)


def gammas_by_length(heads, length, row_scale):
    """gamma_L of each head: 25.6 / T, at most 0.8, which keeps about gamma T directions of T.

    From 256 to 1,024 tokens a quarter of the heads has a fifth of that and so looks further back,
    if D keeps mean squares at 1.
    """
    near = min(0.8, 25.6 / length)
    far = heads // 4 if row_scale == "unit" and 256 <= length <= 1024 else 0
    return (near,) * (heads - far) + (near / 5,) * far
