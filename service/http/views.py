"""Records as clients see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service.jobs.model import JobRecord, StageRecord, StageState
from service.jobs.uploads import UploadStore
from service.schemas import ErrorView, JobSummary, JobView, StageView
from service.upload_names import UPLOAD, uploads_in


@dataclass(frozen=True)
class Subject:
    """What a job is about, as its spec names it; of a comparison the other model stands in the dataset's place."""

    model: str
    dataset: str
    between: str = "on"


def subject_of(spec: Mapping[str, Any]) -> Subject:
    """Model (or base) and dataset of a spec; of a comparison both models."""
    if "a" in spec and "b" in spec:
        return Subject(str(spec["a"]["model"]), str(spec["b"]["model"]), "with")
    model = spec.get("base") or (spec.get("model") or {}).get("path", "")
    source = (spec.get("dataset") or {}).get("source") or {}
    return Subject(str(model), str(source.get("path", "")))


def upload_names(uploads: UploadStore, project: str, specs: Iterable[Any]) -> dict[str, str]:
    """What people call the uploads that specs name, by `upload:<digest>`."""
    named = frozenset(name.removeprefix(UPLOAD) for spec in specs for name in uploads_in(spec))
    return {f"{UPLOAD}{digest}": told for digest, told in uploads.names(project, named).items()}


def summary(job: JobRecord, names: Mapping[str, str]) -> JobSummary:
    """A job as lists show it. `names`: what people call uploads, by `upload:<digest>`."""
    subject = subject_of(job.spec)
    error = job.error
    return JobSummary(
        id=job.id,
        kind=job.kind,
        state=job.state,
        priority=job.priority,
        labels=job.labels,
        created=job.created,
        started=job.started,
        finished=job.finished,
        submitted_by=job.submitted_by,
        cancel_requested=job.cancel_requested,
        error=ErrorView(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable) if error else None,
        verdict=job.verdict,
        model=subject.model,
        dataset=subject.dataset,
        names={name: names[name] for name in uploads_in(job.spec) if name in names},
    )


@dataclass(frozen=True)
class Standing:
    """Where a job stands, as other tables say. `now`: by the database's clock; `names`: see `upload_names`."""

    stages: tuple[StageRecord, ...]
    queue_position: int | None
    now: datetime
    seconds_left: float | None
    names: Mapping[str, str]


def job_view(job: JobRecord, standing: Standing) -> JobView:
    """A job in full."""
    stages, now = standing.stages, standing.now
    current = next((stage for stage in stages if stage.state is StageState.OPEN), None)
    return JobView(
        **dict(summary(job, standing.names)),
        stage=current.name if current else None,
        progress=_progress(current),
        eta_seconds=standing.seconds_left,
        queue_position=standing.queue_position,
        stages=[stage_view(stage, now) for stage in stages],
        inputs=job.inputs,
        verdict_reason=job.verdict_reason,
        callback_url=job.callback_url,
        gpu_seconds=job.gpu_seconds,
        gpu_seconds_budget=job.gpu_seconds_budget,
        attempt=job.attempt,
        spec=job.spec,
        links=_links(job),
    )


def progress_of(stages: tuple[StageRecord, ...]) -> dict[str, Any] | None:
    """How far the open step is; None where none is open."""
    current = next((stage for stage in stages if stage.state is StageState.OPEN), None)
    if current is None:
        return None
    return {"stage": current.name, "done": current.done, "total": current.total, "unit": current.unit}


def stage_view(stage: StageRecord, now: datetime) -> StageView:
    """One step of a job."""
    return StageView(
        name=stage.name,
        queue=stage.queue,
        state=stage.state,
        outcome=stage.outcome,
        done=stage.done,
        total=stage.total,
        unit=stage.unit,
        started=stage.started,
        finished=stage.finished,
        seconds=_seconds(stage, now),
    )


def _seconds(stage: StageRecord, now: datetime) -> float | None:
    if stage.started is None:
        return None
    return max(0.0, ((stage.finished or now) - stage.started).total_seconds())


def _progress(stage: StageRecord | None) -> float | None:
    if stage is None or stage.total <= 0:
        return None
    return min(1.0, max(0.0, stage.done / stage.total))


def _links(job: JobRecord) -> dict[str, str]:
    base = f"/v1/audits/{job.id}"
    return {"self": base} | {name: f"{base}/{name}" for name in ("events", "artifacts", "report", "edits")}
