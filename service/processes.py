"""Child processes that are kept running: started in order, started again with a growing pause, stopped in reverse order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.tether import command_line

LOG_BYTES = 20 << 20
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_STEADY_SECONDS = 60.0
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Program:
    """What is to be kept running.

    Attributes:
        name: for messages.
        environment: of the process, in full.
        log: file that its output is added to.
        stop_seconds: time between SIGTERM and SIGKILL.
        feed: written to its standard input, for secrets that do not belong on a command line.
        pass_fds: descriptors that it inherits.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float = 10.0
    feed: bytes = field(default=b"", repr=False)
    pass_fds: tuple[int, ...] = ()


class Child:
    """One program, and the process that runs it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.hopeless = False
        self._started = 0.0
        self._pause = _FIRST_PAUSE
        self._not_before = 0.0
        self._log_from = 0

    def start(self) -> None:
        """Start the process in a session of its own: Ctrl-C in the terminal reaches only the parent, which orders the end."""
        self.program.log.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log.open("ab") as log:
            self._log_from = log.tell()
            self.process = subprocess.Popen(  # noqa: S603 - a fixed program of this package, or a server found on PATH
                command_line(self.program.command),
                stdin=subprocess.PIPE if self.program.feed else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.program.environment),
                start_new_session=True,
                pass_fds=self.program.pass_fds,
            )
        if self.process.stdin is not None:
            try:
                with self.process.stdin as stdin:
                    stdin.write(self.program.feed)
            except BrokenPipeError:  # it has ended; who watches it sees that
                pass
        self.starts += 1
        self._started = time.monotonic()

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self.process.poll() if self.process else None

    def due(self, now: float) -> bool:
        """Whether an ended process should be started again now; the pause doubles while it keeps ending early."""
        if self._not_before == 0.0:
            if now - self._started > _STEADY_SECONDS:
                self._pause = _FIRST_PAUSE
            self._not_before = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if now < self._not_before:
            return False
        self._not_before = 0.0
        return True

    @property
    def pause(self) -> float:
        """Seconds until the next start, after `due` said no."""
        return max(0.0, self._not_before - time.monotonic())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the process to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, give_up: Callable[[], bool]) -> bool:
        """Wait for the end, at most `stop_seconds`, then kill. Returns whether it ended by itself."""
        if self.process is None:
            return True
        until = time.monotonic() + self.program.stop_seconds
        while self.process.poll() is None:
            if time.monotonic() > until or give_up():
                os.killpg(self.process.pid, signal.SIGKILL)  # the whole session: what it started ends with it
                self.process.wait()
                return False
            time.sleep(0.02)
        return True

    def said(self) -> str:
        """The last lines that the present process wrote."""
        with self.program.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(min(self._log_from, end), end - _TAIL_BYTES))
            return log.read().decode("utf-8", "replace").strip()

    def rotate(self) -> None:
        """Keep the log file bounded: what is over the limit goes to one older file."""
        log = self.program.log
        if log.exists() and log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)
            self._log_from = 0


class Supervisor:
    """Keeps children running until told to stop.

    Args:
        tell: is told what happened, one line each.
    """

    def __init__(self, programs: Sequence[Program], tell: Callable[[str], None]) -> None:
        self.children = {program.name: Child(program) for program in programs}
        self._tell = tell
        self._mourned: set[tuple[str, int]] = set()
        self._rotated = time.monotonic()

    def start(self, name: str) -> Child:
        """Start one child."""
        self.children[name].start()
        return self.children[name]

    def watch(self) -> None:
        """Look once: start again what ended and whose pause is over; bound the logs."""
        now = time.monotonic()
        for name, child in self.children.items():
            if child.process is None or child.code is None:
                continue
            if child.due(now):
                child.start()
            elif (name, child.starts) not in self._mourned:
                self._mourned.add((name, child.starts))
                self._mourn(name, child)
        if now - self._rotated > 60:
            self._rotated = now
            for child in self.children.values():
                child.rotate()

    def _mourn(self, name: str, child: Child) -> None:
        """Tell of an end and of the next start; of ends that go on and on only once."""
        again = f"starting it again in {child.pause:.1f} s"
        if child.pause < _LONGEST_PAUSE / 2:
            self._tell(f"{name} ended ({ending(child.code or 0)}), {again}{last_line(child)}")
        elif not child.hopeless:
            self._tell(f"{name} ends whenever it is started; it is still tried twice a minute, see {child.program.log}")
        child.hopeless = child.pause >= _LONGEST_PAUSE / 2

    def stop(self, give_up: Callable[[], bool]) -> list[str]:
        """Stop every child, the last started first, each when the one before has ended. Returns those that had to be killed."""
        killed = []
        for name, child in reversed(self.children.items()):
            child.stop()
            if not child.wait(give_up):
                killed.append(name)
        return killed


def ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def last_line(child: Child) -> str:
    """The last line a child wrote, as an addition to a message; empty where it wrote nothing, or was killed without a word."""
    lines = child.said().splitlines()
    if not lines or (child.code or 0) < 0:
        return ""
    try:
        line = json.loads(lines[-1])["message"]
    except (ValueError, KeyError, TypeError):
        line = lines[-1]
    return f": {str(line)[:300]}"
