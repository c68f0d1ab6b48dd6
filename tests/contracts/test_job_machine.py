"""Whatever clients, workers and accidents do in whatever order: no job is lost, none is done twice, none waits for ever."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import select

from service.errors import Conflict, LeaseLost
from service.jobs.clock import utc_after
from service.jobs.database import reading
from service.jobs.model import FINAL_JOB_STATES, FINAL_UNIT_STATES, JobError, JobState, Lease, StageState, UnitKind
from service.jobs.requests import Finished
from service.jobs.tables import jobs, key_locks, stages, units
from tests.helpers.databases import database, memory_folder, settings_for

FINAL = {state.value for state in FINAL_JOB_STATES}
OVER = {state.value for state in FINAL_UNIT_STATES}
Seen = dict[str, list[dict[str, Any]]]
LEFT = ("ready", "sent", "leased", "parked")


class Jobs(RuleBasedStateMachine):
    """Three workers, few keys, every accident."""

    made = Bundle("made")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        folder = self.opened.enter_context(memory_folder())
        self.db = self.opened.enter_context(database(settings_for(folder, max_failures=2, retry_seconds=0.0)))
        self.tokens: dict[int, int] = {}
        self.ended: dict[str, tuple[Any, ...]] = {}

    def teardown(self) -> None:
        """Let everything run to its end: nothing may be left waiting."""
        for _ in range(200):
            if not any(count for state, count in self.db.store.job_counts().items() if state not in FINAL_JOB_STATES):
                break
            self.hand_out()
            self.message_to_nowhere()
            self.all_workers_die()
            for unit in self._units("sent"):
                lease = self.db.store.lease(unit["id"], "last")
                if lease is not None and self.db.store.claim_key(lease, "last"):
                    self.db.store.finish(lease, Finished(key="last"))
        else:
            raise AssertionError(f"waits for ever: {self._rows(units)}")
        self.nothing_is_lost_or_doubled()
        self.opened.close()

    @rule(target=made, lengths=st.integers(1, 3), priority=st.integers(0, 1), budget=st.sampled_from([None, 1e9]))
    def submit(self, lengths: int, priority: int, budget: float | None) -> str:
        names = [f"stage-{n}" + ("@gpu" if n == 1 else "") for n in range(lengths)]
        return self.db.submit(*names, priority=priority, gpu_seconds_budget=budget).id

    @rule()
    def hand_out(self) -> None:
        for queue in ("cpu", "gpu"):
            for unit in self.db.store.ready_units(queue, 3):
                assert self.db.store.mark_sent(unit)

    @rule(target=leases, worker=st.sampled_from(["w1", "w2", "w3"]), messages=st.integers(1, 2))
    def take(self, worker: str, messages: int) -> Any:
        taken = []
        for unit in self._units("sent")[:1]:
            found = [self.db.store.lease(unit["id"], worker) for _ in range(messages)]
            assert found[1:] == [None] * (messages - 1)
            taken += [lease for lease in found[:1] if lease is not None]
        for lease in taken:
            assert lease.token > self.tokens.get(lease.unit_id, 0)
            self.tokens[lease.unit_id] = lease.token
        return multiple(*taken)

    @rule(lease=leases, key=st.sampled_from(["k1", "k2"]))
    def claim(self, lease: Lease, key: str) -> None:
        self._write(lease, lambda: self.db.store.claim_key(lease, key))

    @rule(lease=leases, key=st.sampled_from(["k1", "k2"]))
    def finish(self, lease: Lease, key: str) -> None:
        self._write(lease, lambda: self.db.store.finish(lease, Finished(key=key)))

    @rule(lease=leases, retryable=st.booleans())
    def fail(self, lease: Lease, retryable: bool) -> None:
        self._write(lease, lambda: self.db.store.fail(lease, JobError("x", "y", retryable=retryable)))

    @rule(lease=leases, earlier=st.integers(0, 2))
    def miss(self, lease: Lease, earlier: int) -> None:
        self._write(lease, lambda: self.db.store.compute_anew(lease, f"stage-{earlier}", JobError("x", "y")))

    @rule(lease=leases)
    def give_back(self, lease: Lease) -> None:
        self._write(lease, lambda: self.db.store.give_back(lease))

    @rule(lease=leases, parts=st.integers(1, 3))
    def split(self, lease: Lease, parts: int) -> None:
        if lease.kind is UnitKind.WHOLE:
            self._write(lease, lambda: self.db.store.split(lease, [f"part-{n}" for n in range(parts)]))

    @rule(lease=leases)
    def beat(self, lease: Lease) -> None:
        held = self._held(lease)
        beat = self.db.store.heartbeat(lease)
        assert beat.held == held
        if held:
            cancel = self._row(jobs, jobs.c.id == lease.job_id)["cancel_requested"]
            assert beat.cancel == cancel

    @rule(lease=leases)
    def worker_dies(self, lease: Lease) -> None:
        self.db.change(units, (units.c.id == lease.unit_id) & (units.c.state == "leased"), lease_expires=utc_after(-1.0))
        self.db.store.reconcile()
        assert not self.db.store.heartbeat(lease).held

    @rule()
    def all_workers_die(self) -> None:
        self.db.change(units, units.c.state == "leased", lease_expires=utc_after(-1.0))
        self.db.store.reconcile()
        assert not self._units("leased")

    @rule()
    def message_to_nowhere(self) -> None:
        self.db.change(units, units.c.state == "sent", sent_at=utc_after(-1e4))
        sent = {unit["id"] for unit in self._units("sent")}
        assert set(self.db.store.reconcile().resent_unit_ids) == sent

    @rule(job=made)
    def cancel(self, job: str) -> None:
        try:
            self.db.store.request_cancel("default", job, "a")
        except Conflict:
            assert self.db.store.job(job).state in (JobState.SUCCEEDED, JobState.FAILED)
        assert not any(unit["state"] in ("ready", "sent", "parked") for unit in self._units() if unit["job_id"] == job)

    @rule(job=made)
    def retry(self, job: str) -> None:
        done = [stage.name for stage in self.db.store.stages(job) if stage.state is StageState.DONE]
        try:
            again = self.db.store.retry("default", job, "a")
        except Conflict:
            assert self.db.store.job(job).state not in (JobState.FAILED, JobState.CANCELLED)
            return
        self.ended.pop(job, None)
        assert again.state is JobState.QUEUED
        assert [stage.name for stage in self.db.store.stages(job) if stage.state is StageState.DONE] == done

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """Looked at after every step, in one snapshot."""
        with reading(self.db.engine) as connection:
            seen = {
                table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
                for table in (jobs, stages, units, key_locks)
            }
        self._every_live_job_has_a_way_forward(seen)
        self._a_key_is_held_by_one_open_stage(seen)
        self._what_has_ended_never_changes(seen)

    def _every_live_job_has_a_way_forward(self, seen: Seen) -> None:
        """One stage is open; its units wait or run, and what is parked waits for a key that is held."""
        locks = {(lock["stage"], lock["key"]) for lock in seen["key_locks"]}
        for job in seen["jobs"]:
            opened = [stage for stage in seen["stages"] if stage["job_id"] == job["id"] and stage["state"] == "open"]
            live = [unit for unit in seen["units"] if unit["job_id"] == job["id"] and unit["state"] in LEFT]
            if job["state"] in FINAL:
                assert not live
                assert not opened
                continue
            (stage,) = opened
            assert live
            assert {unit["stage_id"] for unit in live} == {stage["id"]}
            assert {unit["kind"] for unit in live} == {"part"} or len(live) == 1
            assert all((stage["name"], unit["key"]) in locks for unit in live if unit["state"] == "parked")

    def _a_key_is_held_by_one_open_stage(self, seen: Seen) -> None:
        opened = {stage["id"] for stage in seen["stages"] if stage["state"] == "open"}
        owners = {unit["id"]: unit["stage_id"] for unit in seen["units"]}
        assert all(owners[lock["unit_id"]] in opened for lock in seen["key_locks"])

    def _what_has_ended_never_changes(self, seen: Seen) -> None:
        for job in seen["jobs"]:
            if job["state"] in FINAL:
                now = tuple(job.values())
                assert self.ended.setdefault(job["id"], now) == now
            else:
                assert job["id"] not in self.ended

    def _write(self, lease: Lease, write: Any) -> None:
        """A write under a lease does something exactly when the lease is held."""
        held = self._held(lease)
        try:
            write()
            assert held
        except LeaseLost:
            assert not held

    def _held(self, lease: Lease) -> bool:
        unit = self._row(units, units.c.id == lease.unit_id)
        return unit is not None and unit["state"] == "leased" and unit["token"] == lease.token

    def _units(self, state: str | None = None) -> list[Any]:
        return [unit for unit in self._rows(units) if state is None or unit["state"] == state]

    def _rows(self, table: Any) -> list[Any]:
        with reading(self.db.engine) as connection:
            return [dict(row) for row in connection.execute(select(table)).mappings()]

    def _row(self, table: Any, where: Any) -> Any:
        with reading(self.db.engine) as connection:
            return connection.execute(select(table).where(where)).mappings().one_or_none()


def run(examples: int, steps: int) -> None:
    """Try so many sequences of so many steps."""
    checks = list(HealthCheck)
    tried = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(Jobs, settings=tried)


def test_a_few_sequences_of_events() -> None:
    run(examples=6, steps=20)


@pytest.mark.full
def test_many_sequences_of_events() -> None:
    run(examples=40, steps=40)
