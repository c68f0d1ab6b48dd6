"""A decision for programs, for pull requests and for test reports: names and figures, never a text of the data."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree as xml

from safer_engine.gate.documents import Audit
from safer_engine.gate.judge import Check, Decision

SCHEMA_VERSION = 1
_LONGEST_NAME = 160
_LOST_SHOWN = 10
_NAMED = 5
_DIGITS = 12
_SEEDS = " Changes are from several trainings, so that for them this covers the seed of the training too."
_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive", "skipped": "– skipped", "waived": "🟡 waived"}


def state_of(check: Check) -> str:
    """What a check came to: its outcome, or `waived`."""
    return "waived" if check.effect == "waived" else check.outcome


def visible(text: str) -> str:
    """A text with its hidden characters written out."""
    return "".join(c if c.isprintable() else f"⟦U+{ord(c):04X}⟧" for c in text)


def name_of(text: str) -> str:
    """A name that came with the data, fit to be shown: hidden characters written out, clipped."""
    seen = visible(text)
    return seen if len(seen) <= _LONGEST_NAME else seen[: _LONGEST_NAME - 1] + "…"


def figure_of(check: Check) -> str:
    """Value and interval as people read them."""
    if check.value is None:
        return "–"
    if check.bounds is None:
        return number(check.value)
    return f"{number(check.value)} ({number(check.bounds.lo)} … {number(check.bounds.hi)})"


def number(value: float) -> str:
    """A figure with four significant digits, at most four decimals."""
    text = f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}".rstrip("0").rstrip(".")
    return text.replace("-", "−") if float(value) else "0"


def count_of(check: Check) -> str:
    """Values behind the figure, and their groups."""
    if check.n is None:
        return ""
    return f"{check.n}" if check.n_groups is None else f"{check.n} in {check.n_groups}"


def explanation(check: Check) -> str:
    """Why, in a sentence; with the waiver, where there is one."""
    said = f"{check.reason}; {check.note}" if check.note else check.reason
    if check.waiver is None:
        return visible(said)
    whose = f"{name_of(check.waiver.owner)}: {name_of(check.waiver.reason)}"
    if check.effect == "waived":
        return f"{visible(said)}; waived until {check.waiver.expires} by {whose}"
    return f"{visible(said)}; it was of {whose}"


def rates(decision: Decision) -> str:
    """How often a gate of this policy is wrong."""
    policy, checks = decision.policy, decision.n_random
    if not checks:
        return "No check has an interval: nothing here was judged against chance."
    lenient = sum(not rule.needs_proof for rule in policy.rules)
    but = f"; not so the {lenient} rules that pass when not disproven" if lenient else ""
    return (
        f"A reward model that breaks no rule fails in at most {100 * policy.false_alarms:g} % of such audits "
        f"({checks} check{'s' if checks > 1 else ''} with an interval); one that breaks a rule passes it in at most "
        f"{100 * policy.misses:g} %{but}.{_SEEDS if len(decision.baselines) > 1 else ''}"
    )


def lost_of(decision: Decision) -> str:
    """How many evaluation pairs were lost, in a sentence without its end."""
    whose = "the baseline" if len(decision.baselines) == 1 else f"each of {len(decision.baselines)} baselines"
    return f"{len(decision.lost)} evaluation pairs that {whose} had right are wrong now"


def reason_of(decision: Decision) -> str:
    """The verdict in a sentence: the checks that made it, a few of them by name."""
    if decision.verdict == "pass":
        passed = sum(check.outcome == "pass" for check in decision.checks)
        return f"{passed} of {len(decision.checks)} checks passed, and none stands against it"
    effect, said = ("fail", "broken") if decision.verdict == "fail" else ("inconclusive", "not shown")
    names = [name_of(check.id) for check in decision.checks if check.effect == effect]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{said}: {', '.join(names[:_NAMED])}{more}" if names else "no check passed"


def as_document(decision: Decision) -> dict[str, Any]:
    """The decision as plain JSON values."""
    policy = decision.policy
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": decision.verdict,
        "policy": {"name": policy.name, "version": policy.version, "digest": policy.digest},
        "report": _identity(decision.audit),
        "baseline": None if decision.baseline is None else _identity(decision.baseline),
        "false_alarms": policy.false_alarms,
        "misses": policy.misses,
        "checks_with_interval": decision.n_random,
        "checks": [_check(check) for check in decision.checks],
        "lost_pairs": list(decision.lost),
    }
    if len(decision.baselines) > 1:
        document["baselines"] = [_identity(each) for each in decision.baselines]
    if policy.waivers:
        document["judged_on"] = decision.judged_on.isoformat()
    return document


def as_json(decision: Decision) -> str:
    """The decision as a JSON text."""
    return json.dumps(as_document(decision), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _identity(audit: Audit) -> dict[str, Any]:
    return {name: audit.digest(name) for name in ("model", "dataset", "evaluation")}


def _check(check: Check) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": check.id,
        "rule": check.rule,
        "outcome": check.outcome,
        "effect": check.effect,
        "demand": check.demand,
        "value": check.value,
        "lo": None if check.bounds is None else check.bounds.lo,
        "hi": None if check.bounds is None else check.bounds.hi,
        "false_alarm_share": check.tail,
        "n": check.n,
        "n_groups": check.n_groups,
        "reason": check.reason,
        "note": check.note,
    }
    if check.training_sd is not None:
        made["training_sd"] = check.training_sd
    if check.waiver is not None:
        made["waiver"] = check.waiver.model_dump(mode="json")
    return made


def as_markdown(decision: Decision) -> str:
    """The decision as Markdown, for a pull request or a job's summary."""
    lines = [
        f"## Reward model gate: {decision.verdict}",
        "",
        f"Policy {_code(decision.policy.name)} ({decision.policy.digest[:_DIGITS]}), {_subject(decision)}.",
        "",
        "| | check | demand | figure | n | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for check in decision.checks:
        mark = _MARKS[state_of(check)]
        cells = (
            mark,
            _code(check.id),
            _plain(visible(check.demand)),
            figure_of(check),
            count_of(check),
            _plain(explanation(check)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", rates(decision)]
    if decision.lost:
        shown = ", ".join(_code(pair) for pair in decision.lost[:_LOST_SHOWN])
        more = f", and {len(decision.lost) - _LOST_SHOWN} more" if len(decision.lost) > _LOST_SHOWN else ""
        lines += ["", f"{lost_of(decision)}: {shown}{more}."]
    return "\n".join(lines) + "\n"


def _subject(decision: Decision) -> str:
    model = (decision.audit.digest("model") or "")[:_DIGITS]
    if not decision.baselines:
        return f"reward model {model or 'unknown'}, no baseline"
    old = ", ".join((each.digest("model") or "unknown")[:_DIGITS] for each in decision.baselines)
    whose = "" if len(decision.baselines) == 1 else f"the mean of {len(decision.baselines)} trainings, "
    return f"reward model {model or 'unknown'} against {whose}{old}"


def _code(text: str) -> str:
    """A name in a code span, which nothing in it can end."""
    return f"`{name_of(text).replace('`', 'ˋ').replace('|', '¦')}`"


def _plain(text: str) -> str:
    """A sentence in a table's cell: a waiver's words are the policy's, and still no markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#@!" else c for c in text)


def as_junit(decision: Decision) -> str:
    """The decision as a JUnit report: failures, errors for what is inconclusive, skipped for what counts for nothing."""
    checks = decision.checks
    counts = {
        "tests": len(checks),
        "failures": sum(check.effect == "fail" for check in checks),
        "errors": sum(check.effect == "inconclusive" for check in checks),
        "skipped": sum(_is_skipped(check) for check in checks),
    }
    suite = xml.Element(
        "testsuite", {"name": f"safer-audit gate {decision.policy.name}", **{k: str(v) for k, v in counts.items()}}
    )
    properties = xml.SubElement(suite, "properties")
    for name, value in (("verdict", decision.verdict), ("policy", decision.policy.digest), ("rates", rates(decision))):
        xml.SubElement(properties, "property", {"name": name, "value": value})
    for check in checks:
        case = xml.SubElement(suite, "testcase", {"classname": f"gate.{check.rule}", "name": name_of(check.id), "time": "0"})
        kind = {"fail": "failure", "inconclusive": "error"}.get(check.effect, "skipped" if _is_skipped(check) else "")
        said = f"{visible(check.demand)}: {figure_of(check)}; {state_of(check)}: {explanation(check)}"
        if kind:
            xml.SubElement(case, kind, {"message": said})
        else:
            xml.SubElement(case, "system-out").text = said
    xml.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(suite, encoding="unicode") + "\n"


def _is_skipped(check: Check) -> bool:
    return check.effect == "waived" or (check.outcome in ("skipped", "inconclusive") and check.effect == "none")
