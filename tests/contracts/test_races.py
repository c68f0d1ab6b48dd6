"""Several processes write to one database at once: each unit has one winner, each job one end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.jobs.model import FINAL_UNIT_STATES, JobState
from service.jobs.tables import jobs
from tests.helpers.databases import Database

RIVALS = 4


def rivals(db: Database, database_url: str | None, deed: str, numbers: list[int]) -> list[list[list[int]]]:
    """What each of several processes won that did the same at the same time."""
    folder, start = Path(db.settings.folder), time.time() + 2.5
    outs = [folder / f"rival-{n}.json" for n in range(RIVALS)]
    module, where = [sys.executable, "-m", "tests.helpers.rivals"], [str(folder), database_url or "-"]
    when = [str(start), *map(str, numbers)]
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen([*module, *where, deed, f"rival-{n}", str(out), *when], cwd=root) for n, out in enumerate(outs)
    ]  # fmt: skip
    assert [process.wait(120) for process in started] == [0] * RIVALS
    return [json.loads(out.read_text()) for out in outs]


def test_each_unit_is_leased_by_one_process(db: Database, database_url: str | None) -> None:
    for _ in range(25):
        db.submit()
    db.change(jobs, jobs.c.state == "queued", state="running")
    ready = list(range(1, 26))
    for unit in ready:
        assert db.store.mark_sent(unit)
    won = [pair for found in rivals(db, database_url, "lease_all", ready) for pair in found]
    assert sorted(won) == [[unit, 1] for unit in ready]


@pytest.mark.full
def test_processes_that_share_all_work_finish_each_unit_once(db: Database, database_url: str | None) -> None:
    made = [db.submit("prepare", "pairs", "sae") for _ in range(12)]
    done = [unit for found in rivals(db, database_url, "work", []) for unit, _ in found]
    assert {db.get(job).state for job in made} == {JobState.SUCCEEDED}
    assert sorted(done) == sorted(unit.id for job in made for unit in db.store.units(job.id))
    assert len(done) == 36
    assert {unit.state for job in made for unit in db.store.units(job.id)} <= FINAL_UNIT_STATES


@pytest.mark.full
def test_one_process_makes_the_job_of_an_idempotency_key(db: Database, database_url: str | None) -> None:
    keys = list(range(20))
    made = [key for found in rivals(db, database_url, "submit_same", keys) for key, _ in found]
    assert sorted(made) == keys
    assert len(db.store.find("default", limit=100).items) == 20
