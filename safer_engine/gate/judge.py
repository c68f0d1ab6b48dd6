"""Whether a reward model passes: every rule against the interval of its fact, and the verdict on all of them.

A check passes when the interval at `misses` on each side lies on the right side of its bound; it fails when the interval at the
check's part of `false_alarms` (at most `misses`) lies wholly on the wrong side; else it is inconclusive. A model must pass every
check, so misses need no correction (an intersection–union test); any one check can fail it, so false alarms are shared: evenly
among the rules with intervals, and within a rule among its checks (Bonferroni; it holds however the checks depend on each other).

Against one baseline these chances are over which values were drawn. Against several, trainings of one recipe, they are over the
seed of the training as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

from safer_engine.errors import SpecError
from safer_engine.gate.baselines import told_apart
from safer_engine.gate.compared import comparison_facts, is_comparison
from safer_engine.gate.documents import Audit
from safer_engine.gate.facts import Figure, Missing, find_facts
from safer_engine.gate.intervals import Bounds
from safer_engine.gate.paired import Shared, change, shared_pairs
from safer_engine.gate.paths import parse_path
from safer_engine.gate.policy import Policy, Rule, Waiver

Outcome = Literal["pass", "fail", "inconclusive", "skipped"]
Verdict = Literal["pass", "fail", "inconclusive"]
Effect = Literal["none", "inconclusive", "fail", "waived"]
_IMPLIED: Mapping[str, tuple[str, bool, str]] = {
    "evaluation": ("evaluation.too_few", False, "the evaluation set has fewer usable pairs than evaluation.min_pairs asks for"),
    "features": (
        "sae.interpretable",
        True,
        "reward recovered is below its floor, or was not measured: features are not interpreted",
    ),
}
"""First key of a fact → what must hold for it to mean anything, and why."""
_DIGITS = 12
_BY_BUDGET = "suspicion is a rank: the budget decides this share, not the data"


@dataclass(frozen=True)
class Check:
    """One rule on one fact.

    Attributes:
        id: the rule's name, and in brackets what the fact is of.
        outcome: of the rule on the fact alone.
        effect: what that does to the verdict, after `on_inconclusive` and waivers.
        reason: in a sentence of names and figures, never of the data's texts.
        value, bounds: what was judged; `bounds` is the interval at `misses` on each side, None for an exact figure.
        tail: the check's part of the false alarms; None without an interval.
        demand: what was demanded, in words.
        note: how the figure was come by.
        training_sd: of a change from several baselines, the standard deviation of their values.
    """

    id: str
    rule: str
    outcome: Outcome
    effect: Effect
    reason: str
    demand: str
    value: float | None = None
    bounds: Bounds | None = None
    tail: float | None = None
    n: int | None = None
    n_groups: int | None = None
    note: str = ""
    waiver: Waiver | None = None
    training_sd: float | None = None


@dataclass(frozen=True)
class Decision:
    """The gate's decision.

    Attributes:
        baselines: what it was compared with, in an order that does not depend on how they were given.
        lost: evaluation pairs that every baseline had right and the new model has not, ids in order.
    """

    verdict: Verdict
    policy: Policy
    checks: tuple[Check, ...]
    audit: Audit
    baselines: tuple[Audit, ...]
    judged_on: date
    lost: tuple[str, ...] = ()

    @property
    def baseline(self) -> Audit | None:
        """The only baseline; None where there is none, or several."""
        return self.baselines[0] if len(self.baselines) == 1 else None

    @property
    def n_random(self) -> int:
        """Checks with an interval."""
        return sum(check.tail is not None for check in self.checks)


@dataclass(frozen=True)
class _Case:
    """A rule with a figure to judge, or with the outcome that stands without one."""

    rule: Rule
    figure: Figure | None
    outcome: Outcome = "inconclusive"
    reason: str = ""

    @property
    def id(self) -> str:
        label = self.figure.label if self.figure is not None else ""
        return f"{self.rule.name}[{label}]" if label else self.rule.name


def judge(policy: Policy, audit: Audit, baseline: Audit | Sequence[Audit] | None, today: date) -> Decision:
    """Apply a policy to a finished audit.

    Args:
        baseline: what it must not fall behind; several are trainings of one recipe, and it is compared with what that comes to.
        today: in UTC, for waivers.

    Raises:
        SpecError: a rule names a fact that reports do not have, or one that it cannot be applied to.
        InputRefused: several baselines are not trainings of their own, or the one under judgement is among them.
    """
    baselines = told_apart(audit, () if baseline is None else (baseline,) if isinstance(baseline, Audit) else tuple(baseline))
    shared = shared_pairs(audit, *baselines) if baselines else Shared(reason="there is no baseline")
    cases = [case for rule in policy.rules for case in _cases(rule, audit, baselines, shared)]
    tails = _tails(policy, cases)
    checks = [_with_waiver(_check(case, policy.misses, tail), policy, today) for case, tail in zip(cases, tails, strict=True)]
    checks += _expired(policy, today)
    _require_waived(policy, checks)
    lost = tuple(new.pair_id for new, olds in shared.pairs if all(old.right for old in olds) and not new.right)
    return Decision(_verdict(checks), policy, tuple(checks), audit, baselines, today, lost)


def _tails(policy: Policy, cases: list[_Case]) -> list[float | None]:
    """Each check's part of the false alarms; None where there is no interval."""
    random = Counter(case.rule.name for case in cases if case.figure is not None and case.figure.spread is not None)
    return [
        None
        if case.figure is None or case.figure.spread is None
        else min(policy.misses, policy.false_alarms / len(random) / random[case.rule.name])
        for case in cases
    ]


