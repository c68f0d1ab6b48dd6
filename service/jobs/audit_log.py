"""Who did what: rows that are only ever added. Triggers in the database refuse to change or remove one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from service.jobs.clock import UtcNow
from service.jobs.tables import audit_log


@dataclass(frozen=True)
class AuditEntry:
    """One deed.

    Attributes:
        project: None for what concerns the whole service.
        actor: id of an API key, or what acts of itself (`operator`, `retention`).
        action: `subject.verb`, such as `key.create`.
        target: id of what it was done to.
    """

    id: int
    at: datetime
    project: str | None
    actor: str
    action: str
    target: str
    data: dict[str, Any]


def append(
    connection: Connection, project: str | None, actor: str, action: str, target: str, data: Mapping[str, Any] | None = None
) -> None:  # fmt: skip
    """Record a deed in the transaction that does it."""
    row = {"at": UtcNow(), "project": project, "actor": actor, "action": action, "target": target, "data": dict(data or {})}
    connection.execute(insert(audit_log).values(row))


def entries(connection: Connection, project: str | None, after: int, limit: int) -> tuple[AuditEntry, ...]:
    """Entries with an id above `after`, in order; of one project, or of all where it is None."""
    query = select(audit_log).where(audit_log.c.id > after).order_by(audit_log.c.id).limit(limit)
    if project is not None:
        query = query.where(audit_log.c.project == project)
    return tuple(AuditEntry(**row) for row in connection.execute(query).mappings())
