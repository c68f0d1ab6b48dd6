"""The group values of a few latents, and what they say beyond one contrast: at equal length, and by part of the data.

All figures are contrasts as in `science.salience`, s = numerator / (v̄+ + v̄− + C), with intervals of the same delta method over
groups. At equal length: u_g = v+_g − v−_g is regressed on the difference of log lengths of the group's responses, d_g, and the
intercept takes the place of ū: what is left where both responses are equally long. With ψ_g the groups' influence on the
intercept (least squares; the interval is robust to unequal spread), that of s is (ψ_g − s (w_g + c_g)) / mean (w + c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import t as student

from safer_engine.science.latent_acts import ResponseActs
from safer_engine.science.multiple_testing import benjamini_hochberg, holm
from safer_engine.science.salience import Estimator, MomentSums, Salience, contrast, group_blocks, usable_pairs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_COLUMNS = 16
MIN_PART_GROUPS = 10
"""A part of the data with fewer groups has a salience, but no say in whether a latent is mixed."""


@dataclass(frozen=True)
class CandidateValues:
    """v+ and v− of some latents in some groups.

    Attributes:
        groups_G: the groups' integers, ascending.
        plus_GC, minus_GC: sparse float64, one column a latent.
        c_G: mean over *all* latents of the SAE of v+ + v−.
    """

    groups_G: Ints
    plus_GC: Any
    minus_GC: Any
    c_G: Floats

    def part(self, members_G: Bools) -> CandidateValues:
        """Only some groups."""
        rows = np.flatnonzero(members_G)
        return CandidateValues(self.groups_G[rows], self.plus_GC.tocsr()[rows], self.minus_GC.tocsr()[rows], self.c_G[rows])


@dataclass(frozen=True)
class AtEqualLength:
    """Salience with and without what length accounts for; NaN where there are too few groups or lengths do not vary.

    Attributes:
        salience_C, lo_C, hi_C: at equal length.
        t_C: of the intercept.
        length_bound_C: the interval of the plain salience leaves 0 out, that at equal length does not (or lies on the other
            side), and that of their difference, the part that length accounts for, leaves 0 out on the plain one's side.
    """

    salience_C: Floats
    lo_C: Floats
    hi_C: Floats
    t_C: Floats
    length_bound_C: Bools


def candidate_values(
    acts: ResponseActs, groups_P: Ints, estimator: Estimator, pairs: Ints, latents: Ints
) -> CandidateValues | None:
    """Values of the latents over some pairs; None when no pair is usable. Memory: what fires of these latents."""
    usable = usable_pairs(acts, estimator, pairs)
    if len(usable) == 0:
        return None
    groups, plus, minus, c = [], [], [], []
    for block in group_blocks(acts, groups_P, estimator, usable):
        groups.append(block.groups_G)
        plus.append(block.plus_GS[:, latents])
        minus.append(block.minus_GS[:, latents])
        c.append(np.asarray((block.plus_GS + block.minus_GS).sum(axis=1)).ravel() / acts.d_sae)
    return CandidateValues(np.concatenate(groups), sparse.vstack(plus, "csr"), sparse.vstack(minus, "csr"), np.concatenate(c))


def salience_of(values: CandidateValues, estimator: Estimator) -> Salience:
    """The candidates' salience over the groups given (at least one)."""
    total = MomentSums(values.plus_GC.shape[1])
    total.add(values.plus_GC.tocsr(), values.minus_GC.tocsr(), values.c_G)
    return contrast(total.moments(0), estimator)


def group_means(values_P: Floats, groups_P: Ints, pairs: Ints, groups_G: Ints) -> Floats:
    """Mean of a pair's figure over the given pairs of each group."""
    at = np.searchsorted(groups_G, groups_P[pairs])
    return np.asarray(np.bincount(at, values_P[pairs], len(groups_G)) / np.maximum(np.bincount(at, minlength=len(groups_G)), 1))


