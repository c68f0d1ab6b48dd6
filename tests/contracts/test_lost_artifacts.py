"""What a job does when the artifact of one of its earlier stages is gone or damaged, on every database."""

from __future__ import annotations

import pytest

from service.errors import LeaseLost
from service.jobs.model import JobError, JobRecord, JobState, Lease, StageState, UnitKind, UnitState
from service.jobs.requests import Finished
from tests.helpers.databases import Database

LOST = JobError("artifact_gone", "the artifact of stage pairs is gone", "tell the operator")
KEYS = {"pairs": "p" * 64, "activations": "a" * 64, "sae": "s" * 64}
DONE, OPEN, PENDING = StageState.DONE, StageState.OPEN, StageState.PENDING


def finish(db: Database, lease: Lease, content: str = "") -> None:
    assert db.store.claim_key(lease, KEYS[lease.stage])
    db.store.finish(lease, Finished("computed", KEYS[lease.stage], content or f"content of {lease.stage}", bytes=1))


@pytest.fixture
def job(db: Database) -> JobRecord:
    """A job of three stages whose last is open."""
    made = db.submit("pairs", "activations", "sae")
    for _ in range(2):
        finish(db, db.take())
    return made


def states(db: Database, job: JobRecord) -> list[StageState]:
    return [stage.state for stage in db.store.stages(job.id)]


def test_the_stage_that_makes_it_opens_again_and_then_this_one(db: Database, job: JobRecord) -> None:
    lease = db.take()
    assert db.store.claim_key(lease, KEYS["sae"])
    assert db.store.compute_anew(lease, "pairs", LOST)
    assert states(db, job) == [OPEN, DONE, PENDING]
    assert not db.store.heartbeat(lease).held
    with pytest.raises(LeaseLost):
        db.store.compute_anew(lease, "pairs", LOST)
    again = db.take()
    assert (again.stage, again.kind) == ("pairs", UnitKind.WHOLE)
    finish(db, again)
    assert states(db, job) == [DONE, DONE, OPEN]
    last = db.take()
    assert (last.stage, last.unit_id > lease.unit_id) == ("sae", True)
    finish(db, last)
    assert db.get(job).state is JobState.SUCCEEDED
    told = [event.data for event in db.store.events(job.id) if event.data.get("lost")]
    assert told == [{"state": "pending", "lost": "pairs"}]


def test_what_is_not_the_same_again_is_followed_by_all_that_came_of_it(db: Database, job: JobRecord) -> None:
    assert db.store.compute_anew(db.take(), "pairs", LOST)
    finish(db, db.take(), "other content")
    assert states(db, job) == [DONE, OPEN, PENDING]
    finish(db, db.take())
    assert states(db, job) == [DONE, DONE, OPEN]


def test_a_job_that_is_tried_again_follows_too(db: Database, job: JobRecord) -> None:
    db.store.fail(db.take(), LOST)
    db.store.retry("default", job.id, "me")
    assert db.store.compute_anew(db.take(), "activations", LOST)
    db.store.request_cancel("default", job.id, "me")
    assert states(db, job) == [DONE, StageState.CANCELLED, PENDING]
    db.store.retry("default", job.id, "me")
    finish(db, db.take(), "other content")
    finish(db, db.take())
    assert db.get(job).state is JobState.SUCCEEDED


def test_it_ends_after_so_many_times_and_a_retry_counts_anew(db: Database, job: JobRecord) -> None:
    for _ in range(2):
        for _ in range(db.settings.max_failures):
            assert db.store.compute_anew(db.take(), "pairs", LOST)
            finish(db, db.take())
        assert not db.store.compute_anew(db.take(), "pairs", LOST)
        failed = db.get(job)
        assert (failed.state, failed.error) == (JobState.FAILED, LOST)
        db.store.retry("default", job.id, "me")
    finish(db, db.take())
    assert db.get(job).state is JobState.SUCCEEDED


@pytest.mark.parametrize("lost", ["sae", "report", "nothing"])
def test_what_no_earlier_stage_makes_fails_the_job(db: Database, lost: str) -> None:
    job = db.submit("pairs", "sae", "report")
    finish(db, db.take())
    assert not db.store.compute_anew(db.take(), lost, LOST)
    assert db.get(job).error == LOST
    assert states(db, job) == [DONE, StageState.FAILED, PENDING]


def test_a_part_that_misses_something_takes_the_other_parts_along(db: Database) -> None:
    job = db.submit("pairs", "activations")
    finish(db, db.take())
    whole = db.take()
    assert db.store.claim_key(whole, KEYS["activations"])
    db.store.split(whole, ["0", "1", "2"])
    one, two = db.take(), db.take()
    other = db.submit("activations")
    (waiting,) = [unit.id for unit in db.store.units(other.id)]
    assert db.store.mark_sent(waiting)
    waiter = db.store.lease(waiting, "worker-2")
    assert waiter is not None
    assert not db.store.claim_key(waiter, KEYS["activations"])
    assert db.store.compute_anew(one, "pairs", LOST)
    assert not db.store.heartbeat(two).held
    assert [unit.state for unit in db.store.units(other.id)] == [UnitState.READY]
    live = [unit for unit in db.store.units(job.id) if unit.state is UnitState.READY]
    assert [unit.stage for unit in live] == ["pairs"]


def test_a_job_that_is_to_be_cancelled_is(db: Database, job: JobRecord) -> None:
    lease = db.take()
    db.store.request_cancel("default", job.id, "me")
    assert db.store.compute_anew(lease, "pairs", LOST)
    assert db.get(job).state is JobState.CANCELLED
    assert states(db, job) == [DONE, DONE, StageState.CANCELLED]
