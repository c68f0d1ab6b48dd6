"""The rows of the label-noise benchmark: every ranking of the pairs that is compared, higher = more doubtful."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.science.contribution import HeldOut, label_information
from safer_engine.science.folds import group_folds
from safer_engine.science.pair_scoring import ScoringParams, SignalInputs, cross_fitted_paper, score_pairs
from safer_engine.science.recalibration import reliability
from safer_engine.science.signals import knn_doubt, subset_codes
from safer_engine.science.suspicion import AxisPairs, AxisSuspicion, axis_suspicion, fused_score
from safer_engine.spec import SuspicionSpec
from safer_engine.spec_signals import DEFAULT_SIGNALS, DEFAULT_SIGNALS_RETRAINED

Floats = NDArray[np.float64]
RANDOM, PAPER = "random", "the paper's score"
MARGIN, PROBE, DENSE, LATENTS, KNN = "in-sample margin", "probe_cv", "dense probe", "latents", "kNN on latents"
RETRAINED, DENSE_KNN = "2-fold retrained margin", "kNN on dense"
ALONE = {MARGIN: "margin", PROBE: "probe_cv", RETRAINED: "retrained", DENSE: "dense", LATENTS: "latents", KNN: "knn"}
DEFAULT, DEFAULT_DENSE = "fusion, no retraining", "fusion, no retraining, dense in the SAE's place"
FUSION, DENSE_INSTEAD, WITHOUT = "fusion", "fusion, dense in the SAE's place", "fusion without the SAE"


def fusions(retrained: bool) -> dict[str, dict[str, float]]:
    """The default fusions of signals, and what they are compared with: weights by row, over the names of rows.

    With a dense probe in the SAE's place: what the SAE's two signals are made of is replaced by mean activations at the hook,
    which is what the SAE reads. Without the SAE: margins, the retrained ones first; weights chosen as the others' were.
    """
    names = {signal: row for row, signal in ALONE.items()}
    moved = {LATENTS: DENSE, KNN: DENSE_KNN}
    found = {DEFAULT: {names[signal]: weight for signal, weight in DEFAULT_SIGNALS.items()}}
    if retrained:
        found[FUSION] = {names[signal]: weight for signal, weight in DEFAULT_SIGNALS_RETRAINED.items()}
        found[WITHOUT] = {RETRAINED: 1.0, MARGIN: 0.5}
    for row, dense in ((DEFAULT, DEFAULT_DENSE), (FUSION, DENSE_INSTEAD)):
        if row in found:
            found[dense] = {moved.get(name, name): weight for name, weight in found[row].items()}
    return found


def row_doubts(inputs: SignalInputs, pair_ids: Sequence[str], seed: int) -> dict[str, Floats]:
    """Doubt of every pair by row, each within its axis; rows of the retrained margin only where the inputs have one."""
    params = _params(seed)
    alone = {row: signal for row, signal in ALONE.items() if signal != "retrained" or inputs.retrained_P is not None}
    scored = score_pairs(replace(inputs, paper=None), replace(params, weights=dict.fromkeys(alone.values(), 1.0)))
    if scored.left_out:
        raise ValueError(f"signals are missing: {scored.left_out}")
    rows = {RANDOM: _random(pair_ids, seed), **{row: scored.signals[signal] for row, signal in alone.items()}}
    chosen = fusions(retrained=inputs.retrained_P is not None)
    rows |= {row: np.zeros(len(pair_ids)) for row in (PAPER, DENSE_KNN, *chosen)}
    for axis in np.unique(inputs.axes_P):
        at = np.flatnonzero(inputs.axes_P == axis)
        part = inputs.take(at)
        assert part.latents is not None
        assert part.dense_delta_PD is not None
        rows[PAPER][at] = -cross_fitted_paper(part.latents, folds_P=_folds(part, params))
        rng = np.random.default_rng(seed)
        rows[DENSE_KNN][at] = knn_doubt(part.dense_delta_PD, groups_P=part.groups_P, neighbours=params.neighbours, rng=rng)
        for row, weights in chosen.items():
            rows[row][at] = _fused({name: rows[name][at] for name in weights}, weights, part).suspicion_P
    return rows


def label_bits(inputs: SignalInputs, rows: Mapping[str, Floats], axis: str, seed: int) -> dict[str, float]:
    """Bits a pair that each held-out row tells about the labels as they stand, wrong ones included, on one axis."""
    at = np.flatnonzero(inputs.axes_P == axis)
    part = inputs.take(at)
    held = HeldOut(_folds(part, _params(seed)), subset_codes(part.subsets_P)[0], part.groups_P)
    scores = {row: -rows[row][at] for row in (RETRAINED, DENSE, DENSE_KNN, LATENTS, KNN) if row in rows}
    for row, weights in fusions(retrained=inputs.retrained_P is not None).items():
        if MARGIN not in weights:
            scores[row] = fused_score({name: rows[name][at] for name in weights}, weights)
    return {row: float(label_information(score, held).mean()) for row, score in scores.items()}


def reliabilities(
    inputs: SignalInputs, rows: Mapping[str, Floats], axis: str, flipped_P: NDArray[np.bool_], seed: int
) -> dict[str, dict[str, Any]]:
    """How far the default fusions' probabilities on one axis are from the flips: all of it, and each subset.

    A row whose suspicion is a rank has its reason only. `constant`: the Brier score of the share that was flipped.
    """
    at = np.flatnonzero(inputs.axes_P == axis)
    part, flipped = inputs.take(at), flipped_P[at]
    facts: dict[str, dict[str, Any]] = {}
    for row, weights in fusions(retrained=inputs.retrained_P is not None).items():
        if row not in (DEFAULT, FUSION):
            continue
        found = _fused({name: rows[name][at] for name in weights}, weights, part)
        facts[row] = asdict(replace(found.doubt, sae=None))
        if found.doubt.kind != "probability":
            continue
        wheres = {"": np.ones(len(at), dtype=np.bool_)} | {
            str(name): part.subsets_P == name for name in np.unique(part.subsets_P)
        }
        facts[row]["reliability"] = {
            name: _reliability(found.suspicion_P[where], flipped[where], part.groups_P[where], seed)
            for name, where in wheres.items()
        }
    return facts


def _reliability(probability: Floats, flipped: NDArray[np.bool_], groups: NDArray[Any], seed: int) -> dict[str, Any]:
    share, above = float(flipped.mean()), probability > 0.5
    counts = {"n": len(flipped), "n_above_half": int(above.sum()), "flipped_above_half": int(flipped[above].sum())}
    return {**counts, "share": share, "constant": share * (1 - share), **asdict(reliability(probability, flipped, groups, seed))}


def _params(seed: int) -> ScoringParams:
    spec = SuspicionSpec()
    return ScoringParams({}, folds=spec.folds, shrinkage=spec.shrinkage, neighbours=spec.neighbours, seed=seed)


def _folds(part: SignalInputs, params: ScoringParams) -> NDArray[np.int64]:
    return group_folds((str(group) for group in part.groups_P), params.folds, params.seed)


def _fused(doubts: Mapping[str, Floats], weights: Mapping[str, float], part: SignalInputs) -> AxisSuspicion:
    """Suspicion as the product makes it of these signals."""
    signal = {**ALONE, DENSE_KNN: "knn"}
    named = {signal[row]: values for row, values in doubts.items()}
    pairs, rng = AxisPairs(part.groups_P, part.subsets_P), np.random.default_rng(0)
    return axis_suspicion(named, {signal[row]: weight for row, weight in weights.items()}, pairs, 100, rng)


def contradictions(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Floats:
    """How many other pairs of the same prompt prefer what this one rejects or reject what it prefers: no model needed."""
    preferred = Counter(zip(prompts, chosen, strict=True))
    refused = Counter(zip(prompts, rejected, strict=True))
    return np.array(
        [preferred[prompt, bad] + refused[prompt, good] for prompt, good, bad in zip(prompts, chosen, rejected, strict=True)],
        dtype=np.float64,
    )


def _random(pair_ids: Sequence[str], seed: int) -> Floats:
    digests = (hashlib.sha256(f"{seed}/random/{name}".encode()).digest()[:8] for name in pair_ids)
    return np.array([int.from_bytes(raw, "big") / 2.0**64 for raw in digests])