def _verdict(checks: list[Check]) -> Verdict:
    effects = {check.effect for check in checks}
    if "fail" in effects:
        return "fail"
    if "inconclusive" in effects or not any(check.outcome == "pass" for check in checks):
        return "inconclusive"  # a gate none of whose rules passed has shown nothing
    return "pass"


def _cases(rule: Rule, audit: Audit, baselines: tuple[Audit, ...], shared: Shared) -> list[_Case]:
    """The rule's facts, or why it has none."""
    if is_comparison(rule.fact):
        return _of_comparison(rule, audit, baselines, shared)
    found = _facts(rule, audit)
    if isinstance(found, Missing):
        return [_absent(rule, found)]
    if not rule.compares:
        return [_Case(rule, figure) for figure in found]
    if not baselines:
        return [_absent(rule, Missing("nothing", "no baseline was given"))]
    by_label: list[dict[str, Figure]] = []
    for baseline in baselines:
        before = _facts(rule, baseline)
        if isinstance(before, Missing):
            return [_Case(rule, None, reason=f"of {_called(baseline, baselines)}: {before.reason}")]
        by_label.append({figure.label: figure for figure in before})
    return [
        _compared(rule, figure, [known.get(figure.label) for known in by_label], (audit, *baselines), shared) for figure in found
    ]


def _of_comparison(rule: Rule, audit: Audit, baselines: tuple[Audit, ...], shared: Shared) -> list[_Case]:
    """A rule on what the comparison with the baseline found, which is a change already."""
    if rule.compares or rule.share_of is not None:
        raise SpecError(f"rule {rule.name}: {rule.fact} is of a comparison already", "give min, max or equals alone")
    unmet = _unmet(rule, audit)
    found = Missing("not_computed", unmet) if unmet else comparison_facts(rule.fact, audit, baselines, shared)
    return [_absent(rule, found)] if isinstance(found, Missing) else [_Case(rule, figure) for figure in found]


def _called(baseline: Audit, baselines: tuple[Audit, ...]) -> str:
    return "the baseline" if len(baselines) == 1 else f"the baseline {(baseline.digest('model') or '')[:_DIGITS]}"


