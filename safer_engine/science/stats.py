"""Intervals over groups, and how well a score ranks a truth. Arrays in, one figure or one frozen value out.

Pairs linked by a prompt or a response share a group and are not independent, so the group is what is resampled
and what a standard error is clustered by. Bad arrays (empty, unequal lengths, non-finite) raise NumericalError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safer_engine.errors import NumericalError

Floats = NDArray[np.float64]
_CHUNK_CELLS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: on the values' own scale.
        lo, hi: ends of the interval; None where fewer than two groups leave nothing to estimate spread from.
        n: values the estimate is made of.
        n_groups: groups they fall into.
    """

    estimate: float
    lo: float | None
    hi: float | None
    n: int
    n_groups: int


@dataclass(frozen=True)
class ClusteredMean:
    """A mean and its cluster-robust standard error (None where fewer than two groups)."""

    mean: float
    se: float | None
    n: int
    n_groups: int


def group_bootstrap_mean(
    values: ArrayLike, groups: ArrayLike, resamples: int, rng: np.random.Generator, level: float = 0.95
) -> Interval:
    """Mean of `values` with a percentile interval from resampling whole groups.

    Args:
        values: [n], finite.
        groups: [n] group of each value, of any type that can be sorted.
        resamples: number of bootstrap resamples, each of as many groups as there are.
        rng: source of the resamples; the same state gives the same interval.
        level: coverage of the interval, in (0, 1).

    Source: the pairs cluster bootstrap (Cameron, Gelbach & Miller 2008, section 3), percentile ends.
    """
    numerator = _finite(values, "values")
    return group_bootstrap_ratio(numerator, np.ones_like(numerator), groups, resamples, rng, level=level)


def group_bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: ArrayLike,
    resamples: int,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
) -> Interval:
    """Σ numerator / Σ denominator with a percentile interval from resampling whole groups.

    Args:
        numerator, denominator: [n], finite; the denominators of a group must not sum to a negative figure, and not
            all to zero.
        groups, resamples, rng, level: as for `group_bootstrap_mean`.
    """
    top, bottom = _finite(numerator, "numerator"), _finite(denominator, "denominator")
    codes = _codes(groups, len(top))
    if len(top) != len(bottom):
        raise NumericalError(f"{len(top)} numerators but {len(bottom)} denominators")
    n_groups = int(codes.max()) + 1
    tops, bottoms = _group_sums(codes, top, n_groups), _group_sums(codes, bottom, n_groups)
    if bottoms.min() < 0 or bottoms.sum() == 0:
        raise NumericalError("the denominators of a group sum to less than zero, or all to zero")
    estimate = float(tops.sum() / bottoms.sum())
    if n_groups < 2:
        return Interval(estimate, None, None, len(top), n_groups)
    drawn = _resampled_ratios(tops, bottoms, resamples, rng)
    tail = (1 - level) / 2
    lo, hi = np.quantile(drawn, [tail, 1 - tail])
    return Interval(estimate, float(lo), float(hi), len(top), n_groups)


