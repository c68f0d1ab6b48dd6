"""Whether the service lives, is ready, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text

from safer_engine.errors import SaferError
from service.errors import NotAllowed, NotAuthenticated, Unavailable
from service.http.auth import Anyone, allow, authenticate, check_host, client_of
from service.http.errors import Responses, responses
from service.http.parameters import ServicesDep
from service.http.services import Services
from service.jobs.access import DEFAULT_PROJECT
from service.jobs.database import check_version, reading
from service.schemas import Healthy, Me, PartState, Ready

router = APIRouter(tags=["operations"])
_LOOPBACK = frozenset(("127.0.0.1", "::1", "local"))
_HANDED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""What proxies add to a request that is not their own."""
_AWAY: Responses = {503: {"model": Ready, "description": "Something is away."}}
_TEXT: Responses = {
    200: {"description": "In Prometheus's text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/healthz", response_model=Healthy, responses=responses())
async def healthz() -> Healthy:
    """The process answers."""
    return Healthy(ok=True, version=tool_version())


@router.get("/readyz", response_model=Ready, responses=responses(own=_AWAY))
def readyz(services: ServicesDep) -> Response:
    """Whether database, broker and artifact store can be reached. Says no more than that to strangers."""
    parts = {
        "database": _part(lambda: _database(services)),
        "broker": _part(lambda: _broker(services)),
        "store": _part(lambda: _store(services)),
    }
    found = Ready(ok=all(part.ok for part in parts.values()), parts=parts)
    return JSONResponse(found.model_dump(mode="json"), 200 if found.ok else 503)


@router.get("/metrics", response_class=Response, responses=responses(own=_TEXT))
def metrics(request: Request, services: ServicesDep) -> Response:
    """Prometheus metrics. Open to this machine itself, and to all where SAFER_METRICS_PUBLIC says so; else for admins.

    A request that a proxy handed on is not this machine's own.
    """
    if not services.settings.metrics_public and not _own(request, services):
        _require_operator(request, services)
    return Response(generate_latest(services.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/me", response_model=Me, responses=responses())
def me(who: Anyone) -> Me:
    """Whose key this is."""
    return Me(project=who.project, key_id=who.key_id, name=who.name, roles=sorted(who.roles), version=tool_version())


def tool_version() -> str:
    """The installed version."""
    try:
        return version("safer-audit")
    except PackageNotFoundError:
        return "unknown"


def _own(request: Request, services: Services) -> bool:
    headers = request.headers
    if client_of(request) not in _LOOPBACK or any(name in headers for name in _HANDED_ON):
        return False
    check_host(headers.get("host", ""), services.settings.allowed_hosts)
    return True


def _require_operator(request: Request, services: Services) -> None:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    who = authenticate(services, secret.strip()) if scheme.lower() == "bearer" else None
    if who is None:
        services.strangers.take(client_of(request))
        raise NotAuthenticated("metrics need a key from here", "send an admin's key of the project default as bearer token")
    if who.project != DEFAULT_PROJECT:
        raise NotAllowed("metrics are of all projects", "use an admin's key of the project default")
    allow(who, "admin")


def _part(look: Callable[[], str]) -> PartState:
    try:
        return PartState(ok=True, detail=look())
    except SaferError as error:
        return PartState(ok=False, detail=error.message)


def _database(services: Services) -> str:
    check_version(services.engine)
    with reading(services.engine) as connection:
        connection.execute(text("SELECT 1"))
    return services.engine.dialect.name


def _broker(services: Services) -> str:
    services.sender.ping()
    return "redis"


def _store(services: Services) -> str:
    found = services.stores.readiness()
    if not found.ok:
        raise Unavailable(found.detail)
    return f"first commit wins by {found.exclusive}"
