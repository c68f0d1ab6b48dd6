"""What the database says of artifacts and uploads that may be removed, and what it is told when they are."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Select, delete, select, update

from service.jobs import audit_log, moves
from service.jobs.database import reading, writing
from service.jobs.model import FINAL_JOB_STATES, JobState, StageState
from service.jobs.stage_plan import TRAINING
from service.jobs.tables import artifact_refs, commits, decisions, gates, jobs, key_locks, stages, units, upload_parts, uploads
from service.jobs.uploads import UploadState
from service.upload_names import texts_of, uploads_in

ACTOR = "retention"
Place = tuple[str, str]
"""Stage and cache key of an artifact or a work area."""


@dataclass(frozen=True)
class AffectedJob:
    """A job that used something that is removed. `live`: it has not ended."""

    id: str
    kind: str
    state: str
    live: bool


class RetentionRecords:
    """The database, as retention needs it. Every method may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def in_use(self, project: str) -> frozenset[Place]:
        """What jobs that have not ended have made, read or compute now."""
        live = (jobs.c.project == project) & jobs.c.state.not_in(FINAL_JOB_STATES)
        referred = select(artifact_refs.c.stage, artifact_refs.c.key).join(jobs, jobs.c.id == artifact_refs.c.job_id).where(live)
        planned = (
            select(stages.c.name, stages.c.key).join(jobs, jobs.c.id == stages.c.job_id).where(live, stages.c.key.is_not(None))
        )
        locked = select(key_locks.c.stage, key_locks.c.key).where(key_locks.c.project == project)
        with reading(self._engine) as connection:
            return frozenset((row[0], row[1]) for query in (referred, planned, locked) for row in connection.execute(query))

    def referred(self, project: str) -> frozenset[Place]:
        """What jobs that were not deleted refer to."""
        query = select(artifact_refs.c.stage, artifact_refs.c.key).where(artifact_refs.c.project == project)
        with reading(self._engine) as connection:
            return frozenset((row[0], row[1]) for row in connection.execute(query))

    @contextmanager
    def removing(self, project: str, place: Place) -> Iterator[bool]:
        """Remove an artifact within: nobody claims its key meanwhile. Gives False where a job uses it: leave it then.

        Afterwards no job refers to it, and a failed or cancelled job that is tried again computes it anew.
        """
        with writing(self._engine) as connection:
            free = _lock_key(connection, project, place) and not _is_used(connection, project, place)
            yield free
            if free:
                _forget(connection, project, place)
            mine = (key_locks.c.project == project) & (key_locks.c.stage == place[0]) & (key_locks.c.key == place[1])
            connection.execute(delete(key_locks).where(mine, key_locks.c.token == _NOBODYS))

    def jobs_of(
        self, project: str, places: Iterable[Place], words: Collection[str] = (), inputs: Collection[str] = ()
    ) -> tuple[AffectedJob, ...]:
        """Jobs that refer to any of the artifacts, whose spec has any of the words, or whose pairs have any of the digests.

        Oldest first; deleted ones are left out.
        """
        wanted = set(places)
        refs = select(artifact_refs.c.stage, artifact_refs.c.key, artifact_refs.c.job_id).where(
            artifact_refs.c.project == project
        )
        query = select(jobs).where(jobs.c.project == project, jobs.c.deleted.is_(None)).order_by(jobs.c.id)
        with reading(self._engine) as connection:
            using = {row.job_id for row in connection.execute(refs) if (row.stage, row.key) in wanted}
            return tuple(
                AffectedJob(row["id"], row["kind"], row["state"], row["state"] not in FINAL_JOB_STATES)
                for row in connection.execute(query).mappings()
                if row["id"] in using or _is_over(row, words, inputs)
            )

    def inputs_of(self, project: str, roles: Mapping[Place, str]) -> frozenset[str]:
        """Digests of the inputs, by role, of the jobs that made or used these artifacts; of deleted jobs too."""
        with reading(self._engine) as connection:
            rows = connection.execute(_walked(jobs.c.inputs, project=project))
            found = ((row.inputs, roles.get((row.name, row.key))) for row in rows)
            return frozenset(inputs[role] for inputs, role in found if role in inputs)

    def trained_on(self, project: str, words: Collection[str], inputs: Collection[str]) -> frozenset[Place]:
        """Models that were trained by jobs whose spec has any of the words, or whose pairs any of the digests; deleted too."""
        with reading(self._engine) as connection:
            rows = connection.execute(_walked(*jobs.c, project=project).where(stages.c.name == TRAINING)).mappings()
            return frozenset((TRAINING, row["key"]) for row in rows if _is_over(row, words, inputs))

    def uploads_of_specs(self, project: str, places: Iterable[Place]) -> frozenset[str]:
        """The uploads that the specs of the jobs name that made or used these artifacts; of deleted jobs too."""
        wanted = set(places)
        with reading(self._engine) as connection:
            rows = connection.execute(_walked(jobs.c.spec, project=project))
            specs = [row.spec for row in rows if (row.name, row.key) in wanted]
            return frozenset(name for spec in specs for name in uploads_in(spec))

    def content_digests(self, project: str, place: Place) -> frozenset[str]:
        """What jobs noted of the content of an artifact."""
        query = _walked(stages.c.content_digest, project=project).where(stages.c.name == place[0], stages.c.key == place[1])
        with reading(self._engine) as connection:
            return frozenset(row.content_digest for row in connection.execute(query) if row.content_digest)

    def contents_of_jobs(self, project: str) -> tuple[frozenset[str], ...]:
        """Of each job, deleted ones too, what it noted of the contents of its artifacts, those that are gone included."""
        query = select(stages.c.job_id, stages.c.content_digest).join(jobs, jobs.c.id == stages.c.job_id)
        found: dict[str, set[str]] = {}
        with reading(self._engine) as connection:
            for row in connection.execute(query.where(jobs.c.project == project, stages.c.content_digest.is_not(None))):
                found.setdefault(row.job_id, set()).add(row.content_digest)
        return tuple(frozenset(contents) for contents in found.values())

    def uploads(self, project: str, state: UploadState) -> dict[str, str]:
        """Id → digest of a project's uploads in a state."""
        query = select(uploads.c.id, uploads.c.digest).where(uploads.c.project == project, uploads.c.state == state)
        with reading(self._engine) as connection:
            return {row.id: row.digest or "" for row in connection.execute(query)}

    def datasets(self, project: str) -> frozenset[str]:
        """Digests of a project's complete uploads that were declared as datasets, or that a job took for one."""
        query = select(jobs.c.inputs).where(jobs.c.project == project)
        with reading(self._engine) as connection:
            taken = [row.inputs for row in connection.execute(query)]
        used = {digest for inputs in taken for role, digest in inputs.items() if role in _UPLOADED_PAIRS}
        return self._declared(project, "dataset", UploadState.COMPLETE) | used

    def models(self, project: str) -> frozenset[str]:
        """Digests of a project's uploads that were declared as models, complete or not."""
        return self._declared(project, "model", UploadState.COMPLETE) | self._declared(project, "model", UploadState.OPEN)

    def open_uploads(self, project: str, kind: str) -> frozenset[str]:
        """Ids of a project's uploads of a kind that are not complete."""
        query = select(uploads.c.id).where(uploads.c.project == project, uploads.c.kind == kind)
        with reading(self._engine) as connection:
            return frozenset(connection.execute(query.where(uploads.c.state == UploadState.OPEN)).scalars())

    def _declared(self, project: str, kind: str, state: UploadState) -> frozenset[str]:
        query = select(uploads.c.digest).where(uploads.c.project == project, uploads.c.kind == kind, uploads.c.state == state)
        with reading(self._engine) as connection:
            return frozenset(connection.execute(query).scalars())

    def count_decisions(self, project: str, pair_ids: Iterable[str]) -> int:
        """How many decisions of reviewers are about these pairs."""
        with reading(self._engine) as connection:
            return len(_decisions(connection, project, set(pair_ids)))

    def purged(self, project: str, pair_ids: Iterable[str], names: Collection[str], affected: Collection[AffectedJob]) -> None:
        """Take out decisions about the pairs, of reviewers and of gates, and the uploads of these digests or ids.

        Tells the jobs and the audit log. What judges a gate on one of the jobs meanwhile writes no decision (`GateStore.decide`).
        """
        with writing(self._engine) as connection:
            for job in sorted(affected, key=lambda each: each.id):
                moves.lock_job(connection, job.id)
            rows = _decisions(connection, project, set(pair_ids))
            for start in range(0, len(rows), _AT_ONCE):
                connection.execute(delete(decisions).where(decisions.c.id.in_(rows[start : start + _AT_ONCE])))
            gone = (uploads.c.project == project) & (uploads.c.digest.in_(names) | uploads.c.id.in_(names))
            removed = connection.execute(update(uploads).where(gone).values(state=UploadState.REMOVED).returning(uploads.c.id))
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id.in_(removed.scalars().all())))
            for job in affected:
                moves.add_event(connection, job.id, "purged", None, {"decisions": len(rows)})
            _forget_in_gates(connection, project, set(pair_ids))
            audit_log.append(connection, project, ACTOR, "pairs.purge", project, {"jobs": [job.id for job in affected]})


