"""What people's decisions say of the probabilities of an axis: how reliable they are, and what they become.

The map is logistic in the logit of the probability (`doubt_model.recalibrate`), so the order of the pairs stays, and it is drawn
towards "as it is", so that few decisions move little. It is checked on decisions that it was not fitted to, by whole groups, and
used only where it does not make the probabilities worse there.

Reviewers see mostly the most doubtful pairs. The fit is given the probability, so it does not matter how the choice of pairs
depends on it; the reliability is that of the pairs that were decided on, and of no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from safer_engine.errors import NumericalError
from safer_engine.science.doubt_model import Recalibration, recalibrate
from safer_engine.science.folds import group_folds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MIN_DECISIONS, MIN_OF_EACH, MIN_GROUPS = 20, 5, 10
"""Fewer decisions, or fewer of one kind, or of fewer groups, recalibrate nothing."""
_FOLDS, _BINS, _RESAMPLES = 5, 10, 1000
_REFITS = 200


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval over resampled groups."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Reliability:
    """How far probabilities and decisions are apart.

    Attributes:
        brier: mean squared difference, 0 is best.
        ece: expected calibration error over bins of equally many decisions: mean distance of what was foretold and what was
            decided. Never 0, for chance alone sets them apart.
        ece_chance: what it would be on average if every probability were exactly right.
    """

    brier: Measure
    ece: Measure
    ece_chance: float


@dataclass(frozen=True)
class AxisDecisions:
    """Decisions on the pairs of one axis and what follows from them.

    Attributes:
        n, n_wrong, n_groups: decisions, those that called the label wrong, their groups.
        used: whether the probabilities of the axis were recalibrated; `reason` says why not.
        intercept, slope: of the map that was fitted (see `Recalibration`); None where none was.
        lowest, highest: probabilities of the pairs decided on, before; the map is a guess beyond them.
        before: reliability of the probabilities as the model gave them; None for too few decisions.
        after: the same with maps fitted to the other groups' decisions.
    """

    n: int
    n_wrong: int
    n_groups: int
    used: bool
    reason: str | None = None
    intercept: float | None = None
    slope: float | None = None
    lowest: float | None = None
    highest: float | None = None
    before: Reliability | None = None
    after: Reliability | None = None

    @property
    def map(self) -> Recalibration:
        """The map to apply; the identity where none is used."""
        if not self.used or self.intercept is None or self.slope is None:
            return Recalibration(0.0, 1.0, self.n)
        return Recalibration(self.intercept, self.slope, self.n)


def learn_from(probability_N: Floats, wrong_N: Bools, groups_N: NDArray[Any], seed: int) -> AxisDecisions:
    """Check and recalibrate the probabilities of an axis by the decisions on some of its pairs.

    Args:
        probability_N: as the model gave them, in (0, 1).
        wrong_N: the decisions: true where the label was called wrong.
        groups_N: group of each pair: what is left out together.

    Raises:
        NumericalError: a probability is not in (0, 1).
    """
    n, n_wrong, n_groups = len(wrong_N), int(wrong_N.sum()), len(np.unique(groups_N))
    if n and not ((probability_N > 0) & (probability_N < 1)).all():
        raise NumericalError("a probability that was decided on is not between 0 and 1")
    reason = _too_few(n, n_wrong, n_groups)
    if reason is not None:
        return AxisDecisions(n, n_wrong, n_groups, used=False, reason=reason)
    folds_N = group_folds((str(group) for group in groups_N), _FOLDS, seed)
    held_out_N = np.empty(n)
    for fold in np.unique(folds_N):
        others = folds_N != fold
        held_out_N[~others] = recalibrate(probability_N[others], wrong_N[others]).apply(probability_N[~others])
    before = reliability(probability_N, wrong_N, groups_N, seed)
    after = reliability(held_out_N, wrong_N, groups_N, seed)
    better = after.brier.value <= before.brier.value
    fitted = recalibrate(probability_N, wrong_N)
    return AxisDecisions(
        n,
        n_wrong,
        n_groups,
        used=better,
        reason=None if better else "on held-out decisions the probabilities are nearer as they are",
        intercept=fitted.intercept,
        slope=fitted.slope,
        lowest=float(probability_N.min()),
        highest=float(probability_N.max()),
        before=before,
        after=after,
    )


def reliability(probability_N: Floats, wrong_N: Bools, groups_N: NDArray[Any], seed: int) -> Reliability:
    """Brier score and calibration error of probabilities against decisions (or a planted truth), with intervals over groups."""
    rng = np.random.default_rng(seed)
    order = np.argsort(probability_N, kind="stable")
    bin_N = np.empty(len(order), dtype=np.int64)
    for number, part in enumerate(np.array_split(order, min(_BINS, max(2, len(order) // MIN_OF_EACH)))):
        bin_N[part] = number
    truth_N = wrong_N.astype(np.float64)
    squares_N, gaps_N = (probability_N - truth_N) ** 2, probability_N - truth_N
    code_N = np.unique(groups_N, return_inverse=True)[1]
    n_groups, n_bins = int(code_N.max()) + 1, int(bin_N.max()) + 1
    drawn = np.empty((_RESAMPLES, 2))
    for draw in range(_RESAMPLES):
        weight_N = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[code_N].astype(np.float64)
        drawn[draw] = weight_N @ squares_N / weight_N.sum(), _ece(gaps_N, bin_N, n_bins, weight_N)
    ones = np.ones(len(truth_N))
    chance = [_ece(probability_N - (rng.random(len(ones)) < probability_N), bin_N, n_bins, ones) for _ in range(_REFITS)]
    lo, hi = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Reliability(
        Measure(float(squares_N.mean()), float(lo[0]), float(hi[0])),
        Measure(_ece(gaps_N, bin_N, n_bins, ones), float(lo[1]), float(hi[1])),
        float(np.mean(chance)),
    )


@dataclass(frozen=True)
class Share:
    """A share with the ends of its interval."""

    value: float
    lo: float
    hi: float


def recalibrated_share(
    probability_P: Floats, model: Share, decided: tuple[Floats, Bools, NDArray[Any]], rng: np.random.Generator
) -> Share:
    """The mean of the recalibrated probabilities of an axis.

    Its interval joins, as log-odds, two independent errors: that of the model's share, and that of the map, from resampling the
    groups of the decisions.

    Args:
        probability_P: of all pairs of the axis, as the model gave them.
        model: the model's own share of wrong labels.
        decided: probability, decision and group of the pairs decided on.
    """
    probability_N, wrong_N, groups_N = decided
    value = float(recalibrate(probability_N, wrong_N).apply(probability_P).mean())
    code_N = np.unique(groups_N, return_inverse=True)[1]
    by_group = [np.flatnonzero(code_N == code) for code in range(int(code_N.max()) + 1)]
    drawn = np.empty(_REFITS)
    for draw in range(_REFITS):
        rows = np.concatenate([by_group[code] for code in rng.integers(len(by_group), size=len(by_group))])
        drawn[draw] = recalibrate(probability_N[rows], wrong_N[rows]).apply(probability_P).mean()
    lo, hi = np.quantile(drawn, [0.025, 0.975])
    middle, centre = logit(value), logit(model.value)
    down = np.hypot(max(0.0, middle - logit(lo)), max(0.0, centre - logit(model.lo)))
    up = np.hypot(max(0.0, logit(hi) - middle), max(0.0, logit(model.hi) - centre))
    return Share(value, float(expit(middle - down)), float(expit(middle + up)))


def _too_few(n: int, n_wrong: int, n_groups: int) -> str | None:
    if n < MIN_DECISIONS:
        return f"{n} decisions, fewer than {MIN_DECISIONS}"
    if min(n_wrong, n - n_wrong) < MIN_OF_EACH:
        return f"{n_wrong} labels called wrong and {n - n_wrong} right, fewer than {MIN_OF_EACH} of one kind"
    return f"decisions on {n_groups} groups, fewer than {MIN_GROUPS}" if n_groups < MIN_GROUPS else None


def _ece(gaps_N: Floats, bin_N: NDArray[np.int64], n_bins: int, weight_N: Floats) -> float:
    sums = np.bincount(bin_N, weight_N * gaps_N, n_bins)
    return float(np.abs(sums).sum() / weight_N.sum())
