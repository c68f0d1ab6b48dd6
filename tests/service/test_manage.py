"""What an operator does on the service's machine."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from cli.main import run_main
from service import manage
from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.model import JobKind, StagePart
from service.jobs.requests import NewJob
from service.jobs.tables import units
from tests.helpers.http_world import EDITS, SPEC, http_world

Manage = Callable[..., Any]


@pytest.fixture
def manage_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manage:
    """Run `python -m service.manage` in this process, over an empty folder; its answer."""
    monkeypatch.setenv("SAFER_HOME", str(tmp_path))
    monkeypatch.setenv("SAFER_SECRET_PEPPER", "a pepper of tests")

    def run(*arguments: str, told: str = "", code: int = 0) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(told))
        capsys.readouterr()
        assert manage.main(list(arguments)) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_nothing_is_done_before_there_is_a_database(manage_here: Manage, tmp_path: Path) -> None:
    answer = manage_here("jobs", "list", code=4)
    assert (answer["error"]["code"], str(tmp_path) in answer["error"]["message"]) == ("spec_invalid", True)
    assert list(tmp_path.iterdir()) == []
    assert manage_here("migrate")["database"].startswith("sqlite:///")
    assert manage_here("migrate") == manage_here("migrate")
    assert manage_here("jobs", "list") == {"items": []}


def test_keys_are_made_listed_and_ended(manage_here: Manage) -> None:
    manage_here("migrate")
    made = manage_here("keys", "create", "--name", "ci", "--role", "submit", "--role", "read", "--days", "2")
    assert made["secret"].startswith("sk-safer-")
    assert (made["roles"], made["project"], made["expires"] is not None) == (["read", "submit"], "default", True)
    (listed,) = manage_here("keys", "list")["items"]
    assert "secret" not in listed
    assert listed["id"] == made["id"]
    assert manage_here("keys", "revoke", made["id"])["revoked"] is not None
    assert manage_here("keys", "revoke", "nobody", code=4)["error"]["code"] == "not_found"
    assert (
        manage_here("keys", "create", "--project", "lab", "--name", "x", "--role", "read", code=4)["error"]["code"] == "not_found"
    )
    assert (
        manage_here("keys", "create", "--project", "lab", "--make-project", "--name", "x", "--role", "read")["project"] == "lab"
    )
    assert [project["name"] for project in manage_here("projects")["items"]] == ["default", "lab"]


def test_jobs_are_listed_and_put_back(manage_here: Manage, tmp_path: Path) -> None:
    with http_world(tmp_path) as world:
        jobs = [world.submit() for _ in range(3)]
        assert [item["id"] for item in manage_here("jobs", "list", "--limit", "2")["items"]] == [jobs[2].id, jobs[1].id]
        assert manage_here("jobs", "cancel", jobs[0].id)["state"] == "cancelled"
        assert [item["id"] for item in manage_here("jobs", "list", "--state", "cancelled")["items"]] == [jobs[0].id]
        assert manage_here("jobs", "requeue", jobs[0].id)["attempt"] == 2
        assert manage_here("jobs", "requeue", jobs[0].id, code=4)["error"]["code"] == "conflict"
        unit = world.services.jobs.units(jobs[0].id)[-1].id
        world.services.jobs.mark_sent(unit)
        assert manage_here("jobs", "reconcile")["resent"] == []
        with writing(world.services.engine) as connection:
            connection.execute(update(units).where(units.c.id == unit).values(sent_at=utc_after(-3600.0)))
        assert manage_here("jobs", "reconcile")["resent"] == [{"unit_id": unit, "queue": "cpu"}]
        actions = [entry.action for entry in world.services.access.audit_entries("default")]
        assert "job.retry" in actions


def test_artifacts_are_collected_and_pairs_purged(manage_here: Manage, tmp_path: Path) -> None:
    with http_world(tmp_path) as world:
        stages = tuple(StagePart(name, "cpu") for name in ("edits", "report"))
        asked = NewJob(JobKind.AUDIT, SPEC, stages)
        job = world.finish(world.services.jobs.submit("default", asked).job)
        assert manage_here("store", "gc", "--dry-run")["dry_run"] is True
        pair = EDITS[1]["pair_id"]
        told = manage_here("store", "purge", "--dry-run", told=f"{pair}\n\n")
        assert job.id in [item["id"] for item in told["jobs"]]
        assert {item["kind"] for item in told["items"]} >= {"artifact"}
        assert world.client().get(f"/v1/audits/{job.id}/report").status_code == 200
        assert manage_here("store", "purge", told=pair)["items"] != []
        assert world.client().get(f"/v1/audits/{job.id}/edits").status_code == 410
        assert manage_here("store", "purge", code=4)["error"]["code"] == "spec_invalid"


def test_the_commands_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SAFER_HOME", raising=False)
    monkeypatch.delenv("SAFER_SECRET_PEPPER", raising=False)
    home = ["--home", str(tmp_path)]
    assert run_main(["admin", *home, "keys", "list"]) == 2
    assert "there is no database" in capsys.readouterr().err
    assert run_main(["migrate", *home]) == 0
    assert "up to date" in capsys.readouterr().out
    assert run_main(["admin", *home, "keys", "create", "--name", "me", "--role", "read"]) == 2
    assert "SAFER_SECRET_PEPPER" in capsys.readouterr().err
    (tmp_path / "pepper").touch(0o600)
    (tmp_path / "pepper").write_text("a pepper that up has made")
    assert run_main(["migrate", *home]) == 0
    assert run_main(["admin", *home, "keys", "create", "--name", "me", "--role", "read"]) == 0
    assert "sk-safer-" in capsys.readouterr().out
    assert run_main(["admin", *home, "store", "purge"]) == 2
