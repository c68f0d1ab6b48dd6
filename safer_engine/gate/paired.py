"""A fact against the baseline's: pair by pair where both audits have the evaluation pairs, apart otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace

from safer_engine.gate.documents import Audit, EvaluationPair, in_slice
from safer_engine.gate.facts import Figure
from safer_engine.gate.intervals import Bounds, apart_spread, paired_difference, paired_gap
from safer_engine.gate.paths import parse_path

_FEWEST_SHARED = 0.5
"""Share of the smaller evaluation set that must be in the other for the two to be compared."""
_PAIRED = (("groups", "accuracy"), ("groups", "margin"))
_GAP = ("length", "gap")


@dataclass(frozen=True)
class Shared:
    """Evaluation pairs that two audits have in common, new and old, by rising pair_id; or why they cannot be paired."""

    pairs: tuple[tuple[EvaluationPair, EvaluationPair], ...] = ()
    reason: str = ""
    only_new: int = 0
    only_old: int = 0


def shared_pairs(new: Audit, old: Audit) -> Shared:
    """Match the evaluation pairs of two audits by pair_id.

    Ids alone do not make two pairs the same: every id that both have must have the same group, axis and subset, and unless both
    evaluation sets have the same digest, at least half of the smaller set must be in the other.
    """
    if new.pairs is None or old.pairs is None:
        which = "the report" if new.pairs is None else "the baseline"
        return Shared(reason=f"{which} has no evaluation.jsonl beside it")
    before = {pair.pair_id: pair for pair in old.pairs}
    found = sorted(((pair, before[pair.pair_id]) for pair in new.pairs if pair.pair_id in before), key=lambda two: two[0].pair_id)
    if not same_evaluation(new, old) and len(found) < _FEWEST_SHARED * min(len(new.pairs), len(old.pairs)):
        return Shared(reason=f"the evaluation sets differ, and have {len(found)} pair ids in common")
    if moved := sum(a.place != b.place for a, b in found):
        return Shared(reason=f"the evaluation sets differ: {moved} common pair ids are of another group, axis or subset")
    return Shared(tuple(found), "", len(new.pairs) - len(found), len(old.pairs) - len(found))


def same_evaluation(new: Audit, old: Audit) -> bool:
    """Whether both audits measured on the same evaluation data."""
    digest = new.digest("evaluation")
    return digest is not None and digest == old.digest("evaluation")


def change(path: str, new: Figure, old: Figure, audits: tuple[Audit, Audit], shared: Shared) -> Figure:
    """new − old, as a figure with its interval; where there can be none, `unsure` says why.

    Args:
        path: of the fact, in both reports.
        audits: new and old.
        shared: their common evaluation pairs.
    """
    steps = parse_path(path)
    plain = replace(new, value=new.number - old.number, spread=None, unsure=new.unsure or old.unsure)
    if new.absent or old.absent:
        return plain
    if steps[0].key == "evaluation":
        place = tuple(step.key for step in steps[1:])
        if place in _PAIRED and not shared.reason:
            return _paired(plain, shared, shares=place[1] == "accuracy")
        if place == _GAP and not shared.reason and (paired := _paired_gap(plain, shared)):
            return paired
        if not same_evaluation(*audits):
            other = "the baseline was measured on other evaluation pairs: a difference is not the reward model's alone"
            return replace(plain, unsure=f"{other} ({shared.reason})" if shared.reason else other)
        plain = replace(
            plain, note=f"not paired: {shared.reason or 'only accuracies and margins of groups and gaps of lengths are'}"
        )
    if new.spread is None and old.spread is None:
        return plain
    zero = replace(old, spread=lambda _: _at(old.number)) if old.spread is None else old
    one = replace(new, spread=lambda _: _at(new.number)) if new.spread is None else new
    assert zero.spread is not None
    assert one.spread is not None
    fewest = min((count for count in (new.n, old.n) if count is not None), default=None)
    groups = min((count for count in (new.n_groups, old.n_groups) if count is not None), default=None)
    return replace(plain, spread=apart_spread(one.number, one.spread, zero.number, zero.spread), n=fewest, n_groups=groups)


def _at(value: float) -> Bounds:
    return Bounds(value, value)


def _of_slice(plain: Figure, shared: Shared) -> list[tuple[EvaluationPair, EvaluationPair]]:
    axis, subset = plain.slice
    chosen = {pair.pair_id for pair in in_slice((new for new, _ in shared.pairs), axis, subset)}
    return [(new, old) for new, old in shared.pairs if new.pair_id in chosen]


def _paired_gap(plain: Figure, shared: Shared) -> Figure | None:
    """Change of the accuracy gap by length; None where the lengths of some pairs are not known.

    Tokenizers may differ: pairs whose longer response is not the longer one to both models are left out.
    """
    both = _of_slice(plain, shared)
    if any(pair.longer_by is None for two in both for pair in two):
        return None
    agreed = [(new, old) for new, old in both if (new.longer_by or 0) * (old.longer_by or 0) > 0]
    odd = sum(new.longer_by != 0 or old.longer_by != 0 for new, old in both) - len(agreed)
    found = paired_gap(
        [float(new.right) - float(old.right) for new, old in agreed],
        [(new.longer_by or 0) > 0 for new, _ in agreed],
        [(new.axis, new.subset) for new, _ in agreed],
        [new.group for new, _ in agreed],
    )
    left = f"; {odd} pairs whose longer response is not the same to both models left out" if odd else ""
    few = "fewer than two groups of pairs of either kind are in both audits"
    return replace(
        plain,
        value=found.mean,
        spread=found.spread,
        unsure="" if found.spread is not None else few,
        n=found.n,
        n_groups=found.n_groups,
        note=f"paired by pair_id{_apart(shared)}{left}",
    )


def _apart(shared: Shared) -> str:
    if not shared.only_new and not shared.only_old:
        return ""
    return f"; {shared.only_new} pairs only here, {shared.only_old} only in the baseline"


def _paired(plain: Figure, shared: Shared, *, shares: bool) -> Figure:
    both = _of_slice(plain, shared)
    if not both:
        return replace(plain, unsure="no evaluation pair of this slice is in both audits")
    if shares:
        values = [float(new.right) - float(old.right) for new, old in both]
    else:
        values = [new.margin - old.margin for new, old in both]
    found = paired_difference(values, [new.group for new, _ in both], shares=shares)
    return replace(
        plain,
        value=found.mean,
        spread=found.spread,
        unsure="" if found.spread is not None else "fewer than two groups of pairs are in both audits",
        n=found.n,
        n_groups=found.n_groups,
        note=f"paired by pair_id{_apart(shared)}",
    )
