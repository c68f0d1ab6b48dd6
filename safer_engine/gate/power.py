"""What a policy's rules on pair accuracy can detect with given evaluation data, before any model is run.

An accuracy is planned exactly: the number of right pairs is binomial over the independent pairs that the data are worth. A paired
change is planned with the normal approximation to the interval of `intervals.paired_difference`, and where there are several
baselines of `intervals.prediction_spread`, averaged over the spreads that so many trainings may show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from safer_engine.gate.intervals import Bounds, incomplete_beta, student_quantile, wilson_spread
from safer_engine.gate.paths import parse_path
from safer_engine.gate.policy import Policy, Rule

_EXACT = ("dataset", "edits", "sae", "provenance", "spec", "reward_model")
"""First keys of facts that mostly have no interval, so that their rules take no part of the false alarms."""
_RARELY = 0.05
_MOST_PAIRS = 10_000_000
_NODES = 300
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Pairing:
    """What a slice has in common with a baseline: pairs, groups, correlation of right and wrong, design effect of the change."""

    n: int
    n_groups: int
    correlation: float
    design_effect: float


@dataclass(frozen=True)
class Trainings:
    """Baselines, and the standard deviation of the figure between trainings of their recipe. One alone: not known, taken as 0."""

    count: int = 1
    sd: float = 0.0

    @property
    def widening(self) -> float:
        """Standard deviations between one more training and the mean of these."""
        return math.sqrt(1 + 1 / self.count)

    def seen(self) -> list[tuple[float, float]]:
        """Standard deviations that so many trainings may show, with their chances."""
        if self.count < 2 or self.sd == 0:
            return [(0.0, 1.0)]
        degrees = self.count - 1
        least, most = math.log(degrees) - 34 / math.sqrt(degrees), math.log(degrees + 12 * math.sqrt(2 * degrees) + 30)
        logs = [least + (most - least) * (place + 0.5) / _NODES for place in range(_NODES)]
        density = [math.exp((degrees * (u - math.log(degrees)) - math.exp(u) + degrees) / 2) for u in logs]  # of ln chi-square
        whole = math.fsum(density)
        return [(self.sd * math.sqrt(math.exp(u) / degrees), part / whole) for u, part in zip(logs, density, strict=True)]


@dataclass(frozen=True)
class SliceSize:
    """Evaluation pairs of a slice.

    Attributes:
        axis, subset: None for all axes, and for the whole axis.
        n_groups: None where not known; then every pair counts as a group.
        accuracy: what is expected of the reward model there.
        design_effect: how many pairs of a group are worth one independent pair, at least 1.
        pairing: with the baseline, where that was measured.
        trainings: the baselines.
    """

    axis: str | None
    subset: str | None
    n: int
    n_groups: int | None
    accuracy: float
    design_effect: float = 1.0
    pairing: Pairing | None = None
    trainings: Trainings = Trainings()

    @property
    def per_group(self) -> float:
        """Pairs in an average group."""
        return self.n / self.n_groups if self.n_groups else 1.0

    @property
    def degrees(self) -> float:
        """Degrees of freedom of an interval on it."""
        return max(1, (self.n_groups or self.n) - 1)

    @property
    def label(self) -> str:
        """As checks are labelled."""
        named = (("axis", self.axis), ("subset", self.subset))
        return ", ".join(f"{name}={value}" for name, value in named if value is not None)


@dataclass(frozen=True)
class Planned:
    """What a check can detect.

    Attributes:
        id: as the check will be named.
        half_width: of the interval at `misses`, for the expected accuracy, or for no change.
        fails_at: accuracy at or below which, or drop at or above which, it fails with the power asked for; None: it cannot.
        passes_at: accuracy at or above which, or drop at or below which, it passes with that power; None: it cannot.
        p_pass, p_fail: chances at the expected accuracy, or with no change.
        needed: pairs with which it would pass with that power; None where it does already, or no number would do.
        warning: what is wrong with it; empty for nothing.
    """

    id: str
    rule: str
    kind: str
    n: int
    half_width: float
    fails_at: float | None
    passes_at: float | None
    p_pass: float
    p_fail: float
    needed: int | None = None
    warning: str = ""


@dataclass(frozen=True)
class Plan:
    """All planned checks, and the names of the rules that cannot be planned from counts."""

    checks: tuple[Planned, ...]
    not_planned: tuple[str, ...]


@dataclass(frozen=True)
class _Chances:
    """Chances that a check passes and fails, as functions of the true accuracy or drop; `half_width` where it is expected."""

    passes: Callable[[float], float]
    fails: Callable[[float], float]
    half_width: float


def plan(policy: Policy, slices: Sequence[SliceSize], correlation: float = 0.5, power: float = 0.8) -> Plan:
    """What each rule on `evaluation.groups[…].accuracy` can detect.

    Args:
        slices: all pairs, axes and subsets of the evaluation set.
        correlation: of right and wrong between the reward model and its baseline, in [0, 1], for slices without a `pairing`.
        power: the chance with which something is said to be detected, in (0.5, 1).
    """
    chosen = {rule.name: _slices_of(rule, slices) for rule in policy.rules}
    planned = [rule for rule in policy.rules if chosen[rule.name]]
    others = [rule for rule in policy.rules if rule not in planned]
    random = len(planned) + sum(parse_path(rule.fact)[0].key not in _EXACT and not _is_accuracy(rule) for rule in others)
    checks = []
    for rule in planned:
        tail = min(policy.misses, policy.false_alarms / random / len(chosen[rule.name]))
        for size in chosen[rule.name]:
            checks.append(_planned(rule, size, (policy.misses, tail), correlation, power))
    return Plan(tuple(checks), tuple(rule.name for rule in others))


def _is_accuracy(rule: Rule) -> bool:
    return [step.key for step in parse_path(rule.fact)] == ["evaluation", "groups", "accuracy"] and rule.max_rise is None


def _slices_of(rule: Rule, slices: Sequence[SliceSize]) -> list[SliceSize]:
    if not _is_accuracy(rule) or rule.max is not None:
        return []
    step = parse_path(rule.fact)[1]
    return [size for size in slices if step.chooses({"axis": size.axis, "subset": size.subset})]


def _planned(rule: Rule, size: SliceSize, tails: tuple[float, float], correlation: float, power: float) -> Planned:
    kind = "change" if rule.compares else "accuracy"
    if rule.compares and size.pairing is not None:
        found = size.pairing
        size = replace(size, n=found.n, n_groups=found.n_groups or None, design_effect=found.design_effect)
        correlation = found.correlation
    if not size.n:
        nothing = "the baseline has none of these pairs: can only be inconclusive"
        return Planned(_id(rule, size), rule.name, kind, 0, 1.0, None, None, 0.0, 0.0, warning=nothing)
    expected = 0.0 if rule.compares else size.accuracy
    chances = _chances(rule, size, tails, correlation)
    bound = (rule.max_drop if rule.compares else rule.min) or 0.0
    worst, best = (size.accuracy, size.accuracy - 1) if rule.compares else (0.0, 1.0)
    made = Planned(
        id=_id(rule, size),
        rule=rule.name,
        kind=kind,
        n=size.n,
        half_width=chances.half_width,
        fails_at=_edge(chances.fails, worst, bound, power),
        passes_at=_edge(chances.passes, best, bound, power),
        p_pass=chances.passes(expected),
        p_fail=chances.fails(expected),
    )
    if size.n < rule.min_n:
        warning = f"fewer than min_n {rule.min_n}: can only be inconclusive"
        return replace(made, fails_at=None, passes_at=None, p_pass=0.0, p_fail=0.0, needed=rule.min_n, warning=warning)
    if made.p_pass >= power or made.p_fail >= power:
        return made
    needed = _needed(rule, size, tails, correlation, power)
    more = "; more pairs would not do, more baselines might" if needed is None and rule.compares and size.trainings.sd else ""
    return replace(made, needed=needed, warning=_warning(made, rule) + more)


def _id(rule: Rule, size: SliceSize) -> str:
    return f"{rule.name}[{size.label}]" if size.label else rule.name


def _warning(made: Planned, rule: Rule) -> str:
    where = "with no change" if rule.compares else "at the expected accuracy"
    if made.p_pass < _RARELY and made.p_fail < _RARELY:
        return f"{where} it can only be inconclusive"
    return f"{where} it passes with a chance of {100 * made.p_pass:.0f} % only"


def _chances(rule: Rule, size: SliceSize, tails: tuple[float, float], correlation: float) -> _Chances:
    if rule.compares:
        return _of_change(rule, size, tails, correlation)
    return _of_accuracy(rule, size, tails)


def _of_accuracy(rule: Rule, size: SliceSize, tails: tuple[float, float]) -> _Chances:
    """Chances over the binomial count of right pairs among the independent ones."""
    count = max(2, round(size.n / size.design_effect))
    bound = rule.min or 0.0

    def interval(right: int, tail: float) -> Bounds:
        return wilson_spread(right / count, count, size.degrees)(tail)

    wrong_side = _first(lambda right: interval(right, tails[1]).hi >= bound, count)
    proven = _first(lambda right: interval(right, tails[0]).lo >= bound, count)
    right_side = proven if rule.needs_proof else wrong_side
    width = wilson_spread(size.accuracy, count, size.degrees)(tails[0])
    return _Chances(
        passes=lambda accuracy: _at_least(right_side, count, accuracy),
        fails=lambda accuracy: 1 - _at_least(wrong_side, count, accuracy),
        half_width=(width.hi - width.lo) / 2,
    )


def _of_change(rule: Rule, size: SliceSize, tails: tuple[float, float], correlation: float) -> _Chances:
    """Chances under the normal approximation to the paired difference, as `intervals` makes its interval."""
    allowed, trainings = rule.max_drop or 0.0, size.trainings
    total = size.n + 2 * size.per_group
    narrow, wide = (student_quantile(tail, size.degrees) for tail in tails)
    seen, steps = trainings.seen(), [0.0, 0.0]
    if trainings.count > 1:
        steps = [student_quantile(tail, trainings.count - 1) * trainings.widening for tail in tails]

    def spread(drop: float) -> tuple[float, float]:
        variance = size.n * size.design_effect * _variance(size.accuracy, drop, correlation) * (1 + 1 / trainings.count) / 2
        return math.sqrt(variance) / total, math.sqrt(variance + size.per_group**2) / total

    def averaged(drop: float, distance: float, quantile: float, step: float) -> float:
        sd, se = spread(drop)
        sd = math.hypot(sd, trainings.sd * trainings.widening)
        return math.fsum(part * _normal_below(distance - math.hypot(quantile * se, step * shown), sd) for shown, part in seen)

    def fails(drop: float) -> float:
        return averaged(drop, drop * size.n / total - allowed, wide, steps[1])

    def passes(drop: float) -> float:
        if not rule.needs_proof:
            return 1 - fails(drop)
        return averaged(drop, allowed - drop * size.n / total, narrow, steps[0])

    width = math.fsum(part * math.hypot(narrow * spread(0.0)[1], steps[0] * shown) for shown, part in seen)
    return _Chances(passes, fails, width)


def _variance(accuracy: float, drop: float, correlation: float) -> float:
    """Of the difference of right and wrong of one pair, whose chance to be right falls by `drop`."""
    after = min(1.0, max(0.0, accuracy - drop))
    both = accuracy * after + correlation * math.sqrt(accuracy * (1 - accuracy) * after * (1 - after))
    return max(0.0, accuracy + after - 2 * min(both, accuracy, after) - (accuracy - after) ** 2)


def _normal_below(distance: float, sd: float) -> float:
    return float(distance > 0) if sd == 0 else _NORMAL.cdf(distance / sd)


def _at_least(right: int, count: int, accuracy: float) -> float:
    """Chance of `right` or more of `count` pairs; `right` = count + 1 never happens."""
    if right <= 0 or right > count:
        return float(right <= 0)
    return incomplete_beta(right, count - right + 1, accuracy)


def _first(holds: Callable[[int], bool], count: int) -> int:
    """The smallest count of right pairs for which something holds that stays true above; count + 1 where it never does."""
    low, high = 0, count + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _edge(chance: Callable[[float], float], sure: float, bound: float, power: float) -> float | None:
    """Between where it is surest and the bound, the place nearest to the bound with that chance; None where nowhere."""
    if chance(sure) < power:
        return None
    near, far = bound, sure
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if chance(middle) >= power else (middle, far)
    return far


def _needed(rule: Rule, size: SliceSize, tails: tuple[float, float], correlation: float, power: float) -> int | None:
    """Pairs, in groups of the same size, with which the rule would pass as expected; None where no number would do."""
    expected = 0.0 if rule.compares else size.accuracy

    def enough(n: int) -> bool:
        groups = None if size.n_groups is None else max(2, round(n / size.per_group))
        return _chances(rule, replace(size, n=n, n_groups=groups), tails, correlation).passes(expected) >= power

    if not enough(_MOST_PAIRS):
        return None
    low, high = size.n, _MOST_PAIRS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
