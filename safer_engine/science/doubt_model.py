"""From a score to the probability that a label is wrong, without a single label known to be wrong.

A score s of a pair is signed: above 0 where the evidence agrees with the label. Turning a label round turns its score round, so
the scores of a dataset of which a share ε is turned round have the density

    f(s) = (1 − ε) g(s) + ε g(−s),      g: the density of the scores of right labels.

Given |s|, whether s is positive is then a coin with P(s > 0 | |s|) = ε + (1 − 2 ε) π(|s|), π(u) = g(u) / (g(u) + g(−u)): the
chance that evidence of that strength points the right way. With π(u) = 1 / (1 + e^{−a u}) (exact for mirrored normals, and for
every family tilted exponentially) the signs alone tell ε and the slope a: evidence that is strong enough is never wrong, so the
share of strong scores that contradict their label is ε. No shape of g is assumed. Then

    P(wrong | s) = ε g(−s) / f(s) = ε / (ε + (1 − ε) e^{a s}),

which is ε where there is no evidence. Scores must be cross-fitted: one that saw its own label agrees with it too often, and ε
comes out too small. Each cell (a subset) has its own ε and a, drawn towards the axis's as far as its own pairs do not tell them.

Where no score is strong, ε and a cannot be told apart; `identified` says so, and then only the order of the scores counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import beta

from safer_engine.errors import NumericalError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_BINS = 128
"""Strengths of evidence are binned per cell; their signs are all that is counted."""
_SPREAD_SHARE, _SPREAD_SLOPE = 0.5, 0.5
"""Standard deviations of logit ε and log a of the cells about the axis's."""
_PRIOR = 0.5
"""Pairs' worth of a contradiction that nobody saw: keeps ε above 0 where no strong score contradicts its label."""
_STARTS = (-4.0, -2.0, -0.7)
REACH, MAX_WIDTH, MAX_IDENTIFIED = 0.9, 0.15, 0.35
"""For ε to be told: least mean of π over the strongest tenth of the scores, widest interval, and largest upper end."""
MAX_SHARE = 0.5
"""ε stays below: a dataset of which more is wrong is one of its own contrary."""


@dataclass(frozen=True)
class DoubtModel:
    """The fitted model of one axis.

    Attributes:
        share: ε over the axis (mean of its cells', weighted by pairs), in (0, 0.5).
        lo, hi: ends of its interval, from resampling groups; None where it was not asked for or cannot be told.
        share_C, slope_C: ε and a of each cell, a > 0 per unit of the score.
        reach: mean of π over the strongest tenth of the scores.
    """

    share: float
    lo: float | None
    hi: float | None
    share_C: Floats
    slope_C: Floats
    reach: float

    @property
    def identified(self) -> bool:
        """Whether some scores are strong enough, and the pairs enough, to tell ε from the slope."""
        if self.lo is None or self.hi is None:
            return False
        return self.reach >= REACH and self.hi - self.lo <= MAX_WIDTH and self.hi <= MAX_IDENTIFIED

    def probability(self, score_P: Floats, cell_P: Ints) -> Floats:
        """P(wrong | s) of each pair, in (0, 1), falling in the score."""
        share_P = self.share_C[cell_P]
        with np.errstate(over="ignore"):
            return np.asarray(expit(np.log(share_P) - np.log1p(-share_P) - self.slope_C[cell_P] * score_P))


def fit_doubt(
    score_P: Floats, cell_P: Ints, groups_P: Ints, *, resamples: int = 200, rng: np.random.Generator, level: float = 0.95
) -> DoubtModel:
    """Fit ε and the slopes of one axis to the signs of its scores.

    Args:
        score_P: cross-fitted scores, finite, above 0 where the evidence agrees with the label; a score of 0 says nothing.
        cell_P: cell (subset) of each pair, from 0.
        groups_P: group of each pair, as integers: the unit of resampling.
        resamples: refits over resampled groups for the interval; 0 for none.

    Raises:
        NumericalError: no scores, or one that is not finite.
    """
    if len(score_P) == 0 or not np.isfinite(score_P).all():
        raise NumericalError("scores must be finite, and at least one")
    n_cells = int(cell_P.max()) + 1
    bins = _Bins.of(score_P, cell_P, n_cells)
    counts = bins.counts(np.ones(len(score_P)))
    best = min((_fit(bins, counts, np.array([start, *_level_slope(bins)])) for start in _STARTS), key=lambda fit: fit.loss)
    weights_C = np.bincount(cell_P, minlength=n_cells) / len(score_P)
    lo, hi = _interval(bins, best, weights_C, groups_P, (resamples, level), rng)
    reach = _reach(score_P, best.slope_C[cell_P])
    return DoubtModel(float(best.share_C @ weights_C), lo, hi, best.share_C, best.slope_C, reach)


