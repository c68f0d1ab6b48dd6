"""The gate on evidence: doubtful and contested labels, discoveries, checked labels."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from safer_engine.gate.documents import read_audit
from safer_engine.gate.judge import Check, judge
from safer_engine.gate.policy import Policy
from tests.helpers import gate_reports as made

REASON = "suspicion is a rank"


def axis(name: str, share: float | None, lo: float | None, hi: float | None) -> dict[str, Any]:
    told = {"doubtful_share": share, "doubtful_share_lo": lo, "doubtful_share_hi": hi}
    brier = {"value": 0.1, "lo": 0.05, "hi": 0.2}
    decisions = {"n": 100, "after": {"brier": brier}}
    return {"axis": name, **told, "contested_share": 0.2, "contested_by": {"annotators": 7}, "decisions": decisions}


def checks(rule: dict[str, Any], axes: list[dict[str, Any]]) -> list[Check]:
    """What a rule makes of a report with these axes."""
    rows = made.pairs(0.9, 40)
    report = made.report(rows, "eval")
    report["edits"]["axes"] = axes
    report["provenance"]["not_computed"] |= {"edits.axes[].doubtful_share": REASON}
    report["labels"] = {"statuses": {"labelled": 6, "unverified": 2}}
    tests = {"n_discoveries": 8, "n_tests": 32, "replicated_share": 0.75}
    report["sae"]["latents"] = {"tests": tests}
    marks = [(True, False, 0.9), (False, True, 0.6)]
    for feature, (mixed, length_bound, score) in zip(report["features"], marks, strict=True):
        feature |= {
            "mixed": mixed,
            "length_bound": length_bound,
            "detection": {"score": score, "lo": score - 0.1, "hi": score + 0.1},
        }
    policy = Policy.model_validate({"version": 1, "rules": [{"name": "rule", **rule}]})
    return list(judge(policy, read_audit(json.dumps(report).encode(), None, "the report"), None, date(2026, 5, 1)).checks)


@pytest.mark.parametrize(
    ("share", "outcome"),
    [
        ((0.02, 0.01, 0.03), "pass"),
        ((0.04, 0.02, 0.08), "inconclusive"),
        ((0.2, 0.15, 0.25), "fail"),
        ((None,) * 3, "inconclusive"),
    ],
)
def test_the_doubtful_share_is_judged_on_its_interval(share: tuple[Any, Any, Any], outcome: str) -> None:
    rule = {"fact": "edits.axes[axis=safety].doubtful_share", "max": 0.05, "optional": True}
    (found,) = checks(rule, [axis("safety", *share), axis("chat", 0.5, 0.4, 0.6)])
    assert found.outcome == outcome


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ({"fact": "edits.axes[].contested_share", "max": 0.5}, [0.2, 0.2]),
        ({"fact": "edits.axes[axis=chat].contested_by.annotators", "max": 10}, [7]),
        ({"fact": "edits.axes[axis=chat].contested_by.weak_preference", "max": 10}, [0]),
        ({"fact": "edits.axes[axis=chat].decisions.after.brier.value", "max": 0.5}, [0.1]),
        ({"fact": "sae.latents.tests.n_discoveries", "min": 1}, [8]),
        ({"fact": "sae.latents.tests.n_discoveries", "share_of": "sae.latents.tests.n_tests", "min": 0.1}, [0.25]),
        ({"fact": "sae.latents.tests.replicated_share", "min": 0.5}, [0.75]),
        ({"fact": "features[mixed=true]", "share_of": "features", "max": 0.6}, [0.5]),
        ({"fact": "features[length_bound=true]", "max": 1}, [1]),
        ({"fact": "labels.statuses.unverified", "share_of": "labels.statuses", "max": 0.3}, [0.25]),
        ({"fact": "labels.statuses.error", "max": 0}, [0]),
    ],
)
def test_evidence_can_be_asked_for(rule: dict[str, Any], values: list[float]) -> None:
    found = checks(rule, [axis("safety", 0.1, 0.08, 0.12), axis("chat", 0.1, 0.08, 0.12)])
    assert [check.outcome for check in found] == ["pass"] * len(values)
    assert [check.value for check in found] == values


def test_the_score_of_a_checked_label_is_judged_on_its_interval() -> None:
    found = checks({"fact": "features[].detection.score", "min": 0.65}, [axis("safety", 0.1, 0.08, 0.12)])
    assert [check.outcome for check in found] == ["pass", "inconclusive"]
