"""What is handed out next, what is found lost, who leads: what the dispatcher sees, on every database."""

from __future__ import annotations

from itertools import pairwise

from sqlalchemy import insert

from service.jobs.access import AccessStore, Limits
from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.model import JobError, JobState, UnitState
from service.jobs.requests import Finished, Message, QueueFacts, Reconciled
from service.jobs.tables import key_locks, units
from tests.helpers.databases import Database


def handed_out(db: Database, number: int, queue: str = "cpu") -> list[str]:
    """Hand out so many units, one after another; the ids of their jobs."""
    return [db.take(queue).job_id for _ in range(number)]


def test_priority_comes_first_then_age_of_the_job(db: Database) -> None:
    old, new, urgent = db.submit("a", "b"), db.submit(), db.submit(priority=1)
    db.backdate(old, 60.0)
    assert handed_out(db, 1) == [urgent.id]
    lease = db.take()
    assert lease.job_id == old.id
    db.store.finish(lease, Finished())
    assert handed_out(db, 2) == [old.id, new.id]


def test_projects_share_a_queue_whatever_they_have_queued(db: Database) -> None:
    access = AccessStore(db.engine, db.settings)
    access.ensure_project("small")
    many = [db.submit().id for _ in range(5)]
    few = [db.submit(project="small").id for _ in range(2)]
    order = handed_out(db, 4)
    assert [job in few for job in order].count(True) == 2
    assert sum(job in many for job in order) == 2
    assert set(handed_out(db, 3)) < set(many)


def test_a_project_starts_no_more_jobs_than_it_may_and_goes_on_with_those_it_has(db: Database) -> None:
    AccessStore(db.engine, db.settings).set_limits("default", Limits(max_running=2), "operator")
    for _ in range(4):
        db.submit("a", "b")
    assert len(db.store.ready_units("cpu", 10)) == 2
    leases = [db.take(), db.take()]
    assert db.store.ready_units("cpu", 10) == ()
    (waiting, _) = [
        unit for job in db.store.find("default").items if job.state is JobState.QUEUED for unit in db.store.units(job.id)
    ]
    assert not db.store.mark_sent(waiting.id)
    db.store.finish(leases[0], Finished())
    assert [db.take().job_id for _ in range(1)] == [leases[0].job_id]


def test_a_full_project_does_not_hold_up_another(db: Database) -> None:
    access = AccessStore(db.engine, db.settings)
    access.set_limits("default", Limits(max_running=1), "operator")
    access.ensure_project("other")
    for _ in range(20):
        db.submit(priority=9)
    other = db.submit(project="other")
    assert handed_out(db, 2)[1] == other.id


def test_a_unit_is_marked_once(db: Database) -> None:
    job = db.submit()
    (unit,) = db.store.ready_units("cpu", 1)
    assert db.store.mark_sent(unit)
    assert not db.store.mark_sent(unit)
    assert db.get(job).state is JobState.RUNNING
    assert db.store.ready_units("cpu", 1) == ()
    assert not db.store.mark_sent(10**9)


def test_a_message_that_nobody_takes_is_sent_again_after_longer_and_longer(db: Database) -> None:
    db.submit()
    (unit,) = db.store.ready_units("cpu", 1)
    db.store.mark_sent(unit)
    assert db.store.reconcile() == Reconciled()
    for seconds in (31.0, 61.0, 91.0, 121.0, 121.0):
        db.change(units, units.c.id == unit, sent_at=utc_after(1.0 - seconds + 0.5))
        assert db.store.reconcile() == Reconciled(), seconds
        db.change(units, units.c.id == unit, sent_at=utc_after(-seconds))
        assert db.store.reconcile().resent == (Message(unit, "cpu"),), seconds
    assert db.store.lease(unit, "worker") is not None
    assert db.store.facts().messages_resent == {"cpu": 5, "gpu": 0}  # type: ignore[union-attr]