@dataclass(frozen=True)
class _Bins:
    """Strengths in bins: mean |s| and cell of each bin, bin of each pair (−1: score 0), and its sign."""

    strength_N: Floats
    cell_N: Ints
    bin_P: Ints
    positive_P: NDArray[np.bool_]
    n_cells: int

    @staticmethod
    def of(score_P: Floats, cell_P: Ints, n_cells: int) -> _Bins:
        strength_P = np.abs(score_P)
        bin_P = np.full(len(score_P), -1, dtype=np.int64)
        strengths: list[Floats] = []
        cells: list[int] = []
        for cell in range(n_cells):
            rows = np.flatnonzero((cell_P == cell) & (strength_P > 0))
            ordered = rows[np.argsort(strength_P[rows], kind="stable")]
            for part in np.array_split(ordered, min(_BINS, len(ordered)) or 1):
                if len(part):
                    bin_P[part] = len(strengths)
                    strengths.append(strength_P[part].mean())
                    cells.append(cell)
        return _Bins(np.array(strengths), np.array(cells, dtype=np.int64), bin_P, score_P > 0, n_cells)

    def counts(self, weight_P: Floats) -> tuple[Floats, Floats]:
        """Weighted counts of agreeing and of contradicting scores by bin."""
        n, told = len(self.strength_N), self.bin_P >= 0
        agree = told & self.positive_P
        against = told & ~self.positive_P
        return (
            np.bincount(self.bin_P[agree], weight_P[agree], n).astype(np.float64),
            np.bincount(self.bin_P[against], weight_P[against], n).astype(np.float64),
        )


@dataclass(frozen=True)
class _Fit:
    loss: float
    parameters: Floats
    share_C: Floats
    slope_C: Floats


def _level_slope(bins: _Bins) -> tuple[float, ...]:
    """Where the search begins for the slope: evidence of median strength points the right way three times in four."""
    return (float(np.log(1.1 / np.median(bins.strength_N))) if len(bins.strength_N) else 0.0,)


