"""Two reward models on the same pairs: what changed from A to B, with intervals over groups. Plain Python: the gate has no numpy.

Rewards of two models have no common scale, so margins are compared after each model's are divided by their own root mean square
over the common pairs (`margin_scale`): a margin of 1 is then a typical one of that model, and 0 stays no preference.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from safer_engine.errors import NumericalError
from safer_engine.gate.intervals import (
    REPORT_TAIL,
    Difference,
    Spread,
    paired_difference,
    paired_gap,
    student_quantile,
    wilson_spread,
)


@dataclass(frozen=True)
class PairMargins:
    """A pair as both models see it.

    Attributes:
        margin_a, margin_b: reward of the chosen less that of the rejected response, each in its own model's units; finite.
        longer_a, longer_b: length of the chosen less that of the rejected response as each model reads them; None: not known.
    """

    pair_id: str
    group: str
    axis: str
    subset: str
    margin_a: float
    margin_b: float
    longer_a: int | None = None
    longer_b: int | None = None

    @property
    def changed(self) -> bool:
        """Whether the two prefer different responses; equal rewards are a preference of their own."""
        return _sign(self.margin_a) != _sign(self.margin_b)


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95 % interval; `lo` and `hi` are None where fewer than two groups leave nothing to make one of."""

    estimate: float
    lo: float | None
    hi: float | None
    n: int
    n_groups: int


@dataclass(frozen=True)
class Scales:
    """Root mean square margin of each model over the common pairs, above 0, in its own units."""

    a: float
    b: float


@dataclass(frozen=True)
class SliceChange:
    """What changed from A to B on some pairs.

    Attributes:
        accuracy_a, accuracy_b: share of pairs with margin > 0, in [0, 1].
        accuracy_change: B − A, paired by pair, in [−1, 1].
        right_to_wrong, wrong_to_right, both_right, both_wrong: pairs, as in McNemar's table; they add up to n.
        changed: share of pairs whose preferred response is another, in [0, 1].
        lost: share of pairs that A has right and B wrong, in [0, 1].
        margin_change: mean of B's scaled margin less A's; the scales are taken as fixed.
        rank_correlation: Spearman's, of the two models' margins, in [−1, 1]; None where one model's are all alike.
        length_gap_change: change of (accuracy where the chosen response is longer less where it is shorter); None where lengths
            are not known, or no subset has both kinds.
    """

    n: int
    n_groups: int
    accuracy_a: float
    accuracy_b: float
    accuracy_change: Figure
    right_to_wrong: int
    wrong_to_right: int
    both_right: int
    both_wrong: int
    changed: Figure
    lost: Figure
    margin_change: Figure
    rank_correlation: Figure | None
    length_gap_change: Figure | None


def margin_scales(pairs: Sequence[PairMargins]) -> Scales:
    """The scale of each model's margins. Raises NumericalError: there are no pairs, or a model's margins are all 0."""
    return Scales(margin_scale([pair.margin_a for pair in pairs]), margin_scale([pair.margin_b for pair in pairs]))


def margin_scale(margins: Sequence[float]) -> float:
    """Root mean square of margins, above 0. Raises NumericalError where there are none, all are 0, or one is not finite."""
    if not margins or not all(map(math.isfinite, margins)):
        raise NumericalError(f"of {len(margins)} margins not all are finite, or there are none")
    largest = max(map(abs, margins))
    if largest == 0:
        raise NumericalError("a reward model gives both responses of every pair the same reward", "check its weights and head")
    return largest * math.sqrt(math.fsum((margin / largest) ** 2 for margin in margins) / len(margins))


def compare_pairs(pairs: Sequence[PairMargins], scales: Scales) -> SliceChange:
    """What changed from A to B on these pairs. Raises NumericalError where there are none, or one is not finite."""
    groups = [pair.group for pair in pairs]
    cells = Counter((pair.margin_a > 0, pair.margin_b > 0) for pair in pairs)
    right = [float(pair.margin_b > 0) - float(pair.margin_a > 0) for pair in pairs]
    moved = [pair.margin_b / scales.b - pair.margin_a / scales.a for pair in pairs]
    accuracy = paired_difference(right, groups, shares=True)
    n = len(pairs)
    return SliceChange(
        n=n,
        n_groups=accuracy.n_groups,
        accuracy_a=sum(pair.margin_a > 0 for pair in pairs) / n,
        accuracy_b=sum(pair.margin_b > 0 for pair in pairs) / n,
        accuracy_change=_figure(accuracy),
        right_to_wrong=cells[True, False],
        wrong_to_right=cells[False, True],
        both_right=cells[True, True],
        both_wrong=cells[False, False],
        changed=share([pair.changed for pair in pairs], groups),
        lost=share([pair.margin_a > 0 >= pair.margin_b for pair in pairs], groups),
        margin_change=_figure(paired_difference(moved, groups, shares=False)),
        rank_correlation=rank_correlation([pair.margin_a for pair in pairs], [pair.margin_b for pair in pairs], groups),
        length_gap_change=_length_gap_change(pairs),
    )


