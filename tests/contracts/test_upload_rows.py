"""Uploads, decisions and callbacks as rows, on every database."""

from __future__ import annotations

import hashlib
import json

import pytest

from safer_engine.errors import SpecError
from service.errors import Conflict, NotFound, QuotaExceeded
from service.jobs.access import AccessStore, Limits
from service.jobs.callbacks import MAX_ATTEMPTS, CallbackStore
from service.jobs.clock import utc_after
from service.jobs.model import JobState
from service.jobs.reviews import ReviewStore
from service.jobs.tables import jobs, uploads
from service.jobs.uploads import UploadPart, UploadState, UploadStore
from service.upload_names import UploadFile, upload_digest
from tests.helpers.databases import Database

FILES = (UploadFile("b.json", "b" * 64, 2), UploadFile("a/é.json", "a" * 64, 3))


@pytest.fixture
def rows(db: Database) -> UploadStore:
    return UploadStore(db.engine, db.settings)


def test_the_digest_of_an_upload_is_that_of_its_sorted_files() -> None:
    listed = [["a/é.json", "a" * 64, 3], ["b.json", "b" * 64, 2]]
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False)
    assert upload_digest(FILES) == upload_digest(FILES[::-1]) == hashlib.sha256(text.encode()).hexdigest()
    assert upload_digest(FILES[:1]) != upload_digest(FILES)


def test_an_upload_comes_in_parts_and_is_complete_once(rows: UploadStore) -> None:
    made = rows.create("default", "dataset", FILES, "key")
    assert (made.state, made.bytes, made.files, made.digest) == (UploadState.OPEN, 5, FILES, upload_digest(FILES))
    assert rows.find("default", made.digest) is None
    for size in (1, 2):
        rows.add_part("default", made.id, UploadPart(1, 0, "d" * 64, size, "etag"))
    rows.add_part("default", made.id, UploadPart(0, 0, "e" * 64, 2))
    assert rows.parts(made.id) == (UploadPart(0, 0, "e" * 64, 2), UploadPart(1, 0, "d" * 64, 2, "etag"))
    done = rows.complete("default", made.id, "key")
    assert done.state is UploadState.COMPLETE
    assert rows.complete("default", made.id, "key") == done
    assert rows.find("default", made.digest) == rows.get("default", made.id) == done
    with pytest.raises(Conflict, match="the upload is complete"):
        rows.add_part("default", made.id, UploadPart(0, 1, "f" * 64, 2))
    assert rows.create("default", "dataset", FILES[::-1], "other").id == made.id


def test_uploads_of_projects_are_apart(db: Database, rows: UploadStore) -> None:
    AccessStore(db.engine, db.settings).ensure_project("other")
    made = rows.create("default", "model", FILES, "key")
    rows.complete("default", made.id, "key")
    assert rows.find("other", made.digest) is None
    assert rows.create("other", "model", FILES, "key").id != made.id
    for ask in (rows.get, lambda p, u: rows.complete(p, u, "key"), lambda p, u: rows.remove(p, u, "key")):
        with pytest.raises(NotFound, match="there is no upload"):
            ask("other", made.id)
    with pytest.raises(NotFound, match="no project"):
        rows.create("nowhere", "model", FILES, "key")


def test_bytes_of_uploads_count_until_they_are_removed(db: Database, rows: UploadStore) -> None:
    AccessStore(db.engine, db.settings).set_limits("default", Limits(max_bytes=8), "operator")
    first = rows.create("default", "model", FILES, "key")
    with pytest.raises(QuotaExceeded, match="bytes"):
        rows.create("default", "model", (UploadFile("c", "c" * 64, 4),), "key")
    rows.remove("default", first.id, "key")
    assert rows.create("default", "model", (UploadFile("c", "c" * 64, 4),), "key").bytes == 4
    with pytest.raises(NotFound, match="there is no upload"):
        rows.get("default", first.id)


def test_what_a_live_job_uses_is_not_removed(db: Database, rows: UploadStore) -> None:
    made = rows.create("default", "model", FILES, "key")
    rows.complete("default", made.id, "key")
    job = db.submit(inputs={"model": made.digest})
    with pytest.raises(Conflict, match="a job that is not over"):
        rows.remove("default", made.id, "key")
    db.store.request_cancel("default", job.id, "key")
    rows.remove("default", made.id, "key")
    assert rows.find("default", made.digest) is None


def test_uploads_that_were_not_completed_in_time_are_found(db: Database, rows: UploadStore) -> None:
    late, done, _ = (rows.create("default", "model", (UploadFile(str(n), "c" * 64, n),), "key") for n in range(3))
    rows.complete("default", done.id, "key")
    db.change(uploads, uploads.c.id.in_((late.id, done.id)), expires=utc_after(-1.0))
    assert [found.id for found in rows.expired()] == [late.id]


def test_the_last_decision_on_a_pair_counts_and_all_are_kept(db: Database) -> None:
    reviews, job, other = ReviewStore(db.engine), db.submit(), db.submit()
    for pair, action, who in (("p1", "drop", "alice"), ("p2", "keep", "bob"), ("p1", "flip", "bob")):
        reviews.decide("default", job.id, pair, action, who, note=f"{action} it")
    reviews.decide("default", other.id, "p1", "keep", "carol")
    latest = reviews.latest(job.id)
    assert {pair: (found.action, found.reviewer) for pair, found in latest.items()} == {
        "p1": ("flip", "bob"), "p2": ("keep", "bob"),
    }  # fmt: skip
    assert reviews.latest(job.id, ("p2", "p9")).keys() == {"p2"}
    assert [(found.action, found.note) for found in reviews.history(job.id, "p1")] == [("drop", "drop it"), ("flip", "flip it")]
    with pytest.raises(SpecError, match="burn"):
        reviews.decide("default", job.id, "p1", "burn", "alice")
    with pytest.raises(NotFound, match="there is no job"):
        reviews.decide("other", job.id, "p1", "keep", "alice")
    assert reviews.forget(("p1",), "privacy") == 3
    assert reviews.latest(job.id).keys() == {"p2"}
    assert "p1" not in str(AccessStore(db.engine, db.settings).audit_entries(None)[-1])


def test_an_ended_job_owes_its_callback_until_it_is_settled(db: Database) -> None:
    callbacks = CallbackStore(db.engine)
    db.submit()
    job = db.submit(callback_url="https://example.org/done")
    assert callbacks.take() == ()
    db.store.request_cancel("default", job.id, "a")
    (owed,) = callbacks.take()
    assert (owed.job.id, owed.job.state) == (job.id, JobState.CANCELLED)
    assert callbacks.take() == ()
    db.change(jobs, jobs.c.id == job.id, callback_at=utc_after(-1.0))
    assert [found.job.id for found in callbacks.take()] == [job.id]
    callbacks.settle(owed.job, delivered=True)
    db.change(jobs, jobs.c.id == job.id, callback_at=utc_after(-1.0))
    assert callbacks.take() == ()
    db.store.retry("default", job.id, "a")
    db.store.request_cancel("default", job.id, "a")
    callbacks.settle(owed.job, delivered=True)
    (again,) = callbacks.take()
    assert again.job.attempt == 2


def test_a_callback_that_never_arrives_is_given_up(db: Database) -> None:
    callbacks, job = CallbackStore(db.engine), db.submit(callback_url="https://example.org/done")
    db.store.request_cancel("default", job.id, "a")
    for _ in range(MAX_ATTEMPTS):
        assert len(callbacks.take()) == 1
        db.change(jobs, jobs.c.id == job.id, callback_at=utc_after(-1.0))
    assert callbacks.take() == ()
