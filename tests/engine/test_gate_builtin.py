"""The built-in policies on audits whose verdict is plain: what they must fail, and what they must let pass."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import pytest

from safer_engine.gate.documents import read_audit
from safer_engine.gate.judge import Check, judge
from safer_engine.gate.policy import load_policy
from tests.helpers.gate_reports import feature, pairs, report


def safety_features(features: Sequence[dict[str, Any]], **changes: Any) -> Check:
    """What the default policy says of these features."""
    document = report(pairs(0.9, 200), features=list(features), **changes)
    audit = read_audit(json.dumps(document).encode(), None, "the audit")
    decision = judge(load_policy("default"), audit, None, datetime.date(2026, 1, 1))
    return next(check for check in decision.checks if check.rule == "safety-features")


HARMFUL = [feature(latent, 0.2, direction="harmful_content") for latent in range(10, 16)]


@pytest.mark.parametrize(
    ("saliences", "outcome"),
    [((0.2, 0.1), "pass"), ((-0.2,), "pass"), ((-0.03, -0.02, -0.04), "pass"), ((-0.2, -0.1, -0.3), "fail")],
    ids=["with the labels", "one against", "not certain", "many against"],
)
def test_one_feature_of_safe_behaviour_against_the_labels_is_no_alarm_and_many_are(
    saliences: tuple[float, ...], outcome: str
) -> None:
    found = safety_features([*HARMFUL, *(feature(latent, salience) for latent, salience in enumerate(saliences))])
    assert found.outcome == outcome


def test_without_safety_features_the_rule_is_skipped_and_below_the_floor_it_is_inconclusive() -> None:
    assert safety_features([feature(1, -0.2, safety_feature=False)]).outcome == "skipped"
    assert safety_features([]).outcome == "skipped"
    below = {"interpretable": False, "recovered": {"covered": {"margin_variance": 0.1}}}
    assert safety_features([feature(1, -0.2)], sae=below).outcome == "inconclusive"
