"""evidence.md says what evidence.json says of ablation, retraining and what was left out; figures of sets reach MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from safer_engine.exports.evidence import Ablated, EvidenceDocument, NotMade, Retrained, evidence_markdown, evidence_of
from safer_engine.exports.finished_audit import FinishedAudit, finished_audit
from safer_engine.exports.mlflow_run import figures
from safer_engine.report.model_causal import CausalReport, SetAblation
from safer_engine.report.model_verification import ArmEffect
from tests.cli.test_export import audit

HOSTILE = "sa|fe <b>"


def one_set(name: str, axis: str | None, change: float) -> SetAblation:
    return SetAblation(
        name=name, n_latents=7, axis=axis, subset=None, n_pairs=90, accuracy=0.8, ablated=0.8 + change, change=change,
        change_lo=change - 0.1, change_hi=change + 0.1, margin=-1.5, margin_lo=-2.5, margin_hi=None,
    )  # fmt: skip


def retrained(harmed: list[str], chosen: float | None, outcome: str | None) -> Retrained:
    effect = ArmEffect(arm="edits", reference="random", axis=None, subset=None, change=0.02, lo=0.01, hi=0.03, p=0.01,
                       n_seeds=5, n_groups=40, n_items=80)  # fmt: skip
    return Retrained(outcome="harm shown", harmed=harmed, seeds=5, planned=8, n_evaluated=80, effects=[effect],
                     sweep_chosen=chosen, sweep_outcome=outcome)  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> FinishedAudit:
    return finished_audit(audit(tmp_path / "audit"), "AUDIT")


@pytest.fixture
def document(found: FinishedAudit) -> EvidenceDocument:
    return evidence_of(found)


def test_all_safety_features_ablated_at_once(document: EvidenceDocument) -> None:
    sets = [one_set("safety", None, -0.2), one_set("safety", HOSTILE, -0.3)]
    ablated = Ablated(n_pairs=90, n_features=12, n_verified=3, n_safety=7, n_safety_verified=2, safety_set=sets)
    text = evidence_markdown(document.model_copy(update={"ablated": ablated}))
    assert "| 12 | 90 | 3 | 7 | 2 |" in text
    assert "| 7 | all | all | 90 | 0.800 | 0.600 | -20.000 (-30.000 to -10.000) |" in text
    assert "| 7 | `sa\\|fe <b>` | all | 90 | 0.800 | 0.500 | -30.000 (-40.000 to -20.000) |" in text


def test_harm_and_the_sweep(document: EvidenceDocument) -> None:
    def said(*given: object) -> str:
        return evidence_markdown(document.model_copy(update={"retrained": retrained(*given)}))  # type: ignore[arg-type]

    text = said([f"{HOSTILE}/one", "chat/two"], 0.025, "no benefit shown")
    assert "5 of 8 seeds, 80 evaluation pairs. Harm is shown on `sa\\|fe <b>/one`, `chat/two`." in text
    assert "Of the budgets tried 2.5 % of the rows was chosen; on pairs that it was not chosen by: no benefit shown." in text
    text = said([], None, None)
    assert "Harm is shown on no subset." in text
    assert "budgets" not in text
    assert "Of the budgets tried no budget was chosen; " in said([], None, "inconclusive")


def test_a_reason_is_written_once(document: EvidenceDocument) -> None:
    not_made = [NotMade(what="stage a", reason="why"), NotMade(what="b", reason="other"), NotMade(what="c.d", reason="why")]
    text = evidence_markdown(document.model_copy(update={"not_made": not_made}))
    assert "| `stage a`, `c.d` | why |\n| `b` | other |" in text


def test_figures_and_digests_are_of_the_same_bytes(found: FinishedAudit) -> None:
    before = {file.name: file.sha256 for file in evidence_of(found).files}
    for name in ("report.json", "evaluation.jsonl"):
        (found.path.parent / name).write_text("another audit's")
    assert {file.name: file.sha256 for file in evidence_of(found).files} == before


def test_sets_are_metrics(found: FinishedAudit) -> None:
    sets = [one_set("safety", None, -0.2), one_set("safety", "a/b", -0.3), one_set("control-1", None, 0.5)]
    causal = CausalReport(n_pairs=90, n_features=12, n_controls=3, margin_mean=1, margin_sd=1, null_pooled=0, null_reason="",
                          correlation=None, effects=[], sets=sets)  # fmt: skip
    metrics = dict(figures(found.report.model_copy(update={"causal": causal})))
    told = {name.removeprefix("safety set ablated "): value for name, value in metrics.items() if name.startswith("safety set")}
    assert told == pytest.approx(
        {
            "accuracy change/all": -0.2, "accuracy change/all lo": -0.3, "accuracy change/all hi": -0.1,
            "accuracy change/a_b": -0.3, "accuracy change/a_b lo": -0.4, "accuracy change/a_b hi": -0.2,
            "margin change/all": -1.5, "margin change/all lo": -2.5, "margin change/a_b": -1.5, "margin change/a_b lo": -2.5,
        }
    )  # fmt: skip
