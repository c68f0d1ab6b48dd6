"""Which effects of ablation are larger than those of latents that fire alike. Arrays in, frozen values out.

The null: for each reported feature the unreported latents nearest to it in log firing rate and log energy are its bin. Their
effects, each divided by its bin's median, are pooled over (feature-bin, control) pairs; a feature's effect, divided by the
same median, is compared with the pool. One latent may stand in several bins: the count of distinct ones is kept as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from safer_engine.errors import NumericalError
from safer_engine.science.multiple_testing import benjamini_hochberg

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEAST_POOLED = 1000
LEAST_AGREEMENT = 0.7
"""Spearman's ρ between first-order and ablated effects below which the first order does not stand for controls' effects."""
_LEAST_COMPARED = 8


@dataclass(frozen=True)
class Agreement:
    """How first-order effects compare with ablated ones of the same latents over the same pairs.

    Attributes:
        rho: Spearman's; None where there are too few, or all are equal.
        slope: Σ|E||A| / ΣA², what a first-order effect is multiplied by to stand for an ablated one.
        n: latents compared.
    """

    rho: float | None
    slope: float
    n: int


@dataclass(frozen=True)
class Null:
    """p-values of features against the pool; NaN where none could be had, with the reason.

    Attributes:
        p_F, adjusted_F: two-sided in effect's size; Benjamini–Hochberg over the features.
        pooled, distinct: (feature-bin, control) pairs, and distinct control latents among them.
        reason: why there are no p-values; empty where there are.
    """

    p_F: Floats
    adjusted_F: Floats
    pooled: int
    distinct: int
    reason: str


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ with a percentile interval from resampling latents (None where it cannot be had)."""

    rho: float
    lo: float | None
    hi: float | None
    n: int


def nearest_controls(rate_S: Floats, energy_S: Floats, features: Sequence[int], pool: Sequence[int], each: int) -> Ints:
    """Ids [F, min(each, len(pool))] of the latents of `pool` nearest to each feature, nearest first; ties by id.

    Distance: Euclidean in log firing rate and log energy, each divided by its standard deviation over the pool.
    """
    if len(pool) == 0:
        return np.zeros((len(features), 0), dtype=np.int64)
    ids = np.sort(np.asarray(pool, dtype=np.int64))
    logs_S2 = np.log(np.maximum(np.stack([rate_S, energy_S], axis=1), 1e-30))
    spread_2 = logs_S2[ids].std(axis=0)
    logs_S2 = logs_S2 / np.where(spread_2 > 0, spread_2, 1)
    found = [ids[np.argsort(((logs_S2[ids] - logs_S2[f]) ** 2).sum(axis=1), kind="stable")[:each]] for f in features]
    return np.stack(found) if found else np.zeros((0, min(each, len(ids))), dtype=np.int64)


def agreement(ablated_N: Floats, first_order_N: Floats) -> Agreement:
    """Compare effects of the same latents, two ways."""
    squares = float(first_order_N @ first_order_N)
    slope = float(np.abs(ablated_N) @ np.abs(first_order_N)) / squares if squares > 0 else 0.0
    enough = len(ablated_N) >= _LEAST_COMPARED and np.ptp(ablated_N) > 0 and np.ptp(first_order_N) > 0
    return Agreement(_spearman(ablated_N, first_order_N) if enough else None, slope, len(ablated_N))


def against_controls(effect_F: Floats, controls_FC: Ints, first_order_S: Floats, agreed: Agreement) -> Null:
    """p-values of ablated effects against the pooled effects of controls (their first order times the slope)."""
    pooled, distinct = controls_FC.size, len(np.unique(controls_FC))
    none = np.full(len(effect_F), np.nan)
    if pooled < LEAST_POOLED:
        return Null(none, none, pooled, distinct, f"{pooled} pooled (feature-bin, control) pairs, fewer than {LEAST_POOLED}")
    if agreed.rho is None or agreed.rho < LEAST_AGREEMENT:
        rho = "not to be had" if agreed.rho is None else f"{agreed.rho:.2f}"
        reason = f"first-order and ablated effects do not agree (Spearman {rho}, {LEAST_AGREEMENT} needed)"
        return Null(none, none, pooled, distinct, reason)
    null_FC = np.abs(first_order_S[controls_FC]) * agreed.slope
    scale_F = np.median(null_FC, axis=1)
    usable_F = scale_F > 0
    pool = np.sort((null_FC[usable_F] / scale_F[usable_F, None]).ravel())
    if len(pool) < LEAST_POOLED:
        return Null(none, none, len(pool), distinct, "most control latents have no effect in the pairs that were kept")
    statistic_F = np.abs(effect_F[usable_F]) / scale_F[usable_F]
    larger_F = len(pool) - np.searchsorted(pool, statistic_F, side="left")
    p_F = none.copy()
    p_F[usable_F] = (1 + larger_F) / (1 + len(pool))
    return Null(p_F, benjamini_hochberg(p_F), len(pool), distinct, "")


def rank_correlation(a_N: Floats, b_N: Floats, resamples: int, rng: np.random.Generator) -> Correlation | None:
    """Spearman's ρ of two figures of the same latents; None where fewer than three or where one of them is constant."""
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all()):
        raise NumericalError("a salience or a causal effect is not finite")
    n = len(a_N)
    if n < 3 or np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return None
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(n, size=n)
        if np.ptp(a_N[rows]) > 0 and np.ptp(b_N[rows]) > 0:
            drawn.append(_spearman(a_N[rows], b_N[rows]))
    lo, hi = np.quantile(drawn, [0.025, 0.975]) if drawn and n >= 8 else (None, None)
    return Correlation(_spearman(a_N, b_N), None if lo is None else float(lo), None if hi is None else float(hi), n)


def _spearman(a_N: Floats, b_N: Floats) -> float:
    ranks = [rankdata(values) for values in (a_N, b_N)]
    centred = [rank - rank.mean() for rank in ranks]
    return float(centred[0] @ centred[1] / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1])))