def changed_pairs(pairs: Sequence[PairMargins], scales: Scales) -> list[PairMargins]:
    """Pairs whose preferred response is another, by falling size of the change of the scaled margin, then by pair_id."""
    return sorted((pair for pair in pairs if pair.changed), key=lambda pair: (-abs(moved_by(pair, scales)), pair.pair_id))


def moved_by(pair: PairMargins, scales: Scales) -> float:
    """Change of a pair's scaled margin, B − A."""
    return pair.margin_b / scales.b - pair.margin_a / scales.a


def share(hits: Sequence[bool], groups: Sequence[str]) -> Figure:
    """Share of hits with Wilson's interval for clustered values: n over the design effect (CR1) counts, Student's quantile.

    Where all values are alike, groups count.
    """
    n, found = len(hits), sum(hits) / len(hits)
    sums: dict[str, float] = defaultdict(float)
    for hit, group in zip(hits, groups, strict=True):
        sums[group] += float(hit) - found
    if len(sums) < 2:
        return Figure(found, None, None, n, len(sums))
    clustered = len(sums) / (len(sums) - 1) * math.fsum(value * value for value in sums.values()) / n**2
    count = max(2.0, min(float(n), found * (1 - found) / clustered)) if clustered > 0 else float(min(n, len(sums)))
    return _of_spread(found, wilson_spread(found, count, len(sums) - 1), n, len(sums))


def rank_correlation(one: Sequence[float], other: Sequence[float], groups: Sequence[str]) -> Figure | None:
    """Spearman's correlation, in [−1, 1]; equal values share the mean of their ranks. None where a column is all alike.

    The interval is Fisher's (on the inverse hyperbolic tangent) with a cluster-robust variance of the statistic's influence
    function, which counts that ranks are estimated too (Borkowf 2002); Student's quantile over groups.
    """
    n = len(one)
    if n < 2:
        return None
    first, second = _middle_ranks(one), _middle_ranks(other)
    spread = math.sqrt(math.fsum((r - 0.5) ** 2 for r in first) * math.fsum((s - 0.5) ** 2 for s in second)) / n
    if spread == 0:
        return None
    found = max(-1.0, min(1.0, math.fsum((r - 0.5) * (s - 0.5) for r, s in zip(first, second, strict=True)) / n / spread))
    above, below = _mean_above(one, second), _mean_above(other, first)
    influence = [(r * s + u + v) / spread for r, s, u, v in zip(first, second, above, below, strict=True)]
    middle = math.fsum(influence) / n
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(influence, groups, strict=True):
        sums[group] += value - middle
    if len(sums) < 2:
        return Figure(found, None, None, n, len(sums))
    if 1 - abs(found) < 1e-12:
        return Figure(found, found, found, n, len(sums))
    se = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(value * value for value in sums.values())) / n
    half = student_quantile(REPORT_TAIL, len(sums) - 1) * se / (1 - found**2)
    centre = math.atanh(found)
    return Figure(found, math.tanh(centre - half), math.tanh(centre + half), n, len(sums))


def _middle_ranks(values: Sequence[float]) -> list[float]:
    """Ranks as shares in (0, 1), with mean 1/2."""
    ordered, n = sorted(values), len(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value)) / (2 * n) for value in values]


def _mean_above(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """For each value, the mean over all pairs of the weight where theirs is larger, half of it where it is equal."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ordered, sums = [values[place] for place in order], [0.0]
    for place in order:
        sums.append(sums[-1] + weights[place])
    whole, n = sums[-1], len(values)
    return [(whole - (sums[bisect_left(ordered, v)] + sums[bisect_right(ordered, v)]) / 2) / n for v in values]


def _length_gap_change(pairs: Sequence[PairMargins]) -> Figure | None:
    """Change of the accuracy gap by length, over pairs whose longer response is the same to both tokenizers."""
    if any(pair.longer_a is None or pair.longer_b is None for pair in pairs):
        return None
    agreed = [pair for pair in pairs if (pair.longer_a or 0) * (pair.longer_b or 0) > 0]
    kinds: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for pair in agreed:
        kinds[pair.axis, pair.subset].add((pair.longer_a or 0) > 0)
    if not any(len(found) == 2 for found in kinds.values()):
        return None
    right = [float(pair.margin_b > 0) - float(pair.margin_a > 0) for pair in agreed]
    longer = [(pair.longer_a or 0) > 0 for pair in agreed]
    strata = [(pair.axis, pair.subset) for pair in agreed]
    return _figure(paired_gap(right, longer, strata, [pair.group for pair in agreed]))


def _figure(found: Difference) -> Figure:
    if found.spread is None:
        return Figure(found.mean, None, None, found.n, found.n_groups)
    return _of_spread(found.mean, found.spread, found.n, found.n_groups)


def _of_spread(estimate: float, spread: Spread, n: int, n_groups: int) -> Figure:
    ends = spread(REPORT_TAIL)
    return Figure(estimate, ends.lo, ends.hi, n, n_groups)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
