"""Recommended edits of a job, and what reviewers decide on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from safer_engine.store import ManifestDraft, canonical_json, digest_bytes
from service.artifact_names import DECISIONS_NAME, DECISIONS_STAGE, StoredFile
from service.errors import NotFound
from service.http.auth import EditReader, Reviewer
from service.http.edit_rows import EditFilter, EditRows, Line, suspicion_order
from service.http.errors import responses
from service.http.job_files import job_file
from service.http.parameters import Cursor, JobId, Limit, ServicesDep
from service.http.services import Services
from service.infra.stores import ServiceStore
from service.jobs.access import Principal
from service.jobs.attachments import Reference
from service.jobs.model import JobRecord
from service.jobs.reviews import Decision
from service.schemas import Action, Decide, DecisionView, EditDetail, EditView, ExportView, Page

router = APIRouter(prefix="/v1/audits/{job_id}", tags=["edits"])
PairId = Annotated[str, Path(min_length=1, max_length=200, description="As in `pair_id`; may hold `/`.")]
_EDITS_FILE = "edits.jsonl"


class EditFilters(BaseModel):
    """Which edits are listed; all conditions hold together."""

    model_config = ConfigDict(extra="forbid")
    action: Annotated[list[Action], Field(description="As recommended; any of these.", max_length=4)] = []
    axis: Annotated[str | None, Field(max_length=200)] = None
    min_suspicion: Annotated[float | None, Field(ge=0, le=1)] = None
    decided: bool | None = None
    cursor: Cursor = None
    limit: Limit = 50

    def wanted(self) -> EditFilter:
        """The conditions."""
        return EditFilter(frozenset(self.action), self.axis, self.min_suspicion, self.decided)


@router.get("/edits", response_model=Page[EditView], responses=responses(410))
def list_edits(job_id: JobId, who: EditReader, services: ServicesDep, filters: Annotated[EditFilters, Query()]) -> Page[EditView]:
    """What is recommended for each input row, most suspicious first, with the decisions so far."""
    job = services.jobs.get(who.project, job_id)
    decisions = services.reviews.latest(job.id)
    with edit_rows(services, job) as rows:
        found = rows.page(filters.wanted(), decisions, filters.cursor, filters.limit)
    items = [EditView(**line, decision=decision_view(decisions.get(line["pair_id"]))) for line in found.lines]
    return Page(items=items, next=found.next)


@router.get("/edits/export", response_model=ExportView, responses=responses(410))
def export_edits(job_id: JobId, who: Reviewer, services: ServicesDep) -> ExportView:
    """Make the edits, with reviewers' decisions in place of what was recommended, an immutable artifact of the job.

    `safer-audit apply` reads it in place of `edits.jsonl`. The same decisions give the same artifact.
    """
    return export_decisions(services, who, services.jobs.get(who.project, job_id))


@router.get("/edits/{pair_id:path}", response_model=EditDetail, responses=responses(410))
def get_edit(job_id: JobId, pair_id: PairId, who: EditReader, services: ServicesDep) -> EditDetail:
    """One edit, with every decision on it."""
    job = services.jobs.get(who.project, job_id)
    return _detail(services, job, _line(services, job, pair_id))


@router.patch("/edits/{pair_id:path}", response_model=EditDetail, responses=responses(410))
def decide_edit(job_id: JobId, pair_id: PairId, decided: Decide, who: Reviewer, services: ServicesDep) -> EditDetail:
    """Decide on an edit. Earlier decisions are kept; the last one counts."""
    job = services.jobs.get(who.project, job_id)
    return decide(services, who, job, pair_id, decided)


def decide(services: Services, who: Principal, job: JobRecord, pair_id: str, decided: Decide) -> EditDetail:
    """Record a decision of a person. Raises NotFound: no such pair."""
    line = _line(services, job, pair_id)
    services.reviews.decide(job.project, job.id, pair_id, decided.action, who.name, decided.note)
    return _detail(services, job, line)


@contextmanager
def edit_rows(services: Services, job: JobRecord) -> Iterator[EditRows]:
    """The edits of a job. Raises NotFound: there are none yet."""
    file = job_file(services, job, _EDITS_FILE)
    with closing(services.store(job.project)) as store:
        path = store.read(file.stage, file.key).path(file.file)
        yield EditRows(path, services.edit_orders.get(file.digest, lambda: suspicion_order(path)))


def decision_view(decision: Decision | None) -> DecisionView | None:
    """A decision as clients see it."""
    if decision is None:
        return None
    return DecisionView(action=decision.action, note=decision.note, reviewer=decision.reviewer, at=decision.at)


def export_decisions(services: Services, who: Principal, job: JobRecord) -> ExportView:
    """Commit the edits with the decisions so far, unless that was done already, and attach them to the job."""
    source = job_file(services, job, _EDITS_FILE)
    decisions = services.reviews.latest(job.id)
    key = digest_bytes(canonical_json([job.id, source.digest, sorted(found.id for found in decisions.values())]))
    with closing(services.store(job.project)) as store:
        if not store.has(DECISIONS_STAGE, key):
            _commit_decisions(services, job, decisions, store, key, source.digest)
            services.access.record(job.project, who.key_id, "edit.export", job.id, {"key": key, "decisions": len(decisions)})
        entry = store.manifest(DECISIONS_STAGE, key).files[DECISIONS_NAME]
    services.attachments.attach(job.project, job.id, Reference(DECISIONS_STAGE, key), entry.size)
    made = StoredFile(DECISIONS_NAME, DECISIONS_STAGE, key, DECISIONS_NAME, entry.size, entry.digest)
    return ExportView(name=made.name, size=made.size, digest=made.digest, media_type=made.media_type, decisions=len(decisions))


def _commit_decisions(
    services: Services, job: JobRecord, decisions: dict[str, Decision], store: ServiceStore, key: str, source: str
) -> None:
    with store.open_work(DECISIONS_STAGE, key) as work, edit_rows(services, job) as rows:
        with work.publish(DECISIONS_NAME) as path, path.open("w", encoding="utf-8", newline="\n") as handle:
            for line in rows.lines():
                handle.write(json.dumps(_decided(line, decisions), ensure_ascii=False, allow_nan=False) + "\n")
        meta = {"job": job.id, "decisions": len(decisions)}
        store.commit(DECISIONS_STAGE, key, work, ManifestDraft(1, "Decisions", meta, {"edits": source}))


def _decided(line: Line, decisions: dict[str, Decision]) -> Line:
    """A line with the reviewer's action, and beside it what was recommended and who decided."""
    decision = decisions.get(line["pair_id"])
    if decision is None:
        return line
    told: dict[str, Any] = {"recommended": line["action"], "reviewer": decision.reviewer, "at": decision.at.isoformat()}
    return line | {"action": decision.action, "decision": told | {"note": decision.note}}


def _line(services: Services, job: JobRecord, pair_id: str) -> Line:
    with edit_rows(services, job) as rows:
        line = rows.find(pair_id)
    if line is None:
        raise NotFound(f"the job has no pair {pair_id!r}", "GET …/edits lists them")
    return line


def _detail(services: Services, job: JobRecord, line: Line) -> EditDetail:
    history = [decision_view(found) for found in services.reviews.history(job.id, line["pair_id"])]
    return EditDetail(**line, decision=history[-1] if history else None, history=[each for each in history if each])
