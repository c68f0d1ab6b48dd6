"""Committed artifacts that belong to a job without being one of its stages: its log, exported decisions."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine, select

from service.jobs import moves
from service.jobs.clock import UtcNow
from service.jobs.database import reading, writing
from service.jobs.tables import artifact_refs, stages


@dataclass(frozen=True)
class Reference:
    """An artifact by its place in the store."""

    stage: str
    key: str


class AttachmentStore:
    """Says which artifacts of a job there are beside its stages'. Every method may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def attach(self, project: str, job_id: str, reference: Reference, size: int) -> None:
        """Keep a committed artifact for as long as the job; doing it again changes nothing but what is the newest."""
        row = {"project": project, "stage": reference.stage, "key": reference.key, "job_id": job_id, "bytes": size}
        columns = ["project", "stage", "key", "job_id"]
        with writing(self._engine) as connection:
            statement = moves.inserting(connection)(artifact_refs).values(**row, created=UtcNow())
            connection.execute(statement.on_conflict_do_update(index_elements=columns, set_={"created": UtcNow()}))

    def attached(self, job_id: str) -> tuple[Reference, ...]:
        """What was attached, oldest first."""
        own = select(stages.c.name).where(stages.c.job_id == job_id)
        query = (
            select(artifact_refs.c.stage, artifact_refs.c.key)
            .where(artifact_refs.c.job_id == job_id, artifact_refs.c.stage.not_in(own))
            .order_by(artifact_refs.c.created, artifact_refs.c.key)
        )
        with reading(self._engine) as connection:
            return tuple(Reference(row.stage, row.key) for row in connection.execute(query))
