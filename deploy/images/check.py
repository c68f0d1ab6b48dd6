"""What can be shown of the images without a container engine: their own install steps, run, and what they install, started.

    python -m deploy.images.check [--how root|venv]

Reads Dockerfile.service and Dockerfile.gpu and carries out their RUN, COPY, ENV and ARG lines in a fresh Debian made by
debootstrap (both; the second is not on its CUDA base), or, where that is not allowed, their pip steps in a fresh virtual
environment; and says which. Then API and worker run from it as the images would: the same user and environment, a read-only
root, SAFER_HOME and /tmp alone writable, the command and the health check of the Dockerfile; one small audit goes through them.
TORCH chooses the build of torch, as in the Makefile. Nothing of it stays. Exit code 0 when all of it held.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.images import roots
from deploy.images.dockerfile import Stage, read_stages
from service.embedded import broker_program, free_port

SOURCE = Path(__file__).parents[2]
HOME = "/var/lib/safer-audit"
IMAGES = ("service", "gpu")
_TRIES = 20
_TORCH = "torch==2.13.0"
_STARTED = time.monotonic()
Line = Callable[[Sequence[str], Mapping[str, str]], list[str]]


@dataclass(frozen=True)
class Image:
    """One image's last stage, how a command line runs in what was installed for it, and what the commands call SAFER_HOME."""

    stage: Stage
    line: Line
    home: str


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=("root", "venv"), help="default: a debootstrap root where that is allowed")
    how = parser.parse_args().how
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    why = roots.why_not()
    if how == "root" and why:
        print(f"no debootstrap root here: {why}")
        return 2
    with passing_folder() as folder:
        home = folder / "home"
        home.mkdir(mode=0o700)
        if how == "venv" or why:
            say(f"in fresh virtual environments, not a root of their own: {why or 'as asked'}")
            images = {name: in_venv(name, folder, home) for name in IMAGES}
        else:
            say(f"in fresh debootstrap roots ({roots.SUITE}), entered by chroot; the CUDA base is not among them")
            os.chown(home, 10001, 10001)
            images = in_roots(folder, home)
        prove(images, folder)
    say("removed; all of it held")
    return 0


