"""Model versions that webhooks asked for: stored once, worked on by one, their tags owed until they are written."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import TypeAdapter, ValidationError

from service.http.parameters import IdempotencyKey
from service.jobs.clock import utc_after
from service.jobs.tables import mlflow_deliveries, mlflow_versions
from service.mlflow.deliveries import VersionEvent
from service.mlflow.store import VersionRecord, VersionState, VersionStore
from tests.helpers.databases import Database

EVENT = VersionEvent("rm", "1")
TAGS = {"safer_audit.state": "running", "safer_audit.error": None}


@pytest.fixture
def versions(db: Database) -> VersionStore:
    return VersionStore(db.engine)


def run_out(db: Database, **columns: str) -> None:
    """Let claims and pauses pass."""
    for name in columns or {"due": "", "tags_due": ""}:
        db.change(mlflow_versions, mlflow_versions.c[name].is_not(None), **{name: utc_after(-1.0)})


def taken(versions: VersionStore) -> VersionRecord:
    """The version that something is to be done about."""
    held = versions.take()
    assert held is not None
    return held


def test_a_delivery_counts_once_and_versions_that_wait_are_asked_for_once(versions: VersionStore) -> None:
    assert [versions.receive("d1", EVENT), versions.receive("d1", EVENT), versions.receive("d2", EVENT)] == [True, False, True]
    held = taken(versions)
    assert (held.model, held.version, held.state, held.round) == ("rm", "1", VersionState.WAITING, 1)
    assert versions.take() is None
    with pytest.raises(ValidationError):
        TypeAdapter(IdempotencyKey).validate_python(held.key)


def test_deliveries_at_the_same_time_make_one_version(versions: VersionStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda number: versions.receive(f"d{number % 2}", EVENT), range(8)))
    assert new.count(True) == 2
    assert taken(versions).round == 1
    assert versions.take() is None


def test_a_delivery_is_forgotten_when_its_signature_is_long_too_old(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    db.change(mlflow_deliveries, mlflow_deliveries.c.id == "d1", at=utc_after(-2 * 86400.0))
    assert versions.receive("d1", EVENT)


def test_asked_for_at_its_end_a_version_begins_a_new_round(versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    held = taken(versions)
    assert versions.move(held, VersionState.ENDED, TAGS, job_id="J", made=7, request={"spec": {}})
    versions.receive("d2", dataclasses.replace(EVENT, alias="champion"))
    again = taken(versions)
    assert (again.round, again.alias, again.job_id, again.made, again.request) == (2, "champion", "J", 7, None)
    assert again.key != held.key


def test_who_lost_a_claim_changes_nothing(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    first = taken(versions)
    assert versions.renew(first)
    run_out(db)
    second = taken(versions)
    assert not versions.renew(first)
    assert not versions.keep(first, TAGS, job_id="wrong")
    assert not versions.move(first, VersionState.ENDED, TAGS)
    assert versions.take_tags() is None
    assert versions.move(second, VersionState.ENDED, TAGS)


def test_an_audit_and_a_gate_are_waited_for(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    job = db.submit("prepare")
    assert versions.move(taken(versions), VersionState.AUDITING, job_id=job.id)
    assert versions.take() is None
    db.run(job)
    held = taken(versions)
    assert held.state is VersionState.AUDITING
    assert versions.move(held, VersionState.JUDGING, gate_id="a gate that is no more")
    assert taken(versions).state is VersionState.JUDGING


def test_what_is_put_off_comes_again_with_the_count_of_its_pauses(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    assert versions.put_off(taken(versions), 60.0)
    assert versions.take() is None
    run_out(db)
    assert taken(versions).attempts == 1


def test_tags_are_owed_until_they_are_settled(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    assert versions.take_tags() is None
    held = taken(versions)
    versions.keep(held, TAGS)
    owed = versions.take_tags()
    assert owed is not None
    assert (owed.model, owed.version, owed.tags) == ("rm", "1", TAGS)
    assert versions.take_tags() is None, "whoever took them writes them alone"
    run_out(db)
    again = versions.take_tags()
    assert again is not None
    assert again.tags_attempts == 2
    versions.keep(held, {**TAGS, "safer_audit.state": "done"})
    versions.settle_tags(again)
    newer = versions.take_tags()
    assert newer is not None
    assert newer.tags["safer_audit.state"] == "done"
    versions.settle_tags(newer)
    run_out(db)
    assert versions.take_tags() is None


def test_tags_that_are_given_up_are_owed_again_with_the_next_wish(db: Database, versions: VersionStore) -> None:
    versions.receive("d1", EVENT)
    held = taken(versions)
    versions.keep(held, TAGS)
    owed = versions.take_tags()
    assert owed is not None
    versions.put_off_tags(owed, None)
    run_out(db)
    assert versions.take_tags() is None
    versions.keep(held, TAGS)
    assert versions.take_tags() is not None
