"""Gates: verdicts on audits, judged by the service when the audit has ended.

A gate is pending until a process of the API takes it (`due`, by the database's clock), judges it and writes the decision, once:
by compare-and-set. Whatever cannot be judged is decided `inconclusive`, with an error that says why; never `pass`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from service.jobs.model import JobError, JobRecord

Verdict = Literal["pass", "fail", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "inconclusive")
CALLBACK = "callback"
AWAITED = "a gate waits for the end of the audit, or for its turn"
"""What a job says in place of a verdict while it has none and a gate is pending."""


class GateState(StrEnum):
    """Where a gate stands. `decided` is final, and always has a verdict."""

    PENDING = "pending"
    DECIDED = "decided"


class DeliveryState(StrEnum):
    """Where a delivery stands. waiting: for the decision. pending: to be sent, or sent again. The last two are final."""

    WAITING = "waiting"
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True)
class NewDelivery:
    """Someone to be told.

    Attributes:
        kind: who delivers it: the thread that takes this kind (`CALLBACK`: a POST to `target["url"]`).
        target: where to, in plain JSON; no secret, and no text of a dataset.
    """

    kind: str
    target: Mapping[str, Any]


@dataclass(frozen=True)
class NewGate:
    """A gate that was checked and may be stored.

    Attributes:
        policy: the whole policy (`safer_engine.gate.policy.Policy`, dumped); policy_digest: its `digest`.
        baseline: as it was asked for (an id, `label:NAME=VALUE`); baseline_job_id: the finished audit that it stood for then.
        deliveries: who is told of the decision.
        body_digest: of the request, so that an idempotency key used twice is known to mean the same.
        submitted_by: id of the API key.
    """

    policy: Mapping[str, Any]
    policy_name: str
    policy_digest: str
    baseline: str | None = None
    baseline_job_id: str | None = None
    deliveries: tuple[NewDelivery, ...] = ()
    idempotency_key: str | None = None
    body_digest: str = ""
    submitted_by: str = ""


@dataclass(frozen=True)
class GateRecord:
    """A gate as it is stored.

    Attributes:
        reason: of the verdict, in one sentence of names and figures; empty while pending.
        error: why nothing could be judged; None where it could.
    """

    id: str
    project: str
    job_id: str
    state: GateState
    policy_name: str
    policy_digest: str
    baseline: str | None
    baseline_job_id: str | None
    verdict: Verdict | None
    reason: str
    error: JobError | None
    submitted_by: str
    created: datetime
    decided: datetime | None


@dataclass(frozen=True)
class CreatedGate:
    """A stored gate, and whether this request stored it (or one before under the same key)."""

    gate: GateRecord
    created: bool


@dataclass(frozen=True)
class TakenGate:
    """A gate to judge now.

    Attributes:
        job: the audit, which has ended.
        attempts: how often it was taken, this time included.
        at: now, by the database's clock.
    """

    gate: GateRecord
    policy: dict[str, Any]
    job: JobRecord
    attempts: int
    at: datetime


@dataclass(frozen=True)
class Outcome:
    """What a gate came to.

    Attributes:
        decision: what `safer-audit gate --json` prints; None where nothing was judged.
        error: why nothing was judged.
    """

    verdict: Verdict
    reason: str
    decision: str | None = None
    error: JobError | None = None


@dataclass(frozen=True)
class GateQuery:
    """Which gates are listed; all conditions hold together, an empty one does not count."""

    states: tuple[GateState, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    job_id: str | None = None
    policy: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
