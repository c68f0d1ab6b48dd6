"""The script of docs/slurm.md under a real Slurm: its time runs out, it is cancelled, it goes on, it ends when nothing waits."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.embedded import free_port
from service.jobs.model import JobRecord, JobState, UnitState
from tests.helpers.servers import wait_until
from tests.helpers.slurm import Slurm
from tests.helpers.workplace import ROOT, Workplace, audit_of, material

RESTART_SECONDS = 10
"""slurmd refuses a job whose credential is no newer than its last end ("credential revoked"); Slurm itself waits two minutes."""

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]
SLOW: dict[str, Any] = {"sae": {"kind": "topk", "max_steps": 6000, "min_steps": 6000, "batch": 256, "k": 8}}
SMALL = ("--cpus-per-task=1", "--mem=500M")
SAE = "sae"


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="safer-slurm-"))
    made = Slurm(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    made = Workplace(tmp_path / "place", broker_url=f"redis://127.0.0.1:{free_port()}/0")  # nobody is there
    yield made
    made.close()


def settings_file(place: Workplace, folder: Path) -> Path:
    """The file that the script reads."""
    ours = {name: value for name, value in place.environment.items() if name.startswith("SAFER_")}
    ours |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    path = folder / "safer-audit.env"
    path.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in ours.items()) + "IDLE_SECONDS=3\n")
    path.chmod(0o600)
    return path


def test_a_job_goes_on_where_the_time_of_another_was_up(slurm: Slurm, place: Workplace, tmp_path: Path) -> None:
    asked = place.submit(audit_of(place, material(tmp_path / "material"), **SLOW))
    command = (*SMALL, ROOT / "deploy/slurm/worker.sbatch", settings_file(place, slurm.folder))
    first = slurm.submit(*command)
    log = slurm.folder / f"safer-audit-{first}.log"

    def given_back() -> bool:
        (unit,) = [each for each in place.jobs.units(asked.id) if each.stage == SAE]
        return unit.state in (UnitState.READY, UnitState.SENT) and (unit.failures, unit.owner) == (0, None)

    until(lambda: steps(place, asked) > 200, "the training is under way", log)
    slurm.ask("scancel", "--signal=USR1", "--batch", first)  # as --signal=B:USR1@180 has it
    until(lambda: slurm.job(first)["JobState"] == "PENDING", "the job is queued again", log)
    assert slurm.job(first)["Restarts"] == "1"
    assert given_back()
    scratch = place.settings.folder / "artifacts" / "work" / "default"
    assert [path for path in scratch.rglob("*") if "checkpoint" in path.name or path.suffix == ".safetensors"]
    done = steps(place, asked)
    until(slurm.idle, "the node is free", log)
    slurm.ask("scontrol", "update", f"JobId={first}", f"StartTime=now+{RESTART_SECONDS}")
    until(lambda: not given_back(), "it goes on", log)
    until(lambda: steps(place, asked) > done, "it goes on where it was", log)
    slurm.ask("scancel", first)  # every process is told to stop
    until(lambda: slurm.job(first)["JobState"] == "CANCELLED", "the job is cancelled", log)
    until(given_back, "its unit is given back", log)
    second = slurm.submit("--array=1-2%1", *command)
    until(lambda: place.jobs.job(asked.id).state is JobState.SUCCEEDED, "the audit is done", slurm.folder)
    until(lambda: slurm.ask("squeue", "--noheader").strip() == "", "nothing is left to do", slurm.folder)
    assert "JobState=COMPLETED" in slurm.ask("scontrol", "show", "job", second)


def steps(place: Workplace, job: JobRecord) -> float:
    """Steps of training so far."""
    return next(row.done or 0.0 for row in place.jobs.stages(job.id) if row.name == SAE)


def until(check: Any, what: str, log: Path) -> None:
    """Wait; a failure shows what the jobs wrote."""
    try:
        wait_until(check, what, 600)
    except TimeoutError as error:
        files = [log] if log.is_file() else sorted(log.glob("safer-audit-*.log"))
        raise AssertionError(f"{error}\n" + "\n".join(path.read_text(errors="replace")[-3000:] for path in files)) from error
