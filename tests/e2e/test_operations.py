"""What docs/operations.md tells an operator to do, done on a running service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.embedded import free_port
from service.jobs.model import JobState, UnitState
from tests.helpers.deployment import Deployment
from tests.helpers.servers import Redis
from tests.helpers.workplace import material

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
_STAGES = 20
_BACKUP = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return material(tmp_path_factory.mktemp("of the client"))


@pytest.fixture
def place(tmp_path: Path, redis: Redis) -> Iterator[Deployment]:
    redis.flush()
    made = Deployment(tmp_path / "place", broker_url=redis.url)
    yield made
    made.close()


def stop_cleanly(process: subprocess.Popen[bytes] | None) -> None:
    """Ask a process to end; it does so in order, and says that all is well."""
    assert process is not None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0


def test_an_upgrade_amid_a_job_a_backup_and_its_return(place: Deployment, files: dict[str, Path]) -> None:
    place.start(workers=1)
    job_id = place.submit(files, sae={"kind": "topk", "max_steps": 3000, "min_steps": 3000, "batch": 256, "k": 8})
    place.wait_stage(job_id, "sae")
    stop_cleanly(place.workers[0])
    (unit,) = [unit for unit in place.jobs.units(job_id) if unit.stage == "sae"]
    assert unit.state in (UnitState.READY, UnitState.SENT, UnitState.DONE)
    stop_cleanly(place.api.process)
    assert "Traceback" not in place.logs()
    database = place.folder / "service.db"
    copy = place.folder / "copy.db"
    subprocess.run(["python3", "-c", _BACKUP, str(database), str(copy)], check=True)
    place.run("migrate")
    place.start(workers=1)
    place.check_sound(job_id)
    lost = place.submit(files, seed=5)
    place.check_sound(lost)
    for process in (place.workers[-1], place.api.process):
        stop_cleanly(process)
    place.engine.dispose()
    for beside in ("service.db-wal", "service.db-shm"):
        (place.folder / beside).unlink(missing_ok=True)
    copy.replace(database)
    place.run("migrate")
    place.start(workers=1)
    place.check_sound(job_id)
    place.cli("status", lost, code=2)
    again = place.submit(files, seed=5)
    place.check_sound(again)
    assert {row.outcome for row in place.jobs.stages(again) if row.name != "prepare"} <= {"cached", "absent"}


def test_workers_that_take_one_unit_each_need_no_broker(place: Deployment, files: dict[str, Path]) -> None:
    place.start_api()
    job_id = place.submit(files)
    alone = {"SAFER_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
    for _ in range(_STAGES):
        assert place.worker("--once", **alone).wait(120) == 0
        if place.jobs.job(job_id).state is JobState.SUCCEEDED:
            break
    place.check_sound(job_id)
    assert place.worker("--once", **alone).wait(120) == 0
    wrong = place.submit({"model": files["model"], "dataset": files["model"] / "config.json"})
    codes = [place.worker("--once", **alone).wait(120) for _ in range(2)]  # it is found out when the job is prepared
    assert codes == [4, 0]
    assert place.jobs.job(wrong).state is JobState.FAILED


def test_keys_and_the_pepper_are_rotated(place: Deployment) -> None:
    place.start_api()
    made = json.loads(place.run("admin", "keys", "create", "--name", "second", "--role", "read", "--json").stdout)
    old, place.token = place.token, made["secret"]
    place.cli("list")
    place.run("admin", "keys", "revoke", made["id"])
    assert "not_authenticated" in place.cli("list", code=2).stderr
    stop_cleanly(place.api.process)
    place.given["secret_pepper"] = "another pepper of tests"
    place.start_api()
    place.token = old
    assert "not_authenticated" in place.cli("list", code=2).stderr
    place.token = json.loads(place.run("admin", "keys", "create", "--name", "new", "--role", "read", "--json").stdout)["secret"]
    place.cli("list")


def test_collecting_and_purging(place: Deployment, files: dict[str, Path]) -> None:
    place.start(workers=1)
    job_id = place.submit(files)
    place.check_sound(job_id)
    kept = json.loads(place.run("admin", "store", "gc", "--dry-run", "--json").stdout)
    assert (kept["dry_run"], kept["items"]) == (True, [])
    pair = place.ask("edits", job_id, "list", "-n", "1")["items"][0]["pair_id"]
    said = json.loads(place.run("admin", "store", "purge", pair, "--dry-run", "--json").stdout)
    done = json.loads(place.run("admin", "store", "purge", pair, "--json").stdout)
    assert [job["id"] for job in said["jobs"]] == [job["id"] for job in done["jobs"]] == [job_id]
    assert {item["kind"] for item in done["items"]} >= {"artifact", "upload"}
    place.cli("report", job_id, code=2)
    left = [path for path in place.folder.rglob("*") if path.is_file() and pair.encode() in path.read_bytes()]
    assert not [path for path in left if not path.name.startswith("service.db") and not path.name.endswith(".log")]
    again = place.submit(files)
    place.check_sound(again)
    old = json.loads(place.run("admin", "store", "gc", "--json", SAFER_RETENTION_DAYS="0.0000001").stdout)["items"]
    assert [item["name"].partition("/")[0] for item in old if item["kind"] == "artifact"] == ["activations"]
