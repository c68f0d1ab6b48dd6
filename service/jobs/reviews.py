"""What reviewers decided on recommended edits. A decision is never changed: a later one of the same pair counts instead."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import Engine, func, insert, select

from safer_engine.errors import SpecError
from service.errors import NotFound
from service.jobs import audit_log, moves
from service.jobs.clock import UtcNow
from service.jobs.database import reading, writing
from service.jobs.tables import decisions

Action = Literal["keep", "review", "drop", "flip"]
ACTIONS: tuple[str, ...] = get_args(Action)


@dataclass(frozen=True)
class Decision:
    """One reviewer's word on one pair.

    Attributes:
        id: grows; the highest of a pair counts.
        reviewer: name of the API key.
    """

    id: int
    job_id: str
    pair_id: str
    action: Action
    note: str
    reviewer: str
    at: datetime


class ReviewStore:
    """Decisions of reviewers. Every method is one transaction and may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def decide(self, project: str, job_id: str, pair_id: str, action: str, reviewer: str, note: str = "") -> Decision:
        """Record a decision. Raises NotFound for another project's job, SpecError for an action that is none."""
        if action not in ACTIONS:
            raise SpecError(f"{action!r} is not a decision", f"decide one of {', '.join(ACTIONS)}")
        row = {"job_id": job_id, "pair_id": pair_id, "action": action, "note": note, "reviewer": reviewer, "at": UtcNow()}
        with writing(self._engine) as connection:
            job = moves.lock_job(connection, job_id)
            if job is None or job["project"] != project or job["deleted"] is not None:
                raise NotFound(f"there is no job {job_id!r}", "see `safer-audit list`")
            stored = connection.execute(insert(decisions).values(row).returning(*decisions.c)).mappings().one()
            audit_log.append(connection, project, reviewer, "edit.decide", job_id, {"decision": stored["id"], "action": action})
            return Decision(**stored)

    def latest(self, job_id: str, pair_ids: tuple[str, ...] | None = None) -> dict[str, Decision]:
        """Pair id → the decision that counts, of the pairs named or of all that have one."""
        last = select(func.max(decisions.c.id)).where(decisions.c.job_id == job_id).group_by(decisions.c.pair_id)
        if pair_ids is not None:
            last = last.where(decisions.c.pair_id.in_(pair_ids))
        query = select(decisions).where(decisions.c.id.in_(last)).order_by(decisions.c.id)
        with reading(self._engine) as connection:
            return {row["pair_id"]: Decision(**row) for row in connection.execute(query).mappings()}

    def history(self, job_id: str, pair_id: str) -> tuple[Decision, ...]:
        """All decisions on a pair, in order."""
        query = select(decisions).where(decisions.c.job_id == job_id, decisions.c.pair_id == pair_id).order_by(decisions.c.id)
        with reading(self._engine) as connection:
            return tuple(Decision(**row) for row in connection.execute(query).mappings())

    def forget(self, pair_ids: tuple[str, ...], actor: str) -> int:
        """Remove every decision on pairs whose subject asked for it; returns how many."""
        with writing(self._engine) as connection:
            gone = connection.execute(decisions.delete().where(decisions.c.pair_id.in_(pair_ids))).rowcount
            audit_log.append(connection, None, actor, "edit.forget", f"{len(pair_ids)} pairs", {"decisions": gone})
            return gone
