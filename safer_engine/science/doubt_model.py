"""From a score to the probability that a label is wrong, without a single label known to be wrong.

A score s of a pair is signed: above 0 where the evidence agrees with the label. Scores of right labels are taken as normal about
μ > 0 with standard deviation σ. Turning a label round turns its score round, so scores of wrong labels lie about −ρ μ, with the
same σ; ρ would be 1 were it not that a reward model that was trained on the wrong labels has learnt something of them. With a
share ε of the labels wrong, scores have the density

    f(s) = (1 − ε) N(s; μ, σ²) + ε N(s; −ρ μ, σ²),

and the log-odds of a wrong label are a line,

    log P(wrong | s) / P(right | s) = log ε / (1 − ε) − a (s − c),      a = (1 + ρ) μ / σ²,  c = (1 − ρ) μ / 2.

A score of exactly 0 is no evidence: it counts for nothing, and its probability is ε. Scores must be cross-fitted: one that saw
its own label agrees with it too often, and ε comes out too small. Each cell (a subset) has its own ε, μ and σ, drawn towards the
axis's as far as its own pairs do not tell them; ρ is the axis's.

Where no score is strong, ε and μ cannot be told apart; `identified` says so, and then only the order of the scores counts.
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
_BINS = 256
"""Scores are binned per cell, as many in each."""
_SPREAD = 0.5
"""Standard deviation of logit ε, log μ and log σ of the cells about the axis's."""
_SPREAD_RATIO = 0.3
"""Prior standard deviation of log ρ about ρ = 1."""
_PRIOR = 0.5
"""Pairs' worth of a contradiction that nobody saw: keeps ε above 0 where no strong score contradicts its label."""
_STARTS = (-3.0, -1.5, -0.5)
_BOUNDS = ((-30.0, 30.0), (-9.0, 3.0), (-5.0, 3.0), (-3.0, 3.0))
"""Of logit 2ε, log μ, log σ (in units of the scores' root mean square) and log ρ: where scores of a cell are all alike, σ has no
other end."""
_FAR = 10.0
"""Of a cell's deviation, in standard deviations of its prior."""
REACH, MAX_WIDTH, MAX_IDENTIFIED = 0.9, 0.15, 0.35
"""For ε to be told: least mean sureness of the strongest tenth of the scores, widest interval, and largest upper end."""
MAX_SHARE = 0.5
"""ε stays below: a dataset of which more is wrong is one of its own contrary."""


@dataclass(frozen=True)
class DoubtModel:
    """The fitted model of one axis.

    Attributes:
        share: ε over the axis (mean of its cells', weighted by pairs), in (0, 0.5).
        lo, hi: ends of its interval, from resampling groups; None where it was not asked for or cannot be told.
        share_C, mean_C, spread_C: ε, μ > 0 and σ > 0 of each cell, the latter two in units of the score.
        ratio: ρ > 0.
        reach: mean of 1 / (1 + e^{−a |s|}) over the strongest tenth of the scores, in [0.5, 1].
    """

    share: float
    lo: float | None
    hi: float | None
    share_C: Floats
    mean_C: Floats
    spread_C: Floats
    ratio: float
    reach: float

    @property
    def slope_C(self) -> Floats:
        """a of each cell, > 0, per unit of the score."""
        return np.asarray((1 + self.ratio) * self.mean_C / self.spread_C**2)

    @property
    def identified(self) -> bool:
        """Whether some scores are strong enough, and the pairs enough, to tell ε from how strong the evidence is."""
        if self.lo is None or self.hi is None:
            return False
        return self.reach >= REACH and self.hi - self.lo <= MAX_WIDTH and self.hi <= MAX_IDENTIFIED

    def evidence(self, score_P: Floats, cell_P: Ints) -> Floats:
        """Log-odds of a wrong label that the score adds to those of ε; 0 for a score of 0, else falling in the score."""
        centre_C = (1 - self.ratio) * self.mean_C / 2
        return np.asarray(np.where(score_P == 0, 0.0, -self.slope_C[cell_P] * (score_P - centre_C[cell_P])))

    def probability(self, score_P: Floats, cell_P: Ints) -> Floats:
        """P(wrong | s) of each pair, in (0, 1)."""
        share_P = self.share_C[cell_P]
        with np.errstate(over="ignore"):
            return np.asarray(expit(np.log(share_P) - np.log1p(-share_P) + self.evidence(score_P, cell_P)))

    def log_density(self, score_P: Floats, cell_P: Ints) -> Floats:
        """log f(s) of each score."""
        parts = _log_parts(score_P, self.share_C[cell_P], self.mean_C[cell_P], self.spread_C[cell_P], self.ratio)
        return np.asarray(np.logaddexp(*parts))


