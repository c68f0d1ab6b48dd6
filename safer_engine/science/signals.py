"""Signals that a pair's label contradicts the evidence, each cross-fitted by group.

All functions take the pairs of ONE axis as arrays and return one float64 per pair, **higher = more doubtful**. Directions and
probes come from other folds, neighbours from other groups, so that a pair's own label does not vote. Two traces of it are left:
a matched filter's scale comes from the scores of the other folds, whose directions have seen the pair; and `margin_doubt` comes
from a model that has seen every label.

Δ is chosen − rejected, so the label of every row is "+": flipping a label negates the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import rankdata

from safer_engine.errors import NumericalError
from safer_engine.science.pair_deltas import Delta, require_finite

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MIN_SUBSET = 20
"""Subsets with fewer pairs than this have no direction of their own."""
_CHUNK = 4096
"""Rows upcast to float64 at a time."""


@dataclass(frozen=True)
class MatchedFilter:
    """Directions per subset and fold, and what they say.

    Attributes:
        score_P: Δ·w in units of a log-likelihood ratio, > 0 where the evidence agrees with the label.
        weights_CS: one direction per cell (a subset in a fold), already scaled: score = Σ_i w_i Δ_i.
        cell_P: the row of `weights_CS` that scored each pair.
    """

    score_P: Floats
    weights_CS: Floats
    cell_P: Ints

    @property
    def doubt_P(self) -> Floats:
        """The signal: −score."""
        return -self.score_P


@dataclass(frozen=True)
class _Moments:
    """n, Σ and Σ² of Δ by fold."""

    n_F: Floats
    sum_FS: Floats
    square_FS: Floats

    def without(self, fold: int) -> tuple[float, Floats, Floats]:
        """n, mean and mean square over all folds but one."""
        n = float(self.n_F.sum() - self.n_F[fold])
        keep = np.arange(len(self.n_F)) != fold
        return n, self.sum_FS[keep].sum(0) / max(n, 1.0), self.square_FS[keep].sum(0) / max(n, 1.0)


def matched_filter(
    delta_PS: Delta, *, folds_P: Ints, subsets_P: NDArray[Any], shrinkage: float = 1.0, subset_prior: float = 100.0
) -> MatchedFilter:
    """Score pairs along w_i = mean_i / (var_i + λ), one direction per subset, from the other folds.

    The diagonal matched filter (linear discriminant with a diagonal covariance) for a row against its mirror image. A subset's
    moments are shrunk towards the axis's with the weight of `subset_prior` pairs; subsets of fewer than `MIN_SUBSET` pairs share
    one cell with the axis's direction. Each subset's scores are scaled by 2·mean/variance of its held-out scores in the other
    folds (the log-likelihood ratio of two mirrored normals): subsets with clear evidence reach further out than subsets with
    little, and one without any gets 0.

    Args:
        delta_PS: Δ of the pairs of one axis, CSR or dense.
        folds_P: fold of each pair, at least two folds.
        subsets_P: subset of each pair.
        shrinkage: λ in units of the mean variance over the latents that vary.
        subset_prior: pairs' worth of the axis in a subset's direction.

    Raises:
        NumericalError: a value is not finite.
    """
    require_finite(delta_PS, "Δ")
    subset_P, pooled = subset_codes(subsets_P)
    priors_N = np.full(int(subset_P.max()) + 1, float(subset_prior))
    if pooled is not None:
        priors_N[pooled] = np.inf
    n_folds = int(folds_P.max()) + 1
    by_subset = [_moments(delta_PS, np.flatnonzero(subset_P == s), folds_P, n_folds) for s in range(len(priors_N))]
    axis = _Moments(*(np.sum([getattr(m, field) for m in by_subset], axis=0) for field in ("n_F", "sum_FS", "square_FS")))
    weights = np.zeros((len(priors_N) * n_folds, delta_PS.shape[1]))
    for s, moments in enumerate(by_subset):
        for fold in range(n_folds):
            weights[s * n_folds + fold] = _direction(moments, axis, fold, shrinkage, priors_N[s])
    cell_P = np.asarray(subset_P * n_folds + folds_P, dtype=np.int64)
    raw_P = project(delta_PS, weights, cell_P)
    scale_C = np.zeros(len(weights))
    for fold in range(n_folds):
        others = folds_P != fold
        scale_C[fold::n_folds] = _llr_scale(raw_P[others], subset_P[others], len(priors_N), subset_prior)
    weights *= scale_C[:, None]
    return MatchedFilter(raw_P * scale_C[cell_P], weights, cell_P)


def project(delta_PS: Delta, weights_CS: Floats, cell_P: Ints) -> Floats:
    """Σ_i Δ_pi · weights[cell_p, i] of each pair."""
    out = np.zeros(delta_PS.shape[0])
    for cell in np.unique(cell_P):
        rows = np.flatnonzero(cell_P == cell)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            out[part] = delta_PS[part].astype(np.float64) @ weights_CS[cell]
    return out


def subset_codes(subsets_P: NDArray[Any]) -> tuple[Ints, int | None]:
    """A code per pair, from 0, and the code that all subsets of fewer than `MIN_SUBSET` pairs share (None: there are none)."""
    _, code_P, size_N = np.unique(subsets_P, return_inverse=True, return_counts=True)
    small_N = size_N < MIN_SUBSET
    n_large = int((~small_N).sum())
    renumbered = np.where(small_N, n_large, np.cumsum(~small_N) - 1)
    return np.asarray(renumbered[code_P], dtype=np.int64), n_large if small_N.any() else None


def _moments(delta_PS: Delta, rows: Ints, folds_P: Ints, n_folds: int) -> _Moments:
    n_latents = delta_PS.shape[1]
    sums, squares = np.zeros((n_folds, n_latents)), np.zeros((n_folds, n_latents))
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        block = delta_PS[part].astype(np.float64)
        in_fold = sparse.csr_array((np.ones(len(part)), (folds_P[part], np.arange(len(part)))), shape=(n_folds, len(part)))
        sums += _dense(in_fold @ block)
        squares += _dense(in_fold @ (block * block))
    return _Moments(np.bincount(folds_P[rows], minlength=n_folds).astype(np.float64), sums, squares)


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)


def _direction(moments: _Moments, axis: _Moments, fold: int, shrinkage: float, prior: float) -> Floats:
    n, mean, square = moments.without(fold)
    _, axis_mean, axis_square = axis.without(fold)
    own = n / (n + prior) if n else 0.0
    mean = own * mean + (1 - own) * axis_mean
    square = own * square + (1 - own) * axis_square
    variance = np.maximum(square - mean * mean, 0.0)
    varying = variance > 0
    if not varying.any():
        return np.zeros_like(mean)
    floor = shrinkage * variance[varying].mean()
    return np.where(varying, mean / (variance + floor), 0.0)


def _llr_scale(raw_P: Floats, subset_P: Ints, n_subsets: int, prior: float) -> Floats:
    """2·mean/variance of each subset's scores, shrunk to the axis's moments; 0 where the mean is not positive."""
    n = np.maximum(np.bincount(subset_P, minlength=n_subsets), np.finfo(np.float64).tiny)
    mean = (np.bincount(subset_P, raw_P, n_subsets) + prior * raw_P.mean()) / (n + prior)
    square = (np.bincount(subset_P, raw_P**2, n_subsets) + prior * (raw_P**2).mean()) / (n + prior)
    variance = square - mean**2
    usable = (mean > 0) & (variance > 0)
    with np.errstate(over="ignore"):
        scale = np.divide(2 * mean, variance, out=np.zeros_like(mean), where=usable)
    return np.where(np.isfinite(scale), scale, 0.0)


def knn_doubt(
    delta_PS: Delta,
    *,
    groups_P: NDArray[Any],
    neighbours: int = 20,
    max_references: int = 20_000,
    rng: np.random.Generator | None = None,
) -> Floats:
    """Minus the agreement of a pair with its nearest neighbours among the pairs of other groups and their mirror images.

    Cosine similarity of Δ; a reference pair votes + with its Δ and − with −Δ, so the nearest are those of largest |cosine| and
    each votes with its signed cosine: agreement = Σ cos over the `neighbours` largest |cos|, divided by their number.
    Range of the result: [−1, 1]; 0 for a pair without any difference.

    Args:
        max_references: with more pairs than this, neighbours are sought among that many, drawn by `rng`; bounds time and memory.
        rng: needed only where references are drawn.

    Raises:
        ValueError: references must be drawn and no generator was given.
    """
    require_finite(delta_PS, "Δ")
    unit_PS = _unit_rows(delta_PS)
    codes_P = np.unique(groups_P, return_inverse=True)[1]
    references = np.arange(delta_PS.shape[0])
    if len(references) > max_references:
        if rng is None:
            raise ValueError("more pairs than references: give a generator")
        references = np.sort(rng.choice(references, max_references, replace=False))
    bank_SR = unit_PS[references].T
    out = np.zeros(delta_PS.shape[0])
    step = max(1, 8_000_000 // len(references))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        cosine = np.array(_dense(unit_PS[rows] @ bank_SR), dtype=np.float32)
        cosine[codes_P[rows][:, None] == codes_P[references][None, :]] = 0.0
        k = min(neighbours, cosine.shape[1])
        nearest = np.argpartition(-np.abs(cosine), k - 1, axis=1)[:, :k]
        out[rows] = -np.take_along_axis(cosine, nearest, axis=1).astype(np.float64).mean(axis=1)
    return out


def _unit_rows(delta_PS: Delta) -> Delta:
    if sparse.issparse(delta_PS):
        norm = np.sqrt(np.asarray((delta_PS * delta_PS).sum(axis=1), dtype=np.float64)).ravel()
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
        return sparse.csr_array(sparse.diags_array(inverse.astype(np.float32)) @ delta_PS)
    norm = np.linalg.norm(delta_PS, axis=1)
    return delta_PS * np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)[:, None]


def margin_doubt(margin_P: Floats) -> Floats:
    """Minus the reward margin r(chosen) − r(rejected), of a model that was trained on these labels."""
    if not np.isfinite(margin_P).all():
        raise NumericalError("a reward margin is not finite")
    return -np.asarray(margin_P, dtype=np.float64)


def retrained_doubt(margin_P: Floats) -> Floats:
    """Minus the reward margin of a model that saw neither the pair nor its group; 0, no evidence, where it is NaN."""
    if np.isinf(margin_P).any():
        raise NumericalError("a retrained reward margin is not finite")
    return -np.nan_to_num(np.asarray(margin_P, dtype=np.float64), nan=0.0)


def unit_ranks(values_P: Floats) -> Floats:
    """Average ranks, scaled to [0, 1]: 0 the smallest value, 1 the largest; ties share their mean; a lone value is 0.5."""
    if not np.isfinite(values_P).all():
        raise NumericalError("a value to be ranked is not finite")
    if len(values_P) == 1:
        return np.full(1, 0.5)
    return np.asarray((rankdata(values_P) - 1.0) / (len(values_P) - 1.0))
