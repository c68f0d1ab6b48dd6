"""deploy/slurm/worker.sbatch: what it makes of a worker's exit codes and of signals, with a stand-in for worker and scontrol.

tests/e2e/test_slurm.py runs it under Slurm with real workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from cli.worker import worker_command
from tests.helpers.servers import wait_until

SCRIPT = Path(__file__).parents[2] / "deploy/slurm/worker.sbatch"
WORKER = """#!/usr/bin/env bash
echo "$* $SAFER_QUEUES" >> calls
if [ -e stay ]; then trap 'echo TERM >> calls; exit 0' TERM; touch there; while :; do sleep 0.05; done; fi
code=$(head -n1 codes); sed -i 1d codes; exit "$code"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> calls\n'


class Place:
    """A folder with stand-ins, in which the script runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("safer-audit", WORKER), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "env").write_text("SAFER_QUEUES=gpu\nIDLE_SECONDS=7\n")

    def start(self, codes: Sequence[int] = (), **environment: str) -> subprocess.Popen[str]:
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        given = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", **environment}
        return subprocess.Popen(
            ["bash", str(SCRIPT), "env"], cwd=self.folder, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("codes", "code"),
    [((75,), 0), ((0, 0, 75), 0), ((4, 4, 0, 4, 4, 75), 0), ((4, 4, 4), 4), ((0, 2), 2), ((137,), 137)],
)
def test_units_are_taken_until_none_comes_or_something_is_wrong(place: Place, codes: tuple[int, ...], code: int) -> None:
    assert place.start(codes).wait(60) == code
    assert place.calls() == ["worker --once --wait 7 gpu"] * len(codes)


@pytest.mark.parametrize(
    ("told", "count", "calls"),
    [
        (signal.SIGUSR1, "0", ["TERM", "scontrol requeue 42"]),
        (signal.SIGUSR1, "100", ["TERM"]),
        (signal.SIGTERM, "0", ["TERM"]),
    ],
)
def test_a_signal_stops_the_worker_and_the_end_of_the_time_queues_the_job_again(
    place: Place, told: signal.Signals, count: str, calls: list[str]
) -> None:
    (place.folder / "stay").touch()
    running = place.start(SLURM_RESTART_COUNT=count)
    wait_until((place.folder / "there").exists, "the worker is there", 60)
    running.send_signal(told)
    assert running.wait(60) == 0
    assert place.calls()[1:] == calls


def test_nothing_is_taken_without_settings_or_the_gpu(place: Place) -> None:
    missing = subprocess.run(["bash", SCRIPT], cwd=place.folder, capture_output=True, text=True, check=False)
    assert missing.returncode != 0
    assert "docs/slurm.md" in missing.stderr
    (place.folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (place.folder / "nvidia-smi").chmod(0o755)
    assert place.start((0, 75), SAFER_DEVICE="cuda").wait(60) == 9
    assert place.calls() == []


def test_the_command_has_the_options_that_the_script_gives() -> None:
    known = {name for option in worker_command.params if isinstance(option, click.Option) for name in option.opts}
    (line,) = [line.split() for line in SCRIPT.read_text().splitlines() if line.strip().startswith("safer-audit worker")]
    assert {word for word in line if word.startswith("--")} <= known