@contextmanager
def passing_folder() -> Iterator[Path]:
    """A folder for the time being. What still writes into it is being killed: removal is tried until nothing does."""
    folder = Path(tempfile.mkdtemp(prefix="safer-images-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _ in range(_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.5)
        else:
            print(f"could not remove {folder}", file=sys.stderr)


def say(text: str) -> None:
    """One line, with the seconds since the start."""
    print(f"{time.monotonic() - _STARTED:6.1f} s  {text}", flush=True)


def in_roots(folder: Path, home: Path) -> dict[str, Image]:
    """Both Dockerfiles carried out, each stage in a root of its own."""
    base = folder / "base"
    roots.bootstrap(base)
    say("debootstrap: done")
    builder = roots.Builder(base, folder, SOURCE, {"TORCH": os.environ.get("TORCH", _TORCH)})
    images = {}
    for name in IMAGES:
        stages = read_stages(SOURCE / f"Dockerfile.{name}")
        root = builder.build(name, stages)
        root.writable[HOME] = home
        runs = sum(one.word == "RUN" for stage in stages for one in stage.instructions)
        say(f"Dockerfile.{name}: {runs} RUN lines ended with 0")
        images[name] = Image(stages[-1], _rooted(root, stages[-1]), HOME)
    return images


def _rooted(root: roots.Root, stage: Stage) -> Line:
    def line(told: Sequence[str], given: Mapping[str, str]) -> list[str]:
        return root.command(told, {**stage.environment(), **given}, user=stage.last("USER"), cwd=stage.last("WORKDIR"))

    return line


def in_venv(name: str, folder: Path, home: Path) -> Image:
    """The steps of one Dockerfile that need no Debian, in a fresh virtual environment."""
    stages = read_stages(SOURCE / f"Dockerfile.{name}")
    venv, tree = folder / name / "venv", folder / name / "tree"
    tree.mkdir(parents=True)
    for one in stages[0].instructions:
        if one.word == "COPY":
            roots.copy_in(one.rest.split(), tree, SOURCE)
    environment = {**os.environ, "VENV": str(venv), "TORCH": os.environ.get("TORCH", _TORCH)}
    runs = " ".join(one.rest for one in stages[0].instructions if one.word == "RUN")
    for step in re.findall(r"install\.sh (venv|torch|product \S+)", runs):
        subprocess.run(["sh", "deploy/images/install.sh", *step.split()], cwd=tree, env=environment, check=True)
    say(f"Dockerfile.{name}: venv, torch and product steps ended with 0")

    def line(told: Sequence[str], given: Mapping[str, str]) -> list[str]:
        path = f"{venv}/bin:{os.defpath}"
        all_given = {**stages[-1].environment(), "PATH": path, "HOME": str(home), "SAFER_HOME": str(home), **given}
        here = [str(SOURCE / "deploy/images/healthy.py") if part == "/opt/healthy.py" else part for part in told]
        return ["env", "-i", *(f"{key}={value}" for key, value in all_given.items()), *here]

    return Image(stages[-1], line, str(home))


def prove(images: Mapping[str, Image], folder: Path) -> None:
    """API and worker up, healthy, one audit through them, and down again."""
    api, worker = images["service"], images["gpu"]
    broker_port, port, metrics_port = free_port(), free_port(), free_port()
    given = {
        "SAFER_BROKER_URL": f"redis://127.0.0.1:{broker_port}/0",
        "SAFER_SECRET_PEPPER": secrets.token_hex(32),
        "SAFER_HOST": "127.0.0.1",
        "SAFER_PORT": str(port),
        "SAFER_METRICS_PORT": str(metrics_port),
        "SAFER_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    broker = [broker_program(), "--port", str(broker_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with ExitStack() as stack:
        stack.enter_context(running("broker", broker, folder))
        ran(api, ["safer-audit", "migrate"], given)
        stack.enter_context(running("api", api.line(api.stage.command(), given), folder))
        until(lambda: healthy(api, given), "the health check of Dockerfile.service")
        ready = "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SAFER_PORT'] + '/readyz', timeout=5)"
        until(lambda: call(api, ["python", "-c", ready], given).returncode == 0, "/readyz")
        stack.enter_context(running("worker", worker.line(worker.stage.command(), given), folder))
        until(lambda: healthy(worker, given), "the health check of Dockerfile.gpu")
        audit(api, worker, given)
        ran(worker, ["safer-audit", "worker", "--once"], given)
        refused(api, given)


def audit(api: Image, worker: Image, given: Mapping[str, str]) -> None:
    """One small audit, submitted from the service's image and done by the worker."""
    script = (SOURCE / "deploy/images/tiny_inputs.py").read_text(encoding="utf-8")
    inputs = f"{worker.home}/inputs"
    call(worker, ["python", "-c", script, inputs], given).check_returncode()
    say("worker's image: trained a tiny reward model on the CPU")
    key = json.loads(
        call(api, ["safer-audit", "admin", "keys", "create", "--name", "check", "--role", "submit", "--json"], given).stdout
    )
    client = {**given, "SAFER_AUDIT_URL": f"http://127.0.0.1:{given['SAFER_PORT']}", "SAFER_AUDIT_TOKEN": key["secret"]}
    ran(api, ["safer-audit", "submit", "--spec", f"{inputs}/spec.yaml", "--wait", "--quiet"], client)


def refused(image: Image, given: Mapping[str, str]) -> None:
    """What an image may not do: be root, write beside its volumes. A virtual environment has no such bounds."""
    if image.home != HOME:
        return
    told = call(image, ["python", "-c", "import os; print(os.getuid()); open('/opt/venv/x', 'w')"], given)
    if not told.stdout.startswith("10001\n") or "Read-only file system" not in told.stderr:
        raise RuntimeError(f"the root is not read-only for uid 10001: {told.stdout}{told.stderr}")
    say("uid 10001; writing beside SAFER_HOME and /tmp: Read-only file system")


def call(image: Image, told: Sequence[str], given: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in an image to its end."""
    return subprocess.run(image.line(told, given), capture_output=True, text=True, check=False, timeout=300)


def ran(image: Image, told: Sequence[str], given: Mapping[str, str]) -> None:
    """Run a command that must end with 0."""
    done = call(image, told, given)
    if done.returncode:
        raise RuntimeError(f"{' '.join(told)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    say(f"{' '.join(told)}: 0")


def healthy(image: Image, given: Mapping[str, str]) -> bool:
    """Whether the HEALTHCHECK command ends with 0."""
    return call(image, image.stage.health(), given).returncode == 0


def until(holds: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    """Ask until it holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not hold within {seconds:.0f} s")
        time.sleep(0.5)
    say(f"{what}: holds")


@contextmanager
def running(name: str, command: Sequence[str], folder: Path) -> Iterator[None]:
    """A process for the time being; stopped by SIGTERM, to which it must answer with exit code 0."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode}")
        os.kill(_inner(process.pid), signal.SIGTERM)
        code = process.wait(60)
        say(f"{name}: SIGTERM, then exit code {code}")
        if code:
            raise RuntimeError(f"{name} ended with {code} after SIGTERM")
    except BaseException:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        process.kill()
        process.wait(30)


def _inner(pid: int) -> int:
    """The process that `unshare` started, which is number 1 in its own namespace; else the process itself."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if command == b"unshare" and children else pid


if __name__ == "__main__":
    sys.exit(main())
