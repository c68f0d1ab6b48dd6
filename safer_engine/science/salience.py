"""How differently a latent fires on chosen and rejected responses: a contrast in [−1, 1], its interval, its t.

Both estimators are one formula over prompt groups g, with v±_g a latent's activity on the two sides of the group:

    s = (v̄+ − v̄−) / (v̄+ + v̄− + C),   C = 2 × the mean of v̄ over all latents and both sides

`paired_mean`: v±_g is the mean over the group's pairs of the response's mean activation over counted positions, so that
neither long responses nor large groups weigh more. `paper` (arXiv 2507.00665): v±_g is the group's total activation;
then s is the paper's contrast of sums, which does not depend on how pairs are grouped.

t = mean of (v+_g − v−_g) over its standard error over groups. The interval is the delta method's on s (C included, which
moves with the data too) at Student's quantile for G − 1 degrees of freedom. Neither corrects for having looked at many
latents; `science.sign_flips` does. Positive: fires more on chosen responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import t as student

from safer_engine.errors import NumericalError
from safer_engine.science.latent_acts import ResponseActs, SideActs
from safer_engine.science.pair_deltas import gather

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Estimator = Literal["paired_mean", "paper"]

_CHUNK_PAIRS = 1024

MIN_AXIS_GROUPS = 20
"""An axis with fewer groups has a salience of its own in the tables, but does not decide what a latent is ranked by."""


@dataclass(frozen=True)
class Salience:
    """Salience of all latents.

    Attributes:
        a_chosen_S, a_rejected_S: what is contrasted, ≥ 0. `paired_mean`: mean over groups of per-response means, in the
            SAE's units; `paper`: totals over all responses.
        salience_S: in [−1, 1]; 0 where the latent never fires.
        lo_S, hi_S: ends of its interval, in [−1, 1]; NaN where there are fewer than two groups.
        t_S: studentised mean difference; NaN where it cannot be estimated (fewer than two groups, or no spread).
        n_groups: groups it rests on.
        n_left_out: pairs left out because a side has no counted position.
    """

    a_chosen_S: Floats
    a_rejected_S: Floats
    salience_S: Floats
    lo_S: Floats
    hi_S: Floats
    t_S: Floats
    n_groups: int
    n_left_out: int

    def of(self, latents: Ints) -> Salience:
        """Only those latents, in that order."""
        return Salience(
            self.a_chosen_S[latents],
            self.a_rejected_S[latents],
            self.salience_S[latents],
            self.lo_S[latents],
            self.hi_S[latents],
            self.t_S[latents],
            self.n_groups,
            self.n_left_out,
        )


@dataclass(frozen=True)
class Moments:
    """Sums over groups of u = v+ − v−, w = v+ + v− (per latent) and c = Σ_i w_i / S (per group).

    Attributes:
        plus_S, minus_S, uu_S, ww_S, uw_S, cu_S, cw_S: Σ v+, Σ v−, Σ u², Σ w², Σ uw, Σ cu, Σ cw.
        c, cc: Σ c, Σ c².
        n_groups, n_left_out: as in `Salience`.
    """

    plus_S: Floats
    minus_S: Floats
    uu_S: Floats
    ww_S: Floats
    uw_S: Floats
    cu_S: Floats
    cw_S: Floats
    c: float
    cc: float
    n_groups: int
    n_left_out: int


def salience(
    acts: ResponseActs, groups_P: Ints, estimator: Estimator, pairs: Ints | None = None, level: float = 0.95
) -> Salience:
    """Salience of every latent over some pairs.

    Args:
        acts: per-response sums.
        groups_P: group of each pair, as integers.
        estimator: `paired_mean` or `paper` (see the module).
        pairs: which pairs; all when None. Raises NumericalError when no pair is left.
        level: coverage of the interval.
    """
    return contrast(group_moments(acts, groups_P, estimator, pairs), estimator, level)


@dataclass(frozen=True)
class AxisSalience:
    """Salience of one axis of the data; `axis` is None over all pairs.

    Attributes:
        tier_S: within the axis latents of tier 0 go on before those of tier 1, and so on; one tier when None.
    """

    axis: str | None
    salience: Salience
    tier_S: Ints | None = None


@dataclass(frozen=True)
class Headline:
    """The salience each latent is shown by, and the order in which latents go on.

    Attributes:
        salience: of each latent, within the axis that was chosen for it (`n_groups` is of all pairs).
        axis_S: that axis, None where all pairs count together.
        ranked: the eligible latents, the first to go on first.
    """

    salience: Salience
    axis_S: tuple[str | None, ...]
    ranked: Ints


def headline(
    overall: Salience | AxisSalience,
    axes: Sequence[AxisSalience],
    eligible_S: NDArray[np.bool_],
    candidates: int,
    min_groups: int = MIN_AXIS_GROUPS,
) -> Headline:
    """Rank the eligible latents: axes take turns, each with its largest |salience|; a latent is shown in the axis that took it.

    Axes ask different questions of a response, and a latent that answers one of them would be diluted by the pairs of
    the others. But |salience| is not comparable between axes: its noise is about 1/√groups, so the largest of a small axis are
    chance. So each axis has about as many of the `candidates` places as its share of the groups (Sainte-Laguë's
    apportionment: the next place goes to the largest groups / (2 · places so far + 1), the earlier axis among equals;
    any first part of the list is apportioned too), and fills them by plain |salience|. A small axis can so add few latents
    by chance and displace as few. Tiers go before |salience|.

    Latents that no axis took are shown in the axis of their largest |salience| · t² / (1 + t²), which shrinks a figure by its own
    noise, and are ranked by it after the candidates. Being the larger of several, a figure leans outwards; its interval does
    not allow for that. Without an axis of `min_groups` groups, or where there is only one axis, all pairs count
    together, ranked by |salience|.
    """
    whole = overall if isinstance(overall, AxisSalience) else AxisSalience(None, overall)
    large = [one for one in axes if one.salience.n_groups >= min_groups]
    if len(axes) < 2 or not large:
        ranked = rank_latents(whole.salience.salience_S, eligible_S, whole.tier_S)
        return Headline(whole.salience, (None,) * len(eligible_S), ranked)
    shrunk_AS = np.stack([_shrunk(one.salience) for one in large])
    axis_S = np.argmax(np.stack([_first_tier(one) for one in large]) + shrunk_AS, axis=0)
    taken = _in_turns(large, eligible_S, candidates)
    for latent, axis in taken:
        axis_S[latent] = axis
    first = np.array([latent for latent, _ in taken], dtype=np.int64)
    others_S = eligible_S.copy()
    others_S[first] = False
    ranked = np.concatenate([first, rank_latents(shrunk_AS.max(axis=0), others_S)])
    return Headline(picked(whole.salience, large, axis_S), tuple(large[axis].axis for axis in axis_S), ranked)


def _shrunk(found: Salience) -> Floats:
    """|salience| · t² / (1 + t²); |salience| where t is unknown for want of any spread."""
    trust_S = np.divide(found.t_S**2, 1 + found.t_S**2, out=np.ones_like(found.t_S), where=np.isfinite(found.t_S))
    return np.asarray(np.abs(found.salience_S) * trust_S)


def _first_tier(one: AxisSalience) -> Floats:
    """2 for latents of the axis's first tier, where it has tiers, else 0: more than any shrunk |salience|."""
    return np.zeros(len(one.salience.salience_S)) if one.tier_S is None else 2.0 * (one.tier_S == 0)


