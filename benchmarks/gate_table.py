"""Tables of the gate's benchmark, from reports alone: every row against the baseline, and against all trainings of its recipe.

Against one baseline a gate's stated rate of false alarms is over the evaluation pairs that were drawn; against several, over the
seed of the training as well. Side by side the two show what that costs and gains.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safer_engine.gate.documents import Audit, load_audit
from safer_engine.gate.facts import Missing, find_facts
from safer_engine.gate.judge import Check, Decision, Verdict, judge
from safer_engine.gate.outputs import number
from safer_engine.gate.policy import Policy, load_policy

BASELINE, SAME = "baseline", "same recipe"
_TODAY = datetime.date(2026, 1, 1)
"""The policy has no waivers, so that the day decides nothing."""


@dataclass(frozen=True)
class Judged:
    """One reward model of the benchmark and what the gate says of it.

    Attributes:
        single: against the baseline; None for the baseline itself.
        several: against all trainings of the baseline's recipe but itself; None where there are fewer than two.
        n_several: how many those are.
    """

    name: str
    what: str
    audit: Audit
    single: Decision | None
    several: Decision | None
    n_several: int


def judged_rows(out: Path, policy: Policy) -> list[Judged]:
    """All finished rows, in the order of their seeds; none without the baseline."""
    rows = sorted((json.loads(path.read_bytes()) for path in out.glob("*/row.json")), key=lambda row: row["seed"])
    if not any(row["name"] == BASELINE for row in rows):
        return []
    audits = {row["name"]: load_audit(out / row["name"] / "audit", row["name"]) for row in rows}
    recipe = [row["name"] for row in rows if row["what"] in (BASELINE, SAME)]

    def judged(name: str, what: str) -> Judged:
        others = [audits[other] for other in recipe if other != name]
        single = None if name == BASELINE else judge(policy, audits[name], audits[BASELINE], _TODAY)
        several = judge(policy, audits[name], others, _TODAY) if len(others) > 1 else None
        return Judged(name, what, audits[name], single, several, len(others))

    return [judged(row["name"], row["what"]) for row in rows]


def markdown_table(out: Path, policy_path: Path) -> str:
    """The whole result as Markdown; a line that says so where nothing is finished."""
    policy = load_policy(str(policy_path))
    rows = judged_rows(out, policy)
    if len(rows) < 2:
        return "nothing to judge yet: the baseline and another row must be finished\n"
    lines = [
        "Checks that failed, with change and interval; `?` counts the inconclusive ones. Against all: all trainings of the",
        "baseline's recipe but itself.",
        "",
        "| reward model | against the baseline | failed | ? | against all | failed | ? |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(row) for row in rows),
        "",
        *_same_recipe(rows, policy),
        "",
        *_by_chance(rows, policy),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Judged) -> str:
    what = f"{row.what}, seed {row.name.rpartition('-')[2]}" if row.what == SAME else row.what
    return f"| {' | '.join((what, *_cells(row.single, ''), *_cells(row.several, f' ({row.n_several})')))} |"


def _cells(decision: Decision | None, count: str) -> tuple[str, str, str]:
    """Verdict, checks that failed, and how many could not be judged."""
    if decision is None:
        return "–", "–", "–"
    failed = [_failure(check) for check in decision.checks if check.outcome == "fail"]
    n_open = sum(check.outcome == "inconclusive" for check in decision.checks)
    return f"{decision.verdict}{count}", "; ".join(failed) or "–", str(n_open)


def _failure(check: Check) -> str:
    assert check.value is not None, check.id
    interval = "" if check.bounds is None else f" ({number(check.bounds.lo)} … {number(check.bounds.hi)})"
    return f"{_short(check.id)} {number(check.value)}{interval}"


def _short(check_id: str) -> str:
    return check_id.replace("axis=", "").replace("subset=", "")


def _same_recipe(rows: list[Judged], policy: Policy) -> list[str]:
    """A/A: each retraining against the baseline, every ordered pair of same-recipe reward models, and each against all others."""
    same = [row for row in rows if row.what in (BASELINE, SAME)]
    if len(same) < 2:
        return []
    single = [row.single for row in same if row.single is not None]
    pairs = [judge(policy, new.audit, old.audit, _TODAY) for new, old in itertools.permutations(same, 2)]
    several = [row.several for row in same if row.several is not None]
    lines = [
        f"- A/A against the baseline: {_counts(single)} of {len(single)}; stated rate of false alarms {policy.false_alarms:g}.",
        f"- A/A, all {len(pairs)} ordered pairs of the {len(same)} reward models, which are not independent: "
        f"{_counts(pairs)}; checks that failed: {_failures(pairs)}.",
    ]
    if several:
        lines.append(
            f"- A/A, each against all {len(same) - 1} others: {_counts(several)} of {len(several)}, which are not independent; "
            f"checks that failed: {_failures(several)}."
        )
    return [*lines, *_spread([row.audit for row in same], policy)]


def _failures(decisions: list[Decision]) -> str:
    """Checks that failed, and how often."""
    failed = Counter(check.id for decision in decisions for check in decision.checks if check.outcome == "fail")
    return ", ".join(f"{_short(name)} {count}" for name, count in failed.most_common()) or "none"


def _spread(audits: list[Audit], policy: Policy) -> list[str]:
    """How far trainings of one recipe differ in each figure that is compared with the baseline."""
    lines = []
    for rule in policy.rules:
        if rule.max_drop is None and rule.max_rise is None:
            continue
        values: dict[str, list[float]] = {}
        for audit in audits:
            found = find_facts(audit.report, rule.fact)
            for figure in [] if isinstance(found, Missing) else found:
                values.setdefault(figure.label, []).append(figure.number)
        for where, each in values.items():
            if len(each) > 1:
                spread = f"mean {statistics.fmean(each):.3f}, SD {statistics.stdev(each):.3f}, {min(each):.3f} … {max(each):.3f}"
                lines.append(f"- {rule.name}{where and f'[{_short(where)}]'}, {len(each)} trainings: {spread}.")
    return lines


def _by_chance(rows: list[Judged], policy: Policy) -> list[str]:
    damaged = [row for row in rows if row.what not in (BASELINE, SAME)]
    single = [row.single for row in damaged if row.single is not None]
    several = [row.several for row in damaged if row.several is not None]
    lines = [f"- Damaged, against the baseline: {_counts(single)} of {len(single)}."]
    if several:
        n = damaged[0].n_several
        lines.append(f"- Damaged, against all {n} trainings of the recipe: {_counts(several)} of {len(several)}.")
    return [*lines, f"- Policy `{policy.name}`, digest {policy.digest[:12]}."]


def _counts(decisions: list[Decision]) -> str:
    verdicts = Counter(decision.verdict for decision in decisions)
    names: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")
    return ", ".join(f"{verdicts[name]} {name}" for name in names)
