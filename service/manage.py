"""`python -m service.manage`: what an operator does on the service's machine. Answers with one JSON document.

Settings are those of the service (`SAFER_…`); where the folder is one of `safer-audit up`, its pepper is found there. An
error is `{"error": {"code", "message", "hint"}}` with exit code 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Engine, make_url

from safer_engine.errors import SaferError, SpecError
from service.embedded import PEPPER_FILE, kept_pepper
from service.infra.purge import purge
from service.infra.retention import gc
from service.infra.settings import Settings, load_settings
from service.infra.stores import Stores
from service.jobs.access import DEFAULT_PROJECT, AccessStore, Role
from service.jobs.database import check_version, migrate, open_database
from service.jobs.model import JobKind, JobState
from service.jobs.requests import JobQuery
from service.jobs.store import JobStore

DAY_SECONDS = 86400.0
_PAGE = 200


def main(arguments: list[str] | None = None) -> int:
    """Do one thing and print the answer. Returns 0, or 4 where the answer is an error."""
    given = _parser().parse_args(arguments)
    try:
        answer = _with_database(given)
    except SaferError as error:
        sys.stdout.write(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}) + "\n")
        return 4
    sys.stdout.write(json.dumps(answer, default=_plain) + "\n")
    return 0


def manage_settings() -> Settings:
    """The settings in force, with the pepper of the folder where none is set."""
    settings = load_settings()
    if settings.secret_pepper is None and (settings.folder / PEPPER_FILE).exists():
        return load_settings(secret_pepper=kept_pepper(settings.folder))
    return settings


def _with_database(given: argparse.Namespace) -> Any:
    settings = manage_settings()
    path = make_url(settings.database).database
    if settings.database.startswith("sqlite") and given.act is not _migrate and not Path(path or "").exists():
        raise SpecError(
            f"there is no database {path}",
            "make it with `safer-audit migrate`, or name the folder of the service with --home (SAFER_HOME)",
        )
    settings.folder.mkdir(parents=True, exist_ok=True)
    engine = open_database(settings)
    try:
        if given.act is not _migrate:
            check_version(engine)
        act: Callable[[Engine, Settings, argparse.Namespace], Any] = given.act
        return act(engine, settings, given)
    finally:
        engine.dispose()


def _migrate(engine: Engine, settings: Settings, _given: argparse.Namespace) -> Any:
    migrate(engine)
    AccessStore(engine, settings).ensure_project(DEFAULT_PROJECT) if settings.secret_pepper else None
    return {"database": make_url(settings.database).render_as_string(hide_password=True)}


def _create_key(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    access = AccessStore(engine, settings)
    if given.make_project or given.project == DEFAULT_PROJECT:
        access.ensure_project(given.project)
    lifetime = None if given.days is None else given.days * DAY_SECONDS
    made = access.create_key(given.project, given.name, [Role(role) for role in given.role], actor(), lifetime)
    return {**_dict(made.key), "secret": made.secret}


def _list_keys(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    return {"items": [_dict(key) for key in AccessStore(engine, settings).keys(given.project)]}


def _revoke_key(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    return _dict(AccessStore(engine, settings).revoke_key(given.project, given.id, actor()))


def _list_projects(engine: Engine, settings: Settings, _given: argparse.Namespace) -> Any:
    return {"items": [_dict(project) for project in AccessStore(engine, settings).projects()]}


def _list_jobs(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    jobs, cursor = JobStore(engine, settings), None
    items: list[dict[str, Any]] = []
    query = JobQuery(states=tuple(JobState(state) for state in given.state), kind=JobKind(given.kind) if given.kind else None)
    while len(items) < given.limit:
        page = jobs.find(given.project, query, cursor, min(_PAGE, given.limit - len(items)))
        items += [_job(job) for job in page.items]
        cursor = page.next
        if cursor is None:
            break
    return {"items": items}


def _requeue_job(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    return _job(JobStore(engine, settings).retry(given.project, given.id, actor()))


def _cancel_job(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    return _job(JobStore(engine, settings).request_cancel(given.project, given.id, actor()))


def _reconcile(engine: Engine, settings: Settings, _given: argparse.Namespace) -> Any:
    return _dict(JobStore(engine, settings).reconcile())


def _collect(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    collected = gc(Stores(settings, engine), engine, given.dry_run)
    return {"dry_run": collected.dry_run, "items": [_dict(item) for item in collected.removed]}


def _purge(engine: Engine, settings: Settings, given: argparse.Namespace) -> Any:
    """Ids come by standard input, one a line: there may be many, and they do not belong in a list of processes."""
    wanted = [line.strip() for line in sys.stdin.read().splitlines() if line.strip()]
    purged = purge(Stores(settings, engine), engine, given.project, wanted, given.dry_run)
    return {
        "dry_run": purged.dry_run,
        "items": [_dict(item) for item in purged.removed],
        "jobs": [_dict(job) for job in purged.jobs],
        "decisions": purged.decisions,
    }


def actor() -> str:
    """Who is at the keyboard, for the audit log."""
    try:
        return f"operator {getpass.getuser()}"
    except (KeyError, OSError):
        return "operator"


def _job(job: Any) -> dict[str, Any]:
    names = ("id", "project", "kind", "state", "priority", "created", "started", "finished", "attempt", "error", "labels")
    return {name: value for name, value in _dict(job).items() if name in names}


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    assert isinstance(value, Mapping)
    return dict(value)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.manage")
    groups = parser.add_subparsers(required=True)
    groups.add_parser("migrate").set_defaults(act=_migrate)
    groups.add_parser("projects").set_defaults(act=_list_projects)
    _key_commands(groups.add_parser("keys").add_subparsers(required=True))
    _job_commands(groups.add_parser("jobs").add_subparsers(required=True))
    _store_commands(groups.add_parser("store").add_subparsers(required=True))
    return parser


def _key_commands(commands: Any) -> None:
    create = _project_of(commands.add_parser("create"), _create_key)
    create.add_argument("--name", required=True)
    create.add_argument("--role", action="append", required=True, choices=list(Role))
    create.add_argument("--days", type=float)
    create.add_argument("--make-project", action="store_true")
    _project_of(commands.add_parser("list"), _list_keys)
    _project_of(commands.add_parser("revoke"), _revoke_key).add_argument("id")


def _job_commands(commands: Any) -> None:
    listing = _project_of(commands.add_parser("list"), _list_jobs)
    listing.add_argument("--state", action="append", default=[], choices=list(JobState))
    listing.add_argument("--kind", choices=list(JobKind))
    listing.add_argument("--limit", type=int, default=50)
    _project_of(commands.add_parser("requeue"), _requeue_job).add_argument("id")
    _project_of(commands.add_parser("cancel"), _cancel_job).add_argument("id")
    commands.add_parser("reconcile").set_defaults(act=_reconcile)


def _store_commands(commands: Any) -> None:
    collecting = commands.add_parser("gc")
    collecting.add_argument("--dry-run", action="store_true")
    collecting.set_defaults(act=_collect)
    _project_of(commands.add_parser("purge"), _purge).add_argument("--dry-run", action="store_true")


def _project_of(command: argparse.ArgumentParser, act: Callable[..., Any]) -> argparse.ArgumentParser:
    command.add_argument("--project", default=DEFAULT_PROJECT)
    command.set_defaults(act=act)
    return command


if __name__ == "__main__":
    sys.exit(main())
