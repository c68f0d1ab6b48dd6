"""Records as clients see them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from service.jobs.model import JobRecord, JobState, StageRecord, StageState
from service.schemas import ErrorView, JobSummary, JobView, StageView


def summary(job: JobRecord) -> JobSummary:
    """A job as lists show it."""
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
    )


def job_view(job: JobRecord, stages: tuple[StageRecord, ...], queue_position: int | None) -> JobView:
    """A job in full."""
    now = datetime.now(UTC)
    current = next((stage for stage in stages if stage.state is StageState.OPEN), None)
    return JobView(
        **dict(summary(job)),
        stage=current.name if current else None,
        progress=_progress(current),
        eta_seconds=_eta(current, now) if job.state is JobState.RUNNING else None,
        queue_position=queue_position,
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


def _eta(stage: StageRecord | None, now: datetime) -> float | None:
    share = _progress(stage)
    if stage is None or stage.started is None or share is None or share <= 0:
        return None
    return max(0.0, (now - stage.started).total_seconds() * (1 - share) / share)


def _links(job: JobRecord) -> dict[str, str]:
    base = f"/v1/audits/{job.id}"
    return {"self": base} | {name: f"{base}/{name}" for name in ("events", "artifacts", "report", "edits")}
