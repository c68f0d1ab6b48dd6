"""Suspicion of the pairs of one axis: the probability that a label is wrong where the signals can tell it, else a rank.

Only signals whose directions and neighbours come from other groups can tell a probability (`CROSS_FITTED`). A margin of the
audited model has learnt the label it would have to doubt, and so has a probe on the vectors that its head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import NumericalError
from safer_engine.science.contribution import Contribution, HeldOut, contribution
from safer_engine.science.doubt_model import MAX_IDENTIFIED, MAX_WIDTH, REACH, DoubtModel, fit_doubt
from safer_engine.science.signals import subset_codes, unit_ranks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["rank", "probability"]
Draws = tuple[int, np.random.Generator]
"""Resamples of groups for an interval, and what draws them."""
CROSS_FITTED = frozenset({"latents", "knn", "dense", "retrained"})
SAE_SIGNALS = frozenset({"latents", "knn", "paper"})


@dataclass(frozen=True)
class CellDoubt:
    """What was fitted to a subset: its estimated share of wrong labels, the slope of its scores, its pairs."""

    share: float
    slope: float
    n_pairs: int


@dataclass(frozen=True)
class AxisDoubt:
    """How the suspicion of an axis was made.

    Attributes:
        kind: `probability`, or `rank` with the reason why no probability is given.
        share, lo, hi: estimated share of wrong labels with its interval over groups; None where nothing was fitted.
        reach: see `DoubtModel`; None where nothing was fitted.
        cells: by subset; the subset "" stands for all that are too small for a direction of their own.
        sae: what the SAE adds; None where it could not be told. sae_left_out: whether a dense probe stands in its place.
    """

    kind: Kind
    reason: str | None = None
    share: float | None = None
    lo: float | None = None
    hi: float | None = None
    reach: float | None = None
    cells: dict[str, CellDoubt] = field(default_factory=dict)
    sae: Contribution | None = None
    sae_left_out: bool = False


@dataclass(frozen=True)
class AxisSuspicion:
    """Suspicion of each pair of an axis in [0, 1], and the share of wrong labels it starts from (NaN under `rank`).

    `evidence_P`: how much the signals say, whichever way, ≥ 0: the change of the log-odds from that share, or under `rank` the
    weighted mean of the signals in units of their root mean square; NaN without signals.
    """

    suspicion_P: Floats
    base_P: Floats
    evidence_P: Floats
    doubt: AxisDoubt


@dataclass(frozen=True)
class AxisPairs:
    """Whose suspicion it is: group and subset of each pair of the axis."""

    groups_P: NDArray[Any]
    subsets_P: NDArray[Any]


def axis_suspicion(
    doubts: Mapping[str, Floats], weights: Mapping[str, float], pairs: AxisPairs, resamples: int, rng: np.random.Generator
) -> AxisSuspicion:
    """Suspicion of the pairs of one axis from their signals.

    The signals that weigh are added, each in units of its root mean square; a probability is fitted to the sum
    (`science.doubt_model`). Where that is not possible, suspicion is the weighted mean of the signals' ranks.

    Args:
        doubts: signal → values, higher = more doubtful, 0 = no evidence.
        weights: of the signals, ≥ 0.
        resamples: for the interval of the share; fewer than 20 leave it at ranks.
    """
    n_pairs = len(pairs.groups_P)
    unknown = np.full(n_pairs, np.nan)
    used = sorted(name for name in doubts if weights[name] > 0)
    ranks = fuse_ranks(doubts, weights, n_pairs)
    reason = _no_probability(used)
    score = fused_score(doubts, weights) if used else np.zeros(n_pairs)
    mean_P = np.abs(score) / sum(weights[name] for name in used) if used else unknown
    if reason is not None:
        return AxisSuspicion(ranks, unknown, mean_P, AxisDoubt("rank", reason))
    cell_P, names = _cells(pairs.subsets_P)
    model = fit_doubt(score, cell_P, np.unique(pairs.groups_P, return_inverse=True)[1], resamples=resamples, rng=rng)
    sizes = np.bincount(cell_P, minlength=len(names)).tolist()
    fitted = zip(names, model.share_C.tolist(), model.slope_C.tolist(), sizes, strict=True)
    cells = {name: CellDoubt(share, slope, size) for name, share, slope, size in fitted}
    figures: dict[str, Any] = {
        "share": model.share, "lo": model.lo, "hi": model.hi, "reach": model.reach, "cells": cells,
    }  # fmt: skip
    if not model.identified:
        return AxisSuspicion(ranks, unknown, mean_P, AxisDoubt("rank", _not_identified(model), **figures))
    evidence_P = np.abs(model.evidence(score, cell_P))
    doubt = AxisDoubt("probability", **figures)
    return AxisSuspicion(model.probability(score, cell_P), model.share_C[cell_P], evidence_P, doubt)


def fused_score(doubts: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """Minus the sum of the signals that weigh, each in units of its root mean square: above 0 where they agree with the label."""
    used = sorted(name for name in doubts if weights[name] > 0)
    return np.asarray(-np.sum([weights[name] * _scaled(doubts[name]) for name in used], axis=0), dtype=np.float64)


def dense_in_place(weights: Mapping[str, float]) -> dict[str, float]:
    """The same weights with what the SAE's signals weigh moved to the dense probe."""
    kept = {name: weight for name, weight in weights.items() if name not in SAE_SIGNALS}
    moved = sum(weight for name, weight in weights.items() if name in SAE_SIGNALS)
    return {**kept, "dense": kept.get("dense", 0.0) + moved}


