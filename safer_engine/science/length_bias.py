"""How far rewards follow the length of responses, beyond what the labels ask for.

Reward models prefer longer responses, and much of what training on them gains is length (Singhal et al. 2023, "A Long Way to
Go", arXiv 2310.03716); accuracy on pairs whose chosen response is the plainer one falls with it (RM-Bench, arXiv 2410.16184).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import NumericalError
from safer_engine.science.stats import Interval

FEWEST = 10
"""Pairs whose chosen response is the longer one, and as many of the others, without which the two are not compared."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_TAIL = 0.025
_COMPARED = "gap"
_CORRELATED = "correlation"


@dataclass(frozen=True)
class LengthBias:
    """How rewards follow length on a slice of pairs. Shares are of the pairs whose two responses differ in length.

    Attributes:
        n_equal: pairs with responses of equal length: in none of the figures.
        longer_chosen: share whose chosen response is the longer one: the preference for length that the labels ask for.
        longer_preferred: share whose longer response has the higher reward; equal rewards count one half.
        excess: longer_preferred − longer_chosen, in [−1, 1]: errors towards length less errors against it, as a share of pairs.
        accuracy_longer, accuracy_shorter: share of right pairs (margin > 0) among those whose chosen response is the longer one,
            and among the others.
        gap: accuracy_longer − accuracy_shorter, in [−1, 1], each subset compared within itself and weighted by
            n_longer · n_shorter / (n_longer + n_shorter) (the risk difference of Mantel & Haenszel; Greenland & Robins 1985).
            0 where errors do not depend on length; noise in labels or rewards does not move it from there, nor does a subset
            whose chosen responses are all long. `n` are the pairs of subsets that have both kinds.
        correlation: Spearman's, of the margin with the length of the chosen less that of the rejected response, in [−1, 1].
        reasons: why a figure is None, by its name.
    """

    n_equal: int
    longer_chosen: Interval | None
    longer_preferred: Interval | None
    excess: Interval | None
    accuracy_longer: Interval | None
    accuracy_shorter: Interval | None
    gap: Interval | None
    correlation: Interval | None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Pairs of unequal length. `cell_P`: 2 · stratum + (1 where the chosen response is the longer one)."""

    cell_P: Ints
    n_cells: int
    right_P: Floats
    preferred_P: Floats
    margin_code_P: Ints
    length_code_P: Ints
    group_P: Ints

    @property
    def longer_P(self) -> NDArray[np.bool_]:
        return np.asarray(self.cell_P % 2 == 1)

    @property
    def compared_P(self) -> NDArray[np.bool_]:
        """Pairs of strata that have both kinds."""
        counts = np.bincount(self.cell_P, minlength=self.n_cells).reshape(-1, 2)
        return np.asarray((counts.min(axis=1) > 0)[self.cell_P // 2])


def length_bias(
    margin_P: Floats,
    longer_by_P: Ints,
    groups_P: NDArray[Any],
    strata_P: NDArray[Any],
    resamples: int,
    rng: np.random.Generator,
) -> LengthBias:
    """How the rewards of some pairs follow length, with 95 % percentile intervals from resampling whole groups.

    Args:
        margin_P: reward of the chosen response less that of the rejected one, finite.
        longer_by_P: length of the chosen response less that of the rejected one, as the reward model read them.
        groups_P: group of each pair: the unit of resampling.
        strata_P: within which errors are compared.
    """
    if not len(margin_P) == len(longer_by_P) == len(groups_P) == len(strata_P):
        raise NumericalError("the columns of pairs and lengths differ in length")
    if not np.isfinite(margin_P).all():
        raise NumericalError("some margins are not finite")
    unequal = np.flatnonzero(longer_by_P != 0)
    if not len(unequal):
        names = ("longer_chosen", "longer_preferred", "excess", "accuracy_longer", "accuracy_shorter", _COMPARED, _CORRELATED)
        why = "all responses are as long as the other of their pair"
        return LengthBias(len(margin_P), **dict.fromkeys(names), reasons=dict.fromkeys(names, why))
    rows = _rows(margin_P[unequal], longer_by_P[unequal], groups_P[unequal], strata_P[unequal])
    reasons = _lacking(rows)
    drawn = _resampled(rows, resamples, rng)
    whole = _figures(rows, np.ones(len(unequal)))
    among = {"accuracy_longer": rows.longer_P, "accuracy_shorter": ~rows.longer_P, _COMPARED: rows.compared_P}
    found = {
        name: None if name in reasons else _interval(value, drawn[name], rows.group_P[among.get(name, slice(None))])
        for name, value in whole.items()
    }
    return LengthBias(len(margin_P) - len(unequal), **found, reasons=reasons)


def _rows(margin: Floats, longer_by: Ints, groups: NDArray[Any], strata: NDArray[Any]) -> _Rows:
    names, stratum = np.unique(strata, return_inverse=True)
    longer = longer_by > 0
    tied = margin == 0
    return _Rows(
        cell_P=(2 * stratum + longer).astype(np.int64),
        n_cells=2 * len(names),
        right_P=(margin > 0).astype(np.float64),
        preferred_P=np.where(tied, 0.5, (margin > 0) == longer),
        margin_code_P=np.unique(margin, return_inverse=True)[1].astype(np.int64),
        length_code_P=np.unique(longer_by, return_inverse=True)[1].astype(np.int64),
        group_P=np.unique(groups, return_inverse=True)[1].astype(np.int64),
    )


def _lacking(rows: _Rows) -> dict[str, str]:
    """Figures that these pairs cannot give, and why."""
    reasons = {}
    n_longer, n_shorter = int(rows.longer_P.sum()), int((~rows.longer_P).sum())
    for name, count, kind in (("accuracy_longer", n_longer, "longer"), ("accuracy_shorter", n_shorter, "shorter")):
        if not count:
            reasons[name] = f"in no pair is the chosen response the {kind} one"
    compared = rows.compared_P
    least = min(int((rows.longer_P & compared).sum()), int((~rows.longer_P & compared).sum()))
    if least < FEWEST:
        reasons[_COMPARED] = (
            f"of {n_longer} pairs whose chosen response is the longer one and {n_shorter} whose chosen one is the shorter, fewer "
            f"than {FEWEST} of either kind are in subsets that have both"
        )
    if len(rows.cell_P) < FEWEST or not rows.margin_code_P.any() or not rows.length_code_P.any():
        reasons[_CORRELATED] = (
            f"it needs {FEWEST} pairs that differ in length, whose margins and differences are not all the same"
        )
    return reasons


def _figures(rows: _Rows, weight_P: Floats) -> dict[str, float]:
    """All figures, each pair counted `weight_P` times; NaN where there is nothing to make one of."""
    n = np.bincount(rows.cell_P, weight_P, rows.n_cells).reshape(-1, 2)
    right = np.bincount(rows.cell_P, weight_P * rows.right_P, rows.n_cells).reshape(-1, 2)
    total = n.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        shorter, longer = right.sum(axis=0) / n.sum(axis=0)
        both = n.min(axis=1) > 0
        weight = n[both].prod(axis=1) / n[both].sum(axis=1)
        rate = right[both] / n[both]
        gap = np.float64(weight @ (rate[:, 1] - rate[:, 0])) / weight.sum()
        chosen, preferred = n[:, 1].sum() / total, weight_P @ rows.preferred_P / total
    figures = (chosen, preferred, preferred - chosen, longer, shorter, gap, _spearman(rows, weight_P))
    names = ("longer_chosen", "longer_preferred", "excess", "accuracy_longer", "accuracy_shorter", _COMPARED, _CORRELATED)
    return dict(zip(names, map(float, figures), strict=True))


def _spearman(rows: _Rows, weight_P: Floats) -> float:
    """Correlation of the ranks of margin and length difference, equal values sharing the mean of their ranks."""
    one, other = (_ranks(codes, weight_P) for codes in (rows.margin_code_P, rows.length_code_P))
    total = weight_P.sum()
    one, other = one - weight_P @ one / total, other - weight_P @ other / total
    below = (weight_P @ one**2) * (weight_P @ other**2)
    return float(np.clip(weight_P @ (one * other) / np.sqrt(below), -1, 1)) if below > 0 else float("nan")


def _ranks(codes: Ints, weight_P: Floats) -> Floats:
    counts = np.bincount(codes, weight_P)
    return np.asarray((np.cumsum(counts) - counts / 2)[codes])


def _resampled(rows: _Rows, resamples: int, rng: np.random.Generator) -> dict[str, Floats]:
    """The figures over groups drawn with replacement."""
    n_groups = int(rows.group_P.max()) + 1
    if n_groups < 2:
        return {name: np.empty(0) for name in _figures(rows, np.ones(len(rows.cell_P)))}
    drawn = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)
        drawn.append(_figures(rows, times[rows.group_P]))
    return {name: np.asarray([figures[name] for figures in drawn]) for name in drawn[0]}


def _interval(value: float, drawn: Floats, groups: Ints) -> Interval:
    """An estimate with its interval; draws that have nothing to make it of are left out."""
    n_groups = len(np.unique(groups))
    usable = drawn[np.isfinite(drawn)]
    if n_groups < 2 or not len(usable):
        return Interval(value, None, None, len(groups), n_groups)
    lo, hi = np.quantile(usable, [_TAIL, 1 - _TAIL])
    return Interval(value, float(lo), float(hi), len(groups), n_groups)
