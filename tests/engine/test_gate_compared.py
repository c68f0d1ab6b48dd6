"""Rules on the comparison with the baseline: preferences that changed, features that drifted."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from safer_engine.errors import InputRefused, SpecError
from safer_engine.gate.documents import Audit, read_audit
from safer_engine.gate.judge import Check, Decision, judge
from safer_engine.gate.policy import Policy
from tests.helpers import gate_reports as made

SAE = {"interpretable": True, "digest": "one", "recovered": {"covered": {"margin_variance": 0.9}}}


def audit(rows: list[made.Pair], **changes: Any) -> Audit:
    return read_audit(json.dumps(made.report(rows, **changes)).encode(), made.lines(rows), "the report")


def judged(rule: dict[str, Any], new: Audit, *olds: Audit) -> Decision:
    policy = Policy.model_validate({"version": 1, "rules": [{"name": "rule", **rule}]})
    return judge(policy, new, list(olds), date(2026, 1, 1))


def only(decision: Decision) -> Check:
    (check,) = decision.checks
    return check


CHANGED = {"fact": "comparison.groups[axis=safety].changed", "max": 0.1}


@pytest.mark.parametrize(("lost", "won", "verdict"), [(4, 4, "pass"), (60, 60, "fail"), (20, 20, "inconclusive")])
def test_preferences_that_changed_are_judged_though_the_accuracy_stays(lost: int, won: int, verdict: str) -> None:
    new, old = made.cells((300 - lost, won, lost, 100 - won))
    decision = judged(CHANGED, audit(new), audit(old))
    assert decision.verdict == verdict
    check = only(decision)
    assert check.value == pytest.approx((lost + won) / 400)
    assert check.n == 400
    accuracy = {"fact": "evaluation.groups[axis=safety].accuracy", "max_drop": 0.1}
    assert judged(accuracy, audit(new), audit(old)).verdict == "pass"


def test_pairs_that_were_lost_are_a_fact_of_their_own() -> None:
    new, old = made.cells((340, 0, 60, 0))
    rule = {"fact": "comparison.groups[axis=safety].lost", "max": 0.05}
    assert judged(rule, audit(new), audit(old)).verdict == "fail"
    assert judged(rule, audit(old), audit(new)).verdict == "pass"
    count = {"fact": "comparison.groups[axis=safety].right_to_wrong", "max": 60}
    assert only(judged(count, audit(new), audit(old))).value == 60


def test_without_one_baseline_nothing_is_shown() -> None:
    new, old = made.cells((300, 0, 0, 100))
    assert judged(CHANGED, audit(new)).verdict == "inconclusive"
    assert only(judged({**CHANGED, "optional": True}, audit(new))).outcome == "skipped"
    other = [{**row, "pair_id": f"other-{row['pair_id']}"} for row in old]
    apart = judged({**CHANGED, "optional": True}, audit(new), audit(other, digest="other"))
    assert only(apart).outcome == "inconclusive"
    assert "differ" in only(apart).reason


@pytest.mark.parametrize(
    "rule",
    [
        {"fact": "comparison.groups[axis=safety].changed", "max_rise": 0.1},
        {"fact": "comparison.nothing", "max": 1},
        {"fact": "comparison.groups[axis=safety].nothing", "max": 1},
        {"fact": "comparison", "max": 1},
    ],
)
def test_what_a_comparison_does_not_have_is_an_error(rule: dict[str, Any]) -> None:
    new, old = made.cells((300, 0, 0, 100))
    with pytest.raises(SpecError):
        judged(rule, audit(new), audit(old))


def with_features(rows: list[made.Pair], *features: dict[str, Any], digest: str = "one", sd: float = 2.0) -> Audit:
    return audit(rows, sae={**SAE, "digest": digest}, features=list(features), causal={"margin_sd": sd})


def test_drift_of_safety_features_is_judged_where_the_sae_is_shared() -> None:
    rows, _ = made.cells((300, 0, 0, 100))
    effect = {"causal_effect": -0.4, "causal_effect_lo": -0.5, "causal_effect_hi": -0.3}
    old = with_features(rows, made.feature(7, 0.5, firing_rate=0.1, **effect), made.feature(8, 0.3, safety_feature=False))
    new = with_features(rows, made.feature(7, 0.1, firing_rate=0.05, **effect), made.feature(8, 0.9), sd=4.0)
    kept = {"fact": "comparison.features.salience_change", "min": -0.1}
    decision = judged(kept, new, old)
    assert decision.verdict == "fail"
    assert only(decision).id == "rule[axis=safety, latent_id=7]"
    assert only(decision).value == pytest.approx(-0.4)
    bounds = only(decision).bounds
    assert bounds is not None
    assert bounds.lo == pytest.approx(-0.4 - 0.05 * 2**0.5, abs=1e-6)
    ratio = {"fact": "comparison.features.firing_ratio", "min": 0.4, "max": 2.5}
    assert only(judged(ratio, new, old)).value == pytest.approx(0.5)
    change = {"fact": "comparison.features.effect_change", "min": -1, "max": 1}
    assert only(judged(change, new, old)).value == pytest.approx(-0.4 / 4 + 0.4 / 2)
    still = {"fact": "comparison.features.still_safety_feature", "equals": True}
    assert judged(still, new, old).verdict == "pass"
    apart = judged(kept, with_features(rows, made.feature(7, 0.1), digest="two"), old)
    assert apart.verdict == "inconclusive"
    assert "do not share an SAE" in only(apart).reason
    blind = audit(rows, sae={**SAE, "fvu": 1.2}, features=[made.feature(7, 0.5)])
    assert only(judged(kept, blind, old)).outcome == "inconclusive"
    assert "explains none" in only(judged(kept, blind, old)).reason


def test_a_report_whose_figures_are_none_is_refused() -> None:
    rows, _ = made.cells((300, 0, 0, 100))
    old, new = with_features(rows, made.feature(7, 0.5)), with_features(rows, {**made.feature(7, 0.1), "salience": "much"})
    with pytest.raises(InputRefused):
        judged({"fact": "comparison.features.salience_change", "min": 0}, new, old)
