"""What callers give to the stores and get back, beside the records of `service.jobs.model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from service.jobs.model import JobKind, JobRecord, JobState, StagePart, UnitKind, UnitState

T = TypeVar("T")


@dataclass(frozen=True)
class NewJob:
    """A request that was checked and may be stored.

    Attributes:
        spec: the document as submitted; holds no secret.
        stages: every stage in order.
        body_digest: sha256 of the request, so that an idempotency key used twice is known to mean the same.
        submitted_by: id of the API key.
        inputs: role → digest where that is known already (uploads); the others are known once `prepare` is done.
        gpu_seconds_budget: at most the project's, which None takes.
    """

    kind: JobKind
    spec: Mapping[str, Any]
    stages: tuple[StagePart, ...]
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    callback_url: str | None = None
    idempotency_key: str | None = None
    body_digest: str = ""
    submitted_by: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    gpu_seconds_budget: float | None = None


@dataclass(frozen=True)
class Submitted:
    """A stored job, and whether this request stored it (or one before under the same key)."""

    job: JobRecord
    created: bool


@dataclass(frozen=True)
class JobQuery:
    """Which jobs are listed; all conditions hold together, an empty one does not count.

    Attributes:
        stage: name of the stage that is open.
        input_digest: content digest of a model or dataset the job uses.
        created_from, created_before: half-open interval of time.
    """

    states: tuple[JobState, ...] = ()
    kind: JobKind | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None
    input_digest: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some items, newest first, and the cursor of the page after (None: this was the last)."""

    items: tuple[T, ...]
    next: str | None


@dataclass(frozen=True)
class Finished:
    """What a worker says of a unit it has finished.

    Attributes:
        outcome: `computed`, `cached` (it was committed already) or `absent` (switched off).
        key, content_digest: of the committed artifact; None where the stage commits none.
        cost: `safer_engine.cost.Cost`, dumped.
        bytes: size of the artifact's payload.
        inputs: role → content digest, from the stage that resolves them; plan: what it expects of the others.
        figures: name of a figure of `service.infra.stage_figures` → its value for the artifact that was computed.
        rows: what became of a dataset's rows: `kept`, or a reason why they were dropped → how many.
    """

    outcome: Literal["computed", "cached", "absent"] = "computed"
    key: str | None = None
    content_digest: str | None = None
    cost: Mapping[str, Any] | None = None
    bytes: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Beat:
    """What a worker learns when it renews its lease.

    Attributes:
        held: False: the unit is another's or nobody's; stop and write nothing more.
        cancel: somebody asked to cancel the job; stop and give the unit back.
        over_budget: the job's GPU seconds are used up; stop and fail the unit with `budget_exhausted`.
    """

    held: bool
    cancel: bool = False
    over_budget: bool = False


@dataclass(frozen=True)
class Message:
    """A unit and the queue its message goes to."""

    unit_id: int
    queue: str


@dataclass(frozen=True)
class Reconciled:
    """What one round of reconciliation found.

    Attributes:
        resent: units whose message seems lost; the caller sends them again.
        expired: units whose worker is gone and that may be handed out again.
        poisoned: units that failed because they lost too many workers.
        released: units parked on a key that nobody computes any more.
    """

    resent: tuple[Message, ...] = ()
    expired: tuple[int, ...] = ()
    poisoned: tuple[int, ...] = ()
    released: tuple[int, ...] = ()

    @property
    def resent_unit_ids(self) -> tuple[int, ...]:
        """Ids of `resent`."""
        return tuple(message.unit_id for message in self.resent)


@dataclass(frozen=True)
class QueueFacts:
    """How one queue stands.

    Attributes:
        ready, sent, leased, parked: units in these states; depth (ready + sent + leased) is what can keep workers busy.
        oldest_seconds: age of the unit that has waited longest among ready and sent; 0 where none waits.
    """

    queue: str
    ready: int = 0
    sent: int = 0
    leased: int = 0
    parked: int = 0
    oldest_seconds: float = 0.0

    @property
    def depth(self) -> int:
        """Work that waits or runs."""
        return self.ready + self.sent + self.leased


@dataclass(frozen=True)
class UnitRecord:
    """One unit as it is stored, for operators."""

    id: int
    job_id: str
    stage: str
    queue: str
    kind: UnitKind
    name: str
    state: UnitState
    owner: str | None
    token: int
    attempts: int
    failures: int
    ready_at: datetime
    sent_at: datetime | None
    lease_expires: datetime | None


@dataclass(frozen=True)
class Usage:
    """What a project uses of its limits."""

    running: int
    queued: int
    bytes: int