def _facts(rule: Rule, audit: Audit) -> list[Figure] | Missing:
    unmet = _unmet(rule, audit)
    return Missing("not_computed", unmet) if unmet else _figures(rule, audit)


def _compared(rule: Rule, new: Figure, olds: list[Figure | None], audits: tuple[Audit, ...], shared: Shared) -> _Case:
    for old, baseline in zip(olds, audits[1:], strict=True):
        if old is None:
            called = "the baseline's report" if len(olds) == 1 else f"the report of {_called(baseline, audits[1:])}"
            return _Case(rule, replace(new, spread=None, unsure=f"{called} has no such figure"))
    return _Case(rule, change(rule.fact, new, [old for old in olds if old is not None], audits, shared))


def _absent(rule: Rule, missing: Missing) -> _Case:
    skipped = rule.optional and missing.kind == "nothing"
    return _Case(rule, None, "skipped" if skipped else "inconclusive", missing.reason)


def _unmet(rule: Rule, audit: Audit) -> str:
    """The first thing the rule's fact needs and has not; empty where nothing is lacking."""
    implied = _IMPLIED.get(parse_path(rule.fact)[0].key)
    if implied is not None and audit.report[parse_path(rule.fact)[0].key] is not None:
        path, wanted, why = implied
        found = find_facts(audit.report, path)
        if isinstance(found, Missing) or found[0].value is not wanted:
            return why
    for path, value in rule.needs.items():
        found = find_facts(audit.report, path)
        if isinstance(found, Missing) or any(figure.value != value for figure in found):
            return f"{path} is not {value}, which the rule needs"
    return ""


def _figures(rule: Rule, audit: Audit) -> list[Figure] | Missing:
    found = find_facts(audit.report, rule.fact)
    if isinstance(found, Missing):
        return found
    if rule.fact.startswith("edits.") and audit.report["edits"].get("suspicion_kind") == "rank":
        found = [replace(figure, note=_BY_BUDGET) for figure in found]
    if rule.share_of is None:
        return found
    whole = find_facts(audit.report, rule.share_of)
    if isinstance(whole, Missing):
        return whole
    if len(whole) == 1 and whole[0].number == 0:
        return Missing("nothing", "there is nothing that it could be a share of")
    by_label = {figure.label: figure for figure in whole}
    return [_share(rule, figure, whole[0] if len(whole) == 1 else by_label.get(figure.label)) for figure in found]


def _share(rule: Rule, part: Figure, whole: Figure | None) -> Figure:
    if whole is None or whole.number == 0:
        return replace(part, spread=None, unsure="there is nothing that it could be a share of")
    if part.spread is not None or whole.spread is not None:
        raise SpecError(f"rule {rule.name}: share_of divides counts, and one of the two has an interval", "leave share_of out")
    return replace(part, value=part.number / whole.number)


def _check(case: _Case, misses: float, tail: float | None) -> Check:
    rule, figure = case.rule, case.figure
    if figure is None:
        return _made(case, case.outcome, case.reason)
    if figure.unsure:
        return _made(case, "skipped" if rule.optional and figure.absent == "nothing" else "inconclusive", figure.unsure)
    if figure.n is not None and figure.n < rule.min_n:
        return _made(case, "inconclusive", f"{figure.n} values, fewer than min_n {rule.min_n}")
    if figure.spread is None or tail is None:
        return _exact(case, figure)
    return _random(case, figure.spread(misses), figure.spread(tail), tail)


def _exact(case: _Case, figure: Figure) -> Check:
    wanted = case.rule.equals
    if wanted is not None:
        right = figure.value == wanted and isinstance(figure.value, bool) == isinstance(wanted, bool)
    else:
        low, high = _limits(case.rule)
        right = low <= figure.number <= high
    return _made(case, "pass" if right else "fail", "a figure without an interval, as it stands")


