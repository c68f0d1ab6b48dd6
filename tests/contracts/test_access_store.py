"""Projects, API keys and the audit log, on every database."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError

from safer_engine.errors import SpecError
from service.errors import Conflict, NotFound
from service.infra.settings import load_settings
from service.jobs.access import KEY_PREFIX, AccessStore, Limits, Role
from service.jobs.clock import utc_after
from service.jobs.database import reading, writing
from service.jobs.tables import METADATA, api_keys
from tests.helpers.databases import Database


@pytest.fixture
def access(db: Database) -> AccessStore:
    return AccessStore(db.engine, db.settings)


def test_a_key_speaks_for_its_project_with_its_roles(access: AccessStore) -> None:
    made = access.create_key("default", "ci", [Role.READ, Role.SUBMIT, Role.READ], "operator")
    assert made.secret.startswith(KEY_PREFIX)
    assert len(made.secret) == len("sk-safer-") + 43
    who = access.authenticate(made.secret)
    assert who is not None
    assert (who.project, who.key_id, who.name, who.roles) == ("default", made.key.id, "ci", frozenset((Role.READ, Role.SUBMIT)))
    assert who.may(Role.READ)
    assert not who.may(Role.REVIEW)
    assert access.principal(made.key.id) == who
    admin = access.authenticate(access.create_key("default", "root", [Role.ADMIN], "operator").secret)
    assert admin is not None
    assert all(admin.may(role) for role in Role)


def test_secrets_differ_and_are_not_kept(db: Database, access: AccessStore) -> None:
    made = [access.create_key("default", "k", ["read"], "operator") for _ in range(5)]  # type: ignore[list-item]
    assert len({key.secret for key in made}) == 5
    with reading(db.engine) as connection:
        kept = str([connection.execute(select(table)).all() for table in METADATA.sorted_tables])
    assert all(key.secret not in kept and key.secret.removeprefix(KEY_PREFIX) not in kept for key in made)
    assert all(key.secret not in repr(key.key) for key in made)


def test_wrong_secrets_are_nobodys(access: AccessStore) -> None:
    secret = access.create_key("default", "k", [Role.READ], "operator").secret
    other = "A" if secret[-1] != "A" else "B"
    for wrong in ("", "sk-safer-", secret[:-1], secret + "A", secret[:-1] + other, secret.upper(), KEY_PREFIX + "é" * 43):
        assert access.authenticate(wrong) is None, wrong


def test_a_key_is_known_while_the_database_takes_no_writes(db: Database, access: AccessStore) -> None:
    secret = access.create_key("default", "k", [Role.READ], "operator").secret
    forbid = "PRAGMA query_only = ON" if db.engine.dialect.name == "sqlite" else "SET default_transaction_read_only = on"
    allow = "PRAGMA query_only = OFF" if db.engine.dialect.name == "sqlite" else "SET default_transaction_read_only = off"
    event.listen(db.engine, "checkout", refuse := lambda connection, *_: connection.cursor().execute(forbid))
    try:
        assert access.authenticate(secret) is not None
        assert access.keys("default")[0].last_used is None
    finally:
        event.remove(db.engine, "checkout", refuse)
        event.listen(db.engine, "checkout", lambda connection, *_: connection.cursor().execute(allow))
    assert access.authenticate(secret) is not None
    assert access.keys("default")[0].last_used is not None


def test_another_pepper_knows_no_key_and_no_pepper_is_refused(db: Database, access: AccessStore) -> None:
    secret = access.create_key("default", "k", [Role.READ], "operator").secret
    other = load_settings(home=db.settings.home, secret_pepper="another pepper of tests")
    assert AccessStore(db.engine, other).authenticate(secret) is None
    with pytest.raises(SpecError, match="SAFER_SECRET_PEPPER"):
        AccessStore(db.engine, load_settings(home=db.settings.home, secret_pepper=None))


def test_expired_and_revoked_keys_are_nobodys(db: Database, access: AccessStore) -> None:
    short = access.create_key("default", "short", [Role.READ], "operator", lifetime_seconds=3600.0)
    assert short.key.expires is not None
    assert timedelta(minutes=59) < short.key.expires - short.key.created < timedelta(minutes=61)
    assert access.authenticate(short.secret) is not None
    db.change(api_keys, api_keys.c.id == short.key.id, expires=utc_after(-1.0))
    assert access.authenticate(short.secret) is access.principal(short.key.id) is None
    long = access.create_key("default", "long", [Role.READ], "operator")
    assert access.revoke_key("default", long.key.id, "alice").revoked is not None
    assert access.authenticate(long.secret) is access.principal(long.key.id) is None
    first = access.revoke_key("default", long.key.id, "bob").revoked
    assert first == access.revoke_key("default", long.key.id, "carol").revoked
    assert [(e.actor, e.action) for e in access.audit_entries("default")][2:] == [("alice", "key.revoke")]
    assert [key.name for key in access.keys("default")] == ["short", "long"]


def test_last_use_is_noted_at_most_once_a_minute(db: Database, access: AccessStore) -> None:
    made = access.create_key("default", "k", [Role.READ], "operator")
    assert access.keys("default")[0].last_used is None
    access.authenticate(made.secret)
    first = access.keys("default")[0].last_used
    access.authenticate(made.secret)
    assert access.keys("default")[0].last_used == first
    assert first is not None
    db.change(api_keys, api_keys.c.id == made.key.id, last_used=utc_after(-61.0))
    access.authenticate(made.secret)
    noted = access.keys("default")[0].last_used
    assert noted is not None
    assert noted >= first


def test_keys_of_other_projects_cannot_be_revoked(access: AccessStore) -> None:
    access.create_project("other", "operator")
    key = access.create_key("other", "k", [Role.READ], "operator")
    with pytest.raises(NotFound, match="there is no key"):
        access.revoke_key("default", key.key.id, "a")
    assert access.authenticate(key.secret) is not None
    assert access.keys("default") == ()


def test_projects_have_the_defaults_of_the_settings_until_they_are_given_limits(db: Database, access: AccessStore) -> None:
    made = access.create_project("team-1", "operator", Limits(max_running=3, gpu_seconds_per_job=60.0))
    assert (made.max_running, made.max_queued, made.gpu_seconds_per_job) == (3, db.settings.default_max_queued, 60.0)
    assert access.set_limits("team-1", Limits(max_bytes=5), "operator").max_bytes == 5
    assert access.project("team-1").max_running == 3
    assert access.ensure_project("team-1") == access.project("team-1")
    assert [project.name for project in access.projects()] == ["default", "team-1"]
    assert db.submit(project="team-1").gpu_seconds_budget == 60.0
    assert db.submit(project="team-1", gpu_seconds_budget=5.0).gpu_seconds_budget == 5.0
    with pytest.raises(Conflict, match="a project 'team-1' already"):
        access.create_project("team-1", "operator")
    with pytest.raises(SpecError, match="max_running"):
        access.set_limits("team-1", Limits(max_running=0), "operator")
    for ask in (lambda: access.project("no"), lambda: access.create_key("no", "k", [Role.READ], "o")):
        with pytest.raises(NotFound, match="there is no project 'no'"):
            ask()


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "../x", "a" * 64, "a b", "é"])
def test_names_that_cannot_be_projects(access: AccessStore, name: str) -> None:
    with pytest.raises(SpecError, match="cannot name a project"):
        access.ensure_project(name)


@pytest.mark.parametrize(
    ("given", "said"), [({"roles": []}, "needs a role"), ({"roles": [Role.READ], "lifetime_seconds": 0.0}, "lifetime must be")]
)
def test_keys_that_cannot_be_made(access: AccessStore, given: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        access.create_key("default", "k", actor="operator", **given)  # type: ignore[arg-type]
    assert access.keys("default") == ()


@pytest.mark.parametrize("deed", ["UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log"])
def test_the_audit_log_only_grows(db: Database, access: AccessStore, deed: str) -> None:
    access.record("default", "alice", "test.deed", "target", {"n": 1})
    access.record(None, "bob", "test.deed", "target")
    with pytest.raises(DBAPIError, match="append-only"):
        with writing(db.engine) as connection:
            connection.execute(text(deed))
    entries = access.audit_entries(None)
    assert [(e.project, e.actor, e.data) for e in entries] == [("default", "alice", {"n": 1}), (None, "bob", {})]
    assert [e.actor for e in access.audit_entries("default")] == ["alice"]
    assert [e.actor for e in access.audit_entries(None, after=entries[0].id)] == ["bob"]
    assert len(access.audit_entries(None, limit=1)) == 1