def fit_doubt(
    score_P: Floats, cell_P: Ints, groups_P: Ints, *, resamples: int = 200, rng: np.random.Generator, level: float = 0.95
) -> DoubtModel:
    """Fit ε, μ and σ of the cells of one axis, and ρ, by penalised maximum likelihood.

    Args:
        score_P: cross-fitted scores, finite, above 0 where the evidence agrees with the label; a score of 0 says nothing.
        cell_P: cell (subset) of each pair, from 0.
        groups_P: group of each pair: the unit of resampling.
        resamples: refits over resampled groups for the interval; 0 for none.

    Raises:
        NumericalError: no scores, or one that is not finite.
    """
    if len(score_P) == 0 or not np.isfinite(score_P).all():
        raise NumericalError("scores must be finite, and at least one")
    n_cells = int(cell_P.max()) + 1
    unit = float(np.sqrt((score_P[score_P != 0] ** 2).mean())) if score_P.any() else 1.0
    bins = _Bins.of(score_P / unit, cell_P, n_cells)
    counts = bins.counts(np.ones(len(score_P)))
    best = min((_fit(bins, counts, _start(start, n_cells)) for start in _STARTS), key=lambda fit: fit.loss)
    weights_C = np.bincount(cell_P, minlength=n_cells) / len(score_P)
    slope_C = (1 + best.ratio) * best.mean_C / best.spread_C**2
    lo, hi = _interval(bins, best, weights_C, groups_P, (resamples, level), rng)
    share = float(best.share_C @ weights_C)
    if lo is not None and hi is not None:
        lo, hi = min(lo, share), max(hi, share)
    reach = _reach(score_P / unit, slope_C[cell_P])
    return DoubtModel(share, lo, hi, best.share_C, best.mean_C * unit, best.spread_C * unit, best.ratio, reach)


@dataclass(frozen=True)
class _Bins:
    """Scores in bins: mean and cell of each bin, bin of each pair (−1: score 0)."""

    score_N: Floats
    cell_N: Ints
    bin_P: Ints
    n_cells: int

    @staticmethod
    def of(score_P: Floats, cell_P: Ints, n_cells: int) -> _Bins:
        bin_P = np.full(len(score_P), -1, dtype=np.int64)
        means: list[float] = []
        cells: list[int] = []
        for cell in range(n_cells):
            rows = np.flatnonzero((cell_P == cell) & (score_P != 0))
            ordered = rows[np.argsort(score_P[rows], kind="stable")]
            for part in np.array_split(ordered, min(_BINS, len(ordered))) if len(ordered) else []:
                bin_P[part] = len(means)
                means.append(float(score_P[part].mean()))
                cells.append(cell)
        return _Bins(np.array(means), np.array(cells, dtype=np.int64), bin_P, n_cells)

    def counts(self, weights_P: Floats) -> Floats:
        """Weight of the pairs in each bin."""
        held = self.bin_P >= 0
        return np.asarray(np.bincount(self.bin_P[held], weights_P[held], len(self.score_N)), dtype=np.float64)


