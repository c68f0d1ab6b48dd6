"""Intervals in plain Python: Student's quantile, Wilson's share with clusters, paired differences, differences of estimates.

A tail is the chance on one side: 0.025 on each makes a 95 % interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from safer_engine.errors import NumericalError

REPORT_TAIL = 0.025
"""Of the intervals that a report holds."""
_Z_REPORT = NormalDist().inv_cdf(1 - REPORT_TAIL)
_MANY = 1e6


@dataclass(frozen=True)
class Bounds:
    """Both ends of an interval."""

    lo: float
    hi: float


Spread = Callable[[float], Bounds]
"""From a tail in (0, 0.5) to the interval with that chance beyond each end."""


@lru_cache(maxsize=4096)
def student_quantile(tail: float, degrees: float) -> float:
    """t with P(T > t) = `tail` in (0, 0.5), T of Student's distribution with `degrees` ≥ 1 degrees of freedom."""
    if not 0 < tail < 0.5 or degrees < 1:
        raise NumericalError(f"no quantile of Student's distribution for a tail of {tail} and {degrees} degrees of freedom")
    if degrees > _MANY:
        return NormalDist().inv_cdf(1 - tail)
    low, high = 0.0, 2.0
    while _student_tail(high, degrees) > tail:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_tail(middle, degrees) > tail else (low, middle)
    return (low + high) / 2


def _student_tail(t: float, degrees: float) -> float:
    """P(T > t) for t ≥ 0, by the incomplete beta function."""
    return 0.5 * incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0 and x in [0, 1], by its continued fraction (modified Lentz)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def share_spread(share: float, lo: float, hi: float, n: int, n_groups: int) -> Spread:
    """Wilson's interval of a share whose values come in groups.

    The report's interval says how many independent values the share is worth: share · (1 − share) / se², at most n; where it has
    no width (all values alike), as many as there are groups. The quantile is Student's, with n_groups − 1 degrees of freedom.

    Args:
        share: in [0, 1].
        lo, hi: of the 95 % interval by resampling groups.
        n_groups: at least 2.
    """
    return wilson_spread(share, effective_count(share, lo, hi, n, n_groups), n_groups - 1)


def effective_count(share: float, lo: float, hi: float, n: int, n_groups: int) -> float:
    """Independent values that a share with this interval is worth, in [2, n]; by its longer side, since 0 and 1 cut the other."""
    se = max(share - lo, hi - share) / _Z_REPORT
    variance = share * (1 - share)
    if se <= 0 or variance <= 0:
        return float(min(n, n_groups))
    return max(2.0, min(float(n), variance / se**2))


def wilson_spread(share: float, count: float, degrees: float) -> Spread:
    """Wilson's interval (1927) of a share of `count` values, with Student's quantile."""

    def interval(tail: float) -> Bounds:
        c = student_quantile(tail, degrees)
        scale = 1 + c * c / count
        centre = (share + c * c / (2 * count)) / scale
        half = c / scale * math.sqrt(share * (1 - share) / count + c * c / (4 * count * count))
        return Bounds(max(0.0, centre - half), min(1.0, centre + half))

    return interval


def stretched_spread(estimate: float, lo: float, hi: float, degrees: float) -> Spread:
    """A 95 % interval stretched to other tails, each side by itself, by Student's quantile over the normal one."""

    def interval(tail: float) -> Bounds:
        factor = student_quantile(tail, degrees) / _Z_REPORT
        return Bounds(estimate - factor * (estimate - lo), estimate + factor * (hi - estimate))

    return interval


def apart_spread(new: float, new_spread: Spread, old: float, old_spread: Spread) -> Spread:
    """Of new − old, each with an interval of its own and independent (Zou & Donner 2008); wider where the two go together."""

    def interval(tail: float) -> Bounds:
        a, b = new_spread(tail), old_spread(tail)
        down = math.hypot(new - a.lo, b.hi - old)
        up = math.hypot(a.hi - new, old - b.lo)
        return Bounds(new - old - down, new - old + up)

    return interval


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """Of the mean of estimates that may go together as they like: as far as their intervals reach on average."""

    def interval(tail: float) -> Bounds:
        found = [spread(tail) for spread in spreads]
        return Bounds(math.fsum(each.lo for each in found) / len(found), math.fsum(each.hi for each in found) / len(found))

    return interval


def prediction_spread(estimate: float, spread: Spread, sd: float, count: int, most: float = math.inf) -> Spread:
    """Of the change from the mean of several trainings to one more: a prediction interval.

    The variance of the change has two parts: which values were drawn (`spread` covers them), and sd² · (1 + 1/count), because the
    new training and the mean of the others each differ from what the recipe comes to. Each part has its own quantile of
    Student's distribution, count − 1 degrees of freedom for the second, and the two reaches add as squares (Banerjee 1960). For
    normal parts the chance beyond each end is then at most the tail, whatever the variances are: it is exact where only one part
    matters, and in between F(x) = P(Z² ≤ x) is concave. Satterthwaite's degrees of freedom in place of it have a chance of up
    to nine times the tail with two trainings, four times with three (simulated at a tail of 0.004), because a small spread that
    came about by chance also makes the degrees of freedom many.

    `sd` is of the trainings' figures as measured. What the draw of values does to all of them alike is not in it; what it does to
    each by itself is in it, and in `spread` as well, and nothing is subtracted for that: wider rather than narrower. Trainings
    are taken as draws of a normal distribution.

    Args:
        sd: standard deviation (count − 1 below) of the trainings' figures.
        count: how many, at least 2.
        most: the change lies within ± this.
    """
    more = sd * math.sqrt(1 + 1 / count)

    def interval(tail: float) -> Bounds:
        drawn, trained = spread(tail), student_quantile(tail, count - 1) * more
        down, up = max(0.0, estimate - drawn.lo), max(0.0, drawn.hi - estimate)
        return Bounds(max(-most, estimate - math.hypot(down, trained)), min(most, estimate + math.hypot(up, trained)))

    return interval


