"""The report's document: its keys, its nulls, its schema."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.model import SECTIONS, Health, Histogram, ReportDocument, json_schema
from tests.helpers import fake_artifacts

TOP_LEVEL = [
    "schema_version", "spec", "provenance", "dataset", "reward_model", "evaluation", "sae", "features", "labels", "causal",
    "edits", "verification", "verdict",
]  # fmt: skip
SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    audit = fake_artifacts.build(tmp_path_factory.mktemp("store"))
    report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))
    return dict(json.loads(report.model_dump_json()))


def test_top_level_keys_are_the_published_ones(document: dict[str, Any]) -> None:
    assert list(document) == TOP_LEVEL
    assert set(SECTIONS) < set(TOP_LEVEL)


def test_a_report_reads_back_as_itself(document: dict[str, Any]) -> None:
    again = ReportDocument.model_validate_json(json.dumps(document))
    assert json.loads(again.model_dump_json()) == document


def test_the_published_schema_is_the_models(document: dict[str, Any]) -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == json_schema(), "stale: python -m safer_engine.report.schema docs/report.schema.json"
    Draft202012Validator.check_schema(published)
    Draft202012Validator(published).validate(document)


def test_the_schema_refuses_an_unknown_key(document: dict[str, Any]) -> None:
    errors = list(Draft202012Validator(json_schema()).iter_errors({**document, "extra": 1}))
    assert len(errors) == 1
    assert "extra" in errors[0].message


def test_the_schema_asks_for_every_top_level_key() -> None:
    assert set(json_schema()["required"]) == set(TOP_LEVEL)


def test_a_null_section_needs_its_reason(document: dict[str, Any]) -> None:
    silent = {name: reason for name, reason in document["provenance"]["not_computed"].items() if name != "verdict"}
    bad = {**document, "provenance": {**document["provenance"], "not_computed": silent}}
    with pytest.raises(ValidationError, match="null without a reason.*verdict"):
        ReportDocument.model_validate(bad)


def test_a_reason_for_what_was_computed_is_refused(document: dict[str, Any]) -> None:
    reasons = {**document["provenance"]["not_computed"], "sae": "switched off"}
    with pytest.raises(ValidationError, match="names what was computed: sae"):
        ReportDocument.model_validate({**document, "provenance": {**document["provenance"], "not_computed": reasons}})


def test_non_finite_figures_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="finite"):
        ReportDocument.model_validate({**document, "sae": {**document["sae"], "fvu": float("nan")}})


def test_counts_must_add_up() -> None:
    assert Health(n_in=5, n_kept=3, dropped={"tie": 2}).n_kept == 3
    with pytest.raises(ValidationError, match="do not add up"):
        Health(n_in=5, n_kept=3, dropped={"tie": 1})


def test_a_histogram_has_one_edge_more() -> None:
    with pytest.raises(ValidationError, match="one edge more"):
        Histogram(edges=[0.0, 1.0], counts=[1, 2])
