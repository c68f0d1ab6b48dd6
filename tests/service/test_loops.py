"""Threads beside the API: they end when told to, and none of them ends unnoticed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.embedded import free_port
from service.jobs.database import migrate
from service.loops import Loops
from tests.helpers.databases import PEPPER, database, settings_for
from tests.helpers.servers import accepts, wait_until

ROOT = Path(__file__).parents[2]


class Steady:
    """Acts until told to stop."""

    def run(self, stop: threading.Event) -> None:
        stop.wait(60)


class Faulty:
    """Ends by an error of its own."""

    def run(self, stop: threading.Event) -> None:
        raise LookupError("not foreseen")


class Leaver:
    """Ends without a word."""

    def run(self, stop: threading.Event) -> None:
        return


def test_loops_end_when_told_to_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stopping, ended = threading.Event(), threading.Event()
    loops = Loops([Steady(), Steady()], stopping, ended.set)
    loops.start()
    stopping.set()
    loops.join(30)
    assert loops.fallen == []
    assert not ended.is_set()
    assert not caplog.records


@pytest.mark.parametrize("loop", [Faulty(), Leaver()])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_ends_unasked_ends_the_others_and_the_process(
    loop: Faulty | Leaver, caplog: pytest.LogCaptureFixture
) -> None:
    stopping, ended = threading.Event(), threading.Event()
    loops = Loops([Steady(), loop], stopping, ended.set)
    with caplog.at_level(logging.CRITICAL):
        loops.start()
        assert ended.wait(30)
        loops.join(30)
    assert loops.fallen == [type(loop).__name__]
    assert stopping.is_set()
    assert "ended unasked" in caplog.text


BROKEN = """
import sys
from service import __main__ as program
from service.gate_judge import GateJudge

def run(self, stop):
    with open(sys.argv[1]) as wait:
        wait.read()
    raise LookupError("not foreseen")

GateJudge.run = run
sys.exit(program.main())
"""
"""The service with a judge that fails once somebody has opened and closed a pipe."""


def test_a_service_without_its_judge_ends_so_that_it_is_started_again(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with database(settings) as db:
        migrate(db.engine)
    port, pipe = free_port(), tmp_path / "pipe"
    os.mkfifo(pipe)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_")}
    given = {"SAFER_HOME": str(settings.folder), "SAFER_PORT": str(port), "SAFER_SECRET_PEPPER": PEPPER}
    running = subprocess.Popen(
        [sys.executable, "-c", BROKEN, str(pipe)], cwd=ROOT, env={**plain, **given}, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: accepts(port) or running.poll() is not None, "the API listens")
        pipe.write_text("now")
        said = running.communicate(timeout=60)[1]
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 4, said
    assert "GateJudge ended unasked" in said
