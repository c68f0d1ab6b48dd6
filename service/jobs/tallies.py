"""Counting what stage runs came to, in the transaction that ends the run (`service.infra.stage_figures` says what).

The rows are few and every worker's: they are locked last in a transaction, in one order, and for one statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, select

from service.infra.stage_figures import FIGURES, Tally
from service.jobs.moves import Held, inserting
from service.jobs.requests import Finished
from service.jobs.tables import tallies

GPU = "gpu"
LOST = "lost"
_LAST = tuple(figure.name for figure in FIGURES.values() if figure.last)


@dataclass(frozen=True)
class Seen:
    """One observation of a figure, under the values of its labels."""

    name: str
    value: float
    first: str = ""
    second: str = ""


def tally(connection: Connection, seen: Iterable[Seen]) -> None:
    """Count observations. The last statements of a transaction, since every worker comes by the same rows."""
    rows: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for each in seen:
        key = (each.name, each.first, each.second, FIGURES[each.name].bucket(each.value))
        row = rows.setdefault(key, {**dict(zip(_KEY, key, strict=True)), "number": 0, "total": 0.0})
        row["number"] += 1
        row["total"] = each.value if each.name in _LAST else row["total"] + each.value
    if not rows:
        return
    statement = inserting(connection)(tallies).values([rows[key] for key in sorted(rows)])
    new = statement.excluded
    total = case((tallies.c.name.in_(_LAST), new.total), else_=tallies.c.total + new.total)
    more = {"number": tallies.c.number + new.number, "total": total}
    connection.execute(statement.on_conflict_do_update(index_elements=list(_KEY), set_=more))


_KEY = ("name", "first", "second", "bucket")


def tallied(connection: Connection) -> tuple[Tally, ...]:
    """All that was counted."""
    return tuple(Tally(**row) for row in connection.execute(select(tallies)).mappings())


def gpu_time(held: Held) -> float:
    """Seconds on the GPU queue since the last renewal of a lease; 0 on another queue."""
    if held.unit["queue"] != GPU:
        return 0.0
    return _seconds(held, "beat_at")


def gpu_held(held: Held, stage: str) -> list[Seen]:
    """The GPU time since the last renewal."""
    seconds = gpu_time(held)
    return [Seen("gpu_seconds", seconds, stage)] if seconds else []


def run_ended(held: Held, stage: str, outcome: str, code: str | None = None) -> list[Seen]:
    """A run ended: how long it took, and with which error's code, if it failed.

    How long a lost worker lived after it renewed its lease is not known: no GPU time is counted for that.
    """
    errors = [Seen("stage_errors", 1.0, stage, code)] if code is not None else []
    gpu = gpu_held(held, stage) if outcome != LOST else []
    return [Seen("stage_seconds", _seconds(held, "started"), stage, outcome), *errors, *gpu]


def artifact_made(stage: str, finished: Finished) -> list[Seen]:
    """What is known of an artifact; nothing of one that was there already."""
    if finished.outcome != "computed":
        return []
    size = [Seen("stage_bytes", float(finished.bytes), stage)] if finished.key is not None else []
    peak = (finished.cost or {}).get("peak_gpu_bytes")
    memory = [Seen("gpu_memory_peak_bytes", float(peak), stage)] if peak is not None else []
    rows = [Seen("dataset_rows", float(number), stage, fate) for fate, number in finished.rows.items()]
    return [*size, *memory, *rows, *_told(stage, finished.figures)]


def _seconds(held: Held, since: str) -> float:
    return max(float((held.unit["now"] - held.unit[since]).total_seconds()), 0.0)


def _told(stage: str, figures: Mapping[str, float]) -> list[Seen]:
    return [Seen(name, float(value), *(stage,) * len(FIGURES[name].labels)) for name, value in figures.items()]
