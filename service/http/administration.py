"""API keys, projects and the log of who did what. A key's secret is in one answer only: the one that makes it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from service.errors import NotAllowed
from service.http.auth import Admin
from service.http.errors import responses
from service.http.parameters import ServicesDep, known_id
from service.jobs.access import DEFAULT_PROJECT, KeyRecord, Limits, Principal, Project, Role
from service.schemas import (
    KeyCreate,
    KeySecret,
    KeyView,
    LogEntry,
    Page,
    ProjectCreate,
    ProjectView,
)

router = APIRouter(prefix="/v1", tags=["administration"])
_DAY = 86_400.0


@router.get("/keys", response_model=Page[KeyView], responses=responses())
def list_keys(who: Admin, services: ServicesDep) -> Page[KeyView]:
    """The project's API keys, revoked ones too."""
    return Page(items=[_key(key) for key in services.access.keys(who.project)])


@router.post("/keys", status_code=201, response_model=KeySecret, responses=responses())
def create_key(asked: KeyCreate, who: Admin, services: ServicesDep) -> KeySecret:
    """Make an API key. Its secret is shown this once."""
    project = asked.project or who.project
    if project != who.project:
        _require_operator(who)
    seconds = asked.days * _DAY if asked.days is not None else None
    made = services.access.create_key(project, asked.name, [Role(role) for role in asked.roles], who.key_id, seconds)
    return KeySecret(**dict(_key(made.key)), secret=made.secret)


@router.delete("/keys/{key_id}", response_model=KeyView, responses=responses())
def revoke_key(
    key_id: Annotated[str, Path(description="Id of the key.", max_length=100)], who: Admin, services: ServicesDep
) -> KeyView:
    """End an API key, and every session that began with it, now."""
    return _key(services.access.revoke_key(who.project, known_id(key_id, "key"), who.key_id))


@router.get("/projects", response_model=Page[ProjectView], responses=responses())
def list_projects(who: Admin, services: ServicesDep) -> Page[ProjectView]:
    """All projects, for admins of `default`; others see their own."""
    found = services.access.projects() if who.project == DEFAULT_PROJECT else (services.access.project(who.project),)
    return Page(items=[_project(project) for project in found])


@router.post("/projects", status_code=201, response_model=ProjectView, responses=responses(409))
def create_project(asked: ProjectCreate, who: Admin, services: ServicesDep) -> ProjectView:
    """Make a project. For admins of `default`, who then make its first key."""
    _require_operator(who)
    limits = Limits(asked.max_running, asked.max_queued, asked.max_bytes, asked.gpu_seconds_per_job)
    return _project(services.access.create_project(asked.name, who.key_id, limits))


@router.get("/log", response_model=Page[LogEntry], responses=responses())
def read_log(
    who: Admin,
    services: ServicesDep,
    after: Annotated[int, Query(ge=0, le=2**62, description="Entries with a larger id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> Page[LogEntry]:
    """Who did what in this project, oldest first. `next` is the `after` of the next page."""
    found = services.access.audit_entries(who.project, after, limit)
    items = [
        LogEntry(id=entry.id, at=entry.at, actor=entry.actor, action=entry.action, target=entry.target, data=entry.data)
        for entry in found
    ]
    return Page(items=items, next=str(found[-1].id) if len(found) == limit else None)


def _require_operator(who: Principal) -> None:
    if who.project != DEFAULT_PROJECT:
        raise NotAllowed("only admins of the project default may do this", "ask one of them")


def _key(key: KeyRecord) -> KeyView:
    return KeyView(
        id=key.id,
        project=key.project,
        name=key.name,
        roles=list(key.roles),
        created=key.created,
        expires=key.expires,
        revoked=key.revoked,
        last_used=key.last_used,
    )


def _project(project: Project) -> ProjectView:
    return ProjectView(
        name=project.name,
        created=project.created,
        max_running=project.max_running,
        max_queued=project.max_queued,
        max_bytes=project.max_bytes,
        gpu_seconds_per_job=project.gpu_seconds_per_job,
    )