def _fit(bins: _Bins, counts: tuple[Floats, Floats], start: Floats) -> _Fit:
    """Most likely parameters; `start` holds (logit 2ε, log a) of the axis, or all parameters of an earlier fit."""
    n = bins.n_cells
    first = start if len(start) == 2 + 2 * n else np.concatenate([start, np.zeros(2 * n)])
    found = minimize(_loss, first, args=(bins, counts), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    share_C, slope_C = _cells(found.x, n)
    return _Fit(float(found.fun), found.x, share_C, slope_C)


def _cells(parameters: Floats, n: int) -> tuple[Floats, Floats]:
    """ε and a of the cells: the axis's and each cell's deviation, in units of their spread."""
    share_C = MAX_SHARE * expit(parameters[0] + _SPREAD_SHARE * parameters[2 : 2 + n])
    slope_C = np.exp(parameters[1] + _SPREAD_SLOPE * parameters[2 + n :])
    return np.asarray(share_C), np.asarray(slope_C)


def _loss(parameters: Floats, bins: _Bins, counts: tuple[Floats, Floats]) -> tuple[float, Floats]:
    """Minus the log-likelihood of the signs, with the deviations' normal prior, and its gradient."""
    n, (agree_N, against_N) = bins.n_cells, counts
    share_C, slope_C = _cells(parameters, n)
    share_N, slope_N = share_C[bins.cell_N], slope_C[bins.cell_N]
    evidence_N = slope_N * bins.strength_N
    right_N = expit(evidence_N)
    wrong_N = np.exp(log_expit(-evidence_N))
    chance_N = share_N + (1 - 2 * share_N) * right_N
    other_N = share_N + (1 - 2 * share_N) * wrong_N
    deviations = parameters[2:]
    tiny = np.finfo(np.float64).tiny
    loss = -float(agree_N @ np.log(chance_N + tiny) + against_N @ np.log(other_N + tiny)) + 0.5 * float(deviations @ deviations)
    loss -= _PRIOR * float(log_expit(parameters[0]))
    slope_of_N = -(agree_N / (chance_N + tiny) - against_N / (other_N + tiny))
    by_share_N = slope_of_N * (1 - 2 * right_N) * share_N * (1 - share_N / MAX_SHARE)
    by_slope_N = slope_of_N * (1 - 2 * share_N) * right_N * wrong_N * evidence_N
    by_share_C = np.bincount(bins.cell_N, by_share_N, n)
    by_slope_C = np.bincount(bins.cell_N, by_slope_N, n)
    common = np.array([by_share_C.sum() - _PRIOR * expit(-parameters[0]), by_slope_C.sum()])
    return loss, np.concatenate([common, _SPREAD_SHARE * by_share_C, _SPREAD_SLOPE * by_slope_C]) + np.concatenate(
        [np.zeros(2), deviations]
    )


def _interval(
    bins: _Bins, best: _Fit, weights_C: Floats, groups_P: Ints, asked: tuple[int, float], rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Percentiles of ε over resampled groups; the upper end no lower than what so few groups of strong scores can exclude."""
    (resamples, level), codes_P = asked, np.unique(groups_P, return_inverse=True)[1]
    n_groups = int(codes_P.max()) + 1
    if resamples == 0 or n_groups < 2:
        return None, None
    drawn = np.empty(resamples)
    for draw in range(resamples):
        times_G = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)
        drawn[draw] = _fit(bins, bins.counts(times_G[codes_P]), best.parameters).share_C @ weights_C
    lo, hi = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), max(float(hi), _exact_upper(bins, best, codes_P, weights_C, level))


def _exact_upper(bins: _Bins, best: _Fit, codes_P: Ints, weights_C: Floats, level: float) -> float:
    """Upper end for a share of the groups that hold a strong score (Clopper and Pearson): resampling none gives none."""
    strong_N = expit(best.slope_C[bins.cell_N] * bins.strength_N) >= REACH
    held_P = (bins.bin_P >= 0) & strong_N[bins.bin_P] if len(strong_N) else np.zeros(len(bins.bin_P), dtype=np.bool_)
    n_groups = len(np.unique(codes_P[held_P]))
    wrong = float(best.share_C @ weights_C) * n_groups
    return (
        MAX_SHARE if n_groups == 0 else min(MAX_SHARE, float(beta.ppf((1 + level) / 2, wrong + 1, max(n_groups - wrong, 1e-9))))
    )


def _reach(score_P: Floats, slope_P: Floats) -> float:
    evidence_P = np.sort(np.abs(score_P) * slope_P)
    return float(expit(evidence_P[-max(1, len(evidence_P) // 10) :]).mean())


@dataclass(frozen=True)
class Recalibration:
    """What a person's decisions say of the probabilities: logit p′ = intercept + slope · logit p.

    Attributes:
        intercept, slope: 0 and 1 leave probabilities as they are; slope > 0, so that their order stays.
        n: decisions it rests on.
    """

    intercept: float
    slope: float
    n: int

    def apply(self, probability_P: Floats) -> Floats:
        """The probabilities, recalibrated."""
        return np.asarray(expit(self.intercept + self.slope * _logit(probability_P)))


def recalibrate(probability_N: Floats, wrong_N: NDArray[np.bool_]) -> Recalibration:
    """Fit to pairs that a person decided on (Platt scaling with a normal prior about "as it is").

    Which pairs were looked at may depend on their probability, for the fit is given it; it must not depend on what else made them
    look wrong. The prior (SD 1 for the intercept, 0.5 for the log of the slope) gives way to a few dozen decisions.

    Args:
        probability_N: as the model gave them, in (0, 1).
        wrong_N: the decision: true where the label was wrong.
    """
    x_N = _logit(probability_N)
    sign_N = np.where(wrong_N, 1.0, -1.0)

    def loss(v: Floats) -> tuple[float, Floats]:
        slope = np.exp(v[1])
        margin_N = sign_N * (v[0] + slope * x_N)
        pull_N = -sign_N * expit(-margin_N)
        value = -float(log_expit(margin_N).sum()) + 0.5 * v[0] ** 2 + 0.5 * (v[1] / 0.5) ** 2
        return value, np.array([pull_N.sum() + v[0], slope * float(pull_N @ x_N) + v[1] / 0.25])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B")
    return Recalibration(float(found.x[0]), float(np.exp(found.x[1])), len(x_N))


def _logit(probability: Floats) -> Floats:
    return np.asarray(np.log(probability) - np.log1p(-probability))
