"""What a child tells its parent, and hears from it: JSON documents over a pipe, nothing that could run code."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PROGRESS_SECONDS = 0.2
_LONGEST_TEXT = 2000
STOP = "stop"


class Line:
    """The child's end of the pipe; may be used by many threads.

    Args:
        clean: applied to every text that is sent.
    """

    def __init__(self, pipe: Connection, clean: Callable[[str], str]) -> None:
        self._pipe = pipe
        self._clean = clean
        self._lock = threading.Lock()

    def send(self, kind: str, **data: Any) -> None:
        """Tell the parent something. Nothing happens when it is gone: the listener ends this process."""
        document = json.dumps({"type": kind, **self._cleaned(data)}, allow_nan=True, default=str).encode()
        try:
            with self._lock:
                self._pipe.send_bytes(document)
        except OSError:
            return

    def _cleaned(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, dict):
            return {name: self._cleaned(each) for name, each in value.items()}
        return [self._cleaned(each) for each in value] if isinstance(value, (list, tuple)) else value


class PipeObserver:
    """Passes the course of a stage on to the parent (see `safer_engine.events.Observer`).

    Attributes:
        outcome: how the last stage ended, as the engine said.
    """

    def __init__(self, line: Line, stopping: threading.Event) -> None:
        self._line = line
        self._stopping = stopping
        self._last = 0.0
        self.outcome = "computed"

    def stage_started(self, stage: str, key: str) -> None:
        """See `Observer.stage_started`: the parent knows."""

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """See `Observer.progress`; a few times a second."""
        now = time.monotonic()
        if now - self._last >= _PROGRESS_SECONDS or done >= total:
            self._last = now
            self._line.send("progress", done=float(done), total=float(total), unit=unit[:40])

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """See `Observer.stage_finished`."""
        self.outcome = outcome

    def note(self, stage: str, message: str) -> None:
        """See `Observer.note`."""
        self._line.send("note", message=message[:_LONGEST_TEXT])

    def transferred(self, op: str, size: int, seconds: float) -> None:
        """A file moved between this process and the artifact store (see `service.infra.stores.OnTransfer`)."""
        self._line.send("transfer", op=op, size=size, seconds=seconds)

    def cancelled(self) -> bool:
        """See `Observer.cancelled`."""
        return self._stopping.is_set()


class LineHandler(logging.Handler):
    """Sends log records to the parent: the text of our own, of other packages only that they warned.

    What other packages write may quote what they were working on, and dataset text does not belong in logs.
    """

    OWN = ("safer_engine", "service", "workers")

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        if record.name.split(".")[0] in self.OWN:
            self._line.send("log", level=record.levelno, logger=record.name, message=record.getMessage()[:_LONGEST_TEXT])
        elif record.levelno >= logging.WARNING:
            place = f"{record.name}, line {record.lineno}"
            self._line.send("log", level=logging.DEBUG, logger="workers.child", message=f"a warning from {place}")
