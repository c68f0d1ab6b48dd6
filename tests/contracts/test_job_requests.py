"""Submit, list, cancel, retry, delete: what clients see of jobs, on every database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from safer_engine.errors import SpecError
from service.errors import Conflict, NotFound, QuotaExceeded
from service.jobs.access import AccessStore, Limits
from service.jobs.model import JobError, JobKind, JobRecord, JobState, StagePart, StageState, UnitState
from service.jobs.requests import Finished, JobQuery, NewJob
from service.jobs.tables import projects
from tests.helpers.databases import Database, new_job

FATAL = JobError("model_refused", "the head is newly made")


def test_a_job_is_stored_as_it_was_asked_for_and_its_first_stage_is_open(db: Database) -> None:
    new = new_job(
        "prepare", "pairs", "activations@gpu", priority=3, labels={"team": "trust", "env": "test"}, idempotency_key="k",
        body_digest="d", submitted_by="key", callback_url="https://example.org/done", inputs={"model": "m"},
        gpu_seconds_budget=7.5,
    )  # fmt: skip
    submitted = db.store.submit("default", new)
    assert submitted.created
    job = db.store.get("default", submitted.job.id)
    assert job == submitted.job
    assert (job.state, job.kind, job.priority, job.spec) == (JobState.QUEUED, JobKind.AUDIT, 3, {"seed": 0})
    assert (job.labels, job.inputs, job.gpu_seconds_budget) == ({"team": "trust", "env": "test"}, {"model": "m"}, 7.5)
    assert (job.created.utcoffset(), job.started, job.finished, job.error) == (timedelta(0), None, None, None)
    stages = db.store.stages(job.id)
    assert [(s.name, s.queue, s.state) for s in stages] == [
        ("prepare", "cpu", StageState.OPEN), ("pairs", "cpu", StageState.PENDING), ("activations", "gpu", StageState.PENDING),
    ]  # fmt: skip
    assert [(u.stage, u.state) for u in db.store.units(job.id)] == [("prepare", UnitState.READY)]


def test_the_same_idempotency_key_gives_the_same_job_and_another_body_is_refused(db: Database) -> None:
    first = db.store.submit("default", new_job(idempotency_key="k", body_digest="a"))
    again = db.store.submit("default", new_job(idempotency_key="k", body_digest="a"))
    assert (again.job.id, again.created) == (first.job.id, False)
    with pytest.raises(Conflict, match=first.job.id):
        db.store.submit("default", new_job(idempotency_key="k", body_digest="b"))
    AccessStore(db.engine, db.settings).ensure_project("other")
    assert db.store.submit("other", new_job(idempotency_key="k", body_digest="b")).created
    assert db.store.submit("default", new_job()).created
    assert db.store.submit("default", new_job()).created


def test_submits_at_once_under_one_key_make_one_job(db: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: db.store.submit("default", new_job(idempotency_key="k")), range(16)))
    assert len({each.job.id for each in found}) == 1
    assert sum(each.created for each in found) == 1
    assert len(db.store.units(found[0].job.id)) == 1


def test_unknown_and_foreign_jobs_look_the_same(db: Database) -> None:
    AccessStore(db.engine, db.settings).ensure_project("other")
    job = db.submit()
    messages = set()
    for project, job_id in (("other", job.id), ("default", "0" * 26)):
        for ask in (db.store.get, lambda p, j: db.store.request_cancel(p, j, "a"), lambda p, j: db.store.delete(p, j, "a")):
            with pytest.raises(NotFound) as caught:
                ask(project, job_id)
            messages.add(caught.value.message.replace(job_id, "ID"))
    assert messages == {"there is no job 'ID'"}
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        db.store.submit("nowhere", new_job())


def test_quota_of_queued_jobs_counts_what_waits_and_not_what_is_asked_again(db: Database) -> None:
    AccessStore(db.engine, db.settings).set_limits("default", Limits(max_queued=2), "operator")
    db.submit(idempotency_key="k")
    second = db.submit()
    with pytest.raises(QuotaExceeded, match="2 jobs queued"):
        db.submit()
    assert not db.store.submit("default", new_job(idempotency_key="k")).created
    db.store.request_cancel("default", second.id, "a")
    db.submit()
    with pytest.raises(QuotaExceeded, match="2 jobs queued"):
        db.store.retry("default", second.id, "a")
    assert db.get(second).state is JobState.CANCELLED


def test_quota_of_bytes_counts_a_shared_artifact_once(db: Database) -> None:
    for _ in range(2):
        db.submit("pairs")
        db.store.finish(db.take(), Finished(key="k" * 64, bytes=600))
    assert db.store.usage("default").bytes == 600
    db.change(projects, projects.c.name == "default", max_bytes=500)
    with pytest.raises(QuotaExceeded, match="600 bytes"):
        type(db.store)(db.engine, db.settings).submit("default", new_job())


def test_cancel_before_anything_ran_ends_the_job_at_once(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    cancelled = db.store.request_cancel("default", job.id, "alice")
    assert cancelled.state is JobState.CANCELLED
    assert cancelled.finished is not None
    assert [s.state for s in db.store.stages(job.id)] == [StageState.CANCELLED, StageState.PENDING]
    assert db.store.ready_units("cpu", 5) == ()
    assert db.store.request_cancel("default", job.id, "alice") == cancelled


def test_cancel_of_an_ended_job_is_a_conflict(db: Database) -> None:
    job = db.submit()
    db.run(job)
    with pytest.raises(Conflict, match="succeeded"):
        db.store.request_cancel("default", job.id, "a")


def test_cancel_is_heard_with_the_next_heartbeat_and_ends_when_the_worker_lets_go(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    lease = db.take()
    assert db.store.request_cancel("default", job.id, "a").state is JobState.RUNNING
    assert db.store.heartbeat(lease).cancel
    db.store.give_back(lease)
    assert db.get(job).state is JobState.CANCELLED
    assert not db.store.heartbeat(lease).held


def test_retry_goes_on_after_the_last_stage_that_is_done(db: Database) -> None:
    job = db.submit("prepare", "pairs", "sae")
    db.store.finish(db.take(), Finished())
    stale = db.take()
    db.store.fail(stale, FATAL)
    failed = db.get(job)
    assert (failed.state, failed.error) == (JobState.FAILED, FATAL)
    again = db.store.retry("default", job.id, "alice")
    assert (again.state, again.attempt, again.error, again.finished) == (JobState.QUEUED, 2, None, None)
    states = [s.state for s in db.store.stages(job.id)]
    assert states == [StageState.DONE, StageState.OPEN, StageState.PENDING]
    lease = db.take()
    assert lease.stage == "pairs"
    assert lease.unit_id != stale.unit_id
    db.store.finish(lease, Finished())
    assert db.run(job).state is JobState.SUCCEEDED
    for state_now in ("succeeded",):
        with pytest.raises(Conflict, match=state_now):
            db.store.retry("default", job.id, "alice")


def test_delete_hides_an_ended_job_and_frees_its_idempotency_key(db: Database) -> None:
    job = db.submit("pairs", idempotency_key="k", labels={"a": "b"})
    with pytest.raises(Conflict, match="queued"):
        db.store.delete("default", job.id, "a")
    db.store.finish(db.take(), Finished(key="k" * 64, bytes=5))
    db.store.delete("default", job.id, "a")
    with pytest.raises(NotFound):
        db.store.get("default", job.id)
    assert db.store.find("default").items == ()
    assert db.store.find("default", JobQuery(labels={"a": "b"})).items == ()
    assert db.store.usage("default").bytes == 0
    assert db.store.submit("default", new_job(idempotency_key="k")).created


def test_deeds_are_in_the_audit_log_and_jobs_tell_their_story(db: Database) -> None:
    job = db.submit()
    db.store.request_cancel("default", job.id, "alice")
    db.store.retry("default", job.id, "bob")
    db.run(job)
    db.store.delete("default", job.id, "carol")
    log = AccessStore(db.engine, db.settings).audit_entries("default")
    assert [(e.actor, e.action, e.target) for e in log] == [
        ("alice", "job.cancel", job.id), ("bob", "job.retry", job.id), ("carol", "job.delete", job.id),
    ]  # fmt: skip
    story = [(e.kind, e.data.get("state")) for e in db.store.events(job.id)]
    assert story == [
        ("job", "queued"), ("stage", "open"), ("cancel", None), ("stage", "cancelled"), ("job", "cancelled"), ("job", "queued"),
        ("stage", "open"), ("job", "running"), ("stage", "started"), ("stage", "done"), ("job", "succeeded"),
    ]  # fmt: skip


def test_events_are_paged_by_id_and_kept_apart_by_job(db: Database) -> None:
    job, other = db.submit(), db.submit()
    first = db.store.add_event(job.id, "note", "pairs", {"text": "one"})
    second = db.store.add_event(job.id, "note", "pairs", {"text": "two"})
    assert second > first
    assert [e.data for e in db.store.events(job.id, after=first)] == [{"text": "two"}]
    assert db.store.events(job.id, after=0, limit=1)[0].kind == "job"
    assert all(e.kind != "note" for e in db.store.events(other.id))
    with pytest.raises(NotFound):
        db.store.add_event("0" * 26, "note", None, {})


def test_listing_pages_through_everything_once_newest_first(db: Database) -> None:
    jobs = [db.submit(labels={"n": str(n % 2)}) for n in range(7)]
    for age, job in enumerate(reversed(jobs)):
        db.backdate(job, 60.0 * (age // 2))  # some are of the same age to the millisecond, or nearly
    seen: list[JobRecord] = []
    cursor: str | None = None
    while True:
        page = db.store.find("default", cursor=cursor, limit=3)
        seen += page.items
        cursor = page.next
        if cursor is None:
            break
    assert seen == sorted(seen, key=lambda job: (job.created, job.id), reverse=True)
    assert {job.id for job in seen} == {job.id for job in jobs}
    assert len(seen) == 7
    odd = db.store.find("default", JobQuery(labels={"n": "1"}), limit=2)
    more = db.store.find("default", JobQuery(labels={"n": "1"}), cursor=odd.next)
    assert len(odd.items) == 2
    assert {job.id for job in (*odd.items, *more.items)} == {jobs[n].id for n in (1, 3, 5)}
    for wrong in ("x", "!!", "YWJj", "MjAyNg"):
        with pytest.raises(SpecError, match="cursor"):
            db.store.find("default", cursor=wrong)


def test_listing_filters_hold_together(db: Database) -> None:
    audit = db.submit("prepare", "pairs", labels={"a": "1", "b": "2"}, inputs={"model": "digest-m"})
    training = db.store.submit("default", NewJob(JobKind.TRAIN_RM, {}, (StagePart("training", "gpu"),))).job
    cancelled = db.submit(labels={"a": "1"}, inputs={"model": "digest-m"})
    db.store.request_cancel("default", cancelled.id, "a")
    db.backdate(training, 3600.0)
    boundary = db.get(audit).created

    def ids(**given: object) -> set[str]:
        return {job.id for job in db.store.find("default", JobQuery(**given)).items}  # type: ignore[arg-type]

    assert ids(states=(JobState.QUEUED,)) == {audit.id, training.id}
    assert ids(states=(JobState.QUEUED, JobState.CANCELLED), kind=JobKind.AUDIT) == {audit.id, cancelled.id}
    assert ids(kind=JobKind.TRAIN_RM) == {training.id}
    assert ids(labels={"a": "1"}) == {audit.id, cancelled.id}
    assert ids(labels={"a": "1", "b": "2"}) == {audit.id}
    assert ids(labels={"a": "2"}) == set()
    assert ids(stage="training") == {training.id}
    assert ids(input_digest="digest-m", states=(JobState.QUEUED,)) == {audit.id}
    assert training.id in ids(created_before=boundary)
    assert ids(created_from=boundary) == {audit.id, cancelled.id}
    assert {job.id for job in db.store.jobs_of_input("default", "digest-m")} == {cancelled.id, audit.id}


def test_queue_position_counts_what_is_ahead(db: Database) -> None:
    first, second, urgent = db.submit(), db.submit(), db.submit(priority=5)
    db.backdate(first, 60.0)
    assert [db.store.queue_position(db.get(job)) for job in (urgent, first, second)] == [1, 2, 3]
    db.take()
    assert db.store.queue_position(urgent) is None
    assert [db.store.queue_position(db.get(job)) for job in (first, second)] == [1, 2]
