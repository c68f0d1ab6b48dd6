"""Uploads as rows: which files are expected, which parts have come. The bytes are `service.infra.upload_files`' business."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, delete, insert, select, update

from service.errors import Conflict, NotFound
from service.infra.settings import Settings
from service.jobs import audit_log, moves
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.ids import new_id
from service.jobs.job_store import check_bytes, kept_bytes
from service.jobs.model import FINAL_JOB_STATES
from service.jobs.tables import job_inputs, jobs, upload_parts, uploads
from service.upload_names import UploadFile, upload_digest

_DAY = 86400.0


class UploadState(StrEnum):
    """open: parts may come. complete: every digest was right. removed: its bytes are gone."""

    OPEN = "open"
    COMPLETE = "complete"
    REMOVED = "removed"


@dataclass(frozen=True)
class UploadPart:
    """One part that has come: `file` and `part` count from 0; `etag` is the object store's."""

    file: int
    part: int
    digest: str
    size: int
    etag: str | None = None


@dataclass(frozen=True)
class UploadRecord:
    """An upload as it is stored.

    Attributes:
        kind: `model` or `dataset`.
        title: what the client calls the file or folder; may be empty.
        digest: `upload_digest` of its files; specs name it as `upload:<digest>`.
        expires: when an upload that is not complete by then is removed.
    """

    id: str
    project: str
    kind: str
    state: UploadState
    title: str
    files: tuple[UploadFile, ...]
    digest: str
    bytes: int
    created: datetime
    expires: datetime
    created_by: str


class UploadStore:
    """Rows of uploads. Every method is one transaction and may raise Unavailable."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def create(
        self, project: str, kind: str, files: Sequence[UploadFile], created_by: str, title: str = ""
    ) -> UploadRecord:  # fmt: skip
        """A new upload, or the project's one of the same content: complete, or under way. Raises NotFound, QuotaExceeded."""
        digest, size = upload_digest(files), sum(file.size for file in files)
        row = {
            "id": new_id(), "project": project, "kind": kind, "state": UploadState.OPEN, "bytes": size, "created": UtcNow(),
            "title": title, "files": [asdict(file) for file in files], "digest": digest, "created_by": created_by,
            "expires": utc_after(self._settings.upload_days * _DAY),
        }  # fmt: skip
        with writing(self._engine) as connection:
            limits = moves.lock_project(connection, project)
            if limits is None:
                raise NotFound(f"there is no project {project!r}")
            there = _complete(connection, project, digest) or _under_way(connection, project, kind, digest)
            if there is not None:
                return there
            check_bytes(kept_bytes(connection, project), limits, size)
            return _upload(connection.execute(insert(uploads).values(row).returning(*uploads.c)).mappings().one())

    def get(self, project: str, upload_id: str) -> UploadRecord:
        """One upload. Raises NotFound, also for another project's or a removed one."""
        with reading(self._engine) as connection:
            return _upload(_row(connection, project, upload_id))

    def find(self, project: str, digest: str) -> UploadRecord | None:
        """The project's complete upload of a digest."""
        with reading(self._engine) as connection:
            return _complete(connection, project, digest)

    def names(self, project: str, digests: Collection[str]) -> dict[str, str]:
        """What people call uploads, by digest: the title, else the only file's name, else the first and how many more."""
        wanted = (uploads.c.project == project) & uploads.c.digest.in_(sorted(digests))
        query = select(uploads.c.digest, uploads.c.title, uploads.c.files).where(wanted).order_by(uploads.c.created)
        if not digests:
            return {}
        with reading(self._engine) as connection:
            return {row.digest: row.title or _told(row.files) for row in connection.execute(query)}

    def add_part(self, project: str, upload_id: str, part: UploadPart) -> None:
        """Note a part that has come; one that comes again replaces itself. Raises NotFound, Conflict: it is not open."""
        values = {"digest": part.digest, "size": part.size, "etag": part.etag}
        with writing(self._engine) as connection:
            row = _row(connection, project, upload_id)
            if row["state"] != UploadState.OPEN:
                raise Conflict(f"the upload is {row['state']}", "start a new one for other content")
            statement = moves.inserting(connection)(upload_parts).values(
                upload_id=upload_id, file=part.file, part=part.part, **values
            )
            keys = ["upload_id", "file", "part"]
            connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values))

    def parts(self, upload_id: str) -> tuple[UploadPart, ...]:
        """The parts that have come, by file and part."""
        query = select(upload_parts).where(upload_parts.c.upload_id == upload_id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(upload_parts.c.file, upload_parts.c.part)).mappings()
            return tuple(UploadPart(**{name: row[name] for name in UploadPart.__dataclass_fields__}) for row in rows)

    def complete(self, project: str, upload_id: str, actor: str) -> UploadRecord:
        """Every file has come and its digest was right; completing twice changes nothing. Raises NotFound."""
        with writing(self._engine) as connection:
            row = _row(connection, project, upload_id)
            open_one = (uploads.c.id == upload_id) & (uploads.c.state == UploadState.OPEN)
            if connection.execute(update(uploads).where(open_one).values(state=UploadState.COMPLETE)).rowcount:
                connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
                audit_log.append(connection, project, actor, "upload.complete", upload_id, {"digest": row["digest"]})
            return _upload(_row(connection, project, upload_id))

    def remove(self, project: str, upload_id: str, actor: str) -> None:
        """Forget an upload, after its bytes are gone or before they are: a job that is not over keeps what it uses.

        Raises:
            NotFound, Conflict: a job that is queued or running uses it, and no other upload has the same content.
        """
        with writing(self._engine) as connection:
            moves.lock_project(connection, project)
            row = _row(connection, project, upload_id)
            if row["state"] == UploadState.COMPLETE and _used(connection, project, row["digest"]):
                raise Conflict("a job that is not over uses the upload", "cancel the job first, or wait for it")
            connection.execute(update(uploads).where(uploads.c.id == upload_id).values(state=UploadState.REMOVED))
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            audit_log.append(connection, project, actor, "upload.remove", upload_id, {"digest": row["digest"]})

    def expired(self, limit: int = 100) -> tuple[UploadRecord, ...]:
        """Uploads that were not completed in time, of all projects."""
        late = (uploads.c.state == UploadState.OPEN) & (uploads.c.expires < UtcNow())
        with reading(self._engine) as connection:
            rows = connection.execute(select(uploads).where(late).order_by(uploads.c.expires).limit(limit)).mappings()
            return tuple(_upload(row) for row in rows)


