"""Tables of the gate's benchmark, from the reports alone: every row against the baseline, and A/A pairs among themselves."""

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
    """One reward model of the benchmark and what the gate says of it against the baseline."""

    name: str
    what: str
    audit: Audit
    decision: Decision


def judged_rows(out: Path, policy: Policy) -> list[Judged]:
    """All finished rows but the baseline, in the order of their seeds."""
    rows = sorted((json.loads(path.read_bytes()) for path in out.glob("*/row.json")), key=lambda row: row["seed"])
    if not any(row["name"] == BASELINE for row in rows):
        return []
    audits = {row["name"]: load_audit(out / row["name"] / "audit", row["name"]) for row in rows}
    baseline = audits[BASELINE]
    return [
        Judged(row["name"], row["what"], audits[row["name"]], judge(policy, audits[row["name"]], baseline, _TODAY))
        for row in rows
        if row["name"] != BASELINE
    ]


def markdown_table(out: Path, policy_path: Path) -> str:
    """The whole result as Markdown; a line that says so where nothing is finished."""
    policy = load_policy(str(policy_path))
    rows = judged_rows(out, policy)
    if not rows:
        return "nothing to judge yet: the baseline and another row must be finished\n"
    lines = [
        "| reward model | verdict | checks that failed: change (interval), bound | inconclusive |",
        "| --- | --- | --- | --- |",
        *(_row(row) for row in rows),
        "",
        *_same_recipe(rows, load_audit(out / BASELINE / "audit", BASELINE), policy),
        "",
        *_by_chance(rows, policy),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Judged) -> str:
    failed = [_failure(check) for check in row.decision.checks if check.outcome == "fail"]
    open_checks = [check.id for check in row.decision.checks if check.outcome == "inconclusive"]
    what = f"{row.what}, seed {row.name.rpartition('-')[2]}" if row.what == SAME else row.what
    return f"| {what} | {row.decision.verdict} | {'; '.join(failed) or '–'} | {', '.join(map(_short, open_checks)) or '–'} |"


def _failure(check: Check) -> str:
    assert check.value is not None, check.id
    interval = "" if check.bounds is None else f" ({number(check.bounds.lo)} … {number(check.bounds.hi)})"
    return f"{_short(check.id)}: {number(check.value)}{interval}, {check.demand}"


def _short(check_id: str) -> str:
    return check_id.replace("axis=", "").replace("subset=", "")


def _same_recipe(rows: list[Judged], baseline: Audit, policy: Policy) -> list[str]:
    """A/A: each retraining against the baseline, then every ordered pair of same-recipe reward models."""
    same = [row for row in rows if row.what == SAME]
    if not same:
        return []
    verdicts = Counter(row.decision.verdict for row in same)
    audits = [baseline, *(row.audit for row in same)]
    pairs = [judge(policy, new, old, _TODAY) for new, old in itertools.permutations(audits, 2)]
    failed = Counter(check.id for decision in pairs for check in decision.checks if check.outcome == "fail")
    all_verdicts = Counter(decision.verdict for decision in pairs)
    said = ", ".join(f"{_short(name)} {count}" for name, count in failed.most_common()) or "none"
    return [
        f"- A/A against the baseline: {_counts(verdicts)} of {len(same)}; stated rate of false alarms {policy.false_alarms:g}.",
        f"- A/A, all {len(pairs)} ordered pairs of the {len(audits)} reward models, which are not independent: "
        f"{_counts(all_verdicts)}; checks that failed: {said}.",
        *_spread(audits, policy),
    ]


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
    damaged = [row for row in rows if row.what != SAME]
    caught = sum(row.decision.verdict == "fail" for row in damaged)
    return [f"- Damaged: {caught} of {len(damaged)} failed; policy `{policy.name}`, digest {policy.digest[:12]}."]


def _counts(verdicts: Counter[Verdict]) -> str:
    names: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")
    return ", ".join(f"{verdicts[name]} {name}" for name in names)
