"""How long a job will still compute, from what `prepare` planned, what is done, and how long others of the project took.

Waiting for workers is not counted: nobody knows it. Where something is not known of any stage to come, nothing is said.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, select

from service.jobs.clock import UtcNow
from service.jobs.database import reading
from service.jobs.model import JobRecord, JobState, StageRecord, StageState
from service.jobs.tables import jobs, stages

RECENT_JOBS = 50
_NEAREST = 5
_ALIKE = 4.0
_KEPT_SECONDS = 15.0
_ENOUGH_SECONDS, _ENOUGH_SHARE = 3.0, 0.05
_LONG_SECONDS, _LITTLE_SHARE = 30.0, 0.01
_TRUSTED_SHARE = 0.3
_LEAST_LEFT = 0.1
_FASTEST_SLOWEST = (0.5, 3.0)
_UNUSUAL, _GRACE_SECONDS = 3.0, 60.0


@dataclass(frozen=True)
class StageOutlook:
    """What `prepare` expects of one stage.

    Attributes:
        cached: its artifact is there already.
        work: size of what is to be computed, in the stage's own unit; None where not known.
        seconds: by the rates of the machine that prepared, where it serves the stage's queue; None elsewhere.
    """

    cached: bool
    work: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class JobPlan:
    """What `prepare` found out about the stages after it.

    Attributes:
        size: of the inputs, for the machine that computes a stage to estimate it anew (`safer_engine.planning.AuditSize`).
    """

    size: Mapping[str, Any]
    stages: Mapping[str, StageOutlook] = field(default_factory=dict)

    def dumped(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def loaded(cls, document: Mapping[str, Any]) -> JobPlan:
        """What `dumped` gave."""
        return cls(document["size"], {name: StageOutlook(**each) for name, each in document["stages"].items()})


@dataclass(frozen=True)
class PastStage:
    """A stage of a job that succeeded: its work as planned, and the seconds from its first lease to its end."""

    name: str
    work: float | None
    seconds: float


class Outlook:
    """Looks ahead. What others took is looked up four times a minute at most. Safe for threads; may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[float, tuple[PastStage, ...]]] = {}
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """By the database's clock, which all times of jobs are of."""
        with reading(self._engine) as connection:
            at: datetime = connection.execute(select(UtcNow())).scalar_one()
        return at

    def seconds_left(self, job: JobRecord, steps: Sequence[StageRecord], now: datetime) -> float | None:
        """Seconds that a running job will still compute; None where not known."""
        if job.state is not JobState.RUNNING or job.cancel_requested:
            return None
        return seconds_left(job.plan, steps, self._past(job.project), now)

    def _past(self, project: str) -> tuple[PastStage, ...]:
        with self._lock:
            at, found = self._known.get(project, (-math.inf, ()))
        if time.monotonic() - at > _KEPT_SECONDS:
            found = past_stages(self._engine, project)
            with self._lock:
                self._known[project] = (time.monotonic(), found)
        return found


def past_stages(engine: Engine, project: str) -> tuple[PastStage, ...]:
    """What was computed for the last jobs of a project that succeeded."""
    done = (jobs.c.project == project) & (jobs.c.state == JobState.SUCCEEDED) & jobs.c.deleted.is_(None)
    recent = select(jobs.c.id, jobs.c.plan).where(done).order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(RECENT_JOBS)
    with reading(engine) as connection:
        plans = {row.id: row.plan for row in connection.execute(recent)}
        timed = stages.c.started.is_not(None) & stages.c.finished.is_not(None) & (stages.c.outcome != "cached")
        rows = connection.execute(
            select(stages.c.job_id, stages.c.name, stages.c.started, stages.c.finished).where(
                stages.c.job_id.in_(list(plans)), timed
            )
        ).all()
    return tuple(
        PastStage(row.name, _planned_work(plans[row.job_id], row.name), (row.finished - row.started).total_seconds())
        for row in rows
    )


