"""The states of a job, its stages and its units, and which change may follow which. Read this first.

A *job* is the record of one request. It walks the stages of its kind in order; at most one stage of a job is open at a time.
A stage is made of *units*, the only things that are handed to workers: one `whole` unit, or, where the stage declares parts
(shards), `part` units that run side by side and then one `join`, which finds the parts done and commits the artifact.

SQL decides: every change of state is a compare-and-set on the state it leaves. A message in the queue only says "look at
this unit"; one that comes late or twice finds the state changed and does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

QUEUES = ("cpu", "gpu")
"""What a stage needs, and so the queue its units go to."""


class JobKind(StrEnum):
    """What a job does."""

    AUDIT = "audit"
    VERIFY = "verify"
    TRAIN_RM = "train-rm"
    COMPARE = "compare"
    DRILL = "drill"

    @property
    def reports(self) -> bool:
        """Whether it walks the stages of an audit and ends with an audit's report; a verification is an audit that goes on."""
        return self in {JobKind.AUDIT, JobKind.VERIFY}


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StageState(StrEnum):
    """Where one pipeline step of a job stands."""

    PENDING = "pending"
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnitKind(StrEnum):
    """What a unit computes of its stage."""

    WHOLE = "whole"
    PART = "part"
    JOIN = "join"


class UnitState(StrEnum):
    """Where a unit stands.

    ready: may be handed out. sent: a message is, or was, in the queue. leased: a worker computes it. parked: waits for
    another job's unit that computes the same cache key.
    """

    READY = "ready"
    SENT = "sent"
    LEASED = "leased"
    PARKED = "parked"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_JOB_STATES = frozenset((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED))
FINAL_UNIT_STATES = frozenset((UnitState.DONE, UnitState.FAILED, UnitState.CANCELLED))

JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset((JobState.RUNNING, JobState.FAILED, JobState.CANCELLED)),
    JobState.RUNNING: frozenset((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset((JobState.QUEUED,)),
    JobState.CANCELLED: frozenset((JobState.QUEUED,)),
}
"""`retry` leads from failed and cancelled back to queued; what was committed is not computed again."""

STAGE_TRANSITIONS: dict[StageState, frozenset[StageState]] = {
    StageState.PENDING: frozenset((StageState.OPEN,)),
    StageState.OPEN: frozenset((StageState.DONE, StageState.FAILED, StageState.CANCELLED, StageState.PENDING)),
    StageState.DONE: frozenset((StageState.OPEN, StageState.PENDING)),
    StageState.FAILED: frozenset((StageState.OPEN,)),
    StageState.CANCELLED: frozenset((StageState.OPEN,)),
}
"""Failed and cancelled open again by `retry` only.

open → pending, done → open: the artifact of an earlier stage is gone or damaged; that one is computed anew, then this one.
done → pending: its artifact was removed, or what it was computed from is not the same any more.
"""

UNIT_TRANSITIONS: dict[UnitState, frozenset[UnitState]] = {
    UnitState.READY: frozenset((UnitState.SENT, UnitState.CANCELLED)),
    UnitState.SENT: frozenset((UnitState.LEASED, UnitState.PARKED, UnitState.READY, UnitState.CANCELLED)),
    UnitState.LEASED: frozenset((UnitState.DONE, UnitState.FAILED, UnitState.READY, UnitState.PARKED, UnitState.CANCELLED)),
    UnitState.PARKED: frozenset((UnitState.READY, UnitState.CANCELLED)),
    UnitState.DONE: frozenset(),
    UnitState.FAILED: frozenset(),
    UnitState.CANCELLED: frozenset(),
}
"""leased → ready: the lease expired, the worker gave it back, or the error may pass (then after a pause)."""


@dataclass(frozen=True)
class StagePart:
    """One stage as it is declared when a job is made: its name and the queue its units go to."""

    name: str
    queue: str


@dataclass(frozen=True)
class JobError:
    """Why a job or a unit failed, as its owner is told.

    Attributes:
        code: `SaferError.code`, or `worker_died`, `internal`, `budget_exhausted`.
        retryable: whether the same request may succeed later.
    """

    code: str
    message: str
    hint: str = ""
    retryable: bool = False


@dataclass(frozen=True)
class Lease:
    """A unit held by a worker.

    Attributes:
        token: fencing token; every write names it, and a write under an older token changes nothing.
    """

    unit_id: int
    stage_id: int
    job_id: str
    project: str
    stage: str
    kind: UnitKind
    name: str
    token: int
    owner: str
    attempt: int


@dataclass(frozen=True)
class StageRecord:
    """One stage of a job.

    Attributes:
        outcome: `computed`, `cached` or `absent`, once done.
        done, total, unit: progress as the engine reports it, over all units.
        pace_done, pace_since: what was done, and when, where the present worker's pace began to be measured.
        cost: what it took (`safer_engine.cost.Cost`), once done.
    """

    id: int
    job_id: str
    ordinal: int
    name: str
    queue: str
    state: StageState
    key: str | None = None
    outcome: str | None = None
    content_digest: str | None = None
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    pace_done: float | None = None
    pace_since: datetime | None = None
    started: datetime | None = None
    finished: datetime | None = None
    cost: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobRecord:
    """One job as it is stored.

    Attributes:
        spec: the document as submitted (never contains a secret).
        inputs: role (`model`, `dataset`, `evaluation`, `corpus`, `base`, `labels`: the rubric; `u:<role>`: the upload) →
            content digest, once known; and what else is settled once for all stages: `<role>.revision`, `model.dtype`,
            `sae.dtype`.
        plan: what `prepare` expects of each stage (`service.jobs.outlook.JobPlan`, dumped); None before, and where nothing is.
        verdict: outcome of a policy, apart from the job's state; None with a reason in `verdict_reason`.
        gpu_seconds: spent so far over all attempts, against `gpu_seconds_budget`.
    """

    id: str
    project: str
    kind: JobKind
    state: JobState
    priority: int
    spec: dict[str, Any]
    created: datetime
    labels: dict[str, str] = field(default_factory=dict)
    callback_url: str | None = None
    idempotency_key: str | None = None
    body_digest: str = ""
    submitted_by: str = ""
    started: datetime | None = None
    finished: datetime | None = None
    cancel_requested: bool = False
    error: JobError | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    verdict_reason: str = "no policy was given"
    gpu_seconds: float = 0.0
    gpu_seconds_budget: float | None = None
    attempt: int = 1


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to a job, in order of `id`."""

    id: int
    job_id: str
    at: datetime
    kind: str
    stage: str | None
    data: dict[str, Any]
