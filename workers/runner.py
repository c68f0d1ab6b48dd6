"""From a unit's id to its end: lease it, compute it in a child, say how it ended. Read this first.

The parent process holds the lease, and nothing else: what a child makes is committed under its cache key, by whoever comes
first. So a parent or child may be killed at any moment, and a unit be computed twice, without harm.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine

from safer_engine.artifacts import ABSENT
from safer_engine.errors import ArtifactError, SaferError
from safer_engine.publishing import DISK_HINT, is_full
from service.errors import LeaseLost, Unavailable
from service.infra.logs import log_context
from service.infra.metrics import WorkerMetrics
from service.infra.settings import Settings
from service.infra.stores import ServiceStore, Stores
from service.jobs.job_log import JobLogs
from service.jobs.model import FINAL_JOB_STATES, JobError, Lease, UnitKind
from service.jobs.queue import Sender
from service.jobs.requests import Finished
from service.jobs.store import JobStore
from workers.inputs import names_of
from workers.lease import Course, LeaseKeeper
from workers.order import Order, lost_artifact, make_order, parts_of
from workers.supervisor import Ended, Nursery, Reason

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_UNRELIABLE = "the artifact store loses or damages files: tell the operator, and retry the job when that is mended"
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Taken(StrEnum):
    """What became of a unit that was offered."""

    NOTHING = "nothing"
    DONE = "done"
    PARKED = "parked"
    RETURNED = "returned"
    FAILED = "failed"


@dataclass(frozen=True)
class Bench:
    """What a worker works with."""

    settings: Settings
    engine: Engine
    jobs: JobStore
    stores: Stores
    sender: Sender
    metrics: WorkerMetrics


def open_bench(settings: Settings, engine: Engine, registry: CollectorRegistry, listens_to: Sequence[str] = ()) -> Bench:
    """Everything a worker works with; connects to nothing yet."""
    metrics = WorkerMetrics(registry, listens_to)
    stores = Stores(settings, engine, metrics.artifacts.observe)
    return Bench(settings, engine, JobStore(engine, settings), stores, Sender(settings), metrics)


class Runner:
    """Takes units, one at a time.

    Attributes:
        owner: how this worker is named in leases.
    """

    def __init__(self, bench: Bench, nursery: Nursery) -> None:
        self._bench = bench
        self._settings = bench.settings
        self._jobs = bench.jobs
        self._nursery = nursery
        self._logs = JobLogs(bench.engine, bench.jobs, bench.stores)
        self._names = names_of(bench.settings)
        self._stopping = threading.Event()
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    @property
    def stopping(self) -> bool:
        """Whether no more units are taken."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Take no more units; the one at hand is given back at its next checkpoint."""
        self._stopping.set()

    def take(self, unit_id: int) -> Taken:
        """Do what a message asks for, if it is still to be done. Raises nothing that is to be expected."""
        try:
            lease = None if self.stopping else self._jobs.lease(unit_id, self.owner)
        except Unavailable as error:
            _LOG.warning("unit %d is left for later: %s", unit_id, error.message)
            return Taken.NOTHING
        if lease is None:
            return Taken.NOTHING
        self._bench.metrics.free(False)
        with log_context(audit_id=lease.job_id, stage=lease.stage), LeaseKeeper(self._jobs, lease, self._settings) as keeper:
            try:
                taken = self._attempted(lease, keeper)
                _LOG.info("unit %d: %s", unit_id, taken)
                return taken
            except LeaseLost:
                _LOG.warning("unit %d was given to another worker", unit_id)
                return Taken.RETURNED
            finally:
                self._bench.metrics.free(True)
                self._bench.sender.wake()
                self._write_log(lease)

    def _attempted(self, lease: Lease, keeper: LeaseKeeper) -> Taken:
        """Work on a leased unit and say how it ended. Raises LeaseLost."""
        try:
            return self._work(lease, keeper)
        except LeaseLost:
            raise
        except Unavailable as error:  # of the database or the artifact store
            _LOG.warning("given back: %s", error.message)
            self._settle(lambda: self._jobs.give_back(lease, self._settings.retry_seconds))
            return Taken.RETURNED
        except SaferError as error:
            return self._failed(lease, JobError(error.code, error.message, error.hint, error.retryable), lost_artifact(error))
        except Exception as error:
            _LOG.exception("an unexpected error")
            return self._fail(lease, _unexpected(error))

    def _work(self, lease: Lease, keeper: LeaseKeeper) -> Taken:
        store = self._bench.stores.project(lease.project)
        order = make_order(lease, self._jobs.job(lease.job_id), self._jobs.stages(lease.job_id), store)
        if order.key is not None:
            if (known := _known(store, order)) is not None:
                return self._finish(lease, known)
            if lease.kind is not UnitKind.PART and not self._jobs.claim_key(lease, order.key):
                return Taken.PARKED
            if (known := _known(store, order)) is not None:  # committed while we asked
                return self._finish(lease, known)
        parts: tuple[str, ...] = ()
        if lease.kind is UnitKind.WHOLE and self._settings.share_stages:
            parts = parts_of(order, store)
        shared = len(parts) > 1
        course = Course(self._jobs, lease, self._bench.metrics.artifacts.observe, quiet=shared)
        ended = self._nursery.run(replace(order, part=parts[0]) if shared else order, course, lambda: self._reason(keeper))
        course.close()
        if ended.how == "finished" and shared and ended.reason is not Reason.LOST:
            self._settle(lambda: self._jobs.split(lease, parts[1:]))
            return Taken.DONE
        return self._ended(lease, order, ended)

    def _reason(self, keeper: LeaseKeeper) -> Reason | None:
        return keeper.reason or (Reason.SHUTDOWN if self.stopping else None)

    def _ended(self, lease: Lease, order: Order, ended: Ended) -> Taken:
        if ended.reason is Reason.LOST:
            raise LeaseLost(f"the lease of unit {lease.unit_id} is no longer held")
        if ended.how == "finished":
            return self._finish(lease, _finished(order, ended.facts))
        if ended.reason is Reason.BUDGET:
            return self._fail(lease, JobError("budget_exhausted", "the job's GPU time is used up", "ask for a larger budget"))
        if ended.reason is not None:  # asked to stop, and did, or had to be made to
            self._settle(lambda: self._jobs.give_back(lease))
            return Taken.RETURNED
        error = _error(ended, self._settings)
        if error.code == Unavailable.code:
            raise Unavailable(error.message, error.hint)
        return self._failed(lease, error, ended.facts.get("lost"))

    def _finish(self, lease: Lease, finished: Finished) -> Taken:
        self._settle(lambda: self._jobs.finish(lease, finished))
        return Taken.DONE

    def _failed(self, lease: Lease, error: JobError, lost: Sequence[str] | None) -> Taken:
        """Say that a unit failed; where it is for an artifact that an earlier stage made, that one is computed anew."""
        if lost is None:
            return self._fail(lease, error)
        stage, key = lost
        with suppress(Unavailable):  # then it is found out once more
            if key:
                self._bench.stores.project(lease.project).set_aside(stage, key)
        error = replace(error, message=self._names(error.message), hint=_UNRELIABLE)
        if self._settle(lambda: self._jobs.compute_anew(lease, stage, error)):
            _LOG.warning("%s; it is computed anew", error.message)
            return Taken.RETURNED
        _LOG.warning("failed with %s: %s", error.code, error.message)
        return Taken.FAILED

    def _fail(self, lease: Lease, error: JobError) -> Taken:
        error = replace(error, message=self._names(error.message), hint=self._names(error.hint))
        _LOG.warning("failed with %s: %s", error.code, error.message)
        self._settle(lambda: self._jobs.fail(lease, error))
        return Taken.FAILED

    def _settle(self, write: Callable[[], T]) -> T:
        """Write how a unit ended, however long the database is away; when it is written already, LeaseLost says so."""
        pause, asked_at = _FIRST_PAUSE, None
        while True:
            try:
                return write()
            except Unavailable as error:
                _LOG.warning("the end of a unit waits to be written: %s", error.message)
                if self.stopping:
                    asked_at = asked_at or time.monotonic()
                    if time.monotonic() - asked_at > self._settings.terminate_seconds:
                        raise LeaseLost("this worker stops, and the database is away") from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _write_log(self, lease: Lease) -> None:
        """Commit the job's log where this was its end; the dispatcher does it where this fails."""
        with suppress(SaferError):
            job = self._jobs.job(lease.job_id)
            if job.state in FINAL_JOB_STATES:
                self._logs.write(job)


