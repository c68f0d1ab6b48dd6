"""Retraining in the report: outcome, controls beside our edits, figures as they are, hostile names, facts for the gate."""

from __future__ import annotations

import re
from typing import Any

import pytest

from safer_engine.gate.facts import find_facts
from safer_engine.report.html import render_html
from safer_engine.report.model import ReportDocument
from safer_engine.report.model_verification import (
    ArmAccuracy,
    ArmEffect,
    HeldOutEffect,
    ShapeReport,
    SweepReport,
    SweptBudget,
    VerificationReport,
)
from safer_engine.report.plots_verification import scopes
from safer_engine.report.summary import paragraph
from tests.helpers import fake_artifacts

HOSTILE = "<script>alert(1)</script>"
SCOPES = ((None, None), ("safety", None), ("safety", "one"), ("safety", HOSTILE), ("chat", None), ("chat", "only"))


def effect(arm: str, axis: str | None, subset: str | None, change: float, **changed: Any) -> ArmEffect:
    ends = {"lo": change - 0.05, "hi": change + 0.05, "p": 0.01}
    counts = {"n_seeds": 5, "n_groups": 40, "n_items": 80}
    named = {"arm": arm, "reference": "as given", "axis": axis, "subset": subset, "change": change}
    return ArmEffect(**{**named, **ends, **counts, **changed})


def verification(**changed: Any) -> VerificationReport:
    arms = (("edits", 0.12), ("margin", 0.02), ("random", -0.03))
    found: dict[str, Any] = {
        "outcome": "benefit shown", "harmed": [], "level": 0.05, "p_benefit": {"as given": 0.004, "random": None},
        "p_harm": {"safety/one": 1.0}, "seeds": 5, "planned": 8, "edited_axes": ["safety"], "edits": {"drop": 40, "flip": 2},
        "pairs": {"as given": 500, "edits": 460, "margin": 460, "random": 460}, "steps": 30, "n_evaluated": 80,
        "accuracy": [
            ArmAccuracy(arm=arm, axis=axis, subset=subset, accuracy=0.7 + size, by_seed=[0.7 + size] * 5)
            for axis, subset in SCOPES
            for arm, size in (("as given", 0.0), *arms)
        ],
        "effects": [effect(arm, axis, subset, size) for axis, subset in SCOPES for arm, size in arms]
        + [effect("edits", None, None, 0.15, reference="random")],
    }  # fmt: skip
    return VerificationReport(**{**found, **changed})


def swept(**changed: Any) -> SweepReport:
    one = verification()
    effects = [effect for effect in one.effects if effect.reference == "as given"]
    slices = {"accuracy": one.accuracy, "effects": effects, "shapes": []}
    against = [
        HeldOutEffect(reference="as given", change=0.08, lo=0.01, hi=0.15, p=0.02),
        HeldOutEffect(reference="random", change=0.1, lo=None, hi=None, p=None),
    ]
    found: dict[str, Any] = {
        "budgets": [SweptBudget(budget=size, edits={"drop": int(1000 * size), "flip": 0}, **slices) for size in (0.02, 0.1)],
        "axes": ["safety"], "chosen": 0.02, "outcome": "benefit shown", "harmed": [], "p_benefit": {"as given": 0.02},
        "against": against, "n_choosing": 41, "n_judging": 39,
    }  # fmt: skip
    return SweepReport(**{**found, **changed})


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> ReportDocument:
    from safer_engine.report.build import ReportRequest, build_report

    audit = fake_artifacts.build(tmp_path_factory.mktemp("verified"))
    return build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))


def with_retraining(document: ReportDocument, found: VerificationReport) -> ReportDocument:
    missing = {name: why for name, why in document.provenance.not_computed.items() if name != "verification"}
    provenance = document.provenance.model_copy(update={"not_computed": missing})
    return document.model_copy(update={"verification": found, "provenance": provenance})


def section(page: str) -> str:
    found = re.search(r'<section id="verification">.*?</section>', page, re.S)
    assert found is not None
    return found[0]


def test_without_retraining_the_section_says_so(document: ReportDocument) -> None:
    assert "no model was retrained on the edited data" in section(render_html(document))