def sae_contribution(
    doubts: Mapping[str, Floats], weights: Mapping[str, float], pairs: AxisPairs, folds_P: Ints, draws: Draws, *, fair: bool
) -> Contribution | None:
    """What the SAE's signals add to the suspicion of an axis over a dense probe in their place.

    None where no signal of the SAE weighs, where the dense probe is missing, or where a signal had seen the labels.

    Args:
        doubts: the signals, `dense` among them.
        fair: see `science.contribution`.
    """
    used = {name for name in doubts if weights.get(name, 0.0) > 0}
    if not used & SAE_SIGNALS or "dense" not in doubts or not used <= CROSS_FITTED:
        return None
    with_P = fused_score({name: doubts[name] for name in used}, weights)
    moved = dense_in_place({name: weights[name] for name in used})
    without_P = fused_score({name: doubts[name] for name in moved}, moved)
    held = HeldOut(folds_P, _cells(pairs.subsets_P)[0], pairs.groups_P)
    return contribution(with_P, without_P, held, fair, *draws)


def fuse_ranks(doubts: Mapping[str, Floats], weights: Mapping[str, float], n_pairs: int) -> Floats:
    """Σ weight · rank / Σ weight over the pairs of one axis, in [0, 1]; NaN where no signal has a weight above 0."""
    total = sum(weights[name] for name in doubts)
    if total <= 0:
        return np.full(n_pairs, np.nan)
    mean = np.zeros(n_pairs)
    for name in sorted(doubts):
        if weights[name] > 0:
            mean += weights[name] / total * unit_ranks(doubts[name])
    return np.clip(mean, 0.0, 1.0)


def _no_probability(used: list[str]) -> str | None:
    if not used:
        return "no signal has a value"
    seen = [name for name in used if name not in CROSS_FITTED]
    return f"{' and '.join(seen)} had seen the labels that would be doubted" if seen else None


def _not_identified(model: DoubtModel) -> str:
    if model.reach < REACH:
        return "no evidence is strong enough to tell how many labels are wrong"
    if model.lo is None or model.hi is None:
        return "there are too few groups to tell how many labels are wrong"
    if model.hi - model.lo > MAX_WIDTH:
        return f"too little is known of how many labels are wrong: {model.lo:.0%} to {model.hi:.0%}"
    return f"up to {model.hi:.0%} of the labels may be wrong (more than {MAX_IDENTIFIED:.0%}), too many to go by them"


def _scaled(doubt_P: Floats) -> Floats:
    if not np.isfinite(doubt_P).all():
        raise NumericalError("a signal is not finite")
    size = float(np.sqrt((doubt_P**2).mean()))
    return doubt_P / size if size > 0 else doubt_P


def _cells(subsets_P: NDArray[Any]) -> tuple[Ints, list[str]]:
    """A cell per pair, and the cells' names: subsets, and "" for the small ones together."""
    code_P, pooled = subset_codes(subsets_P)
    names = [""] * (int(code_P.max()) + 1)
    for name in np.unique(subsets_P):
        code = int(code_P[subsets_P == name][0])
        names[code] = "" if pooled is not None and code == pooled else str(name)
    return code_P, names
