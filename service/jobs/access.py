"""Projects, API keys and the audit log: who may ask for what."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, insert, or_, select, update
from sqlalchemy.exc import DBAPIError

from safer_engine.errors import SpecError
from service.errors import Conflict, NotFound, Unavailable
from service.infra.settings import Settings
from service.jobs import audit_log, moves
from service.jobs.audit_log import AuditEntry
from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.ids import new_id
from service.jobs.tables import api_keys, projects

DEFAULT_PROJECT = "default"
KEY_PREFIX = "sk-safer-"
_KEY_BYTES, _KEY_LENGTH = 32, 43
_USED_SECONDS = 60.0
_PROJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """What a key may do within its project; `admin` may do all of it."""

    SUBMIT = "submit"
    READ = "read"
    REVIEW = "review"
    REDTEAM = "redteam"
    ADMIN = "admin"


@dataclass(frozen=True)
class Project:
    """A namespace of jobs, artifacts and cache keys, and its limits.

    Attributes:
        gpu_seconds_per_job: budget of a job that names none; None: no limit.
    """

    name: str
    created: datetime
    max_running: int
    max_queued: int
    max_bytes: int
    gpu_seconds_per_job: float | None


@dataclass(frozen=True)
class Limits:
    """Limits of a project to be set; None leaves one as it is."""

    max_running: int | None = None
    max_queued: int | None = None
    max_bytes: int | None = None
    gpu_seconds_per_job: float | None = None


@dataclass(frozen=True)
class KeyRecord:
    """An API key as it is stored; its secret is not."""

    id: str
    project: str
    name: str
    roles: tuple[Role, ...]
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    last_used: datetime | None


@dataclass(frozen=True)
class NewKey:
    """A key and its secret, which is shown this once."""

    key: KeyRecord
    secret: str


@dataclass(frozen=True)
class Principal:
    """Who asks: the key behind a request."""

    project: str
    key_id: str
    name: str
    roles: frozenset[Role]

    def may(self, role: Role) -> bool:
        """Whether the key has a role, of itself or as `admin`."""
        return role in self.roles or Role.ADMIN in self.roles


class AccessStore:
    """Projects, API keys and the audit log. Every method is one transaction and may raise Unavailable.

    Raises SpecError when the settings name no pepper: keys cannot be checked without one.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._pepper = settings.pepper
        self._engine = engine
        self._settings = settings

    def ensure_project(self, name: str) -> Project:
        """A project, made with the default limits where there is none. Raises SpecError for a name that cannot be one."""
        with writing(self._engine) as connection:
            self._insert_project(connection, name)
            return _project(_row(connection, name))

    def create_project(self, name: str, actor: str, limits: Limits = Limits()) -> Project:
        """Make a project. Raises Conflict if there is one of that name, SpecError for a name that cannot be one."""
        with writing(self._engine) as connection:
            if not self._insert_project(connection, name):
                raise Conflict(f"there is a project {name!r} already")
            _set_limits(connection, name, limits)
            audit_log.append(connection, name, actor, "project.create", name, _given(limits))
            return _project(_row(connection, name))

    def set_limits(self, name: str, limits: Limits, actor: str) -> Project:
        """Change a project's limits; what runs goes on. Raises NotFound, SpecError."""
        with writing(self._engine) as connection:
            _row(connection, name)
            _set_limits(connection, name, limits)
            audit_log.append(connection, name, actor, "project.limits", name, _given(limits))
            return _project(_row(connection, name))

    def project(self, name: str) -> Project:
        """One project. Raises NotFound."""
        with reading(self._engine) as connection:
            return _project(_row(connection, name))

    def projects(self) -> tuple[Project, ...]:
        """All projects, by name."""
        with reading(self._engine) as connection:
            return tuple(_project(row) for row in connection.execute(select(projects).order_by(projects.c.name)).mappings())

    def create_key(
        self, project: str, name: str, roles: Iterable[Role], actor: str, lifetime_seconds: float | None = None
    ) -> NewKey:  # fmt: skip
        """Make a key of a project; it ends after `lifetime_seconds`, or never. Raises NotFound, SpecError."""
        wanted = sorted({Role(role) for role in roles})
        if not wanted:
            raise SpecError("a key needs a role", f"roles are {', '.join(Role)}")
        if lifetime_seconds is not None and lifetime_seconds <= 0:
            raise SpecError("a key's lifetime must be above 0", "leave it out for a key that does not end")
        secret = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        row = {
            "id": new_id(), "project": project, "name": name, "roles": wanted, "mac": self._mac(secret), "created": UtcNow(),
            "expires": utc_after(lifetime_seconds) if lifetime_seconds is not None else None,
        }  # fmt: skip
        with writing(self._engine) as connection:
            _row(connection, project)
            stored = connection.execute(insert(api_keys).values(row).returning(*api_keys.c)).mappings().one()
            audit_log.append(connection, project, actor, "key.create", stored["id"], {"name": name, "roles": wanted})
            return NewKey(_key(stored), secret)

    def keys(self, project: str) -> tuple[KeyRecord, ...]:
        """Keys of a project, revoked ones too, in the order they were made."""
        query = select(api_keys).where(api_keys.c.project == project).order_by(api_keys.c.created, api_keys.c.id)
        with reading(self._engine) as connection:
            return tuple(_key(row) for row in connection.execute(query).mappings())

    def revoke_key(self, project: str, key_id: str, actor: str) -> KeyRecord:
        """End a key now; one that was revoked stays so. Raises NotFound."""
        mine = (api_keys.c.id == key_id) & (api_keys.c.project == project)
        with writing(self._engine) as connection:
            ended = update(api_keys).where(mine, api_keys.c.revoked.is_(None)).values(revoked=UtcNow())
            if connection.execute(ended).rowcount:
                audit_log.append(connection, project, actor, "key.revoke", key_id)
            row = connection.execute(select(api_keys).where(mine)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no key {key_id!r}", "see `safer-audit admin keys list`")
        return _key(row)

    def authenticate(self, secret: str) -> Principal | None:
        """Who a secret belongs to; None for one that is wrong, expired or revoked."""
        if not secret.startswith(KEY_PREFIX) or len(secret) != len(KEY_PREFIX) + _KEY_LENGTH:
            return None
        mac = self._mac(secret)
        stale = or_(api_keys.c.last_used.is_(None), api_keys.c.last_used < utc_after(-_USED_SECONDS)).label("stale")
        with reading(self._engine) as connection:
            row = connection.execute(select(*api_keys.c, stale).where(api_keys.c.mac == mac, _live())).mappings().one_or_none()
        if row is None or not hmac.compare_digest(row["mac"], mac):
            return None
        if row["stale"]:
            # A database that takes no writes, on a full disk or in the middle of a failover, can still be read.
            with suppress(Unavailable, DBAPIError), writing(self._engine) as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == row["id"]).values(last_used=UtcNow()))
        return _principal(row)

    def principal(self, key_id: str) -> Principal | None:
        """Who a key stands for, by its id alone, for sessions that were begun with its secret; None once it has ended."""
        with reading(self._engine) as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id, _live())).mappings().one_or_none()
        return _principal(row) if row is not None else None

    def record(self, project: str | None, actor: str, action: str, target: str, data: dict[str, object] | None = None) -> None:
        """Append to the audit log."""
        with writing(self._engine) as connection:
            audit_log.append(connection, project, actor, action, target, data)

    def audit_entries(self, project: str | None, after: int = 0, limit: int = 100) -> tuple[AuditEntry, ...]:
        """Entries of the audit log with an id above `after`, in order; of all projects where `project` is None."""
        with reading(self._engine) as connection:
            return audit_log.entries(connection, project, after, limit)

    def _mac(self, secret: str) -> str:
        return hmac.new(self._pepper, secret.encode(), hashlib.sha256).hexdigest()

    def _insert_project(self, connection: Connection, name: str) -> bool:
        if not _PROJECT_NAME.fullmatch(name):
            raise SpecError(f"{name!r} cannot name a project", "use 1 to 63 lower-case letters, digits and hyphens")
        row = {
            "name": name, "created": UtcNow(), "max_running": self._settings.default_max_running,
            "max_queued": self._settings.default_max_queued, "max_bytes": self._settings.default_max_bytes,
        }  # fmt: skip
        statement = moves.inserting(connection)(projects).values(row).on_conflict_do_nothing().returning(projects.c.name)
        return connection.execute(statement).first() is not None