def wider_spread(estimate: float, spread: Spread, other: float, other_spread: Spread) -> Spread:
    """Around an estimate in [−1, 1], on each side as far as the wider of two intervals, its own and that of `other`, reaches."""

    def interval(tail: float) -> Bounds:
        a, b = spread(tail), other_spread(tail)
        down, up = max(estimate - a.lo, other - b.lo), max(a.hi - estimate, b.hi - other)
        return Bounds(max(-1.0, estimate - down), min(1.0, estimate + up))

    return interval


@dataclass(frozen=True)
class Difference:
    """A mean paired difference. `n` pairs in `n_groups` groups; `spread` is None where there are fewer than two groups."""

    mean: float
    spread: Spread | None
    n: int
    n_groups: int


def paired_difference(differences: Sequence[float], groups: Sequence[str], *, shares: bool) -> Difference:
    """Mean of paired differences with a cluster-robust interval (CR1, Student's quantile with n_groups − 1).

    Args:
        differences: new − old of each pair, finite.
        groups: group of each.
        shares: the differences are of right and wrong (−1, 0, 1). Then one half of an average group is added to each of the four
            cells right/wrong × right/wrong (Agresti & Min 2005, for single values), so that few disagreements, or none, do not
            make the interval too narrow.
    """
    n = len(differences)
    if n == 0 or n != len(groups) or not all(map(math.isfinite, differences)):
        raise NumericalError(f"{n} paired differences in {len(groups)} groups: there must be as many, at least one, all finite")
    mean = math.fsum(differences) / n
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(differences, groups, strict=True):
        sums[group] += value - mean
    count = len(sums)
    if count < 2:
        return Difference(mean, None, n, count)
    squares = count / (count - 1) * math.fsum(value * value for value in sums.values())
    added = n / count if shares else 0.0
    centre, total = mean * n / (n + 2 * added), n + 2 * added
    se = math.sqrt(squares + added * added) / total

    def interval(tail: float) -> Bounds:
        half = student_quantile(tail, count - 1) * se
        return Bounds(max(-1.0, centre - half), min(1.0, centre + half)) if shares else Bounds(centre - half, centre + half)

    return Difference(mean, interval, n, count)


def paired_gap(
    differences: Sequence[float], first: Sequence[bool], strata: Sequence[object], groups: Sequence[str]
) -> Difference:
    """Change of a stratified difference of shares: mean over the pairs of `first` less mean over the others, within strata.

    Strata are weighted by n_first · n_other / (n_first + n_other), as Mantel and Haenszel do; those without both kinds count for
    nothing. The interval is cluster-robust (CR1) about the means of the strata; half an average group of each outcome is added to
    each kind, as in `paired_difference`. Student's quantile is that of the kind with fewer groups.

    Args:
        differences: new − old of right and wrong of each pair (−1, 0, 1).
        first: the kind of each pair.
        strata: the stratum of each.
        groups: the group of each.
    """
    cells: dict[tuple[object, bool], list[int]] = defaultdict(list)
    for place, (stratum, kind) in enumerate(zip(strata, first, strict=True)):
        cells[stratum, bool(kind)].append(place)
    both = [stratum for stratum in dict.fromkeys(strata) if cells[stratum, True] and cells[stratum, False]]
    sizes = {stratum: (len(cells[stratum, True]), len(cells[stratum, False])) for stratum in both}
    weights = {stratum: a * b / (a + b) for stratum, (a, b) in sizes.items()}
    total, mean = math.fsum(weights.values()), 0.0
    sums: dict[str, float] = defaultdict(float)
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for stratum in both:
        for kind in (True, False):
            places = cells[stratum, kind]
            share = (1 if kind else -1) * weights[stratum] / total / len(places)
            middle = math.fsum(differences[place] for place in places) / len(places)
            mean += share * len(places) * middle
            small = math.sqrt(len(places) / (len(places) - 1)) if len(places) > 1 else 1.0
            for place in places:
                left = differences[place] - (middle if len(places) > 1 else 0.0)
                sums[groups[place]] += share * small * left
                named[kind].add(groups[place])
    n, fewest = sum(map(sum, sizes.values())), min(map(len, named.values()))
    if fewest < 2:
        return Difference(mean, None, n, len(sums))
    squares = len(sums) / (len(sums) - 1) * math.fsum(value * value for value in sums.values())
    se = math.sqrt(squares + math.fsum(1 / (len(found) + 2) ** 2 for found in named.values()))

    def interval(tail: float) -> Bounds:
        half = student_quantile(tail, fewest - 1) * se
        return Bounds(max(-2.0, mean - half), min(2.0, mean + half))

    return Difference(mean, interval, n, len(sums))
