"""Which unit is handed out next: by priority, then to the project that has least running, then by age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A unit that may be handed out.

    Attributes:
        starts: whether its job is queued: handing it out starts the job, which takes room among the project's running jobs.
        age: sorts older jobs first.
    """

    unit_id: int
    job_id: str
    project: str
    priority: int
    age: tuple[str, int]
    starts: bool


@dataclass(frozen=True)
class Shares:
    """What each project has already.

    Attributes:
        active: units handed out and not yet back, in this queue.
        room: how many more jobs may start.
        served: sorts projects that were served longer ago first; one that never was is absent.
    """

    active: Mapping[str, int]
    room: Mapping[str, int]
    served: Mapping[str, float]


def fair_order(candidates: Sequence[Candidate], shares: Shares, limit: int) -> tuple[int, ...]:
    """Ids of the units to hand out, first first, at most `limit`.

    A unit is never handed out before one of higher priority, except where that one's project may not start another job.
    """
    waiting: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda each: (-each.priority, each.age)):
        waiting.setdefault(candidate.project, []).append(candidate)
    active, room, turn = Counter(dict(shares.active)), dict(shares.room), dict(shares.served)
    latest = max(turn.values(), default=0.0)
    chosen: list[int] = []
    while len(chosen) < limit:
        heads = [head for project in waiting if (head := _head(waiting[project], room.get(project, 0))) is not None]
        if not heads:
            break
        best = min(heads, key=lambda each: (-each.priority, active[each.project], turn.get(each.project, -1.0), each.age))
        chosen.append(best.unit_id)
        waiting[best.project].remove(best)
        if best.starts:
            room[best.project] -= 1
        active[best.project] += 1
        latest += 1.0
        turn[best.project] = latest
    return tuple(chosen)


def _head(waiting: Sequence[Candidate], room: int) -> Candidate | None:
    return next((candidate for candidate in waiting if not candidate.starts or room > 0), None)