def at_equal_length(values: CandidateValues, d_G: Floats, level: float = 0.95) -> AtEqualLength:
    """Salience at equal length of `paired_mean` values.

    Args:
        d_G: difference of log response lengths, chosen − rejected, of each group.
        level: coverage of the intervals.
    """
    n, n_latents = values.plus_GC.shape
    centred = d_G - d_G.mean()
    spread = float(centred @ centred)
    if n < 4 or spread <= 1e-9 * n:
        unknown = np.full(n_latents, np.nan)
        return AtEqualLength(unknown, unknown.copy(), unknown.copy(), unknown.copy(), np.zeros(n_latents, dtype=np.bool_))
    reach = float(student.ppf((1 + level) / 2, n - 2)), float(student.ppf((1 + level) / 2, n - 1))
    plus, minus = values.plus_GC.tocsc(), values.minus_GC.tocsc()
    parts = []
    for start in range(0, n_latents, _COLUMNS):
        here = slice(start, start + _COLUMNS)
        parts.append(_adjusted(plus[:, here].toarray(), minus[:, here].toarray(), values.c_G, d_G, reach))
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return AtEqualLength(joined[0], joined[1], joined[2], joined[3], joined[4].astype(np.bool_))


def _adjusted(plus: Floats, minus: Floats, c_G: Floats, d_G: Floats, reach: tuple[float, float]) -> tuple[Floats, ...]:
    """salience, lo, hi, t, length-bound of some columns."""
    n, d_mean = len(d_G), float(d_G.mean())
    centred = d_G - d_mean
    u, w = plus - minus, plus + minus + c_G[:, None]
    slope = centred @ u / float(centred @ centred)
    mean = u.mean(axis=0)
    intercept = mean - slope * d_mean
    weights = 1 - n * d_mean * centred / float(centred @ centred)
    residual = u - intercept - slope * d_G[:, None]
    psi = residual * weights[:, None]
    size = w.mean(axis=0)
    scale = np.where(size > 0, size, 1)
    adjusted, plain = intercept / scale, mean / scale

    def error(influence: Floats, used: int) -> Floats:
        return np.asarray(np.sqrt((influence**2).sum(axis=0) * n / (n - used)) / (n * scale))

    drift = w - size
    error_adjusted = error(psi - adjusted * drift, 2)
    error_plain = error(u - mean - plain * drift, 1)
    removed, error_removed = plain - adjusted, error(u - mean - psi - (plain - adjusted) * drift, 2)
    lo, hi = adjusted - reach[0] * error_adjusted, adjusted + reach[0] * error_adjusted
    side = np.sign(plain)
    stands = np.abs(plain) > reach[1] * error_plain
    vanishes = np.where(side > 0, lo <= 0, hi >= 0)
    by_length = side * removed > reach[0] * error_removed
    spread = error(psi, 2)
    t = np.divide(adjusted, spread, out=np.full(len(adjusted), np.nan), where=spread > 1e-12 * np.abs(adjusted))
    return adjusted, np.clip(lo, -1, 1), np.clip(hi, -1, 1), t, stands & vanishes & by_length


def mixed_signs(t_AC: Floats, n_groups_A: Ints, level: float = 0.05) -> tuple[Floats, Bools]:
    """Latents that fire more on chosen in one part of the data and more on rejected in another: p [C], and which are mixed [C].

    In each part, a two-sided p of t; over a latent's parts, Holm; its p is the larger of the smallest ones of either sign (both
    directions must hold), and over the latents, Benjamini and Hochberg at `level`. Parts of fewer than `MIN_PART_GROUPS` groups
    do not take part. p is 1 where one of the signs does not occur, NaN with fewer than two parts.
    """
    usable = n_groups_A >= MIN_PART_GROUPS
    t_AC, df_A = t_AC[usable], n_groups_A[usable] - 1
    n_latents = t_AC.shape[1]
    if len(t_AC) < 2:
        return np.full(n_latents, np.nan), np.zeros(n_latents, dtype=np.bool_)
    p_AC = 2 * student.sf(np.abs(t_AC), df_A[:, None])
    held = np.column_stack([holm(p_AC[:, latent]) for latent in range(n_latents)])
    either = [np.nanmin(np.where((sign * t_AC > 0) & np.isfinite(held), held, 1.0), axis=0) for sign in (1, -1)]
    p_C = np.maximum(either[0], either[1])
    return p_C, benjamini_hochberg(p_C) <= level