def seconds_left(
    plan: Mapping[str, Any] | None, steps: Sequence[StageRecord], past: Sequence[PastStage], now: datetime
) -> float | None:  # fmt: skip
    """Seconds for the rest of the open stage and for those after it, one after another; None where one is not known.

    A job that has been slower or quicker than usual so far is expected to stay so.
    """
    expected = JobPlan.loaded(plan).stages if plan else {}
    usual = {step.name: usual_seconds(step.name, expected.get(step.name), past) for step in steps}
    pace = _own_pace(steps, usual)
    total = 0.0
    for step in steps:
        if step.state is StageState.DONE:
            continue
        seconds = usual[step.name]
        mine = None if seconds is None else pace * seconds
        left = mine if step.state is StageState.PENDING else rest_of(step, mine, now)
        if left is None:
            return None
        total += left
    return round(total, 1)


def _own_pace(steps: Sequence[StageRecord], usual: Mapping[str, float | None]) -> float:
    """How long the stages that were computed took, in terms of what is usual; 1 where that is too little to tell."""
    took = as_usual = 0.0
    for step in steps:
        seconds = usual[step.name]
        if step.state is StageState.DONE and step.outcome == "computed" and seconds and step.started and step.finished:
            took += (step.finished - step.started).total_seconds()
            as_usual += seconds
    return min(_FASTEST_SLOWEST[1], max(_FASTEST_SLOWEST[0], took / as_usual)) if as_usual >= _ENOUGH_SECONDS else 1.0


def usual_seconds(name: str, expected: StageOutlook | None, past: Sequence[PastStage]) -> float | None:
    """What a stage takes: nothing where it is cached, the median of those of like size, else what was planned."""
    if expected is None:
        return None
    if expected.cached:
        return 0.0
    alike = sorted(
        (distance, each.seconds)
        for each in past
        if each.name == name and (distance := _distance(each.work, expected.work)) <= math.log(_ALIKE)
    )
    return statistics.median(seconds for _, seconds in alike[:_NEAREST]) if alike else expected.seconds


def rest_of(step: StageRecord, usual: float | None, now: datetime) -> float | None:
    """Seconds left of an open stage: as usual at first, then more and more by its own pace; None where it is far from usual."""
    share = min(1.0, step.done / step.total) if step.total > 0 else 0.0
    by_pace, trust = _by_pace(step, now)
    if usual is None:
        return by_pace
    elapsed = (now - step.started).total_seconds() if step.started else 0.0
    if by_pace is None and elapsed > _UNUSUAL * usual + _GRACE_SECONDS:
        return None
    as_usual = usual * (1 - share) if share > 0 else max(usual - elapsed, _LEAST_LEFT * usual)
    return as_usual if by_pace is None else trust * by_pace + (1 - trust) * as_usual


def _by_pace(step: StageRecord, now: datetime) -> tuple[float | None, float]:
    """Seconds left at the pace of the worker that is at it, and how far that is to be trusted, in [0, 1]."""
    if step.pace_since is None or step.pace_done is None or step.total <= 0:
        return None, 0.0
    seconds, done = (now - step.pace_since).total_seconds(), step.done - step.pace_done
    share = done / step.total
    needed = _LITTLE_SHARE if seconds >= _LONG_SECONDS else _ENOUGH_SHARE
    if seconds < _ENOUGH_SECONDS or share < needed:
        return None, 0.0
    return max(0.0, step.total - step.done) * seconds / done, min(1.0, share / _TRUSTED_SHARE)


def _distance(one: float | None, other: float | None) -> float:
    """How unlike two sizes are, as a log-ratio; infinite where one is not known."""
    if one is None or other is None:
        return math.inf
    if one <= 0 or other <= 0:
        return 0.0 if one == other else math.inf
    return abs(math.log(one / other))


def _planned_work(plan: Mapping[str, Any] | None, stage: str) -> float | None:
    work = ((plan or {}).get("stages") or {}).get(stage, {}).get("work")
    return None if work is None else float(work)