_PAIRS = ("dataset", "evaluation")
_UPLOADED_PAIRS = frozenset(f"u:{role}" for role in (*_PAIRS, "corpus"))
_AT_ONCE = 500
_NOBODYS = -1


def _lock_key(connection: Connection, project: str, place: Place) -> bool:
    """Take the key until the transaction ends; False where a unit has it. Others that claim it wait for the transaction."""
    unit = connection.execute(select(units.c.id).limit(1)).scalar()
    if unit is None:
        return True  # no job, nobody to keep away
    row = {"project": project, "stage": place[0], "key": place[1], "unit_id": unit, "token": _NOBODYS}
    statement = moves.inserting(connection)(key_locks).values(row)
    taken = statement.on_conflict_do_nothing(index_elements=["project", "stage", "key"]).returning(key_locks.c.key)
    return connection.execute(taken).first() is not None


def _is_used(connection: Connection, project: str, place: Place) -> bool:
    live = (jobs.c.project == project) & jobs.c.state.not_in(FINAL_JOB_STATES)
    mine = (artifact_refs.c.project == project) & (artifact_refs.c.stage == place[0]) & (artifact_refs.c.key == place[1])
    query = select(jobs.c.id).join(artifact_refs, artifact_refs.c.job_id == jobs.c.id).where(live, mine)
    return connection.execute(query.limit(1)).first() is not None


