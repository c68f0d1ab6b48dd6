"""Processes that judge are killed with -9 while they do: each gate is decided once, none is lost, and all who asked are told."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import func, select

from service.jobs.clock import utc_after
from service.jobs.database import writing
from service.jobs.deliveries import NewDelivery
from service.jobs.gate_model import GateState, NewGate, Outcome
from service.jobs.tables import gate_deliveries, gates
from tests.helpers import gate_reports as made
from tests.helpers.http_world import HttpWorld, http_world
from tests.helpers.judging import KIND
from tests.helpers.servers import wait_until
from tests.service.test_gates import files

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
ROWS = made.pairs(0.95, 120)
POLICY = {"version": 1, "rules": [{"name": "right", "fact": "evaluation.groups[axis=*].accuracy", "min": 0.5}]}
GATES, KILLS, JUDGES = 8, 4, 2


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Of an empty database; None stands for SQLite."""
    if request.param == "sqlite":
        return None
    fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres")
    return fresh()


@contextmanager
def judges(world: HttpWorld, url: str | None, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that judge and deliver, and leave alone for a second what another has taken."""
    folder = world.services.settings.folder
    command = [sys.executable, "-m", "tests.helpers.judging", str(folder), url or "-", "1", str(folder / "notes")]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(number)]
    try:
        yield running
    finally:
        for each in running:
            each.kill()
            each.wait()


def left(world: HttpWorld) -> int:
    """Gates that are not decided."""
    return sum(gate.state is GateState.PENDING for gate in world.services.gates.find("default", limit=500).items)


def moved(world: HttpWorld, before: int) -> bool:
    """Whether a gate was taken since, if there is one to take."""
    return attempts(world) != before or left(world) == 0


def attempts(world: HttpWorld) -> int:
    """How often gates were taken."""
    with writing(world.services.engine) as connection:
        return int(connection.execute(select(func.sum(gates.c.attempts))).scalar_one())


@pytest.mark.timeout(600)
def test_judges_that_are_killed_at_any_moment(folder: Path, url: str | None) -> None:
    moments = random.Random(7)
    with http_world(folder, url=url) as world:
        store = world.services.gates
        new = NewGate(POLICY, "policy", "d" * 64, deliveries=(NewDelivery(KIND, {}),))
        for _ in range(GATES):
            store.create("default", new, world.finish(world.submit(), files(ROWS)).id)
        for _ in range(KILLS):
            before = attempts(world)
            with judges(world, url, JUDGES):
                wait_until(partial(moved, world, before), "a gate is taken")
                time.sleep(moments.uniform(0.0, 1.0))  # when they die is chance: any moment will do
        with writing(world.services.engine) as connection:  # the dead left their attempts behind; a judge of one gate has three
            connection.execute(gates.update().where(gates.c.state == "pending").values(attempts=0))
        with judges(world, url, JUDGES):
            wait_until(lambda: left(world) == 0, "every gate is decided", seconds=120)
            wait_until(lambda: told(world) == GATES, "everybody was told", seconds=120)
        decided = store.find("default", limit=500).items
        facts = world.services.jobs.facts()
        assert facts is not None
        assert facts.gates == {"pass": GATES, "fail": 0, "inconclusive": 0}
        assert {gate.verdict for gate in decided} == {"pass"}
        shown = [world.services.jobs.job(gate.job_id).verdict or {} for gate in decided]
        assert [each["gate"] for each in shown] == [gate.id for gate in decided]


def told(world: HttpWorld) -> int:
    """Gates whose delivery was noted at least once. Those of killed processes are made due at once."""
    with writing(world.services.engine) as connection:
        connection.execute(gate_deliveries.update().where(gate_deliveries.c.state == "pending").values(due=utc_after(-1.0)))
    notes = world.services.settings.folder / "notes"
    lines = notes.read_text().splitlines() if notes.exists() else []
    assert {line.split()[1] for line in lines} <= {"pass"}
    return len({line.split()[0] for line in lines})


@pytest.mark.parametrize("moment", ["taken", "decided", "delivering"])
def test_a_process_that_dies_between_two_steps(folder: Path, url: str | None, moment: str) -> None:
    with http_world(folder, url=url) as world:
        store = world.services.gates
        job = world.finish(world.submit(), files(ROWS))
        gate = store.create("default", NewGate(POLICY, "policy", "d" * 64, deliveries=(NewDelivery(KIND, {}),)), job.id).gate
        taken = store.take()
        assert taken is not None
        if moment != "taken":
            assert store.decide(taken, Outcome("pass", "it was judged"))
        if moment == "delivering":
            assert len(world.services.deliveries.take(KIND)) == 1
        with writing(world.services.engine) as connection:  # what the dead one held runs out
            connection.execute(gates.update().where(gates.c.state == "pending").values(due=utc_after(-1.0)))
        with judges(world, url, 1):
            wait_until(lambda: told(world) == 1, "it was told", seconds=120)
        assert store.record(gate.id).verdict == "pass"
        assert (store.record(gate.id).reason == "it was judged") == (moment != "taken")
        facts = world.services.jobs.facts()
        assert facts is not None
        assert facts.gates["pass"] == 1
