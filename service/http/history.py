"""The audits of a model over time: by its digest, or of all versions that carry a label."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from safer_engine.errors import ArtifactError
from safer_engine.gate.shapes import fault_of_evaluation, is_number
from service.errors import FieldProblem, Gone, NotFound, RequestInvalid
from service.history_schemas import AxisAccuracy, VersionView
from service.http.auth import Reader
from service.http.errors import responses
from service.http.job_files import job_file, read_file
from service.http.parameters import Cursor, DigestPath, Labelled, ServicesDep, labels_of
from service.http.services import ReportFigures, Services
from service.http.views import subject_of
from service.jobs.model import JobKind, JobRecord, JobState
from service.jobs.requests import JobQuery
from service.schemas import Page

router = APIRouter(prefix="/v1", tags=["jobs"])
VersionLimit = Annotated[int, Field(ge=1, le=50, description="Versions of a page: the report of each is read.")]
_LARGEST = 64 << 20


@router.get("/models/{digest}/history", response_model=Page[VersionView], responses=responses())
def model_history(
    digest: DigestPath, who: Reader, services: ServicesDep, cursor: Cursor = None, limit: VersionLimit = 20
) -> Page[VersionView]:
    """The finished audits of a model, by its content digest, newest first."""
    return history(services, who.project, JobQuery(**_AUDITS, input_digest=digest), cursor, limit)


@router.get("/history", response_model=Page[VersionView], responses=responses())
def label_history(
    label: Annotated[Labelled, Query()], who: Reader, services: ServicesDep, cursor: Cursor = None, limit: VersionLimit = 20
) -> Page[VersionView]:
    """The finished audits that carry all these labels, newest first: versions of one model, where they are labelled so."""
    if not label:
        raise RequestInvalid("no label is given", "write label=name=value", (FieldProblem("query.label", "none is given"),))
    return history(services, who.project, JobQuery(**_AUDITS, labels=labels_of(label)), cursor, limit)


_AUDITS: dict[str, Any] = {"states": (JobState.SUCCEEDED,), "kind": JobKind.AUDIT}


def history(services: Services, project: str, query: JobQuery, cursor: str | None, limit: int) -> Page[VersionView]:
    """A page of versions, each with its change from the one before, also where that is on the next page."""
    found = services.jobs.find(project, query, cursor, limit)
    jobs = list(found.items)
    if found.next is not None:
        jobs += services.jobs.find(project, query, found.next, 1).items
    figures = [_figures(services, job) for job in jobs]
    items = [
        _version(job, figures[place], jobs[place + 1 : place + 2], figures[place + 1 : place + 2])
        for place, job in enumerate(jobs[: len(found.items)])
    ]
    return Page(items=items, next=found.next)


def _version(job: JobRecord, own: ReportFigures, before: list[JobRecord], theirs: list[ReportFigures]) -> VersionView:
    evaluated = job.inputs.get("evaluation")
    comparable = bool(before) and evaluated is not None and before[0].inputs.get("evaluation") == evaluated
    known = {axis: accuracy for axis, accuracy, *_ in theirs[0].accuracy} if comparable else {}
    models = [each.inputs.get("model") for each in (job, *before)]
    return VersionView(
        audit=job.id,
        created=job.created,
        finished=job.finished,
        labels=dict(job.labels),
        model=subject_of(job.spec).model,
        model_digest=models[0],
        dataset_digest=job.inputs.get("dataset"),
        evaluation_digest=evaluated,
        accuracy=[
            AxisAccuracy(axis=axis, accuracy=value, lo=lo, hi=hi, n=n, change=value - known[axis] if axis in known else None)
            for axis, value, lo, hi, n in own.accuracy
        ],
        doubtful_share=own.doubtful_share,
        verdict=dict(job.verdict) if job.verdict is not None else None,
        previous=before[0].id if before else None,
        same_model=models[0] == models[1] if before and None not in models else None,
        missing=own.missing,
    )


def _figures(services: Services, job: JobRecord) -> ReportFigures:
    try:
        file = job_file(services, job, "report.json")
        if file.size > _LARGEST:
            return ReportFigures(missing=f"its report has more than {_LARGEST:,} bytes")
        return services.report_figures.get(file.digest, lambda: figures_of(read_file(services, job, file)))
    except (NotFound, Gone) as error:
        return ReportFigures(missing=error.message)
    except ArtifactError:
        return ReportFigures(missing="its report is damaged in the store")


def figures_of(raw: bytes) -> ReportFigures:
    """The figures of a report that a history shows."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("schema_version") != 1:
        return ReportFigures(missing="its report is not of this version")
    evaluation, edits = document.get("evaluation"), document.get("edits")
    if evaluation is not None and (fault := fault_of_evaluation(evaluation)):
        return ReportFigures(missing=f"its report is not as an audit writes it: {fault}")
    rows = [row for row in (evaluation or {}).get("groups", []) if row["subset"] is None]
    accuracy = [(row["axis"], *(row["accuracy"].get(name) for name in ("estimate", "lo", "hi", "n"))) for row in rows]
    share = edits.get("doubtful_share") if isinstance(edits, dict) else None
    return ReportFigures(tuple(accuracy), share if is_number(share) else None)
