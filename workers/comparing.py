"""A comparison of two finished audits, from what the store holds of them."""

from __future__ import annotations

from safer_engine.comparison.build import compare_sides
from safer_engine.comparison.page import render_page
from safer_engine.comparison.sides import SCORES, Side, read_scores, stored_latents
from safer_engine.comparison.write import DOCUMENT, PAGE
from safer_engine.errors import ArtifactError
from safer_engine.gate.documents import EVALUATION, REPORT, read_audit
from safer_engine.machine import measured, provenance
from safer_engine.store import ManifestDraft, StoredArtifact, WorkArea
from service.comparison_spec import VERSION, ComparedAudit, ComparisonSpec
from service.infra.stores import ServiceStore
from service.jobs.stage_plan import COMPARISON

COMPARED = "Comparison"
"""Artifact type of a comparison's document and page."""
_REPORTS = "report"


def require_reports(spec: ComparisonSpec, store: ServiceStore) -> None:
    """Raise ArtifactError where the report of one of the audits is gone."""
    for one in (spec.a, spec.b):
        if not store.has(_REPORTS, one.report):
            raise ArtifactError(
                f"the report of audit {one.job} is gone", "submit that audit as a new one, and compare it when it is finished"
            )


def compare(spec: ComparisonSpec, store: ServiceStore, work: WorkArea) -> StoredArtifact:
    """Compare two audits and commit what is found.

    Raises:
        InputRefused: the audits have no pairs in common, or a report is damaged. ArtifactError: a report is gone.
    """
    require_reports(spec, store)
    with measured() as measurement:
        found = compare_sides(_side(spec.a, store), _side(spec.b, store))
        for name, text in ((DOCUMENT, found.model_dump_json(indent=1) + "\n"), (PAGE, render_page(found))):
            with work.publish(name) as path:
                path.write_text(text, encoding="utf-8", newline="\n")
    draft = ManifestDraft(
        stage_version=VERSION,
        artifact=COMPARED,
        inputs={"a": spec.a.content, "b": spec.b.content},
        meta={"same_model": found.same_model},
        provenance=provenance("cpu"),
        cost=measurement.cost,
    )
    stored: StoredArtifact = store.commit(COMPARISON, spec.key, work, draft)
    return stored


def _side(one: ComparedAudit, store: ServiceStore) -> Side:
    name, stored = f"audit {one.job}", store.read(_REPORTS, one.report)
    files = stored.manifest.files
    evaluation = stored.path(EVALUATION).read_bytes() if EVALUATION in files else None
    audit = read_audit(stored.path(REPORT).read_bytes(), evaluation, name)
    scored = read_scores(stored.path(SCORES).read_bytes(), f"{SCORES} of {name}") if SCORES in files else None
    return Side(name, audit, scored, stored_latents(audit, store))