def _live() -> ColumnElement[bool]:
    return api_keys.c.revoked.is_(None) & or_(api_keys.c.expires.is_(None), api_keys.c.expires > UtcNow())


def _principal(row: RowMapping) -> Principal:
    return Principal(row["project"], row["id"], row["name"], frozenset(Role(role) for role in row["roles"]))


def _given(limits: Limits) -> dict[str, float]:
    return {name: value for name, value in vars(limits).items() if value is not None}


def _set_limits(connection: Connection, name: str, limits: Limits) -> None:
    given = _given(limits)
    wrong = [limit for limit, value in given.items() if value <= 0]
    if wrong:
        raise SpecError(f"{', '.join(wrong)} must be above 0")
    if given:
        connection.execute(update(projects).where(projects.c.name == name).values(given))


def _row(connection: Connection, name: str) -> RowMapping:
    row = connection.execute(select(projects).where(projects.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no project {name!r}", "an administrator of the default project can make it")
    return row


def _project(row: RowMapping) -> Project:
    return Project(**{name: row[name] for name in Project.__dataclass_fields__})


def _key(row: RowMapping) -> KeyRecord:
    given = {name: row[name] for name in KeyRecord.__dataclass_fields__ if name != "roles"}
    return KeyRecord(roles=tuple(Role(role) for role in row["roles"]), **given)
