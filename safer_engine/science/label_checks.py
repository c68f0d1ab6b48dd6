"""How far labels hold: whether they tell where a latent fires, and whether a second reading rates alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safer_engine.errors import NumericalError

_Z = 1.959963984540054
_RATINGS = 5


@dataclass(frozen=True)
class Detection:
    """How well windows with and without a latent were told apart.

    Attributes:
        score: balanced accuracy, (recall + specificity) / 2, in [0, 1]; guessing gives 0.5.
        lo, hi: ends of its 95 % interval.
        recall: share of the windows with the latent that were taken for such; specificity: of those without it, for such.
        n_fires, n_silent: windows of either kind that were judged.
    """

    score: float
    lo: float
    hi: float
    recall: float
    specificity: float
    n_fires: int
    n_silent: int


@dataclass(frozen=True)
class Agreement:
    """How two readings of the same latents agree.

    Attributes:
        kappa: Cohen's, with quadratic weights, in [−1, 1]; None where both readings give every latent one same rating.
        lo, hi: ends of its 95 % interval; None where there is no kappa in too many resamples, or fewer than 3 latents.
        same: share rated exactly alike.
        n: latents rated twice.
    """

    kappa: float | None
    lo: float | None
    hi: float | None
    same: float
    n: int


def detection(fires: Sequence[bool], judged: Sequence[bool | None]) -> Detection | None:
    """Balanced accuracy of judgements, with an interval; None where one kind of window has none that was judged.

    The interval joins the Wilson intervals of the two shares by the method of variance estimates recovery (Zou & Donner
    2008, equation 4): windows come from different groups, so they are taken as independent.

    Args:
        fires: [n] whether the latent fires in the window.
        judged: [n] what was said of it; None: nothing.
    """
    if len(fires) != len(judged):
        raise NumericalError(f"{len(judged)} judgements of {len(fires)} windows")
    hits = [said for truth, said in zip(fires, judged, strict=True) if truth and said is not None]
    misses = [not said for truth, said in zip(fires, judged, strict=True) if not truth and said is not None]
    if not hits or not misses:
        return None
    recall, specificity = sum(hits) / len(hits), sum(misses) / len(misses)
    (recall_lo, recall_hi), (silent_lo, silent_hi) = wilson(sum(hits), len(hits)), wilson(sum(misses), len(misses))
    score = (recall + specificity) / 2
    below = math.hypot(recall - recall_lo, specificity - silent_lo) / 2
    above = math.hypot(recall_hi - recall, silent_hi - specificity) / 2
    return Detection(score, max(0.0, score - below), min(1.0, score + above), recall, specificity, len(hits), len(misses))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Ends of the 95 % score interval of a share (Wilson 1927); n at least 1."""
    if not 0 <= successes <= n or n < 1:
        raise NumericalError(f"{successes} of {n} is no share")
    share = successes / n
    middle = share + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    ends = (middle - reach) / (1 + _Z**2 / n), (middle + reach) / (1 + _Z**2 / n)
    return (0.0 if successes == 0 else max(0.0, ends[0])), (1.0 if successes == n else min(1.0, ends[1]))


def agreement(first: Sequence[int], again: Sequence[int], resamples: int, rng: np.random.Generator) -> Agreement | None:
    """Agreement of two readings, each latent's ratings 1–5, with a percentile interval from resampling latents; None without any.

    κ = 1 − Σ w o / Σ w e with w = (i − j)², o the observed table and e that of independent readings with the same
    margins (Cohen 1968).
    """
    ratings = np.stack([np.asarray(first, dtype=np.int64), np.asarray(again, dtype=np.int64)])
    n = ratings.shape[1]
    if n == 0:
        return None
    if ratings.min() < 1 or ratings.max() > _RATINGS:
        raise NumericalError("a rating is not in 1 … 5")
    kappa = _kappa(ratings)
    drawn = [_kappa(ratings[:, rng.integers(n, size=n)]) for _ in range(resamples)] if kappa is not None and n > 2 else []
    known = [value for value in drawn if value is not None]
    lo, hi = np.quantile(known, [0.025, 0.975]).tolist() if 2 * len(known) > resamples else (None, None)
    return Agreement(kappa, lo, hi, float((ratings[0] == ratings[1]).mean()), n)


def _kappa(ratings: np.ndarray) -> float | None:
    """None where independent readings with these margins could not disagree."""
    observed = float(((ratings[0] - ratings[1]) ** 2).mean())
    means, squares = ratings.mean(axis=1), (ratings**2).mean(axis=1)
    expected = float(squares.sum() - 2 * means[0] * means[1])
    return None if expected <= 1e-12 else 1 - observed / expected
