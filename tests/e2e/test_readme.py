"""The README's second section, line by line as it stands there: a service, an audit, a gate that passes and one that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.servers import wait_until
from tests.helpers.workplace import ROOT

SECTION = "## A service and a gate, in a quarter of an hour"
pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]


def blocks() -> list[list[str]]:
    """The commands of the section, block by block; a line that ends in a backslash goes on."""
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)
    section = rest.partition("\n## ")[0]
    found = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\\\n\s*", "", block).splitlines() for block in found]


class Terminal:
    """A shell in a folder of its own, with this environment's commands."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_")}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        own = {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.folder = folder
        self.environment = {**kept, **own}

    def start(self, line: str) -> subprocess.Popen[str]:
        """A command that goes on; `exec` makes it the process that signals reach."""
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=700, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """The second terminal, while the service of the first one runs."""
    made = Terminal(tmp_path)
    (up,) = [line.partition("#")[0] for line in blocks()[0] if line.startswith("safer-audit")]
    running = made.start(f"{up} --port 0")
    try:
        wait_until(
            lambda: next(tmp_path.glob(".local/share/safer-audit/client.toml"), None) is not None,
            "the service of the first terminal",
        )
        yield made
    finally:
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0


def test_a_stranger_sees_a_gate_pass_and_a_gate_fail(terminal: Terminal) -> None:
    _, preparing, gates = blocks()
    for line in preparing:
        terminal.run(line)
    (job,) = json.loads(terminal.run("safer-audit list --json"))["items"]
    assert job["state"] == "succeeded"
    passing, failing = (terminal.run(line) for line in gates)
    assert "verdict: pass\nexit code 0" in passing, passing
    assert "verdict: fail\nexit code 1" in failing, failing
    assert re.search(r"fail +no-regression\[axis=safety\]", failing), failing
    assert not re.search(r"fail +no-regression\[axis=chat\]", failing), failing