def test_the_outcome_and_the_arms(document: ReportDocument) -> None:
    shown = section(render_html(with_retraining(document, verification())))
    assert '<span class="tag">benefit shown</span> The edits help' in shown
    assert "5 seeds of 8 planned (decided early)" in shown
    assert "40 pairs dropped, 2 flipped, of safety" in shown
    assert "against the data as given 0.004, against random edits –" in shown
    assert '<td class="n">70.0\u202f%</td><td class="n">82.0\u202f%</td>' in shown.replace("\u00a0", "\u202f")
    assert shown.count("<circle") == 2 * 3 * 5  # both widths, three arms, and five slices: chat has one subset
    assert HOSTILE not in shown
    harmed = with_retraining(document, verification(outcome="harm shown", harmed=[f"safety/{HOSTILE}"], planned=5))
    shown = section(render_html(harmed))
    assert "tag review" in shown
    assert "Harmed: " in shown
    assert HOSTILE not in shown
    assert "decided early" not in shown


def test_one_seed_has_points_and_no_lines(document: ReportDocument) -> None:
    alone = [one.model_copy(update={"lo": None, "hi": None, "p": None, "n_seeds": 1}) for one in verification().effects]
    page = render_html(with_retraining(document, verification(effects=alone, seeds=1, planned=1, outcome="inconclusive")))
    shown = section(page)
    assert "whisker" not in shown
    assert "Nothing can be said yet" in shown


def test_slices_start_with_our_edits() -> None:
    rows = scopes(verification())
    assert [row.name for row in rows] == ["all", "safety", "safety: one", f"safety: {HOSTILE}", "chat"]
    assert all([one.arm for one in row.effects] == ["edits", "margin", "random"] for row in rows)


def test_the_gate_can_ask_for_it(document: ReportDocument) -> None:
    made = with_retraining(document, verification()).model_dump(mode="json")
    found = find_facts(made, "verification.effects[arm=edits,reference=random,axis=null].change")
    assert isinstance(found, list)
    (fact,) = found
    assert fact.value == 0.15
    assert fact.spread is not None


def test_the_summary_says_what_retraining_says(document: ReportDocument) -> None:
    said = paragraph(with_retraining(document, verification()))
    assert "retraining with these edits: benefit shown" in said
    assert "no retraining has tested that" in paragraph(document)


def test_a_sweep_has_a_panel_for_each_slice_and_says_what_it_was_chosen_by(document: ReportDocument) -> None:
    shown = section(render_html(with_retraining(document, verification(sweep=swept()))))
    assert "How much to edit" in shown
    assert "2 % looks best on 41 evaluation pairs. On the other 39, by which it was not chosen: benefit shown" in shown
    assert "against the data as given +8.0 points, +1.0 … +15.0; against as many random edits +10.0 points, no interval" in shown
    assert shown.count("<h4>") == 5
    assert shown.count("curve-line sweep-edits") == shown.count("curve-line sweep-random") == 5
    assert shown.count("curve-whisker") == 2 * 5  # those of our edits
    assert "20 dropped, 0 flipped" in shown
    assert HOSTILE not in shown
    nothing = swept(chosen=None, outcome="inconclusive", against=[])
    assert "No budget was chosen" in section(render_html(with_retraining(document, verification(sweep=nothing))))
    without = section(render_html(with_retraining(document, verification())))
    assert "How much to edit" not in without
    assert "As benchmarks score" not in without


def test_what_benchmarks_score_is_beside_the_pairs(document: ReportDocument) -> None:
    one = verification()
    shape = ShapeReport(name="best_of_n", accuracy=one.accuracy, effects=one.effects)
    shown = section(render_html(with_retraining(document, verification(shapes=[shape]))))
    assert "best of N (as RewardBench 2): all" in shown
    assert "+12.0" in shown


def test_facts_of_a_sweep_can_be_judged(document: ReportDocument) -> None:
    report = with_retraining(document, verification(sweep=swept()))
    (found,) = find_facts(report.model_dump(mode="json"), "verification.sweep.outcome")
    assert found.value == "benefit shown"
