"""Jobs: submitting, finding, watching, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service.errors import NotFound
from service.http.auth import RedTeam, Submitter, Watcher
from service.http.errors import Responses, responses
from service.http.parameters import (
    Cursor,
    DigestPath,
    IdempotencyKey,
    JobId,
    Labelled,
    Limit,
    ServicesDep,
    StageName,
    labels_of,
    moment,
)
from service.http.services import Services
from service.http.streaming import EVENTS_AT_ONCE, Seen, Watch, event_stream
from service.http.submissions import new_audit, new_comparison, new_drill, new_training, new_verification
from service.http.views import Standing, job_view, progress_of, summary, upload_names
from service.jobs.access import Principal
from service.jobs.model import JobKind, JobRecord, JobState
from service.jobs.requests import JobQuery, NewJob
from service.schemas import JobSummary, JobView, Page
from service.submission_schemas import SubmitAudit, SubmitComparison, SubmitDrill, SubmitTraining, SubmitVerification

router = APIRouter(prefix="/v1", tags=["jobs"])
_CREATED: Responses = {
    201: {"description": "The new job."},
    200: {"model": JobView, "description": "The job of the same request before."},
}
_TEXT = {"type": "string"}
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": _TEXT,
        "id": _TEXT,
        "data": {**_TEXT, "description": "JSON: an EventView; of `progress` and `end` less."},
    },
}
_SSE: Responses = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": _EVENT}}}}


@router.post("/audits", status_code=201, response_model=JobView, responses=responses(409, own=_CREATED))
def submit_audit(
    asked: SubmitAudit, who: Submitter, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> JobView:
    """Submit an audit of a reward model."""
    return _submit(services, who, new_audit(services, who, asked, key), response)


@router.post("/verifications", status_code=201, response_model=JobView, responses=responses(404, 409, own=_CREATED))
def submit_verification(
    asked: SubmitVerification, who: Submitter, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> JobView:
    """Submit a verification by retraining of an audit's edits. What the audit computed is not computed again."""
    return _submit(services, who, new_verification(services, who, asked, key), response)


