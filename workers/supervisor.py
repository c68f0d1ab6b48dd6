"""The parent's view of a child process: start it, hear what it tells, ask it to stop, end it, and say how it ended.

Children are forked from a server process (multiprocessing's forkserver) that has imported torch but never touched a GPU:
the first child takes seconds, later ones some ten milliseconds, and each may use CUDA.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

from safer_engine.errors import ResourceError
from service.infra.settings import Settings
from workers.observer import STOP
from workers.order import Order

_LOOK_SECONDS = 0.2
_LARGEST_MESSAGE = 64 << 20
_LAST_WORDS_SECONDS = 5.0


class Reason(StrEnum):
    """Why a child is to stop before it is done: after a checkpoint for the first two, at once for the others."""

    CANCEL = "cancel"
    SHUTDOWN = "shutdown"
    LOST = "lost"
    BUDGET = "budget"


class Ears(Protocol):
    """Hears what a child tells while it works. Must not raise."""

    def progress(self, done: float, total: float, unit: str) -> None:
        """So much is done."""

    def note(self, message: str) -> None:
        """Something the job's owner should read."""

    def log(self, level: int, logger: str, message: str) -> None:
        """A log record."""

    def transferred(self, op: str, size: int, seconds: float) -> None:
        """A file was read from the artifact store (`get`) or written to it (`put`)."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        how: `finished`, `failed`, `interrupted` as it said itself; `died` without a word; `memory`: over its limit.
        reason: why it was to stop, if it was.
        facts: what it said last.
        code: exit code; below 0, the signal that killed it.
    """

    how: str
    reason: Reason | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    code: int | None = None


class Nursery:
    """Starts children, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["workers.preload"])

    def warm_up(self) -> None:
        """Start the server process now, so that the first child does not wait for its imports."""
        forkserver.ensure_running()

    def run(self, order: Order, ears: Ears, reason: Callable[[], Reason | None]) -> Ended:
        """Run a child to its end.

        Args:
            reason: asked several times a second; an answer makes the child stop.

        Raises:
            ResourceError: no process could be started.
        """
        from workers.child import main

        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=main, args=(order.to_json(), theirs), daemon=True, name=f"safer-{order.stage}")
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise ResourceError(f"no process could be started: {error}", "see the machine's limits") from error
        finally:
            theirs.close()
        with ours:
            watch = _Watch(self._settings, process, ours, ears, reason)
            try:
                return watch.to_the_end()
            finally:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()


class _Watch:
    """One child being watched."""

    def __init__(
        self,
        settings: Settings,
        process: ForkServerProcess,
        pipe: connection.Connection,
        ears: Ears,
        reason: Callable[[], Reason | None],
    ) -> None:
        self._settings = settings
        self._process = process
        self._pipe = pipe
        self._ears = ears
        self._ask = reason
        self._reason: Reason | None = None
        self._deadline = float("inf")
        self._over_memory = False
        self._last: dict[str, Any] = {}

    def to_the_end(self) -> Ended:
        """Hear the child until it is gone."""
        open_, alive = True, True
        while alive:
            ready = connection.wait([self._process.sentinel, *([self._pipe] if open_ else [])], timeout=_LOOK_SECONDS)
            if self._pipe in ready:
                open_ = self._hear()
            elif self._process.sentinel in ready:
                alive = False
            self._look()
        self._process.join()
        return Ended(self._how(), self._reason, self._last, self._process.exitcode)

    def _how(self) -> str:
        return "memory" if self._over_memory and not self._last else str(self._last.get("type", "died"))

    def _hear(self) -> bool:
        """Take one message; False when the pipe is closed."""
        try:
            message = json.loads(self._pipe.recv_bytes(_LARGEST_MESSAGE))
        except (EOFError, OSError, ValueError):
            self._deadline = min(self._deadline, time.monotonic() + _LAST_WORDS_SECONDS)
            return False
        kind = message.pop("type", None)
        if kind == "progress":
            self._ears.progress(float(message["done"]), float(message["total"]), str(message["unit"]))
        elif kind == "note":
            self._ears.note(str(message["message"]))
        elif kind == "log":
            self._ears.log(int(message["level"]), str(message["logger"]), str(message["message"]))
        elif kind == "transfer":
            self._ears.transferred(str(message["op"]), int(message["size"]), float(message["seconds"]))
        elif kind in ("finished", "failed", "interrupted"):
            self._last = {"type": kind, **message}
            self._deadline = min(self._deadline, time.monotonic() + _LAST_WORDS_SECONDS)
        return True

    def _look(self) -> None:
        """Stop the child where that is due."""
        limit = self._settings.worker_memory_bytes
        if limit is not None and own_bytes(self._process.pid) > limit:
            self._over_memory = True
            self._process.kill()
        if self._reason is None and (reason := self._ask()) is not None:
            self._reason = reason
            if reason in (Reason.LOST, Reason.BUDGET):
                self._process.kill()
            else:
                self._deadline = min(self._deadline, time.monotonic() + self._settings.terminate_seconds)
                self._send_stop()
        if self._reason in (Reason.CANCEL, Reason.SHUTDOWN) and self._ask() is Reason.LOST:
            self._reason = Reason.LOST
            self._process.kill()
        if time.monotonic() > self._deadline:
            self._process.kill()

    def _send_stop(self) -> None:
        try:
            self._pipe.send_bytes(STOP.encode())
        except OSError:
            return  # it is gone already


def own_bytes(pid: int | None) -> int:
    """Memory that a process has in use, mapped files aside: the system takes those back by itself. 0 where it does not tell."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