def _resampled_ratios(tops: Floats, bottoms: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Ratios of sums over groups drawn with replacement; draws without any denominator are left out."""
    n_groups = len(tops)
    rows = max(1, _CHUNK_CELLS // n_groups)
    ratios = []
    for start in range(0, resamples, rows):
        chosen = rng.integers(n_groups, size=(min(rows, resamples - start), n_groups))
        below = bottoms[chosen].sum(axis=1)
        usable = below > 0
        ratios.append(tops[chosen].sum(axis=1)[usable] / below[usable])
    drawn = np.concatenate(ratios)
    if len(drawn) == 0:
        raise NumericalError("no bootstrap resample had a denominator above zero")
    return drawn


def _group_sums(codes: NDArray[np.int64], values: Floats, n_groups: int) -> Floats:
    return np.bincount(codes, values, n_groups).astype(np.float64)


def clustered_mean(values: ArrayLike, groups: ArrayLike) -> ClusteredMean:
    """Mean of `values` and its cluster-robust standard error.

    se² = G / (G − 1) · Σ_g (Σ_{j in g} (v_j − v̄))² / n², G the number of groups (CR1 of Liang & Zeger 1986 for a mean).

    Args:
        values: [n], finite.
        groups: [n] group of each value.
    """
    found = _finite(values, "values")
    codes = _codes(groups, len(found))
    n_groups = int(codes.max()) + 1
    mean = float(found.mean())
    if n_groups < 2:
        return ClusteredMean(mean, None, len(found), n_groups)
    residuals = _group_sums(codes, found - mean, n_groups)
    variance = n_groups / (n_groups - 1) * float(residuals @ residuals) / len(found) ** 2
    return ClusteredMean(mean, variance**0.5, len(found), n_groups)


def average_precision(truth: ArrayLike, score: ArrayLike) -> float:
    """Area under the precision–recall steps, Σ (R_k − R_{k−1}) P_k over distinct scores; in (0, 1].

    Args:
        truth: [n] true for what is sought; at least one must be.
        score: [n] higher = more likely sought. Equal scores are one step, so the order of rows cannot matter.
    """
    sought, order = _ranked(truth, score)
    if not sought.any():
        raise NumericalError("average precision needs at least one true row")
    ends = np.append(np.flatnonzero(np.diff(order.scores)), len(sought) - 1)
    found = np.cumsum(sought[order.rows])[ends]
    precision = found / (ends + 1)
    recall_steps = np.diff(found, prepend=0) / found[-1]
    return float(precision @ recall_steps)


def auroc(truth: ArrayLike, score: ArrayLike) -> float:
    """Chance that a true row scores above a false one, ties counted half; in [0, 1].

    Args:
        truth: [n] with at least one true and one false row.
        score: [n] higher = more likely true.
    """
    sought, order = _ranked(truth, score)
    n_true, n_false = int(sought.sum()), int((~sought).sum())
    if n_true == 0 or n_false == 0:
        raise NumericalError("AUROC needs true rows and false rows")
    _, inverse, counts = np.unique(order.scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks_ascending = (last - (counts - 1) / 2)[inverse]
    total = ranks_ascending[sought[order.rows]].sum()
    return float((total - n_true * (n_true + 1) / 2) / (n_true * n_false))


def precision_at(truth: ArrayLike, score: ArrayLike, share: float) -> float:
    """Share of true rows among the `share` of rows with the highest scores; in [0, 1].

    Where the cut falls within equal scores, the expectation over all orders of those rows is given.

    Args:
        truth: [n] true for what is sought.
        score: [n] higher = more likely sought.
        share: in (0, 1]; round(share × n) rows are taken, at least one.
    """
    sought, order = _ranked(truth, score)
    if not 0 < share <= 1:
        raise NumericalError(f"a share of {share} is not in (0, 1]")
    taken = max(1, round(share * len(sought)))
    cut = order.scores[taken - 1]
    above, level = order.scores > cut, order.scores == cut
    hits = sought[order.rows]
    open_places = taken - int(above.sum())
    expected = hits[above].sum() + open_places * hits[level].mean()
    return float(expected / taken)


@dataclass(frozen=True)
class _Order:
    rows: NDArray[np.int64]
    scores: Floats


def _ranked(truth: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.bool_], _Order]:
    """The truth as booleans, and rows by falling score."""
    sought = np.asarray(truth).astype(bool)
    scores = _finite(score, "scores")
    if len(sought) != len(scores):
        raise NumericalError(f"{len(sought)} truths but {len(scores)} scores")
    rows = np.argsort(-scores, kind="stable")
    return sought, _Order(rows, scores[rows])


def _finite(values: ArrayLike, name: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0:
        raise NumericalError(f"{name} must be a non-empty vector, not of shape {found.shape}")
    if not np.isfinite(found).all():
        raise NumericalError(f"{int((~np.isfinite(found)).sum())} of {len(found)} {name} are not finite")
    return found


def _codes(groups: ArrayLike, n: int) -> NDArray[np.int64]:
    """Groups as 0, 1, …, in sorted order."""
    found = np.asarray(groups)
    if found.shape != (n,):
        raise NumericalError(f"{n} values but groups of shape {found.shape}")
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