@dataclass(frozen=True)
class _Fit:
    loss: float
    parameters: Floats
    share_C: Floats
    mean_C: Floats
    spread_C: Floats
    ratio: float


def _start(share: float, n_cells: int) -> Floats:
    """Parameters to begin with: (logit 2ε, log μ, log σ, log ρ) of the axis, and the cells' deviations of the first three."""
    return np.concatenate([[share, -0.2, -0.5, 0.0], np.zeros(3 * n_cells)])


def _fit(bins: _Bins, counts_N: Floats, start: Floats) -> _Fit:
    bounds = [*_BOUNDS, *[(-_FAR, _FAR)] * (len(start) - len(_BOUNDS))]
    found = minimize(_loss, start, args=(bins, counts_N), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    return _Fit(float(found.fun), found.x, *_cells(found.x))


def _cells(parameters: Floats) -> tuple[Floats, Floats, Floats, float]:
    """ε, μ and σ of the cells, and ρ: the axis's and each cell's deviation, in units of their spread."""
    logit, mean, spread = parameters[:3, None] + _SPREAD * parameters[4:].reshape(3, -1)
    return np.asarray(MAX_SHARE * expit(logit)), np.exp(mean), np.exp(spread), float(np.exp(parameters[3]))


def _log_parts(score: Floats, share: Floats, mean: Floats, spread: Floats, ratio: float) -> tuple[Floats, Floats]:
    """log of both terms of f(s): right labels, wrong labels."""
    constant = -np.log(spread) - 0.5 * np.log(2 * np.pi)
    right = np.log1p(-share) - 0.5 * ((score - mean) / spread) ** 2 + constant
    wrong = np.log(share + np.finfo(np.float64).tiny) - 0.5 * ((score + ratio * mean) / spread) ** 2 + constant
    return right, wrong


def _loss(parameters: Floats, bins: _Bins, counts_N: Floats) -> tuple[float, Floats]:
    """Minus the log-likelihood of the scores, with the priors, and its gradient."""
    (share_C, mean_C, spread_C, ratio), deviations = _cells(parameters), parameters[4:]
    share_N, mean_N, spread_N = (values[bins.cell_N] for values in (share_C, mean_C, spread_C))
    right_N, wrong_N = _log_parts(bins.score_N, share_N, mean_N, spread_N, ratio)
    doubt_N = expit(wrong_N - right_N)
    above_N, below_N = bins.score_N - mean_N, bins.score_N + ratio * mean_N
    by_share_N = (doubt_N - share_N) / (1 - share_N) * (1 - share_N / MAX_SHARE)
    by_mean_N = ((1 - doubt_N) * above_N - ratio * doubt_N * below_N) * mean_N / spread_N**2
    by_spread_N = ((1 - doubt_N) * above_N**2 + doubt_N * below_N**2) / spread_N**2 - 1
    by_ratio_N = -doubt_N * ratio * mean_N * below_N / spread_N**2
    by_cell = np.stack(
        [np.bincount(bins.cell_N, -counts_N * part, bins.n_cells) for part in (by_share_N, by_mean_N, by_spread_N)]
    )
    loss = -float(counts_N @ np.logaddexp(right_N, wrong_N)) + 0.5 * float(deviations @ deviations)
    loss += 0.5 * float(parameters[3] / _SPREAD_RATIO) ** 2 - _PRIOR * float(log_expit(parameters[0]))
    common = np.append(by_cell.sum(axis=1), -float(counts_N @ by_ratio_N) + parameters[3] / _SPREAD_RATIO**2)
    common[0] -= _PRIOR * expit(-parameters[0])
    return loss, np.concatenate([common, _SPREAD * by_cell.ravel() + deviations])


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
    slope_C = (1 + best.ratio) * best.mean_C / best.spread_C**2
    strong_N = expit(slope_C[bins.cell_N] * np.abs(bins.score_N)) >= REACH
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