def _random(case: _Case, narrow: Bounds, wide: Bounds, tail: float) -> Check:
    rule = case.rule
    if rule.equals is not None:
        raise SpecError(f"rule {rule.name}: equals needs a fact without an interval", "use min and max")
    low, high = _limits(rule)
    outcome: Outcome = "inconclusive"
    if wide.hi < low or wide.lo > high:
        outcome, reason = "fail", "the whole interval is on the wrong side"
    elif low <= narrow.lo and narrow.hi <= high:
        outcome, reason = "pass", "the whole interval is on the right side"
    elif not rule.needs_proof:
        outcome, reason = "pass", "not all of the interval is on the wrong side"
    elif narrow.hi < low or narrow.lo > high:
        reason = "it is on the wrong side, but with so many checks that may be chance"
    else:
        reason = "the interval holds the bound"
    return replace(_made(case, outcome, reason), bounds=narrow, tail=tail)


def _limits(rule: Rule) -> tuple[float, float]:
    """Least and most that are allowed, of the fact or of its change."""
    if rule.compares:
        low, high = (None if rule.max_drop is None else -rule.max_drop), rule.max_rise
    else:
        low, high = rule.min, rule.max
    return (-float("inf") if low is None else low), (float("inf") if high is None else high)


def _made(case: _Case, outcome: Outcome, reason: str) -> Check:
    figure = case.figure
    value = None if figure is None or figure.unsure or isinstance(figure.value, str) else float(figure.value)
    made = Check(case.id, case.rule.name, outcome, _effect(case.rule, outcome), reason, demand(case.rule), value)
    if figure is None:
        return made
    return replace(made, n=figure.n, n_groups=figure.n_groups, note=figure.note, training_sd=figure.training_sd)


def _effect(rule: Rule, outcome: Outcome) -> Effect:
    if outcome == "inconclusive":
        effects: dict[str, Effect] = {"pass": "none", "warn": "inconclusive", "fail": "fail"}
        return effects[rule.on_inconclusive]
    return "fail" if outcome == "fail" else "none"


def demand(rule: Rule) -> str:
    """What a rule demands, in a few words."""
    if rule.equals is not None:
        return f"= {rule.equals}".replace("True", "true").replace("False", "false")
    change, bound = [("drop ≤ ", rule.max_drop), ("rise ≤ ", rule.max_rise)], [("≥ ", rule.min), ("≤ ", rule.max)]
    parts = change if rule.compares else bound
    return ", ".join(f"{sign}{value:g}" for sign, value in parts if value is not None)


def _with_waiver(check: Check, policy: Policy, today: date) -> Check:
    """A check whose effect a valid waiver takes away."""
    names = (check.id, check.rule)
    waiver = next((w for w in policy.waivers if w.rule in names and today <= w.expires), None)
    if waiver is None or check.effect == "none":
        return check
    return replace(check, effect="waived", waiver=waiver)


def _expired(policy: Policy, today: date) -> list[Check]:
    """A failing check for every waiver that has expired, whatever its rule says: it must be renewed or removed."""
    return [
        Check(
            f"waiver {w.rule}", w.rule.partition("[")[0], "fail", "fail", "the waiver has expired", f"until {w.expires}", waiver=w
        )
        for w in policy.waivers
        if w.expires < today
    ]


def _require_waived(policy: Policy, checks: list[Check]) -> None:
    """A waiver of one check must name one that there is, unless its rule had no figures at all."""
    for waiver in policy.waivers:
        rule = waiver.rule.partition("[")[0]
        there = {check.id for check in checks if check.rule == rule and not check.id.startswith("waiver ")}
        if waiver.rule != rule and waiver.rule not in there and rule not in there:
            raise SpecError(
                f"a waiver names {waiver.rule}, which is no check of this audit",
                f"of that rule there are: {', '.join(sorted(there))}",
            )
