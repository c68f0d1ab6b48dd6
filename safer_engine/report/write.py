"""A report's files, written into a folder or a work area by whoever owns it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from safer_engine.artifacts import CausalEffects, EvaluationSet, Labels, Latents, PairScores, Stability
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import render_html
from safer_engine.report.markdown import render_markdown
from safer_engine.report.model import ReportDocument
from safer_engine.report.tables import features_table, scores_table, write_evaluation

REPORT_FILES = ("report.html", "report.md", "report.json", "evaluation.jsonl", "features.parquet", "pair_scores.parquet")
"""What `write_report` writes, the tables only where their artifacts are there."""
SAE_FILES = ("sae.safetensors", "sae.json", "metrics.json")
"""What a finished audit copies into the folder `sae` beside the report."""

Publish = Callable[[str], AbstractContextManager[Path]]
"""Yields a temporary path for a file name and publishes it on a clean exit."""


def write_report(request: ReportRequest, publish: Publish) -> ReportDocument:
    """Build the report of what there is and write its files; tables whose artifacts are missing are not written.

    Raises:
        ArtifactError, NumericalError: see `build_report`. ResourceError: the page does not fit its limit.
    """
    document = build_report(request)
    texts = {
        "report.json": document.model_dump_json(indent=1) + "\n",
        "report.html": render_html(document),
        "report.md": render_markdown(document),
    }
    for name, content in texts.items():
        with publish(name) as path:
            path.write_text(content, encoding="utf-8", newline="\n")
    _write_tables(request, publish)
    return document


def _write_tables(request: ReportRequest, publish: Publish) -> None:
    from pyarrow import parquet

    found = request.found
    evaluation, latents = found.get(EvaluationSet), found.get(Latents)
    labels, scores = found.get(Labels), found.get(PairScores)
    if isinstance(evaluation, EvaluationSet):
        with publish("evaluation.jsonl") as path:
            write_evaluation(path, evaluation.pairs, evaluation.rewards)
    if isinstance(latents, Latents):
        known = labels if isinstance(labels, Labels) else None
        stability = found.get(Stability)
        again = stability if isinstance(stability, Stability) else None
        causal = found.get(CausalEffects)
        effects = causal if isinstance(causal, CausalEffects) else None
        with publish("features.parquet") as path:
            parquet.write_table(features_table(latents, known, again, effects, text=request.spec.report.text), path)
    if isinstance(scores, PairScores):
        with publish("pair_scores.parquet") as path:
            parquet.write_table(scores_table(scores), path)


def utc_now() -> str:
    """The time, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
