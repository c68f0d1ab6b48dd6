"""A private Slurm of one machine: munge, slurmctld and slurmd on free ports, with one GPU that is none (/dev/null)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

from service.embedded import free_port
from tests.helpers.servers import missing, wait_until

_CONFIGURATION = """ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=n1 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Started when made; `close` ends its daemons and every job.

    Args:
        folder: empty, with a short name (a socket lies in it).
    """

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
            missing("Slurm (Debian: slurmctld slurmd slurm-client munge; started as root)")
        self.folder = folder
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        text = _CONFIGURATION.format(folder=folder, controller=free_port(), daemon=free_port(), cores=os.cpu_count())
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("NodeName=n1 Name=gpu File=/dev/null\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        named = ("socket", "log-file", "pid-file", "seed-file")
        files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in named]
        self._start("munged", "--force", "--foreground", f"--key-file={key}", *files)
        wait_until((folder / "munge.socket").exists, "munged listens", 30)
        self._start("slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf"))
        self._start("slurmd", "-D", "-N", "n1", "-f", str(folder / "slurm.conf"))
        wait_until(self.idle, f"a node\n{self.log()}", 60)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True))

    def idle(self) -> bool:
        """Whether the node is free."""
        return self.ask("sinfo", "--noheader", "--format=%T", code=None).strip() == "idle"

    def ask(self, *command: str | Path, code: int | None = 0) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert code is None or done.returncode == code, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """`sbatch`; the job's id."""
        return self.ask("sbatch", "--parsable", *arguments).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.ask("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self) -> str:
        """What the daemons wrote."""
        return "".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End all jobs, then the daemons."""
        self.ask("scancel", "--full", "--signal=KILL", "--state=RUNNING", code=None)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)
