"""The rows of the label-noise benchmark: every ranking of the pairs that is compared, higher = more doubtful."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from safer_engine.science.folds import group_folds
from safer_engine.science.pair_scoring import ScoringParams, SignalInputs, cross_fitted_paper, score_pairs
from safer_engine.science.suspicion import fuse_ranks
from safer_engine.spec import SuspicionSpec

Floats = NDArray[np.float64]
SAE_SIGNALS = ("latents", "knn", "paper")
FUSION = "latents 2 + margin 1"
WITHOUT = "probe_cv 2 + margin 1"
DENSE_INSTEAD = "dense probe 2 + margin 1"
PAPER = "the paper's score"
LATENTS, MARGIN, PROBE, DENSE = "latents (the default)", "in-sample margin", "probe_cv", "dense probe"
FUSED = {"latents": 2.0, "margin": 1.0}
"""Weights of the fusion that the default was chosen against."""
ALONE = {MARGIN: "margin", PROBE: "probe_cv", DENSE: "dense", LATENTS: "latents", "kNN": "knn"}


def fusions(weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A fusion with the SAE's signals, and what it is compared with: signal weights by row.

    Without the SAE: its signals are replaced by the cross-validated probe on what the reward head reads. With a dense probe in
    their place: by the matched filter on mean activations at the hook, which is what the SAE reads.
    """
    kept = {name: weight for name, weight in weights.items() if name not in SAE_SIGNALS}
    moved = sum(weight for name, weight in weights.items() if name in SAE_SIGNALS)
    return {
        WITHOUT: {**kept, "probe_cv": kept.get("probe_cv", 0.0) + moved},
        DENSE_INSTEAD: {**kept, "dense": kept.get("dense", 0.0) + moved},
        FUSION: dict(weights),
    }


def row_doubts(inputs: SignalInputs, pair_ids: Sequence[str], seed: int) -> dict[str, Floats]:
    """Doubt of every pair by row, each within its axis."""
    spec = SuspicionSpec()
    params = ScoringParams(
        weights=dict.fromkeys(ALONE.values(), 1.0),
        folds=spec.folds,
        shrinkage=spec.shrinkage,
        neighbours=spec.neighbours,
        seed=seed,
    )
    scored = score_pairs(replace(inputs, paper=None), params)
    if scored.left_out:
        raise ValueError(f"signals are missing: {scored.left_out}")
    rows = {"random": _random(pair_ids, seed)}
    rows |= {row: scored.signals[signal] for row, signal in ALONE.items()}
    rows[PAPER] = np.zeros(len(pair_ids))
    fused = {name: np.zeros(len(pair_ids)) for name in fusions(FUSED)}
    for axis in np.unique(inputs.axes_P):
        at = np.flatnonzero(inputs.axes_P == axis)
        part = inputs.take(at)
        assert part.latents is not None
        folds_P = group_folds((str(group) for group in part.groups_P), spec.folds, seed)
        rows[PAPER][at] = -cross_fitted_paper(part.latents, folds_P=folds_P)
        for name, weights in fusions(FUSED).items():
            fused[name][at] = fuse_ranks({signal: scored.signals[signal][at] for signal in weights}, weights, len(at))
    return {**rows, **fused}


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
