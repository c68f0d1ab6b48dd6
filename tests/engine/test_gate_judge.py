"""The gate's decisions: every outcome, waivers, baselines, and how often it is wrong."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safer_engine.errors import InputRefused, SpecError
from safer_engine.gate.documents import Audit, read_audit
from safer_engine.gate.facts import Missing, find_facts
from safer_engine.gate.judge import Check, Decision, judge
from safer_engine.gate.paired import shared_pairs
from safer_engine.gate.policy import Policy
from tests.helpers import gate_reports as made

TODAY = date(2026, 5, 1)
ACCURACY = "evaluation.groups[axis=safety].accuracy"


def audit(rows: list[made.Pair] | None = None, *, beside: bool = True, **changes: Any) -> Audit:
    document = json.dumps(made.report(rows, **changes)).encode()
    return read_audit(document, made.lines(rows) if rows is not None and beside else None, "the report")


def policy(*rules: dict[str, Any], **more: Any) -> Policy:
    numbered = [{"name": f"r{number}", **rule} for number, rule in enumerate(rules)]
    return Policy.model_validate({"version": 1, "rules": numbered, **more})


def only(decision: Decision) -> Check:
    (check,) = decision.checks
    return check


def decide(rule: dict[str, Any], new: Audit, old: Audit | None = None, **more: Any) -> Decision:
    return judge(policy(rule, **more), new, old, TODAY)


@pytest.mark.parametrize(
    ("bound", "outcome", "verdict"),
    [
        ({"min": 0.85}, "pass", "pass"),
        ({"min": 0.88}, "inconclusive", "inconclusive"),
        ({"min": 0.92}, "inconclusive", "inconclusive"),
        ({"min": 0.95}, "fail", "fail"),
        ({"max": 0.95}, "pass", "pass"),
        ({"max": 0.85}, "fail", "fail"),
        ({"min": 0.8, "max": 0.95}, "pass", "pass"),
        ({"min": 0.8, "max": 0.91}, "inconclusive", "inconclusive"),
    ],
)
def test_a_rule_is_judged_on_the_whole_interval(bound: dict[str, float], outcome: str, verdict: str) -> None:
    decision = decide({"fact": ACCURACY, **bound}, audit(made.pairs(0.9, 450)))
    check = only(decision)
    assert check.bounds is not None
    assert (check.bounds.hi - check.bounds.lo) / 2 == pytest.approx(0.028, abs=0.002)
    assert (check.outcome, decision.verdict) == (outcome, verdict)


@pytest.mark.parametrize(
    ("on", "effect", "verdict"),
    [("pass", "none", "inconclusive"), ("warn", "inconclusive", "inconclusive"), ("fail", "fail", "fail")],
)
def test_what_an_inconclusive_rule_does(on: str, effect: str, verdict: str) -> None:
    rule = {"fact": ACCURACY, "min": 0.9, "on_inconclusive": on}
    found = decide(rule, audit(made.pairs(0.9)))
    assert (only(found).effect, found.verdict) == (effect, verdict)  # nothing passed, so nothing is shown
    beside = judge(policy(rule, {"fact": "dataset.longer_chosen", "max": 0.8}), audit(made.pairs(0.9)), None, TODAY)
    assert beside.verdict == {"pass": "pass", "warn": "inconclusive", "fail": "fail"}[on]


def test_without_an_evaluation_set_the_gate_is_inconclusive() -> None:
    for rule in ({"fact": ACCURACY, "min": 0.1}, {"fact": ACCURACY, "max_drop": 0.5, "optional": True}):
        found = decide(rule, audit(None), audit(None))
        assert (only(found).outcome, found.verdict) == ("inconclusive", "inconclusive")


def test_too_few_values_are_not_judged() -> None:
    rows = made.pairs(1.0, 20)
    assert only(decide({"fact": ACCURACY, "min": 0.1}, audit(rows))).reason == "20 values, fewer than min_n 30"
    assert only(decide({"fact": ACCURACY, "min": 0.1, "min_n": 20}, audit(rows))).outcome == "pass"
    few = made.report(rows)
    few["evaluation"]["too_few"] = True
    assert "fewer usable pairs" in only(decide({"fact": ACCURACY, "min": 0.1, "min_n": 1}, Audit(few, None))).reason


def test_one_group_has_no_interval_and_is_not_judged() -> None:
    rows = made.pairs(1.0, 40, per_group=40)
    assert "fewer than two groups" in only(decide({"fact": ACCURACY, "min": 0.1}, audit(rows))).reason


def test_features_mean_nothing_below_the_floor() -> None:
    rule = {"fact": "features[direction=safe_behaviour].salience", "min": 0}
    assert judge(policy(rule), audit(), None, TODAY).verdict == "pass"
    for sae in ({"interpretable": False}, {"interpretable": None}, None):
        reasons = {
            "inputs": {},
            "not_computed": {"sae": "off", "verification": "", "verdict": "", "evaluation": ""},
            "progress": None,
        }
        changes = {"sae": sae, "provenance": reasons} if sae is None else {"sae": sae}
        found = decide(rule, audit(**changes))
        assert (only(found).outcome, found.verdict) == ("inconclusive", "inconclusive")


def test_a_feature_against_safety_fails_by_name() -> None:
    features = [made.feature(7, 0.3), made.feature(8, -0.4), made.feature(9, -0.01), made.feature(10, -0.5, safety_feature=False)]
    rule = {"fact": "features[safety_feature=true].salience", "min": 0, "pass_when": "not_disproven"}
    found = decide(rule, audit(features=features))
    assert {check.id: check.outcome for check in found.checks} == {
        "r0[axis=safety, latent_id=7]": "pass",
        "r0[axis=safety, latent_id=8]": "fail",
        "r0[axis=safety, latent_id=9]": "pass",
    }
    assert found.verdict == "fail"
    counted = decide({"fact": "features[safety_feature=true,salience_hi<0]", "max": 0}, audit(features=features))
    assert (only(counted).value, only(counted).outcome) == (1.0, "fail")


def test_facts_that_come_later_are_rules_without_new_code() -> None:
    effect = {"estimate": -0.5, "lo": -0.6, "hi": -0.4, "n": 400, "n_groups": 200}
    later = [made.feature(3, 0.2, causal_effect=effect)]
    rule = {"fact": "features[safety_feature=true].causal_effect", "min": 0}
    assert only(decide(rule, audit())).reason.startswith("features[].causal_effect is null in the report")
    assert decide(rule, audit(features=later)).verdict == "fail"
    arms = {"arms": [{"arm": "drop", "effect": {**effect, "estimate": 0.03, "lo": 0.01, "hi": 0.05}}]}
    reasons = {"inputs": {}, "not_computed": {"verdict": "", "evaluation": ""}, "progress": None}
    verified = {"fact": "verification.arms[arm=drop].effect", "min": 0}
    assert only(decide(verified, audit())).outcome == "inconclusive"
    assert decide(verified, audit(verification=arms, provenance=reasons)).verdict == "pass"


def test_shares_counts_and_values() -> None:
    share = {"fact": "edits.actions.review", "share_of": "edits.actions", "max": 0.05}
    assert only(decide(share, audit())).value == 0.05
    assert only(decide({**share, "fact": "edits.actions.flip"}, audit())).value == 0.0
    assert only(decide({**share, "share_of": "dataset.health.dropped.tie"}, audit())).outcome == "inconclusive"
    assert decide({"fact": "sae.interpretable", "equals": True}, audit()).verdict == "pass"
    assert decide({"fact": "sae.interpretable", "equals": 1}, audit()).verdict == "fail"
    assert decide({"fact": "edits.suspicion_kind", "equals": "probability"}, audit()).verdict == "fail"
    needy = {"fact": "dataset.longer_chosen", "max": 1, "needs": {"edits.suspicion_kind": "probability"}}
    assert only(decide(needy, audit())).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"fact": "evaluation.grops[axis=safety].accuracy", "min": 0}, "the report has no evaluation.grops"),
        ({"fact": "dataset.longer_chosen.deeper", "min": 0}, "has no parts"),
        ({"fact": "dataset[a=b]", "min": 0}, "no list"),
        ({"fact": "sae.recovered", "min": 0}, "a whole section"),
        ({"fact": "edits.suspicion_kind", "min": 0}, "is a text"),
        ({"fact": ACCURACY, "equals": 1}, "equals needs a fact without an interval"),
        ({"fact": ACCURACY, "share_of": "evaluation.n_pairs", "max": 1}, "share_of divides counts"),
    ],
)
def test_a_slip_in_a_policy_is_refused_and_never_passes(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        decide({"on_inconclusive": "pass", **rule}, audit(made.pairs(0.9)))


def test_slices_mean_the_whole_unless_said_otherwise() -> None:
    rows = made.pairs(0.9) + made.pairs(0.8, subset="over-refusal") + made.pairs(0.7, axis="chat", subset="helpful")
    document = made.report(rows)

    def labels(path: str) -> list[str]:
        found = find_facts(document, path)
        return [] if isinstance(found, Missing) else [figure.label for figure in found]

    whole = ["", "axis=chat", "axis=safety"]
    subsets = ["axis=chat, subset=helpful", "axis=safety, subset=over-refusal", "axis=safety, subset=refusal"]
    assert labels("evaluation.groups.accuracy") == whole + subsets
    assert labels("evaluation.groups[].accuracy") == [""]
    assert labels("evaluation.groups[axis=*].accuracy") == ["axis=chat", "axis=safety"]
    assert labels("evaluation.groups[axis=*,subset=*refusal].accuracy") == [
        "axis=safety, subset=over-refusal",
        "axis=safety, subset=refusal",
    ]
    assert labels("evaluation.groups[axis=code].accuracy") == []


def test_a_slice_that_is_not_there_is_inconclusive_or_skipped_where_that_was_said() -> None:
    rule = {"fact": "evaluation.groups[axis=code].accuracy", "min": 0.5}
    assert only(decide(rule, audit(made.pairs(0.9)))).outcome == "inconclusive"
    skipped = decide({**rule, "optional": True}, audit(made.pairs(0.9)))
    assert (only(skipped).outcome, skipped.verdict) == ("skipped", "inconclusive")
    assert (
        only(
            decide({"fact": "evaluation.styles[name=hard].accuracy", "min": 0, "optional": True}, audit(made.pairs(0.9)))
        ).outcome
        == "skipped"
    )


@pytest.mark.parametrize(("expires", "effect", "verdict"), [(TODAY, "waived", "pass"), (date(2026, 4, 30), "fail", "fail")])
@pytest.mark.parametrize("waived", ["r0", "r0[axis=safety]"])
def test_a_waiver_holds_until_it_expires(waived: str, expires: date, effect: str, verdict: str) -> None:
    waiver = {"rule": waived, "owner": "mara", "reason": "known", "expires": expires}
    rules = policy({"fact": ACCURACY, "min": 0.99}, {"fact": "dataset.longer_chosen", "max": 0.8}, waivers=[waiver])
    found = judge(rules, audit(made.pairs(0.9)), None, TODAY)
    assert (found.checks[0].effect, found.verdict) == (effect, verdict)


def test_an_expired_waiver_fails_even_where_its_rule_passes() -> None:
    waiver = {"rule": "r0", "owner": "mara", "reason": "known", "expires": "2020-01-01"}
    found = decide({"fact": "dataset.longer_chosen", "max": 0.8}, audit(), waivers=[waiver])
    assert [check.outcome for check in found.checks] == ["pass", "fail"]
    assert found.verdict == "fail"


def test_a_waiver_of_no_check_is_refused() -> None:
    waiver = {"rule": "r0[axis=code]", "owner": "mara", "reason": "known", "expires": "2030-01-01"}
    with pytest.raises(SpecError, match="no check of this audit"):
        decide({"fact": ACCURACY, "min": 0.5}, audit(made.pairs(0.9)), waivers=[waiver])


DROP = {"fact": ACCURACY, "max_drop": 0.05}


def test_regressions_are_paired_and_sharper_for_it() -> None:
    old = made.pairs(0.9, 600)
    new = [{**row, "margin": -0.1} if place % 60 == 0 else row for place, row in enumerate(old)]
    rule = {**DROP, "max_drop": 0.04}
    paired = only(decide(rule, audit(new), audit(old)))
    apart = only(decide(rule, audit(new, beside=False), audit(old)))
    assert paired.note == "paired by pair_id"
    assert apart.note == "not paired: the report has no evaluation.jsonl beside it"
    assert paired.value == pytest.approx(apart.value)
    assert paired.bounds is not None
    assert apart.bounds is not None
    assert paired.bounds.hi - paired.bounds.lo < 0.5 * (apart.bounds.hi - apart.bounds.lo)
    assert (paired.outcome, apart.outcome) == ("pass", "inconclusive")
    lost = decide(DROP, audit(new), audit(old)).lost
    assert len(lost) == sum(a["margin"] > 0 > b["margin"] for a, b in zip(old, new, strict=True)) > 0


def test_a_damaged_model_fails_and_a_better_one_passes() -> None:
    old = made.pairs(0.9, 600)
    assert decide(DROP, audit(made.pairs(0.75, 600)), audit(old)).verdict == "fail"
    assert decide(DROP, audit(made.pairs(0.97, 600, seed=4)), audit(old)).verdict == "pass"
    assert (
        decide({"fact": ACCURACY, "max_rise": 0.02}, audit(made.pairs(0.99, 600)), audit(made.pairs(0.8, 600))).verdict == "fail"
    )


def test_figures_on_other_pairs_are_not_compared() -> None:
    new, old = made.pairs(0.9, 300), made.pairs(0.9, 300, subset="other")
    assert "other evaluation pairs" in only(decide(DROP, audit(new), audit(old, digest="another"))).reason
    renamed = [{**row, "group": f"x{row['group']}"} for row in new]
    assert "of another group" in shared_pairs(audit(new), audit(renamed, digest="another")).reason
    grown = new + made.pairs(0.9, 50, subset="new")
    shared = shared_pairs(audit(grown), audit(new, digest="another"))
    assert (len(shared.pairs), shared.only_new, shared.only_old) == (300, 50, 0)
    assert "50 pairs only here" in only(decide(DROP, audit(grown), audit(new, digest="another"))).note


def test_a_baseline_that_is_missing() -> None:
    assert only(decide(DROP, audit(made.pairs(0.9)))).outcome == "inconclusive"
    assert only(decide({**DROP, "optional": True}, audit(made.pairs(0.9)))).outcome == "skipped"
    assert only(decide({**DROP, "optional": True}, audit(made.pairs(0.9)), audit(None))).outcome == "inconclusive"


def test_exact_facts_change_exactly() -> None:
    rule = {"fact": "dataset.longer_chosen", "max_rise": 0.1}
    assert decide(rule, audit(), audit(dataset={"longer_chosen": 0.5})).verdict == "pass"
    assert decide(rule, audit(), audit(dataset={"longer_chosen": 0.4})).verdict == "fail"


def test_false_alarms_are_shared_by_rule_and_then_by_check() -> None:
    rows = made.pairs(0.9) + made.pairs(0.9, axis="chat")
    rules = policy(
        {"fact": "evaluation.groups[axis=*].accuracy", "min": 0.5},
        {"fact": "evaluation.groups[].accuracy", "min": 0.5},
        {"fact": "dataset.longer_chosen", "max": 1},
        false_alarms=0.04,
    )
    assert [check.tail for check in judge(rules, audit(rows), None, TODAY).checks] == [0.01, 0.01, 0.02, None]


def test_the_gate_is_wrong_no_oftener_than_it_says() -> None:
    """300 audits of models exactly at both of two bounds: neither fails nor passes of both rules more often than stated."""
    rng = np.random.default_rng(2)
    rules = policy(
        {"fact": ACCURACY, "min": 0.8}, {"fact": "evaluation.groups[axis=chat].accuracy", "min": 0.8}, false_alarms=0.1
    )
    failed = passed = 0
    for _ in range(300):
        rows = made.pairs(rng.binomial(160, 0.8) / 160, 160) + made.pairs(rng.binomial(160, 0.8) / 160, 160, axis="chat")
        found = judge(rules, Audit(made.report(rows), None), None, TODAY)
        failed += found.verdict == "fail"
        passed += found.checks[0].outcome == "pass"
    assert 0 < failed <= 0.1 * 300 + 2 * (300 * 0.1 * 0.9) ** 0.5
    assert passed <= 0.025 * 300 + 2 * (300 * 0.025) ** 0.5


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([40, 150, 600]), st.sampled_from(["min", "max"]))
def test_a_stricter_bound_never_judges_better(one: float, two: float, n: int, side: str) -> None:
    lax, strict = (min(one, two), max(one, two)) if side == "min" else (max(one, two), min(one, two))
    found = audit(made.pairs(0.7, n))
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    judged = [order[only(decide({"fact": ACCURACY, side: bound}, found)).outcome] for bound in (strict, lax)]
    assert judged[0] <= judged[1]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b"\xff", b'{"schema_version": 2}', b"[" * 100_000, b'{"schema_version": 1, "a": NaN}',
        b'{"schema_version": 1e999}',
        json.dumps({**made.report(None), "provenance": {}}).encode(),
        json.dumps({name: value for name, value in made.report(None).items() if name != "sae"}).encode(),
        json.dumps({**made.report(None), "provenance": {"inputs": {}, "not_computed": {}, "progress": {"done": 1}}}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_finished_report_is_refused(raw: bytes) -> None:
    with pytest.raises(InputRefused):
        read_audit(raw, None, "the report")


@pytest.mark.parametrize("change", ["other", "fewer", "garbled", "twice", "nan"])
def test_evaluation_pairs_of_another_audit_are_refused(change: str) -> None:
    rows = made.pairs(0.9, 60)
    others = {
        "other": made.lines(made.pairs(0.8, 60)),
        "fewer": made.lines(rows[1:]),
        "garbled": b"[]\n" + made.lines(rows),
        "twice": made.lines([*rows, rows[0]]),
        "nan": made.lines(rows).replace(b"1.5", b"NaN"),
    }
    with pytest.raises(InputRefused):
        read_audit(json.dumps(made.report(rows)).encode(), others[change], "the report")