def _row(connection: Connection, project: str, upload_id: str) -> RowMapping:
    mine = (uploads.c.id == upload_id) & (uploads.c.project == project) & (uploads.c.state != UploadState.REMOVED)
    row = connection.execute(select(uploads).where(mine).with_for_update()).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no upload {upload_id!r}", "start a new one")
    return row


def _complete(connection: Connection, project: str, digest: str) -> UploadRecord | None:
    done = (uploads.c.project == project) & (uploads.c.digest == digest) & (uploads.c.state == UploadState.COMPLETE)
    row = connection.execute(select(uploads).where(done).order_by(uploads.c.created).limit(1)).mappings().one_or_none()
    return _upload(row) if row is not None else None


def _under_way(connection: Connection, project: str, kind: str, digest: str) -> UploadRecord | None:
    same = (uploads.c.project == project) & (uploads.c.kind == kind) & (uploads.c.digest == digest)
    live = (uploads.c.state == UploadState.OPEN) & (uploads.c.expires > UtcNow())
    row = connection.execute(select(uploads).where(same & live).order_by(uploads.c.created).limit(1)).mappings().one_or_none()
    return _upload(row) if row is not None else None


def _used(connection: Connection, project: str, digest: str) -> bool:
    live = (jobs.c.project == project) & jobs.c.state.not_in(FINAL_JOB_STATES)
    query = select(jobs.c.id).join(job_inputs, job_inputs.c.job_id == jobs.c.id).where(live, job_inputs.c.digest == digest)
    return connection.execute(query.limit(1)).first() is not None


def _told(files: Sequence[Mapping[str, Any]]) -> str:
    first = min(str(file["path"]) for file in files)
    return first.rpartition("/")[2] if len(files) == 1 else f"{first} and {len(files) - 1} more"


def _upload(row: RowMapping) -> UploadRecord:
    given = {name: row[name] for name in UploadRecord.__dataclass_fields__ if name not in ("files", "state")}
    return UploadRecord(state=UploadState(row["state"]), files=tuple(UploadFile(**file) for file in row["files"]), **given)