def test_what_is_parked_on_a_key_that_nobody_computes_is_released(db: Database) -> None:
    job = db.submit("pairs")
    holder = db.take()
    other = db.submit("pairs")
    db.store.claim_key(holder, "k" * 64)
    db.store.claim_key(db.take(), "k" * 64)
    assert db.store.reconcile().released == ()
    with writing(db.engine) as connection:
        connection.execute(key_locks.delete())
    (waiting,) = db.store.units(other.id)
    assert db.store.reconcile().released == (waiting.id,)
    assert db.store.units(job.id)[0].state is UnitState.LEASED


def test_a_key_of_a_stage_that_is_over_is_taken_away(db: Database) -> None:
    done = db.submit("pairs")
    ended = db.take()
    db.store.finish(ended, Finished())
    assert db.get(done).state is JobState.SUCCEEDED
    row = {"project": "default", "stage": "pairs", "key": "k" * 64, "unit_id": ended.unit_id, "token": 1}
    with writing(db.engine) as connection:
        connection.execute(insert(key_locks).values(row))
    job = db.submit("pairs")
    lease = db.take()
    assert not db.store.claim_key(lease, "k" * 64)
    db.store.reconcile()
    again = db.take()
    assert again.job_id == job.id
    assert db.store.claim_key(again, "k" * 64)


def test_one_leads_until_its_time_is_over_or_it_resigns(db: Database) -> None:
    assert db.store.lead("dispatcher", "a", 30.0)
    assert db.store.lead("dispatcher", "a", 30.0)
    assert not db.store.lead("dispatcher", "b", 30.0)
    assert db.store.lead("other", "b", 30.0)
    db.store.resign("dispatcher", "b")
    assert not db.store.lead("dispatcher", "b", 30.0)
    db.store.resign("dispatcher", "a")
    assert db.store.lead("dispatcher", "b", -1.0)
    assert db.store.lead("dispatcher", "a", 30.0)


def test_facts_count_what_waits_and_what_runs(db: Database) -> None:
    for _ in range(3):
        db.submit("a", "b@gpu")
    db.store.finish(db.take(), Finished())
    db.take()
    for unit in db.store.ready_units("gpu", 1):
        db.store.mark_sent(unit)
    db.change(units, units.c.queue == "gpu", ready_at=utc_after(-90.0))
    cpu, gpu = db.store.queue_facts()
    assert (cpu.queue, cpu.ready, cpu.sent, cpu.leased, cpu.parked, cpu.depth) == ("cpu", 1, 0, 1, 0, 2)
    assert (gpu.ready, gpu.sent, gpu.depth) == (0, 1, 1)
    assert 90.0 <= gpu.oldest_seconds < 120.0
    assert db.store.job_counts() == {
        JobState.QUEUED: 1, JobState.RUNNING: 2, JobState.SUCCEEDED: 0, JobState.FAILED: 0, JobState.CANCELLED: 0,
    }  # fmt: skip
    facts = db.store.facts()
    assert facts is not None
    assert (facts.running, [each.depth for each in facts.queues]) == (2, [2, 1])
    assert facts.entered == {"queued": 3, "running": 2, "succeeded": 0, "failed": 0, "cancelled": 0}


def test_counters_of_jobs_never_fall(db: Database) -> None:
    def entered() -> dict[str, int]:
        facts = db.store.facts()
        assert facts is not None
        return dict(facts.entered)

    never_ran, runs = db.submit("a"), db.submit("a")
    seen = [entered()]
    db.store.request_cancel("default", never_ran.id, "me")
    seen.append(entered())
    db.store.fail(db.take(), JobError("internal", "broken"))
    seen.append(entered())
    for job in (never_ran, runs):
        db.store.retry("default", job.id, "me")
        seen.append(entered())
    db.store.finish(db.take(), Finished())
    seen.append(entered())
    assert seen[0] == {"queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert seen[-1] == {"queued": 4, "running": 2, "succeeded": 1, "failed": 1, "cancelled": 1}
    assert all(later[state] >= sooner[state] for sooner, later in pairwise(seen) for state in later)


def test_an_empty_queue_has_facts_too(db: Database) -> None:
    assert db.store.queue_facts() == (QueueFacts("cpu"), QueueFacts("gpu"))
    assert db.store.ready_units("cpu", 0) == ()
