"""A report that lacks what an audit always writes, where its model leaves that open: a clear error, whoever reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from safer_engine.errors import InputRefused
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import render_html
from safer_engine.report.markdown import render_markdown
from safer_engine.report.model import ReportDocument
from safer_engine.report.summary import cautions, overall, title
from tests.helpers import fake_artifacts


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportDocument:
    audit = fake_artifacts.build(tmp_path_factory.mktemp("store"))
    return build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))


def without(report: ReportDocument, *path: str) -> ReportDocument:
    document: dict[str, Any] = report.model_dump(mode="json")
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return ReportDocument.model_validate(document)


@pytest.mark.parametrize(
    ("path", "read", "words"),
    [
        (("spec", "preset"), cautions, "spec.preset"),
        (("spec", "preset"), render_markdown, "spec.preset"),
        (("spec", "preset"), render_html, "spec.preset"),
        (("spec", "report"), render_html, "spec.report"),
        (("spec", "sae", "interpretable_floor"), render_html, "spec.sae.interpretable_floor"),
        (("provenance", "inputs", "model"), title, "provenance.inputs.model"),
        (("provenance", "inputs", "dataset"), render_html, "provenance.inputs.dataset"),
    ],
)
def test_what_is_not_there_is_named(
    report: ReportDocument, path: tuple[str, ...], read: Callable[[ReportDocument], object], words: str
) -> None:
    assert read(report)
    with pytest.raises(InputRefused, match=f"it has no {re.escape(words)}") as caught:
        read(without(report, *path))
    assert caught.value.hint


def test_a_preset_whose_values_are_not_all_there(report: ReportDocument) -> None:
    for spec in ({**report.spec, "preset": "paper", "sae": {}}, {**report.spec, "preset": "paper", "sae": None}):
        with pytest.raises(InputRefused, match="no whole spec"):
            cautions(report.model_copy(update={"spec": spec}))


def test_the_same_of_a_report_without_scores_and_of_one_without_its_whole(report: ReportDocument) -> None:
    assert report.edits is not None
    bare = report.model_copy(update={"edits": report.edits.model_copy(update={"n_scored": 0})})
    cautions(bare)
    with pytest.raises(InputRefused, match=r"spec\.suspicion"):
        cautions(without(bare, "spec", "suspicion"))
    with pytest.raises(InputRefused, match="figure over all axes"):
        overall([])
