"""A worker that is stopped while it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from service.embedded import free_port
from service.jobs.database import migrate
from tests.helpers.databases import PEPPER, database, settings_for
from tests.helpers.servers import accepts, wait_until
from tests.helpers.workplace import descendants

ROOT = Path(__file__).parents[2]


def catches_term(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.parametrize("module", ["workers", "service"])
def test_a_stop_while_it_starts_is_a_clean_end(tmp_path: Path, module: str) -> None:
    settings = settings_for(tmp_path)
    with database(settings) as db:
        migrate(db.engine)
    given = {"SAFER_HOME": str(settings.folder), "SAFER_METRICS_PORT": "0", "SAFER_SECRET_PEPPER": PEPPER, "SAFER_PORT": "0"}
    running = subprocess.Popen(
        [sys.executable, "-m", module], cwd=ROOT, env={**os.environ, **given}, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: catches_term(running.pid), "the process listens for signals", 60)
        running.terminate()
        assert descendants(running.pid) == set(), "this is later than the start"
        said = running.communicate(timeout=60)[1]
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, said
    assert "Traceback" not in said


def test_a_worker_for_one_unit_tells_metrics_where_the_port_was_chosen_and_two_do_not_fight_for_it(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with database(settings) as db:
        migrate(db.engine)
    port = free_port()
    given = {"SAFER_HOME": str(settings.folder), "SAFER_METRICS_PORT": str(port), "SAFER_SECRET_PEPPER": PEPPER}
    command = [sys.executable, "-m", "workers", "--once", "--wait"]
    environment = {**os.environ, **given}
    first = subprocess.Popen([*command, "120"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: accepts(port) or first.poll() is not None, "the worker tells metrics")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert b"safer_artifact_bytes" in answer.read()
        second = subprocess.run(
            [*command, "0"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 75, second.stderr
        assert f"no metrics on port {port}" in second.stderr
        first.terminate()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.communicate()


KILLED = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import workers.preload; print('whole', flush=True)"])
while "numpy" not in pathlib.Path(f"/proc/{child.pid}/maps").read_text():
    time.sleep(0.005)
os.kill(os.getpid(), 9)
"""


def test_a_server_of_children_does_not_go_on_importing_for_a_worker_that_was_killed() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""  # read to its end: the server, which shares it, has ended too


def test_a_server_of_children_is_left_when_every_process_is_told_to_stop() -> None:
    script = "import os, signal, workers.preload; os.kill(os.getpid(), signal.SIGTERM); print('there')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr


def test_one_unit_is_waited_for(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with database(settings) as db:
        migrate(db.engine)
    given = {**os.environ, "SAFER_HOME": str(settings.folder), "SAFER_METRICS_PORT": "0"}

    def worker(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "workers", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=given, stderr=subprocess.PIPE, text=True)

    codes = [
        worker(*arguments).wait(60) for arguments in (["--once"], ["--once", "--wait=0.5"], ["--wait=1"], ["--once", "--wait=x"])
    ]
    assert codes == [0, 75, 2, 2]
    waiting = worker("--once", "--wait", "600")
    try:
        wait_until(lambda: catches_term(waiting.pid), "the process listens for signals", 60)
        waiting.terminate()
        assert waiting.wait(60) == 0
    finally:
        waiting.kill()
