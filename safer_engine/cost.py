"""What computing an artifact took, and what it was expected to take."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Cost(BaseModel):
    """What computing an artifact took, attempts that were broken off included as far as they are known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    peak_gpu_bytes: int | None = None


class Planned(BaseModel):
    """What computing an artifact was expected to take; None where that could not be told. Disk: its payload."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    disk_bytes: int | None = None


def planned_total(stages: Iterable[Planned]) -> Planned:
    """Stages one after another: seconds and disk add up, of memory the peak counts; None where a stage's is not known.

    Of GPU memory, which only some stages use, it is the peak of those that are known.
    """
    found = list(stages)
    seconds = [each.seconds for each in found if each.seconds is not None]
    memory = [each.peak_memory_bytes for each in found if each.peak_memory_bytes is not None]
    disk = [each.disk_bytes for each in found if each.disk_bytes is not None]
    return Planned(
        seconds=round(sum(seconds), 3) if len(seconds) == len(found) else None,
        peak_memory_bytes=max(memory, default=None) if len(memory) == len(found) else None,
        peak_gpu_bytes=max((each.peak_gpu_bytes for each in found if each.peak_gpu_bytes is not None), default=None),
        disk_bytes=sum(disk) if len(disk) == len(found) else None,
    )
