"""How doubtful each pair's label is: the paper's pair score, and the fusion of cross-fitted signals.

Axes are handled separately: signals are fitted and ranked within an axis, so suspicion compares pairs of one axis only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safer_engine.science.evidence import Evidence, no_evidence, scatter, top_contributions
from safer_engine.science.folds import group_folds
from safer_engine.science.limits import SAE_ADDS_GROUPS
from safer_engine.science.pair_deltas import LatentDelta, LatentSums, latent_delta, matrix_of
from safer_engine.science.probes import probe_doubt
from safer_engine.science.signals import Floats, Ints, knn_doubt, margin_doubt, matched_filter, retrained_doubt
from safer_engine.science.suspicion import (
    AxisDoubt,
    AxisPairs,
    AxisSuspicion,
    axis_suspicion,
    dense_in_place,
    sae_contribution,
)

PAPER_KEEP = 32
"""Latents the paper keeps (arXiv 2507.00665, METHOD §1)."""


@dataclass(frozen=True)
class PaperFeatures:
    """The paper's safety features.

    Attributes:
        latent_ids: the kept latents.
        signs: +1 for F+ (salience > 0), −1 for F− (salience < 0); 0 leaves a latent out.
        pool: the latents the kept ones were chosen from: all that are rated safety-relevant; None: only the kept are known.
    """

    latent_ids: Ints
    signs: Floats
    pool: Ints | None = None


def paper_pair_scores(sums: LatentSums, features: PaperFeatures) -> Floats:
    """The paper's pair score S(y+) − S(y−), float64 [P]; low = doubtful (arXiv 2507.00665; METHOD §1).

    S(y) = mean over the covered positions of y of Σ_{F+} z − Σ_{F−} z, positive z only. A text without a position has S = 0.
    """
    sign_S = np.zeros(sums.n_latents)
    sign_S[features.latent_ids] = features.signs
    out = np.zeros(len(sums.n_positions_P2))
    for place, block in sums.blocks():
        n = np.maximum(block.n_positions_P2, 1)
        out[place] = (matrix_of(block.chosen_PS) @ sign_S) / n[:, 0] - (matrix_of(block.rejected_PS) @ sign_S) / n[:, 1]
    return out


def paper_salience(sums: LatentSums) -> Floats:
    """The paper's contrast of sums, float64 [S] in (−1, 1); 0 where there is no activation at all.

    s_i = (a_i+ − a_i−) / (a_i+ + a_i− + C), C = 2 × the mean of a over all latents and both sides (METHOD §1).
    """
    chosen = np.asarray(matrix_of(sums.chosen_PS).sum(axis=0, dtype=np.float64)).ravel()
    rejected = np.asarray(matrix_of(sums.rejected_PS).sum(axis=0, dtype=np.float64)).ravel()
    below = chosen + rejected + 2 * np.concatenate([chosen, rejected]).mean()
    return np.asarray(np.divide(chosen - rejected, below, out=np.zeros_like(below), where=below > 0))


def cross_fitted_paper(sums: LatentSums, *, folds_P: Ints, keep: int = PAPER_KEEP, eligible: Ints | None = None) -> Floats:
    """The paper's pair score with latents and signs chosen on the other folds, float64 [P]; low = doubtful.

    Args:
        keep: latents of largest |salience| that are kept.
        eligible: only these latents can be kept (those a labeller calls safety-relevant); default all. What made them
            eligible is not cross-fitted: a labeller rates the candidates, which are chosen by salience on all pairs.
    """
    out = np.zeros(len(folds_P))
    for fold in np.unique(folds_P):
        held_out = np.flatnonzero(folds_P == fold)
        salience = paper_salience(sums.take(np.flatnonzero(folds_P != fold)))
        pool = np.arange(sums.n_latents) if eligible is None else np.sort(eligible)
        kept = pool[np.argsort(-np.abs(salience[pool]), kind="stable")[:keep]]
        out[held_out] = paper_pair_scores(sums.take(held_out), PaperFeatures(kept, np.sign(salience[kept])))
    return out


@dataclass(frozen=True)
class SignalInputs:
    """What signals are made of, one row per pair.

    Attributes:
        groups_P, axes_P, subsets_P: strings.
        margins_P: reward margin of the audited model.
        latents: activations of all latents, if there is an SAE.
        head_delta_PD: Δ of the vector the reward head reads.
        dense_delta_PD: Δ of the mean activation at the hook.
        paper: the labelled safety features, if there are any.
        retrained_P: reward margin of a model that did not see the pair, in units of that model's root mean square margin; NaN
            where that model cannot read the pair.
    """

    groups_P: NDArray[Any]
    axes_P: NDArray[Any]
    subsets_P: NDArray[Any]
    margins_P: Floats
    latents: LatentSums | None = None
    head_delta_PD: NDArray[Any] | None = None
    dense_delta_PD: NDArray[Any] | None = None
    paper: PaperFeatures | None = None
    retrained_P: Floats | None = None

    def take(self, rows: Ints) -> SignalInputs:
        """The same for some pairs."""
        return SignalInputs(
            self.groups_P[rows],
            self.axes_P[rows],
            self.subsets_P[rows],
            self.margins_P[rows],
            None if self.latents is None else self.latents.take(rows),
            None if self.head_delta_PD is None else self.head_delta_PD[rows],
            None if self.dense_delta_PD is None else self.dense_delta_PD[rows],
            self.paper,
            None if self.retrained_P is None else self.retrained_P[rows],
        )


@dataclass(frozen=True)
class ScoringParams:
    """How suspicion is made (see `SuspicionSpec`).

    Attributes:
        weights: fused signals and their weights, ≥ 0.
        seed: of folds, of drawn references and of resamples.
        evidence: latents listed per pair.
        labels_seen: whether the reward model was trained on these labels: what the SAE adds decides something only if not.
        resamples: of groups, for the interval of the estimated share of wrong labels.
    """

    weights: Mapping[str, float]
    estimator: Literal["fusion", "paper"] = "fusion"
    folds: int = 5
    shrinkage: float = 1.0
    neighbours: int = 20
    seed: int = 0
    evidence: int = 8
    resamples: int = 200
    labels_seen: bool = True


@dataclass(frozen=True)
class PairScoring:
    """Suspicion of all pairs; NaN marks "no value".

    Attributes:
        suspicion_P: in [0, 1], higher = more doubtful: a probability or a rank, as `doubts` says of the pair's axis.
        base_P: the share of wrong labels a probability starts from; NaN under a rank.
        evidence_P: how much the signals say, whichever way (see `AxisSuspicion`).
        signals: each signal's values (higher = more doubtful), by name.
        pair_score_P: the paper's score, None without labelled safety features.
        evidence: latents that speak for (+) and against (−) the label.
        left_out: signal, or `signal@axis` → why it has no value.
        folds: axis → folds used (0: not cross-fitted).
        doubts: axis → how its suspicion was made.
    """

    suspicion_P: Floats
    base_P: Floats
    evidence_P: Floats
    signals: dict[str, Floats]
    pair_score_P: Floats | None
    evidence: Evidence
    left_out: dict[str, str] = field(default_factory=dict)
    folds: dict[str, int] = field(default_factory=dict)
    doubts: dict[str, AxisDoubt] = field(default_factory=dict)


@dataclass(frozen=True)
class _AxisSignal:
    doubt_P: Floats
    evidence: Evidence | None = None


def score_pairs(inputs: SignalInputs, params: ScoringParams) -> PairScoring:
    """Suspicion of every pair, within each axis (`science.suspicion`): a probability where the signals can tell one, else a rank.

    A rank is 0 for the least and 1 for the most doubtful pair of the axis: 0.9 says that a pair lies high on the fused lists.
    Under estimator `paper` the only signal is minus the paper's pair score, not cross-fitted, as the paper does. Signals whose
    inputs are missing are left out and named; where none is left, suspicion is NaN.
    """
    if params.estimator == "paper":
        params = ScoringParams({"paper": 1.0}, "paper", evidence=params.evidence)
    n_pairs = len(inputs.margins_P)
    left_out = {name: reason for name in params.weights if (reason := missing_input(name, inputs))}
    names = [name for name in params.weights if name not in left_out]
    signals = {name: np.full(n_pairs, np.nan) for name in names}
    suspicion, base, strength = (np.full(n_pairs, np.nan) for _ in range(3))
    evidence: list[tuple[Ints, Evidence]] = []
    folds_of: dict[str, int] = {}
    doubts: dict[str, AxisDoubt] = {}
    for axis in np.unique(inputs.axes_P):
        rows = np.flatnonzero(inputs.axes_P == axis)
        part = inputs.take(rows)
        folds_P = _folds(part, params)
        folds_of[str(axis)] = 0 if folds_P is None else int(folds_P.max()) + 1
        found = {}
        for name in names:
            signal = _axis_signal(name, part, folds_P, params)
            if signal is None:
                left_out[f"{name}@{axis}"] = "the axis has a single group, nothing can be held out"
                continue
            found[name] = signal
            signals[name][rows] = signal.doubt_P
            if signal.evidence is not None:
                evidence.append((rows, signal.evidence))
        rng = np.random.default_rng([params.seed, len(doubts)])
        values = {name: signal.doubt_P for name, signal in found.items()}
        made = _suspicion(values, part, folds_P, params, rng)
        suspicion[rows], base[rows], strength[rows] = made.suspicion_P, made.base_P, made.evidence_P
        doubts[str(axis)] = made.doubt
    return PairScoring(
        suspicion_P=suspicion,
        base_P=base,
        evidence_P=strength,
        signals=signals,
        pair_score_P=_paper_score(inputs),
        evidence=scatter(evidence, n_pairs) if evidence else no_evidence(n_pairs),
        left_out=left_out,
        folds=folds_of,
        doubts=doubts,
    )


def _suspicion(
    values: dict[str, Floats], part: SignalInputs, folds_P: Ints | None, params: ScoringParams, rng: np.random.Generator
) -> AxisSuspicion:
    """Suspicion of an axis; where the SAE can fairly be seen to add nothing, of the dense probe in its place."""
    pairs, adds, weights = AxisPairs(part.groups_P, part.subsets_P), None, params.weights
    dense = None if folds_P is None else _activation_signal("dense", part, folds_P, params)
    if folds_P is not None and dense is not None and len(np.unique(part.groups_P)) >= SAE_ADDS_GROUPS:
        every, fair = {**values, "dense": dense.doubt_P}, not params.labels_seen
        adds = sae_contribution(every, weights, pairs, folds_P, (params.resamples, rng), fair=fair)
        if adds is not None and fair and adds.bits <= 0:
            weights = dense_in_place({name: weights[name] for name in values})
            values = {name: every[name] for name in weights}
    made = axis_suspicion(values, weights, pairs, params.resamples, rng)
    return replace(made, doubt=replace(made.doubt, sae=adds, sae_left_out=weights is not params.weights))


def missing_input(name: str, inputs: SignalInputs) -> str | None:
    """Why a signal cannot be computed from these inputs; None when it can."""
    if name in ("latents", "knn", "paper") and inputs.latents is None:
        return "there are no latents"
    if name == "paper" and inputs.paper is None:
        return "there are no labelled safety features"
    if name == "probe_cv" and inputs.head_delta_PD is None:
        return "there are no head vectors"
    if name == "dense" and inputs.dense_delta_PD is None:
        return "there are no mean activations"
    if name == "retrained" and inputs.retrained_P is None:
        return "no model was retrained"
    return None


def _folds(part: SignalInputs, params: ScoringParams) -> Ints | None:
    if params.estimator == "paper" or len(np.unique(part.groups_P)) < 2:
        return None
    return group_folds((str(group) for group in part.groups_P), params.folds, params.seed)


def _axis_signal(name: str, part: SignalInputs, folds_P: Ints | None, params: ScoringParams) -> _AxisSignal | None:
    """One signal within one axis; None where it cannot be cross-fitted."""
    if name == "margin":
        return _AxisSignal(margin_doubt(part.margins_P))
    if name == "retrained" and part.retrained_P is not None:
        return _AxisSignal(retrained_doubt(part.retrained_P))
    if name == "paper" and params.estimator == "paper" and part.latents is not None and part.paper is not None:
        return _paper_axis(part.latents, part.paper, params)
    if folds_P is None:
        return None
    if part.latents is not None and name in ("latents", "knn", "paper"):
        return _latent_signal(name, part, part.latents, folds_P, params)
    return _activation_signal(name, part, folds_P, params)


def _activation_signal(name: str, part: SignalInputs, folds_P: Ints, params: ScoringParams) -> _AxisSignal | None:
    if name == "probe_cv" and part.head_delta_PD is not None:
        return _AxisSignal(probe_doubt(part.head_delta_PD, folds_P=folds_P))
    if name == "dense" and part.dense_delta_PD is not None:
        found = matched_filter(part.dense_delta_PD, folds_P=folds_P, subsets_P=part.subsets_P, shrinkage=params.shrinkage)
        return _AxisSignal(found.doubt_P)
    return None


def _latent_signal(
    name: str, part: SignalInputs, latents: LatentSums, folds_P: Ints, params: ScoringParams
) -> _AxisSignal | None:
    if name == "paper" and part.paper is not None:
        kept = part.paper.latent_ids
        pool = kept if part.paper.pool is None else part.paper.pool
        return _AxisSignal(-cross_fitted_paper(latents, folds_P=folds_P, keep=len(kept), eligible=pool))
    if name == "knn":
        rng, neighbours = np.random.default_rng(params.seed), params.neighbours
        return _AxisSignal(knn_doubt(latent_delta(latents, root=True), groups_P=part.groups_P, neighbours=neighbours, rng=rng))
    if name == "latents":
        delta_PS = LatentDelta(latents, root=True)
        found = matched_filter(delta_PS, folds_P=folds_P, subsets_P=part.subsets_P, shrinkage=params.shrinkage)
        return _AxisSignal(found.doubt_P, top_contributions(delta_PS, found.weights_CS, found.cell_P, params.evidence))
    return None


def _paper_axis(latents: LatentSums, features: PaperFeatures, params: ScoringParams) -> _AxisSignal:
    sign_CS = np.zeros((1, latents.n_latents))
    sign_CS[0, features.latent_ids] = features.signs
    delta_PS = LatentDelta(latents)
    evidence = top_contributions(delta_PS, sign_CS, np.zeros(delta_PS.shape[0], np.int64), params.evidence)
    return _AxisSignal(-paper_pair_scores(latents, features), evidence)


def _paper_score(inputs: SignalInputs) -> Floats | None:
    if inputs.latents is None or inputs.paper is None:
        return None
    return paper_pair_scores(inputs.latents, inputs.paper)
