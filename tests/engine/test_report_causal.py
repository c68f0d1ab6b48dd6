"""Causal effects in the report: order, plot, sets, tables for machines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from safer_engine.artifacts import CausalEffects, Latents
from safer_engine.gate.facts import find_facts
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import render_html
from safer_engine.report.markdown import render_markdown
from safer_engine.report.model import ReportDocument
from safer_engine.report.plots_causal import disagreements_first, sets_ablated
from safer_engine.report.tables import features_table
from tests.helpers import fake_artifacts
from tests.helpers.fake_artifacts import FakeAudit


def report_of(audit: FakeAudit) -> ReportDocument:
    return build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> FakeAudit:
    return fake_artifacts.build(tmp_path_factory.mktemp("causal"), causal=True)


def section(page: str) -> str:
    found = re.search(r'<section id="causal">.*?</section>', page, re.S)
    assert found is not None
    return found[0]


def test_effects_against_the_labels_come_first(audit: FakeAudit) -> None:
    ordered = disagreements_first(report_of(audit).features or [])
    assert [(f.causal_effect, f.causal_verified) for f in ordered] == [
        (0.25, "yes"),
        (-0.5, "yes"),
        (-0.02, "not measured"),
        (0.01, "no"),
    ]
    shown = section(render_html(report_of(audit)))
    places = [shown.index(f'<td class="n">{number}</td><td>') for number in ("+0.2500", "−0.5000", "−0.0200", "+0.0100")]
    assert places == sorted(places)
    assert "+1.25, standard deviation 0.50" in shown
    folded = shown[shown.index("By axis and side") :]
    assert (
        '<td class="n">−0.2500</td><td class="n">+0.2500</td><td class="n">−0.5000</td><td class="n">−0.5000</td></tr>' in folded
    )
    assert "+0.40 (−0.20 … +0.80; 4 features)" in shown


def test_the_plot_has_a_dot_for_each_and_colours_the_verified(audit: FakeAudit) -> None:
    wide = re.findall(r'<svg[^>]*class="plot wide-only".*?</svg>', section(render_html(report_of(audit))), re.S)
    assert len(wide) == 1
    dots = re.findall(r'<circle[^>]*cy="([0-9.]+)"[^>]*class="dot ([a-z-]+)"', wide[0])
    assert len(dots) == 4
    coloured = [float(cy) for cy, kind in dots if kind in ("chosen-dot", "rejected-dot")]
    plain = [float(cy) for cy, kind in dots if kind == "candidate-dot"]
    assert len(coloured) == len(plain) == 2
    assert min(coloured) < min(plain) < max(plain) < max(coloured)


def test_sets_stand_beside_their_controls(audit: FakeAudit) -> None:
    report = report_of(audit)
    assert report.causal is not None
    assert [(row.safety.subset, [one.change for one in row.controls]) for row in sets_ablated(report.causal)] == [
        (None, [0.01, -0.03]),
        ("refusals", [0.01, -0.03]),
    ]
    shown = section(render_html(report))
    assert "<td>−0.250 … −0.150</td><td>−0.030 … +0.010</td>" in shown
    assert '<td class="n">−0.400</td><td>−0.500 … −0.300</td><td>−0.060 … +0.020</td>' in shown


def test_machines_and_markdown_get_the_effects(audit: FakeAudit) -> None:
    report = report_of(audit)
    assert report.causal is not None
    assert {(e.axis, e.margin) for e in report.causal.effects if e.margin > 0.2} == {(None, 0.25), ("safety", 0.25)}
    latents, causal = audit.found[Latents], audit.found[CausalEffects]
    assert isinstance(latents, Latents)
    assert isinstance(causal, CausalEffects)
    rows = features_table(latents, None, causal=causal, text=True).to_pylist()
    assert [row["causal_margin"] for row in rows[:5]] == [-0.5, 0.25, 0.01, -0.02, None]
    assert rows[0]["causal_verified"] == "yes"
    assert rows[4]["attribution_rank"] == rows[4]["latent_id"] + 1
    text = render_markdown(report)
    assert re.search(r"\| −0\.5000 [^|]+ \| yes \|", text)
    assert "Verified by ablation: 2 of 3 tested: 1 (+0.250), 0 (−0.500)." in text
    assert "Without all 2 safety features at once pair accuracy changes by −0.200 (−0.250 … −0.150)." in text


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("features[causal_effect!=null].causal_effect", [-0.5, 0.25, 0.01, -0.02]),
        ("features[causal_verified=yes,causal_effect>0]", [1]),
        ("causal.sets[name=safety,axis=null,subset=null].change", [-0.2]),
        ("causal.sets[name=safety,axis=safety,subset=refusals].change", [-0.2]),
    ],
)
def test_a_gate_can_ask_for_effects(audit: FakeAudit, path: str, values: list[float]) -> None:
    figures = find_facts(json.loads(report_of(audit).model_dump_json()), path)
    assert isinstance(figures, list)
    assert [figure.value for figure in figures] == values


def test_hostile_names_are_text_and_an_audit_without_effects_says_why(tmp_path: Path) -> None:
    hostile = fake_artifacts.build(tmp_path / "hostile", hostile=True, causal=True)
    assert "<script" not in section(render_html(report_of(hostile)))
    plain = fake_artifacts.build(tmp_path / "plain")
    assert "causal effects were not asked for" in section(render_html(report_of(plain)))