def _in_turns(axes: Sequence[AxisSalience], eligible_S: NDArray[np.bool_], places: int) -> list[tuple[int, int]]:
    """The first `places` latents as (latent, index of the axis that took it), in turn by Sainte-Laguë; see `headline`."""
    orders = [iter(rank_latents(one.salience.salience_S, eligible_S, one.tier_S).tolist()) for one in axes]
    given = [0] * len(axes)
    taken: dict[int, int] = {}
    for _ in range(min(places, int(eligible_S.sum()))):
        axis = max(range(len(axes)), key=lambda index: axes[index].salience.n_groups / (2 * given[index] + 1))
        latent = next(latent for latent in orders[axis] if latent not in taken)
        taken[latent] = axis
        given[axis] += 1
    return list(taken.items())


def picked(overall: Salience, axes: Sequence[AxisSalience], axis_S: Ints) -> Salience:
    """Each latent's figures within its axis, an index into `axes`; counts are those of `overall`."""
    columns = np.arange(len(axis_S))

    def pick(name: str) -> Floats:
        values = np.stack([np.asarray(getattr(one.salience, name), dtype=np.float64) for one in axes])
        return np.asarray(values[axis_S, columns], dtype=np.float64)

    return Salience(
        a_chosen_S=pick("a_chosen_S"),
        a_rejected_S=pick("a_rejected_S"),
        salience_S=pick("salience_S"),
        lo_S=pick("lo_S"),
        hi_S=pick("hi_S"),
        t_S=pick("t_S"),
        n_groups=overall.n_groups,
        n_left_out=overall.n_left_out,
    )