@router.post("/comparisons", status_code=201, response_model=JobView, responses=responses(404, 409, own=_CREATED))
def submit_comparison(
    asked: SubmitComparison, who: Submitter, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> JobView:
    """Submit a comparison of two finished audits: what changed from `a` to `b`."""
    return _submit(services, who, new_comparison(services, who, asked, key), response)


@router.post("/drills", status_code=201, response_model=JobView, responses=responses(409, own=_CREATED))
def submit_drill(
    asked: SubmitDrill, who: RedTeam, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> JobView:
    """Submit a poisoning drill, where the operator allows it: harm and detection of turned preferences. Poison is not kept."""
    return _submit(services, who, new_drill(services, who, asked, key), response)


@router.post("/trainings", status_code=201, response_model=JobView, responses=responses(409, own=_CREATED))
def submit_training(
    asked: SubmitTraining, who: Submitter, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> JobView:
    """Submit the training of a reward model. The job is then one among the audits: watched, cancelled and read there."""
    return _submit(services, who, new_training(services, who, asked, key), response)


class JobFilters(BaseModel):
    """Which jobs are listed; all conditions hold together."""

    model_config = ConfigDict(extra="forbid")
    state: Annotated[list[JobState], Field(description="Any of these.", max_length=5)] = []
    kind: JobKind | None = None
    label: Labelled = []
    stage: Annotated[StageName | None, Field(description="The step that is open.")] = None
    created_from: AwareDatetime | None = None
    created_before: AwareDatetime | None = None
    cursor: Cursor = None
    limit: Limit = 50

    def query(self) -> JobQuery:
        """The conditions. Raises RequestInvalid."""
        return JobQuery(
            states=tuple(dict.fromkeys(self.state)),
            kind=self.kind,
            labels=labels_of(self.label),
            stage=self.stage,
            created_from=moment(self.created_from, "created_from"),
            created_before=moment(self.created_before, "created_before"),
        )


@router.get("/audits", response_model=Page[JobSummary], responses=responses())
def list_audits(who: Watcher, services: ServicesDep, filters: Annotated[JobFilters, Query()]) -> Page[JobSummary]:
    """The project's jobs, newest first."""
    return _page(services, who.project, filters.query(), filters.cursor, filters.limit)


@router.get("/models/{digest}/audits", response_model=Page[JobSummary], responses=responses())
def audits_of_model(
    digest: DigestPath, who: Watcher, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Page[JobSummary]:
    """Jobs that used a model, by its content digest."""
    return _page(services, who.project, JobQuery(input_digest=digest), cursor, limit)


@router.get("/datasets/{digest}/audits", response_model=Page[JobSummary], responses=responses())
def audits_of_dataset(
    digest: DigestPath, who: Watcher, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Page[JobSummary]:
    """Jobs that used a dataset, by its content digest."""
    return _page(services, who.project, JobQuery(input_digest=digest), cursor, limit)


@router.get("/audits/{job_id}", response_model=JobView, responses=responses())
def get_audit(job_id: JobId, who: Watcher, services: ServicesDep) -> JobView:
    """One job: where it stands, and what became of it."""
    return view_of(services, services.jobs.get(who.project, job_id))


def _last_seen(
    after: Annotated[int, Query(ge=0, le=2**62, description="Events with a larger id only.")] = 0,
    last: Annotated[
        str | None, Header(alias="Last-Event-ID", max_length=100, description="As `after`, sent by browsers that come back.")
    ] = None,
) -> int:
    return min(int(last[:20]), 2**62) if last is not None and last.isascii() and last.isdigit() else after


After = Annotated[int, Depends(_last_seen)]
Follow = Annotated[bool, Query(description="Go on until the job ends; `false` ends after what has happened so far.")]


@router.get("/audits/{job_id}/events", response_class=StreamingResponse, responses=responses(own=_SSE))
async def audit_events(
    job_id: JobId, who: Watcher, services: ServicesDep, after: After, follow: Follow = True
) -> StreamingResponse:
    """What happens to a job, as server-sent events; ends after `end`, when the job has ended."""
    await asyncio.to_thread(services.jobs.get, who.project, job_id)
    watch = Watch(
        look=lambda since: _look(services, who.project, job_id, since),
        allowed=lambda: services.access.principal(who.key_id) is not None,
        stopping=services.stopping,
        follow=follow,
    )
    services.streams.require_room(who.key_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_counted(services, who, event_stream(watch, after)), 200, headers, "text/event-stream")


@router.post("/audits/{job_id}/cancel", response_model=JobView, responses=responses(409))
def cancel_audit(job_id: JobId, who: Submitter, services: ServicesDep) -> JobView:
    """Stop a job. What a worker is at ends within a heartbeat; what was committed stays."""
    return view_of(services, services.jobs.request_cancel(who.project, job_id, who.key_id))


@router.post("/audits/{job_id}/retry", response_model=JobView, responses=responses(409))
def retry_audit(job_id: JobId, who: Submitter, services: ServicesDep) -> JobView:
    """Queue a failed or cancelled job again. Steps that are done are not done again."""
    job = services.jobs.retry(who.project, job_id, who.key_id)
    services.sender.wake()
    return view_of(services, job)


@router.delete("/audits/{job_id}", status_code=204, response_class=Response, responses=responses(409))
def delete_audit(job_id: JobId, who: Submitter, services: ServicesDep) -> None:
    """Remove a job that has ended. Files that no other job uses go with the next collection."""
    services.jobs.delete(who.project, job_id, who.key_id)


def view_of(services: Services, job: JobRecord) -> JobView:
    """A job in full, with what stands in other tables."""
    stages, now = services.jobs.stages(job.id), services.outlook.now()
    left = services.outlook.seconds_left(job, stages, now)
    names = upload_names(services.uploads, job.project, (job.spec,))
    return job_view(job, Standing(stages, services.jobs.queue_position(job), now, left, names))


async def _counted(services: Services, who: Principal, stream: AsyncIterator[str]) -> AsyncIterator[str]:
    with services.streams.one(who.key_id):
        async for text in stream:
            yield text


def _submit(services: Services, who: Principal, new: NewJob, response: Response) -> JobView:
    submitted = services.jobs.submit(who.project, new)
    response.status_code = 201 if submitted.created else 200
    response.headers["Location"] = f"/v1/audits/{submitted.job.id}"
    services.sender.wake()
    return view_of(services, submitted.job)


def _page(services: Services, project: str, query: JobQuery, cursor: str | None, limit: int) -> Page[JobSummary]:
    found = services.jobs.find(project, query, cursor, limit)
    names = upload_names(services.uploads, project, (job.spec for job in found.items))
    return Page(items=[summary(job, names) for job in found.items], next=found.next)


def _look(services: Services, project: str, job_id: str, after: int) -> Seen:
    try:
        state = services.jobs.get(project, job_id).state
    except NotFound:
        return Seen(None, (), None)
    found = services.jobs.events(job_id, after, EVENTS_AT_ONCE)
    return Seen(state, found, progress_of(services.jobs.stages(job_id)))
