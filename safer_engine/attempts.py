"""What earlier attempts at a stage took, kept in its work area until it is done: its cost counts all of them.

Written when an attempt ends by an error or a stop, and now and then while it makes progress, so that a kill loses little of it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safer_engine.cost import Cost
from safer_engine.errors import SaferError
from safer_engine.events import Observer
from safer_engine.machine import Measurement, measured
from safer_engine.store import WorkArea

_FILE, _PART = "attempts.json", "cost-of-part-{}.json"
_EVERY_SECONDS = 15.0


class Attempt:
    """One attempt at a stage: passes on what an observer is told, and keeps in mind what it took.

    Attributes:
        before: what was spent until it began: attempts that did not end, and parts computed apart.
    """

    def __init__(
        self, work: WorkArea, measurement: Measurement, observer: Observer, every_seconds: float = _EVERY_SECONDS
    ) -> None:
        self._earlier = _read(work.scratch / _FILE)
        self.before = _total([self._earlier, *(_read(path) for path in sorted(work.scratch.glob(_PART.format("*"))))])
        self._work = work
        self._measurement = measurement
        self._observer = observer
        self._every = every_seconds
        self._saved = time.monotonic()

    def save(self) -> None:
        """Write down what all attempts took so far; where that fails, it is not counted."""
        self._saved = time.monotonic()
        with suppress(SaferError, OSError), self._work.publish(_FILE, scratch=True) as path:
            path.write_text(added(self._earlier, self._measurement.so_far()).model_dump_json(), encoding="utf-8")

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


@contextmanager
def counted_part(work: WorkArea, part: str) -> Iterator[None]:
    """Measure the computing of a part of a stage, and write it down for the stage's cost; where that fails, it is not counted."""
    name = _PART.format(part)
    measurement = Measurement()
    try:
        with measured() as measurement:
            yield
    finally:
        with suppress(SaferError, OSError), work.publish(name, scratch=True) as path:
            path.write_text(added(_read(work.scratch / name), measurement.cost).model_dump_json(), encoding="utf-8")


def _total(costs: Iterable[Cost]) -> Cost:
    return functools.reduce(added, costs, Cost())


def _read(path: Path) -> Cost:
    try:
        return Cost.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return Cost()