def _known(store: ServiceStore, order: Order) -> Finished | None:
    """The outcome, where the artifact is committed already."""
    if order.key is None or not store.has(order.stage, order.key):
        return None
    try:
        manifest = store.manifest(order.stage, order.key)
    except ArtifactError as error:  # damaged: the child sets it aside and computes it anew
        _LOG.warning("%s", error.message)
        return None
    outcome: Literal["cached", "absent"] = "absent" if manifest.artifact == ABSENT else "cached"
    size = sum(entry.size for entry in manifest.files.values())
    cost = manifest.cost.model_dump(mode="json")
    return Finished(outcome, order.key, manifest.content_digest, cost, size)


def _finished(order: Order, facts: dict[str, object]) -> Finished:
    """What a child said at its end. Raises ArtifactError when it speaks of another key."""
    known = ("outcome", "key", "content_digest", "cost", "bytes", "inputs", "plan", "figures", "rows")
    told = {name: facts[name] for name in known if name in facts}
    if order.key is not None and not order.part and told.get("key") != order.key:
        raise ArtifactError("a child committed another cache key than it was asked for", "restart the worker")
    return Finished(**told)  # type: ignore[arg-type]


def _unexpected(error: Exception) -> JobError:
    if is_full(error):
        return JobError("resource_exhausted", "a disk of the worker is full", DISK_HINT, True)
    return JobError("internal", f"unexpected {type(error).__name__} in the worker", "", True)


def _error(ended: Ended, settings: Settings) -> JobError:
    """Why a child failed."""
    if ended.how == "failed":
        facts = ended.facts
        return JobError(str(facts["code"]), str(facts["message"]), str(facts["hint"]), bool(facts["retryable"]))
    if ended.how == "memory":
        limit = settings.worker_memory_bytes
        return JobError("resource_exhausted", f"the stage took more memory than the {limit} bytes it may", _LESS, True)
    code = ended.code or 0
    how = f"was killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"ended with exit code {code}"
    return JobError("worker_died", f"the stage's process {how}", _LESS if code == -signal.SIGKILL else "", True)


_LESS = "often too little memory: smaller runtime.batch_tokens or runtime.shard_pairs, or a larger machine"