def _forget(connection: Connection, project: str, place: Place) -> None:
    """No job refers to the artifact any more; one that can be tried again opens that stage anew."""
    mine = (artifact_refs.c.project == project) & (artifact_refs.c.stage == place[0]) & (artifact_refs.c.key == place[1])
    connection.execute(delete(artifact_refs).where(mine))
    first = (commits.c.project == project) & (commits.c.stage == place[0]) & (commits.c.key == place[1])
    connection.execute(delete(commits).where(first))
    again = select(jobs.c.id).where(jobs.c.project == project, jobs.c.state.in_((JobState.FAILED, JobState.CANCELLED)))
    done = (stages.c.name == place[0]) & (stages.c.key == place[1]) & (stages.c.state == StageState.DONE)
    values = {"state": StageState.PENDING, "key": None, "outcome": None, "cost": None}
    connection.execute(update(stages).where(done, stages.c.job_id.in_(again)).values(values))


def _walked(*columns: ColumnElement[Any], project: str) -> Select[Any]:
    """Stages of a project's jobs that have a key, with what is asked for; of deleted jobs too."""
    query = select(stages.c.name, stages.c.key, *columns).join(jobs, jobs.c.id == stages.c.job_id)
    return query.where(jobs.c.project == project, stages.c.key.is_not(None))


def _is_over(job: RowMapping, words: Collection[str], inputs: Collection[str]) -> bool:
    """Whether a job's spec has any of the words, or its pairs any of the digests."""
    return not texts_of(job["spec"]).isdisjoint(words) or any(job["inputs"].get(role) in inputs for role in _PAIRS)


def _forget_in_gates(connection: Connection, project: str, pair_ids: set[str]) -> None:
    """Gates keep their verdict, and lose the decision that names one of the pairs."""
    query = select(gates.c.id).where(gates.c.project == project, gates.c.decision.is_not(None))
    for gate_id in connection.execute(query).scalars().all():
        decision = connection.execute(select(gates.c.decision).where(gates.c.id == gate_id)).scalar_one()
        if decision is not None and any(named_by(pair, pair_ids) for pair in json.loads(decision)["lost_pairs"]):
            connection.execute(update(gates).where(gates.c.id == gate_id).values(decision=None))


def _decisions(connection: Connection, project: str, pair_ids: set[str]) -> list[int]:
    query = select(decisions.c.id, decisions.c.pair_id).join(jobs, jobs.c.id == decisions.c.job_id)
    rows = connection.execute(query.where(jobs.c.project == project))
    return [row.id for row in rows if named_by(row.pair_id, pair_ids)]


def named_by(pair_id: str, wanted: set[str]) -> bool:
    """Whether a pair is one of those wanted, or a part (`#n`) of a row that is."""
    return pair_id in wanted or pair_id.rpartition("#")[0] in wanted