def group_moments(acts: ResponseActs, groups_P: Ints, estimator: Estimator, pairs: Ints | None = None) -> Moments:
    """Pass once over the pairs, group by group, and add up what `contrast` needs; memory bounded by a chunk."""
    chosen = np.arange(len(groups_P), dtype=np.int64) if pairs is None else np.asarray(pairs, dtype=np.int64)
    usable = usable_pairs(acts, estimator, chosen)
    if len(usable) == 0:
        raise NumericalError("no pair has a counted position on both sides", "check hook.positions and hook.region")
    total = MomentSums(acts.d_sae)
    for block in group_blocks(acts, groups_P, estimator, usable):
        total.add(block.plus_GS, block.minus_GS)
    return total.moments(len(chosen) - len(usable))


def usable_pairs(acts: ResponseActs, estimator: Estimator, pairs: Ints) -> Ints:
    """Those of the pairs that the estimator can use: per-response means need a counted position on both sides."""
    return pairs[(acts.n_positions_P2[pairs] > 0).all(axis=1)] if estimator == "paired_mean" else pairs


@dataclass(frozen=True)
class GroupBlock:
    """v+ and v− of some groups, sparse float64 [groups, S]; `groups_G` are their integers, ascending."""

    groups_G: Ints
    plus_GS: Any
    minus_GS: Any


def group_blocks(acts: ResponseActs, groups_P: Ints, estimator: Estimator, usable: Ints) -> Iterator[GroupBlock]:
    """Every group of the usable pairs, some whole groups at a time, so that memory is bounded by a block."""
    for chunk in _group_chunks(usable, groups_P):
        plus_GS, minus_GS = _group_values(acts, chunk, groups_P[chunk], estimator)
        yield GroupBlock(np.unique(groups_P[chunk]), plus_GS, minus_GS)


def contrast(moments: Moments, estimator: Estimator, level: float = 0.95) -> Salience:
    """The contrast, its interval and its t from sums over groups."""
    m, n = moments, moments.n_groups
    difference, activity = m.plus_S - m.minus_S, m.plus_S + m.minus_S
    if not np.isfinite(activity).all():
        raise NumericalError("a latent's summed activation is not finite", "train the SAE again with a lower sae.lr")
    denominator = activity + m.c
    live = denominator > 0
    s = np.divide(difference, denominator, out=np.zeros_like(difference), where=live)
    influence = m.uu_S + s**2 * (m.ww_S + 2 * m.cw_S + m.cc) - 2 * s * (m.uw_S + m.cu_S)
    lo, hi = _interval(s, influence, denominator, n, level)
    scale = 1 / n if estimator == "paired_mean" else 1.0
    return Salience(
        a_chosen_S=m.plus_S * scale,
        a_rejected_S=m.minus_S * scale,
        salience_S=s,
        lo_S=lo,
        hi_S=hi,
        t_S=_studentised(difference / n, m.uu_S, n),
        n_groups=n,
        n_left_out=m.n_left_out,
    )


def rank_latents(salience_S: Floats, eligible_S: NDArray[np.bool_], tier_S: Ints | None = None) -> Ints:
    """Eligible latents by tier, then by falling |salience|, the lower id first among equals.

    Eligibility must not look at which side a latent fires on: what is ranked is chosen blind to the labels.
    """
    latents = np.flatnonzero(eligible_S)
    tiers = np.zeros(len(latents)) if tier_S is None else tier_S[latents]
    return latents[np.lexsort((latents, -np.abs(salience_S[latents]), tiers))].astype(np.int64)


def eligible_latents(firings_S: Ints, n_positions: int, min_rate: float, max_rate: float) -> NDArray[np.bool_]:
    """Latents that fire at all, in a share of the counted positions within [min_rate, max_rate]; blind to the labels."""
    rate_S = firings_S / max(1, n_positions)
    return np.asarray((firings_S > 0) & (rate_S >= min_rate) & (rate_S <= max_rate), dtype=np.bool_)


