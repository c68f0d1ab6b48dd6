"""What earlier attempts at a stage took, kept in its work area until it is done: its cost counts all of them.

Written when an attempt ends by an error or a stop, and now and then while it makes progress, so that a kill loses little of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safer_engine.cost import Cost
from safer_engine.errors import SaferError
from safer_engine.events import Observer
from safer_engine.machine import Measurement
from safer_engine.store import WorkArea

_FILE = "attempts.json"
_EVERY_SECONDS = 15.0


class Attempt:
    """One attempt at a stage: passes on what an observer is told, and keeps in mind what it took.

    Attributes:
        earlier: what the attempts before it took.
    """

    def __init__(
        self, work: WorkArea, measurement: Measurement, observer: Observer, every_seconds: float = _EVERY_SECONDS
    ) -> None:
        self.earlier = _read(work)
        self._work = work
        self._measurement = measurement
        self._observer = observer
        self._every = every_seconds
        self._saved = time.monotonic()

    def save(self) -> None:
        """Write down what all attempts took so far; where that fails, it is not counted."""
        self._saved = time.monotonic()
        with suppress(SaferError, OSError), self._work.publish(_FILE, scratch=True) as path:
            path.write_text(added(self.earlier, self._measurement.so_far()).model_dump_json(), encoding="utf-8")

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Save where the block does not end well."""
        try:
            yield
        except BaseException:
            self.save()
            raise

    def stage_started(self, stage: str, key: str) -> None:
        """See `Observer`."""
        self._observer.stage_started(stage, key)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        """See `Observer`."""
        if time.monotonic() - self._saved >= self._every:
            self.save()
        self._observer.progress(stage, done, total, unit)

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """See `Observer`."""
        self._observer.stage_finished(stage, outcome, seconds)

    def note(self, stage: str, message: str) -> None:
        """See `Observer`."""
        self._observer.note(stage, message)

    def cancelled(self) -> bool:
        """See `Observer`."""
        return self._observer.cancelled()


def added(one: Cost, other: Cost) -> Cost:
    """One after the other: times add up, of memory the peak counts."""

    def peak(values: tuple[int | None, int | None]) -> int | None:
        return max((value for value in values if value is not None), default=None)

    return Cost(
        seconds=round(one.seconds + other.seconds, 3),
        cpu_seconds=round(one.cpu_seconds + other.cpu_seconds, 3),
        peak_memory_bytes=peak((one.peak_memory_bytes, other.peak_memory_bytes)),
        peak_gpu_bytes=peak((one.peak_gpu_bytes, other.peak_gpu_bytes)),
    )


def _read(work: WorkArea) -> Cost:
    try:
        return Cost.model_validate_json((work.scratch / _FILE).read_bytes())
    except (OSError, ValueError):
        return Cost()
