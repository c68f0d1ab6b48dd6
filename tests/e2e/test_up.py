"""`safer-audit up`, as a person at a terminal uses it: real processes, the commands of the client, Ctrl-C and kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safer_engine import demo_data
from tests.helpers.servers import wait_until
from tests.helpers.tiny_model import build_reward_model
from tests.helpers.workplace import ROOT, alive, descendants

SMALL = ("sae.expansion=2", "sae.k=8", "sae.max_steps=40", "sae.min_steps=40", "model.max_length=96", "report.bootstrap=100")
QUICK = {
    "SAFER_LEASE_SECONDS": "6",
    "SAFER_HEARTBEAT_SECONDS": "2",
    "SAFER_RESEND_SECONDS": "3",
    "SAFER_RECONCILE_SECONDS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Machine:
    """One home folder, and commands given there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "service"
        named = ("SAFER_AUDIT_URL", "SAFER_AUDIT_TOKEN", "SAFER_AUDIT_PROFILE", "SAFER_SECRET_PEPPER", "SAFER_BROKER_URL")
        kept = {name: value for name, value in os.environ.items() if name not in named}
        self.environment = {**kept, **QUICK, "HOME": str(folder), "SAFER_HOME": str(self.home), "PYTHONPATH": str(ROOT)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on."""
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> str:
        """A command and what it printed; the exit code must be as given."""
        running = self.start(*arguments)
        out, err = running.communicate(timeout=280)
        assert running.returncode == code, f"{arguments}: {running.returncode}\n{out}\n{err}\n{self.logs()}"
        return out if code == 0 else err

    @contextmanager
    def up(self, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
        """The service while the block lasts, then Ctrl-C unless it ended in the block."""
        running = self.start("up", "--port", "0", "--json", *arguments)
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line, f"{running.communicate()[1]}\n{self.logs()}"
        try:
            yield running, json.loads(line)
            if running.poll() is None:
                running.send_signal(signal.SIGINT)
                assert running.wait(60) == 0, self.logs()
        finally:
            if running.poll() is None:
                running.kill()
            running.communicate()

    def logs(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.home / "logs").glob("*.log")))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def states(machine: Machine) -> list[str]:
    return [item["state"] for item in json.loads(machine.run("list", "--json"))["items"]]


def test_it_starts_by_itself_refuses_a_second_and_stops_on_ctrl_c(machine: Machine) -> None:
    with machine.up("--no-worker") as (running, told):
        assert urllib.request.urlopen(f"{told['url']}/healthz").status == 200
        ready = json.load(urllib.request.urlopen(f"{told['url']}/readyz"))
        assert ready["ok"], ready
        assert machine.run("list", "--json").strip() == '{\n  "items": []\n}'
        assert f"process {running.pid}" in machine.run("up", code=2)
        children = descendants(running.pid)
        assert len(children) == 2
    assert not any(map(alive, children))
    assert "cannot be reached" in machine.run("list", code=5)


@pytest.mark.full
def test_what_was_asked_for_survives_ctrl_c_and_kill(machine: Machine) -> None:
    build_reward_model(machine.folder / "rm")
    demo_data.write_demo(machine.folder / "data", demo_data.generate(seed=3, n_groups=30))
    data = next((machine.folder / "data").glob("preferences*.jsonl"))
    asked = ["submit", "-m", "rm", "-d", str(data), *(part for value in SMALL for part in ("--set", value))]
    with machine.up():
        job = machine.run(*asked, "--wait").split()[0]
        page = Path(machine.run("report", job).strip())
        assert page.read_text().startswith("<!doctype html>")
        second = machine.run(*asked, "--seed", "1").strip()
        wait_until(lambda: "running" in states(machine), "the second job runs", 60)
    with machine.up() as (running, _):
        wait_until(lambda: stage_of(machine, second) not in (None, "prepare", "pairs"), "it goes on", 120)
        children = descendants(running.pid)
        running.kill()
        wait_until(lambda: not any(map(alive, children)), "no process is left", 60)
    with machine.up():
        machine.run("watch", second)
        assert states(machine) == ["succeeded", "succeeded"]


def stage_of(machine: Machine, job: str) -> str | None:
    found: str | None = json.loads(machine.run("status", job, "--json"))["stage"]
    return found