def _interval(s: Floats, influence: Floats, denominator: Floats, n: int, level: float) -> tuple[Floats, Floats]:
    """Delta-method interval of s, clipped to [−1, 1]; influence is Σ_g of the squared numerator of s's influence function.

    In sums over groups, s's influence of group g is (u_g − s (w_g + c_g)) / (denominator / n), with mean 0.
    """
    if n < 2:
        unknown = np.full_like(s, np.nan)
        return unknown, unknown.copy()
    variance = np.clip(influence, 0, None) * n / (n - 1)
    error = np.divide(np.sqrt(variance), denominator, out=np.zeros_like(s), where=denominator > 0)
    reach = float(student.ppf((1 + level) / 2, n - 1)) * error
    return np.clip(s - reach, -1, 1), np.clip(s + reach, -1, 1)


def _studentised(mean_S: Floats, uu_S: Floats, n: int) -> Floats:
    unknown = np.full_like(mean_S, np.nan)
    if n < 2:
        return unknown
    spread = (uu_S - n * mean_S**2) / (n * (n - 1))
    known = spread > 1e-12 * mean_S**2
    t_S = np.divide(mean_S, np.sqrt(np.clip(spread, 0, None)), out=unknown, where=known)
    return np.where(uu_S == 0, 0.0, t_S)


class MomentSums:
    """Running sums over groups."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.sums = {name: np.zeros(d_sae) for name in ("plus", "minus", "uu", "ww", "uw", "cu", "cw")}
        self.c = 0.0
        self.cc = 0.0
        self.n_groups = 0

    def add(self, plus_GS: Any, minus_GS: Any, c_G: Floats | None = None) -> None:
        """Two sparse matrices [groups, S]; c of each group where they hold only some of the latents."""
        u_GS, w_GS = (plus_GS - minus_GS).tocsr(), (plus_GS + minus_GS).tocsr()
        c_G = np.asarray(w_GS.sum(axis=1)).ravel() / self.d_sae if c_G is None else c_G
        squares_plus, squares_minus = self._column_sums(plus_GS, 2), self._column_sums(minus_GS, 2)
        added = {
            "plus": self._column_sums(plus_GS, 1),
            "minus": self._column_sums(minus_GS, 1),
            "uu": self._column_sums(u_GS, 2),
            "ww": self._column_sums(w_GS, 2),
            "uw": squares_plus - squares_minus,
            "cu": u_GS.T @ c_G,
            "cw": w_GS.T @ c_G,
        }
        for name, value in added.items():
            self.sums[name] += value
        self.c += float(c_G.sum())
        self.cc += float(c_G @ c_G)
        self.n_groups += len(c_G)

    def _column_sums(self, matrix: Any, power: int) -> Floats:
        return np.bincount(matrix.indices, matrix.data**power, self.d_sae).astype(np.float64)

    def moments(self, n_left_out: int) -> Moments:
        """What has been added."""
        s = self.sums
        return Moments(
            s["plus"], s["minus"], s["uu"], s["ww"], s["uw"], s["cu"], s["cw"], self.c, self.cc, self.n_groups, n_left_out
        )  # fmt: skip


def _group_chunks(pairs: Ints, groups_P: Ints) -> Iterator[Ints]:
    """The pairs by group, whole groups at a time, about `_CHUNK_PAIRS` a chunk."""
    ordered = pairs[np.argsort(groups_P[pairs], kind="stable")]
    starts = np.flatnonzero(np.diff(groups_P[ordered], prepend=groups_P[ordered[0]] - 1))
    chunk = starts // _CHUNK_PAIRS
    cuts = starts[np.flatnonzero(np.diff(chunk, prepend=-1))]
    yield from np.split(ordered, cuts[1:])


def _group_values(acts: ResponseActs, pairs: Ints, groups: Ints, estimator: Estimator) -> tuple[Any, Any]:
    """v+ and v− of the groups that `pairs` (sorted by group) make up: sparse float64 [groups, S]."""
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    sides = []
    for side, part in enumerate((acts.chosen, acts.rejected)):
        weights = np.ones(len(pairs))
        if estimator == "paired_mean":
            weights = 1 / (sizes[codes] * acts.n_positions_P2[pairs, side].astype(np.float64))
        rows = sparse.csr_array((weights, (codes, np.arange(len(pairs)))), shape=(len(sizes), len(pairs)))
        sides.append((rows @ gather_rows(part, pairs, acts.d_sae)).tocsr())
    return sides[0], sides[1]


def gather_rows(side: SideActs, pairs: Ints, d_sae: int) -> Any:
    """Rows of one side as a sparse float64 matrix [len(pairs), S]; reads only those rows of a memory map."""
    starts, stops = np.asarray(side.indptr[pairs]), np.asarray(side.indptr[pairs + 1])
    return gather(starts, stops, (side.indices, side.sums), d_sae).astype(np.float64)
