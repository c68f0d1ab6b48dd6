"""Threads that act for the service beside its API: sending units, callbacks, judging, tags."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

_LOG = logging.getLogger(__name__)


class Loop(Protocol):
    """Something that acts until it is told to stop."""

    def run(self, stop: threading.Event) -> None:
        """Act until told to stop."""


class Loops:
    """A thread for each loop.

    One that ends unasked takes the process with it, so that whoever runs the process starts it again: a service without its
    dispatcher, or without its judge, would go on answering and do nothing.

    Args:
        stopping: set when the loops are to end; set here too when one of them has ended unasked.
        end: ends the process's main thread. Called from a loop's thread.
    """

    def __init__(self, loops: Sequence[Loop], stopping: threading.Event, end: Callable[[], None]) -> None:
        self._stopping = stopping
        self._end = end
        self._threads = [threading.Thread(target=self._run, args=(each,), name=type(each).__name__) for each in loops]
        self.fallen: list[str] = []
        """Names of loops that ended unasked."""

    def start(self) -> None:
        """Start all of them."""
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        """Wait for their ends, so many seconds in all."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, loop: Loop) -> None:
        try:
            loop.run(self._stopping)
        finally:
            if not self._stopping.is_set():
                name = type(loop).__name__
                self.fallen.append(name)
                _LOG.critical("%s ended unasked: the process ends, to be started again", name)
                self._stopping.set()
                self._end()
