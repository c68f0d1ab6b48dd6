"""Leases, keys, parts, failures: what workers see of units, on every database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import LeaseLost
from service.jobs.clock import utc_after
from service.jobs.model import JobError, JobState, Lease, StageState, UnitKind, UnitState
from service.jobs.requests import Beat, Finished
from service.jobs.tables import stages, units
from tests.helpers.databases import Database

FATAL = JobError("model_refused", "the head is newly made", "train it first")
PASSING = JobError("labeller_error", "the endpoint was away", retryable=True)
KEY = "k" * 64


def states(db: Database, job_id: str) -> list[str]:
    return [unit.state for unit in db.store.units(job_id)]


def test_a_job_walks_its_stages_to_the_end(db: Database) -> None:
    job = db.submit("prepare", "pairs", "activations@gpu")
    prepare = db.take()
    assert (prepare.stage, prepare.kind, prepare.project, prepare.token) == ("prepare", UnitKind.WHOLE, "default", 1)
    db.store.progress(prepare, 3, 10, "files")
    first, *_ = db.store.stages(job.id)
    assert (first.done, first.total, first.unit) == (3.0, 10.0, "files")
    db.store.finish(prepare, Finished(inputs={"model": "m", "dataset": "d"}))
    running = db.get(job)
    assert (running.state, running.inputs) == (JobState.RUNNING, {"model": "m", "dataset": "d"})
    assert [found.id for found in db.store.jobs_of_input("default", "d")] == [job.id]
    pairs = db.take()
    assert db.store.claim_key(pairs, KEY)
    db.store.finish(pairs, Finished("computed", KEY, "c" * 64, {"seconds": 1.5}, 123))
    db.store.finish(db.take("gpu"), Finished("cached", "a" * 64, "b" * 64))
    done = db.get(job)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    assert done.started is not None
    assert done.finished is not None
    assert done.finished >= done.started >= done.created
    second = db.store.stages(job.id)[1]
    assert (second.state, second.outcome, second.key, second.content_digest) == (StageState.DONE, "computed", KEY, "c" * 64)
    assert second.cost == {"seconds": 1.5}
    assert db.store.ready_units("cpu", 9) == db.store.ready_units("gpu", 9) == ()


def test_a_message_leases_once_whoever_asks_and_however_often(db: Database) -> None:
    db.submit()
    (unit_id,) = db.store.ready_units("cpu", 5)
    assert db.store.lease(unit_id, "early") is None
    assert db.store.mark_sent(unit_id)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: db.store.lease(unit_id, f"worker-{n}"), range(12)))
    (won,) = [lease for lease in found if lease is not None]
    assert won.token == 1
    assert db.store.lease(unit_id, "late") is None
    db.store.finish(won, Finished())
    assert db.store.lease(unit_id, "late") is None
    assert db.store.lease(10**9, "nobody") is None


def test_a_lease_that_was_lost_can_write_nothing(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    old = db.take(owner="old")
    db.run_out(old)
    assert db.store.reconcile().expired == (old.unit_id,)
    new = db.take(owner="new")
    assert new.unit_id == old.unit_id
    assert new.token > old.token
    assert db.store.heartbeat(old) == Beat(held=False)
    before = db.store.stages(job.id), db.store.units(job.id), db.get(job)
    for write in (
        lambda: db.store.progress(old, 1, 2, "pairs"),
        lambda: db.store.claim_key(old, KEY),
        lambda: db.store.split(old, ["a"]),
        lambda: db.store.finish(old, Finished()),
        lambda: db.store.give_back(old),
        lambda: db.store.fail(old, FATAL),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert (db.store.stages(job.id), db.store.units(job.id), db.get(job)) == before
    db.store.finish(new, Finished())


def test_a_late_heartbeat_keeps_a_lease_that_nobody_took(db: Database) -> None:
    db.submit()
    lease = db.take()
    db.run_out(lease)
    assert db.store.heartbeat(lease).held
    assert db.store.reconcile().expired == ()


def test_a_unit_that_loses_its_workers_fails_its_job(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    tokens = []
    for left in (2, 1, 0):
        lease = db.take()
        tokens.append(lease.token)
        db.run_out(lease)
        found = db.store.reconcile()
        assert (found.expired, found.poisoned) == (((lease.unit_id,), ()) if left else ((), (lease.unit_id,)))
    assert tokens == [1, 2, 3]
    failed = db.get(job)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error.code == "worker_died"
    assert "3 times" in failed.error.message
    assert failed.error.hint
    assert db.store.facts().lease_expired == 3  # type: ignore[union-attr]


def test_an_error_that_may_pass_is_tried_again_after_a_pause(db: Database) -> None:
    job = db.submit()
    for tried in (1, 2):
        lease = db.take()
        assert lease.attempt == tried
        db.store.fail(lease, PASSING)
        assert db.store.ready_units("cpu", 5) == ()
        assert not db.store.mark_sent(lease.unit_id)
        assert db.get(job).state is JobState.RUNNING
        db.now_ready()
    db.store.fail(db.take(), PASSING)
    assert db.get(job).error == PASSING
    pauses = [e.data["in_seconds"] for e in db.store.events(job.id) if e.data.get("state") == "retrying"]
    assert pauses == [15.0, 30.0]


def test_an_error_that_cannot_pass_fails_the_job_at_once(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    db.store.fail(db.take(), FATAL)
    assert db.get(job).error == FATAL
    assert [s.state for s in db.store.stages(job.id)] == [StageState.FAILED, StageState.PENDING]


def test_giving_back_costs_nothing(db: Database) -> None:
    job = db.submit()
    for _ in range(5):
        db.store.give_back(db.take())
    db.store.give_back(db.take(), delay=60.0)
    assert db.store.ready_units("cpu", 5) == ()
    assert (db.store.units(job.id)[0].failures, db.get(job).state) == (0, JobState.RUNNING)


def test_the_same_key_is_computed_once_and_the_other_waits_unleased(db: Database) -> None:
    first, second = db.submit("pairs", "sae"), db.submit("pairs")
    one, two = db.take(), db.take(owner="worker-2")
    assert {one.job_id, two.job_id} == {first.id, second.id}
    assert db.store.claim_key(one, KEY)
    assert db.store.claim_key(one, KEY)
    assert not db.store.claim_key(two, KEY)
    assert states(db, two.job_id) == [UnitState.PARKED]
    assert not db.store.heartbeat(two).held
    assert db.store.reconcile().released == ()
    db.store.finish(one, Finished(key=KEY))
    assert states(db, two.job_id) == [UnitState.READY]
    again = next(lease for lease in (db.take(), db.take()) if lease.job_id == two.job_id)
    assert again.token > two.token
    assert db.store.claim_key(again, KEY)
    db.store.finish(again, Finished("cached", KEY))


@pytest.mark.parametrize("how", ["fail", "give_back", "expire", "cancel", "retry_later"])
def test_a_key_is_given_up_however_its_unit_ends(db: Database, how: str) -> None:
    db.submit("pairs")
    holder = db.take()
    other = db.submit("pairs")
    waiter = db.take()
    assert db.store.claim_key(holder, KEY)
    assert not db.store.claim_key(waiter, KEY)
    if how == "fail":
        db.store.fail(holder, FATAL)
    elif how == "retry_later":
        db.store.fail(holder, PASSING)
    elif how == "give_back":
        db.store.give_back(holder)
    elif how == "expire":
        db.run_out(holder)
        db.store.reconcile()
    else:
        db.store.request_cancel("default", holder.job_id, "a")
        assert states(db, other.id) == [UnitState.PARKED]
        db.store.give_back(holder)
    assert states(db, other.id) == [UnitState.READY]


def test_projects_share_no_keys(db: Database) -> None:
    from service.jobs.access import AccessStore

    AccessStore(db.engine, db.settings).ensure_project("other")
    db.submit("pairs")
    db.submit("pairs", project="other")
    one, two = db.take(), db.take()
    assert {one.project, two.project} == {"default", "other"}
    assert db.store.claim_key(one, KEY)
    assert db.store.claim_key(two, KEY)


def test_a_waiting_job_can_be_cancelled_while_another_computes(db: Database) -> None:
    db.submit("pairs")
    holder = db.take()
    other = db.submit("pairs")
    waiter = db.take()
    db.store.claim_key(holder, KEY)
    db.store.claim_key(waiter, KEY)
    assert db.store.request_cancel("default", other.id, "a").state is JobState.CANCELLED
    db.store.finish(holder, Finished(key=KEY))
    assert states(db, other.id) == [UnitState.CANCELLED]


def test_parts_run_side_by_side_and_the_last_makes_the_join_ready(db: Database) -> None:
    job = db.submit("activations@gpu", "sae")
    whole = db.take("gpu")
    assert db.store.claim_key(whole, KEY)
    db.store.split(whole, ["0", "1", "2"])
    parts = [db.take("gpu", owner=f"worker-{n}") for n in range(3)]
    assert [(p.kind, p.name) for p in parts] == [(UnitKind.PART, "0"), (UnitKind.PART, "1"), (UnitKind.PART, "2")]
    db.store.progress(parts[0], 1, 4, "pairs")
    assert (db.store.stages(job.id)[0].done, db.store.stages(job.id)[0].total) == (0.25, 3.0)
    db.store.finish(parts[0], Finished())
    db.store.finish(parts[2], Finished())
    assert db.store.ready_units("gpu", 5) == ()
    db.store.finish(parts[1], Finished())
    join = db.take("gpu")
    assert (join.kind, join.stage_id) == (UnitKind.JOIN, whole.stage_id)
    assert db.store.claim_key(join, KEY)
    db.store.finish(join, Finished(key=KEY))
    assert [s.state for s in db.store.stages(job.id)] == [StageState.DONE, StageState.OPEN]


def test_a_lost_part_is_done_again_alone_and_its_stage_keeps_its_key(db: Database) -> None:
    db.submit("activations@gpu")
    whole = db.take("gpu")
    db.store.claim_key(whole, KEY)
    db.store.split(whole, ["0", "1"])
    one, two = db.take("gpu"), db.take("gpu")
    other = db.submit("activations@gpu")
    waiter = db.take("gpu")
    assert not db.store.claim_key(waiter, KEY)
    db.store.finish(one, Finished())
    db.run_out(two)
    db.store.reconcile()
    assert states(db, other.id) == [UnitState.PARKED]
    again = db.take("gpu")
    assert (again.unit_id, again.name) == (two.unit_id, two.name)
    db.store.finish(again, Finished())
    db.store.finish(db.take("gpu"), Finished(key=KEY))
    assert states(db, other.id) == [UnitState.READY]


def test_a_part_that_fails_takes_its_siblings_leases_away(db: Database) -> None:
    job = db.submit("activations@gpu")
    db.store.split(db.take("gpu"), ["0", "1", "2"])
    one, two = db.take("gpu"), db.take("gpu")
    db.store.fail(one, FATAL)
    assert db.get(job).state is JobState.FAILED
    assert not db.store.heartbeat(two).held
    assert sorted(states(db, job.id)) == ["cancelled", "cancelled", "done", "failed"]
    db.store.retry("default", job.id, "a")
    fresh = db.take("gpu")
    assert fresh.kind is UnitKind.WHOLE
    assert fresh.unit_id > max(one.unit_id, two.unit_id)


def test_cancel_ends_when_the_last_part_lets_go(db: Database) -> None:
    job = db.submit("activations@gpu")
    db.store.split(db.take("gpu"), ["0", "1", "2"])
    one, two = db.take("gpu"), db.take("gpu")
    db.store.request_cancel("default", job.id, "a")
    assert db.store.ready_units("gpu", 5) == ()
    db.store.give_back(one)
    assert db.get(job).state is JobState.RUNNING
    db.store.finish(two, Finished())
    assert db.get(job).state is JobState.CANCELLED


def test_cancel_of_a_job_whose_worker_is_gone_ends_with_its_lease(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    lease = db.take()
    db.store.request_cancel("default", job.id, "a")
    db.store.reconcile()
    assert db.get(job).state is JobState.RUNNING
    db.run_out(lease)
    db.store.reconcile()
    assert db.get(job).state is JobState.CANCELLED


def test_finishing_in_spite_of_a_cancel_keeps_what_was_done(db: Database) -> None:
    job, last = db.submit("prepare", "pairs"), db.submit("report")
    leases = {lease.job_id: lease for lease in (db.take(), db.take())}
    for each in (job, last):
        db.store.request_cancel("default", each.id, "a")
        db.store.finish(leases[each.id], Finished())
    assert [s.state for s in db.store.stages(job.id)] == [StageState.DONE, StageState.PENDING]
    assert (db.get(job).state, db.get(last).state) == (JobState.CANCELLED, JobState.SUCCEEDED)
    db.store.retry("default", job.id, "a")
    assert db.take().stage == "pairs"


def test_gpu_time_is_counted_by_the_databases_clock_against_the_budget(db: Database) -> None:
    job = db.submit("prepare", "sae@gpu", "labels@gpu", gpu_seconds_budget=100.0)
    lease = db.take()
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-500.0))
    db.store.finish(lease, Finished())
    assert db.get(job).gpu_seconds == 0.0
    lease = db.take("gpu")
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-60.0))
    assert db.store.heartbeat(lease) == Beat(held=True)
    assert db.get(job).gpu_seconds == pytest.approx(60.0, abs=5.0)
    db.change(units, units.c.id == lease.unit_id, beat_at=utc_after(-60.0))
    assert db.store.heartbeat(lease).over_budget
    db.store.finish(lease, Finished())
    (unit_id,) = db.store.ready_units("gpu", 5)
    assert db.store.mark_sent(unit_id)
    assert db.store.lease(unit_id, "worker") is None
    failed = db.get(job)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error.code == "budget_exhausted"


def test_finishing_opens_the_next_stage_or_changes_nothing(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    lease = db.take()
    seen = db.store.events(job.id)
    following = (stages.c.job_id == job.id) & (stages.c.ordinal == 1)
    db.change(stages, following, state="torn")  # what opens it does not know this state
    with pytest.raises(ValueError, match="torn"):
        db.store.finish(lease, Finished(key=KEY, inputs={"model": "m"}))
    db.change(stages, following, state=StageState.PENDING)
    assert states(db, job.id) == [UnitState.LEASED]
    assert [stage.state for stage in db.store.stages(job.id)] == [StageState.OPEN, StageState.PENDING]
    assert (db.get(job).inputs, db.store.events(job.id)) == ({}, seen)
    db.store.finish(lease, Finished(key=KEY, inputs={"model": "m"}))
    assert [stage.state for stage in db.store.stages(job.id)] == [StageState.DONE, StageState.OPEN]
    assert db.get(job).inputs == {"model": "m"}


def test_splitting_needs_parts_of_different_names(db: Database) -> None:
    db.submit("activations@gpu")
    lease: Lease = db.take("gpu")
    for parts in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="parts"):
            db.store.split(lease, parts)
    assert db.store.heartbeat(lease).held
