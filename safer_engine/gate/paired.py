"""A fact against the baseline's: pair by pair where both audits have the evaluation pairs, apart otherwise.

Several baselines are trainings of one recipe. The change is then from their mean, and its interval also covers how far one more
training of that recipe may lie from it (`intervals.prediction_spread`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from safer_engine.gate.documents import Audit, EvaluationPair, in_slice
from safer_engine.gate.facts import Figure
from safer_engine.gate.intervals import (
    Bounds,
    Difference,
    Spread,
    apart_spread,
    mean_spread,
    paired_difference,
    paired_gap,
    prediction_spread,
)
from safer_engine.gate.paths import parse_path
from safer_engine.gate.shapes import SHARES

_FEWEST_SHARED = 0.5
"""Share of the smaller evaluation set that must be in the other for the two to be compared."""
_PAIRED = (("groups", "accuracy"), ("groups", "margin"))
_GAP = ("length", "gap")
_MOST = {**dict.fromkeys(SHARES, 1.0), "gap": 2.0}
"""How far figures can be apart, by name."""


Both = tuple[EvaluationPair, tuple[EvaluationPair, ...]]
"""An evaluation pair as the new audit has it, and as each baseline has it."""


@dataclass(frozen=True)
class Shared:
    """Evaluation pairs that an audit has in common with all baselines, by rising pair_id; or why they cannot be paired.

    Attributes:
        only_new: pairs of the new audit that are not common.
        only_old: pairs of any baseline that are not common.
    """

    pairs: tuple[Both, ...] = ()
    reason: str = ""
    only_new: int = 0
    only_old: int = 0


def shared_pairs(new: Audit, *olds: Audit) -> Shared:
    """Match the evaluation pairs of an audit and its baselines by pair_id.

    Ids alone do not make two pairs the same: every id that the audit and a baseline both have must have the same group, axis and
    subset, and unless the evaluation sets have the same digest, at least half of the smaller set must be in the other. Of
    several baselines each must be so, and half of the smallest set must be in all.
    """
    if new.pairs is None or any(old.pairs is None for old in olds):
        which = "the report" if new.pairs is None else "the baseline" if len(olds) == 1 else "a baseline"
        return Shared(reason=f"{which} has no evaluation.jsonl beside it")
    before = [{pair.pair_id: pair for pair in old.pairs or ()} for old in olds]
    for old, known in zip(olds, before, strict=True):
        if reason := _differ(new, old, [(pair, known[pair.pair_id]) for pair in new.pairs if pair.pair_id in known]):
            return Shared(reason=reason)
    common = [pair for pair in new.pairs if all(pair.pair_id in known for known in before)]
    fewest = min(len(new.pairs), *map(len, before))
    if not all(same_evaluation(new, old) for old in olds) and len(common) < _FEWEST_SHARED * fewest:
        return Shared(reason=f"the evaluation sets differ, and have {len(common)} pair ids in common")
    found = sorted(((pair, tuple(known[pair.pair_id] for known in before)) for pair in common), key=lambda two: two[0].pair_id)
    only_old = len(set().union(*before)) - len(common)
    return Shared(tuple(found), "", len(new.pairs) - len(common), only_old)


def _differ(new: Audit, old: Audit, found: list[tuple[EvaluationPair, EvaluationPair]]) -> str:
    """Why two evaluation sets are not the same; empty where they are."""
    assert new.pairs is not None
    assert old.pairs is not None
    if not same_evaluation(new, old) and len(found) < _FEWEST_SHARED * min(len(new.pairs), len(old.pairs)):
        return f"the evaluation sets differ, and have {len(found)} pair ids in common"
    if moved := sum(a.place != b.place for a, b in found):
        return f"the evaluation sets differ: {moved} common pair ids are of another group, axis or subset"
    return ""


def same_evaluation(new: Audit, old: Audit) -> bool:
    """Whether both audits measured on the same evaluation data."""
    digest = new.digest("evaluation")
    return digest is not None and digest == old.digest("evaluation")


def change(path: str, new: Figure, olds: Sequence[Figure], audits: tuple[Audit, ...], shared: Shared) -> Figure:
    """new − mean of old, as a figure with its interval; where there can be none, `unsure` says why.

    Args:
        path: of the fact, in all reports.
        olds: the figure of each baseline, at least one.
        audits: the new one, and the baselines.
        shared: their common evaluation pairs.
    """
    steps = parse_path(path)
    unsure = next((figure.unsure for figure in (new, *olds) if figure.unsure), "")
    plain = replace(new, value=new.number - _mean([old.number for old in olds]), spread=None, unsure=unsure)
    if any(figure.absent for figure in (new, *olds)):
        return plain
    if steps[0].key == "evaluation":
        place = tuple(step.key for step in steps[1:])
        if place in _PAIRED and not shared.reason:
            return _paired(plain, shared, shares=place[1] == "accuracy")
        if place == _GAP and not shared.reason and (paired := _paired_gap(plain, shared)):
            return paired
        if not all(same_evaluation(audits[0], old) for old in audits[1:]):
            which = "the baseline" if len(olds) == 1 else "a baseline"
            other = f"{which} was measured on other evaluation pairs: a difference is not the reward model's alone"
            return replace(plain, unsure=f"{other} ({shared.reason})" if shared.reason else other)
        plain = replace(
            plain, note=f"not paired: {shared.reason or 'only accuracies and margins of groups and gaps of lengths are'}"
        )
    return _among_trainings(_unpaired(plain, new, olds), [old.number for old in olds])


def _unpaired(plain: Figure, new: Figure, olds: Sequence[Figure]) -> Figure:
    """A change with the interval that follows from those of the figures, if any has one."""
    if new.spread is None and all(old.spread is None for old in olds):
        return plain
    before = mean_spread([_spread_of(old) for old in olds])
    mean = _mean([old.number for old in olds])
    fewest = min((figure.n for figure in (new, *olds) if figure.n is not None), default=None)
    groups = min((figure.n_groups for figure in (new, *olds) if figure.n_groups is not None), default=None)
    return replace(plain, spread=apart_spread(new.number, _spread_of(new), mean, before), n=fewest, n_groups=groups)


def _among_trainings(figure: Figure, values: Sequence[float]) -> Figure:
    """A change whose interval also covers one more training, from the figures of several baselines.

    A figure without an interval gets one, unless the baselines have it all alike.
    """
    if len(values) == 1:
        return figure
    sd = statistics.stdev(values)
    said = f"against the mean of {len(values)} baselines, spread between trainings SD {sd:.2g}"
    figure = replace(figure, training_sd=sd, note=f"{figure.note}; {said}" if figure.note else said)
    if figure.unsure or (figure.spread is None and sd == 0):
        return figure
    drawn, most = figure.spread or _exactly(figure.number), _MOST.get(figure.key, math.inf)
    return replace(figure, spread=prediction_spread(figure.number, drawn, sd, len(values), most))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread_of(figure: Figure) -> Spread:
    return figure.spread or _exactly(figure.number)


def _exactly(value: float) -> Spread:
    return lambda _: Bounds(value, value)


def _of_slice(plain: Figure, shared: Shared) -> list[Both]:
    axis, subset = plain.slice
    chosen = {pair.pair_id for pair in in_slice((new for new, _ in shared.pairs), axis, subset)}
    return [both for both in shared.pairs if both[0].pair_id in chosen]


def _paired_gap(plain: Figure, shared: Shared) -> Figure | None:
    """Change of the accuracy gap by length; None where the lengths of some pairs are not known.

    Tokenizers may differ: pairs whose longer response is not the longer one to all models are left out.
    """
    both = _of_slice(plain, shared)
    if any(pair.longer_by is None for new, olds in both for pair in (new, *olds)):
        return None
    agreed = [(new, olds) for new, olds in both if all((new.longer_by or 0) * (old.longer_by or 0) > 0 for old in olds)]
    odd = sum(any(pair.longer_by != 0 for pair in (new, *olds)) for new, olds in both) - len(agreed)

    def gap(values: list[float]) -> Difference:
        first = [(new.longer_by or 0) > 0 for new, _ in agreed]
        return paired_gap(values, first, [(new.axis, new.subset) for new, _ in agreed], [new.group for new, _ in agreed])

    found = gap([float(new.right) - _mean([float(old.right) for old in olds]) for new, olds in agreed])
    models = "all" if any(len(olds) > 1 for _, olds in both) else "both"
    left = f"; {odd} pairs whose longer response is not the same to {models} models left out" if odd else ""
    few = "fewer than two groups of pairs of either kind are in both audits"
    made = replace(
        plain,
        value=found.mean,
        spread=found.spread,
        unsure="" if found.spread is not None else few,
        n=found.n,
        n_groups=found.n_groups,
        note=f"paired by pair_id{_apart(shared)}{left}",
    )
    if found.spread is None:
        return made
    return _among_trainings(made, [gap([float(old.right) for old in each]).mean for each in _baselines(agreed)])


def _baselines(both: Sequence[Both]) -> list[tuple[EvaluationPair, ...]]:
    """The pairs of each baseline."""
    return list(zip(*(olds for _, olds in both), strict=True))


def _apart(shared: Shared) -> str:
    if not shared.only_new and not shared.only_old:
        return ""
    return f"; {shared.only_new} pairs only here, {shared.only_old} only in the baseline"


def _paired(plain: Figure, shared: Shared, *, shares: bool) -> Figure:
    both = _of_slice(plain, shared)
    if not both:
        return replace(plain, unsure="no evaluation pair of this slice is in both audits")

    def measured(pair: EvaluationPair) -> float:
        return float(pair.right) if shares else pair.margin

    values = [measured(new) - _mean([measured(old) for old in olds]) for new, olds in both]
    found = paired_difference(values, [new.group for new, _ in both], shares=shares)
    made = replace(
        plain,
        value=found.mean,
        spread=found.spread,
        unsure="" if found.spread is not None else "fewer than two groups of pairs are in both audits",
        n=found.n,
        n_groups=found.n_groups,
        note=f"paired by pair_id{_apart(shared)}",
    )
    return _among_trainings(made, [_mean([measured(old) for old in each]) for each in _baselines(both)])
