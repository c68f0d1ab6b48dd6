"""`AuditClient`: the service's API (`/v1`) as Python calls."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from safer_engine.errors import SaferError
from service.client import downloads, streams, uploads
from service.client.connection import Connection, Patience, make_error
from service.client.files import LocalFiles, TransferObserver
from service.errors import NotFound, RequestInvalid
from service.gate_schemas import GateSummary, GateView
from service.jobs.model import FINAL_JOB_STATES
from service.schemas import (
    Action,
    ArtifactList,
    ArtifactView,
    EditDetail,
    EditView,
    EventView,
    ExportView,
    JobSummary,
    JobView,
    Me,
    UploadView,
)
from service.submission_schemas import SubmitAudit, SubmitComparison, SubmitDrill, SubmitTraining, SubmitVerification

if TYPE_CHECKING:
    import httpx

_ROUTES = {
    "audit": "/v1/audits", "verify": "/v1/verifications", "train-rm": "/v1/trainings", "compare": "/v1/comparisons",
    "drill": "/v1/drills",
}  # fmt: skip
_BODIES: dict[str, type[BaseModel]] = {
    "audit": SubmitAudit, "verify": SubmitVerification, "train-rm": SubmitTraining, "compare": SubmitComparison,
    "drill": SubmitDrill,
}  # fmt: skip
_GATES = "/v1/gates"
_PARALLEL = 4
_PAGE = 100


@dataclass(frozen=True)
class Submission:
    """What is asked for.

    Attributes:
        spec: an audit spec, or for `train-rm` a training spec, as a document; for `compare` the ids `a` and `b` of two audits.
        audit: of kind `verify`: id of the audit that `spec` goes on from; None where `spec` says it all.
        idempotency_key: the same key and request give the same job; by default one of its own.
    """

    spec: Mapping[str, Any]
    kind: str = "audit"
    audit: str | None = None
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    callback_url: str | None = None
    gpu_seconds_budget: float | None = None
    idempotency_key: str | None = None

    def body(self) -> dict[str, Any]:
        """The request's JSON. Raises RequestInvalid for what the service would refuse beside the spec: it needs no answer."""
        what: dict[str, Any] = dict(self.spec) if self.kind == "compare" else {"spec": dict(self.spec)}
        body: dict[str, Any] = {**what, "priority": self.priority, "labels": dict(self.labels)}
        for name in ("audit", "callback_url", "gpu_seconds_budget"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        try:
            _BODIES[self.kind].model_validate(body)
        except ValidationError as error:
            wrong = [
                f"{'.'.join(str(part) for part in item['loc'] if part != '[key]')}: {item['msg']}" for item in error.errors()
            ]
            raise RequestInvalid(f"fields are wrong: {'; '.join(wrong)}", "see /openapi.json") from None
        return body


@dataclass(frozen=True)
class JobFilter:
    """Which jobs are listed; all conditions hold together.

    Attributes:
        states: any of these; empty for all.
        stage: the step that is open.
        created_from, created_before: aware times.
    """

    states: Sequence[str] = ()
    kind: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None

    def parameters(self) -> dict[str, Any]:
        """As the service takes it."""
        times = {"created_from": self.created_from, "created_before": self.created_before}
        return {
            "state": list(self.states),
            "kind": self.kind,
            "label": [f"{name}={value}" for name, value in self.labels.items()],
            "stage": self.stage,
            **{name: moment and moment.isoformat() for name, moment in times.items()},
        }


@dataclass(frozen=True)
class GateRequest:
    """A verdict that is asked for.

    Attributes:
        audit: an audit's id, or one to be made.
        policy: the name of a built-in one, or a whole policy.
        baseline: an audit's id, `label:NAME=VALUE`, or `label:X` for `label:alias=X`.
        idempotency_key: as of a `Submission`.
    """

    audit: str | Submission
    policy: str | Mapping[str, Any] = "default"
    baseline: str | None = None
    callback_url: str | None = None
    idempotency_key: str | None = None

    def body(self) -> dict[str, Any]:
        """The request's JSON. Raises RequestInvalid."""
        body: dict[str, Any] = {"audit": self.audit} if isinstance(self.audit, str) else {"submission": self.audit.body()}
        body["policy"] = self.policy if isinstance(self.policy, str) else dict(self.policy)
        given = {"baseline": self.baseline, "callback_url": self.callback_url}
        return body | {name: value for name, value in given.items() if value is not None}


class AuditClient:
    """A client of one service, for one thread (uploads use several themselves). Close it, or use it in `with`.

    Args:
        url: of the service, for example `https://audit.example.org`.
        token: API key, `sk-safer-…`.
        transport: an httpx transport in place of the network.
        patience: how often what may be repeated is tried.

    Every call raises `service.errors.Unreachable` where nobody answers, and the error whose code the service names
    (`NotFound`, `NotAllowed`, `Conflict`, `SpecError`, …), with its hint, where it refuses.
    """

    def __init__(
        self, url: str, token: str, transport: httpx.BaseTransport | None = None, patience: Patience | None = None
    ) -> None:
        self._patience = patience or Patience()
        self._connection = Connection(url, token, transport, self._patience)
        self.url = self._connection.url

    def __enter__(self) -> AuditClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def me(self) -> Me:
        """Whose key this is, and the service's version."""
        return Me.model_validate_json(self._connection.call("GET", "/v1/me").content)

    def submit(self, submission: Submission) -> JobView:
        """Make a job. Safe to repeat: the request carries an idempotency key. Raises RequestInvalid."""
        headers = {"Idempotency-Key": submission.idempotency_key or uuid.uuid4().hex}
        body = submission.body()
        response = self._connection.call("POST", _ROUTES[submission.kind], body=body, headers=headers, repeatable=True)
        return JobView.model_validate_json(response.content)

    def job(self, job_id: str) -> JobView:
        """A job as it stands."""
        return JobView.model_validate_json(self._connection.call("GET", _job(job_id)).content)

    def jobs(self, wanted: JobFilter | None = None, limit: int = 20) -> Iterator[JobSummary]:
        """Jobs, newest first, at most `limit`; pages are fetched as they are needed."""
        params = {**(wanted or JobFilter()).parameters(), "limit": min(limit, _PAGE)}
        for item in islice(self._pages(_ROUTES["audit"], params), limit):
            yield JobSummary.model_validate(item)

    def cancel(self, job_id: str) -> JobView:
        """Ask a job to stop."""
        return JobView.model_validate_json(self._connection.call("POST", f"{_job(job_id)}/cancel", repeatable=True).content)

    def retry(self, job_id: str) -> JobView:
        """Let a failed or cancelled job go on. Not repeated by itself: a second retry is refused as a conflict."""
        return JobView.model_validate_json(self._connection.call("POST", f"{_job(job_id)}/retry").content)

    def delete(self, job_id: str) -> None:
        """Remove a finished job from lists; its artifacts go with the next garbage collection unless others use them."""
        self._connection.call("DELETE", _job(job_id))

    def post_gate(self, wanted: GateRequest) -> GateView:
        """Have the service judge an audit when it has ended. Safe to repeat, as `submit`. Raises RequestInvalid."""
        headers = {"Idempotency-Key": wanted.idempotency_key or uuid.uuid4().hex}
        response = self._connection.call("POST", _GATES, body=wanted.body(), headers=headers, repeatable=True)
        return GateView.model_validate_json(response.content)

    def gate(self, gate_id: str) -> GateView:
        """A gate as it stands, with its decision once there is one."""
        return GateView.model_validate_json(self._connection.call("GET", f"{_GATES}/{quote(gate_id, safe='')}").content)

    def gates(
        self, *, audit: str | None = None, states: Sequence[str] = (), verdicts: Sequence[str] = (), limit: int = 20
    ) -> Iterator[GateSummary]:
        """Gates, newest first, at most `limit`; empty conditions do not count."""
        params = {"audit": audit, "state": list(states), "verdict": list(verdicts), "limit": min(limit, _PAGE)}
        for item in islice(self._pages(_GATES, params), limit):
            yield GateSummary.model_validate(item)

    def events(self, job_id: str, *, after: int = 0, follow: bool = True) -> Generator[EventView]:
        """What happened to a job after an event, and (`follow`) then what happens, until it ends."""
        path = f"{_job(job_id)}/events{'' if follow else '?follow=false'}"
        return streams.follow(self._connection, path, after, self._patience)

    def artifacts(self, job_id: str) -> list[ArtifactView]:
        """The files that a job has made so far."""
        return ArtifactList.model_validate_json(self._connection.call("GET", f"{_job(job_id)}/artifacts").content).items

    def artifact(self, job_id: str, name: str) -> ArtifactView:
        """One of them. Raises NotFound, and Gone for one that was removed."""
        found = self.artifacts(job_id)
        for artifact in found:
            if artifact.name == name:
                return artifact
        with suppress(NotFound):  # the service knows whether there was one
            self._connection.call("GET", f"{_job(job_id)}/artifacts/{quote(name)}", headers={"Range": "bytes=0-0"})
        names = ", ".join(item.name for item in found if not item.name.startswith("stages/"))
        raise NotFound(f"job {job_id} has no file {name}", f"it has: {names or 'none yet'}")

    def download(self, job_id: str, artifact: ArtifactView, target: Path, observer: TransferObserver | None = None) -> bool:
        """Get a file; an interrupted transfer goes on. False: `target` had this content already.

        Raises:
            ArtifactError: what came has another digest than the service said.
            ResourceError: `target` cannot be written.
        """
        path = _file(job_id, artifact)
        return downloads.receive(self._connection, path, artifact, target, observer or TransferObserver(), self._patience)

    def read(self, job_id: str, artifact: ArtifactView) -> bytes:
        """A small file as a whole. Raises ArtifactError where it has another digest than the service said."""
        return downloads.read(self._connection, _file(job_id, artifact), artifact)

    def upload(self, files: LocalFiles, kind: str, observer: TransferObserver | None = None) -> UploadView:
        """Send a model folder or a dataset, unless the service has it. The view's `name` is what a spec calls it."""
        return uploads.send(self._connection, files, kind, observer or TransferObserver(), _PARALLEL)

    def edits(self, job_id: str, *, actions: Sequence[str] = (), decided: bool | None = None) -> Iterator[EditView]:
        """Recommended edits with the last decision on each, in the order of the rows.

        Args:
            actions: only these recommendations; empty for all.
            decided: only rows with a decision, or without one.
        """
        wanted = {"action": list(actions), "decided": decided}
        for item in self._pages(f"{_job(job_id)}/edits", wanted):
            yield EditView.model_validate(item)

    def edit(self, job_id: str, pair_id: str) -> EditDetail:
        """One edit, with all decisions on it."""
        return EditDetail.model_validate_json(self._connection.call("GET", _edit(job_id, pair_id)).content)

    def decide(self, job_id: str, pair_id: str, action: Action, note: str = "") -> EditDetail:
        """Record a reviewer's decision; earlier ones stay in the history."""
        body = {"action": action, "note": note}
        return EditDetail.model_validate_json(self._connection.call("PATCH", _edit(job_id, pair_id), body=body).content)

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The items of all pages of a list."""
        cursor: str | None = None
        while True:
            asked = {"limit": _PAGE, **params, "cursor": cursor}
            page = self._connection.call("GET", path, params=asked).json()
            yield from page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def export_decisions(self, job_id: str) -> ExportView:
        """Make the edits with the decisions so far an immutable file of the job, and say which."""
        return ExportView.model_validate_json(self._connection.call("GET", f"{_job(job_id)}/edits/export").content)


def job_error(job: JobView) -> SaferError | None:
    """Why a job failed, as the error it was."""
    return make_error(job.error.code, job.error.message, job.error.hint) if job.error else None


def is_final(job: JobSummary) -> bool:
    """Whether nothing will happen to the job any more unless someone retries it."""
    return job.state in FINAL_JOB_STATES


def _job(job_id: str) -> str:
    return f"/v1/audits/{quote(job_id, safe='')}"


def _file(job_id: str, artifact: ArtifactView) -> str:
    return f"{_job(job_id)}/artifacts/{quote(artifact.name)}"


def _edit(job_id: str, pair_id: str) -> str:
    return f"{_job(job_id)}/edits/{quote(pair_id, safe='')}"
