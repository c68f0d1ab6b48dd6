"""The application: routes, and what surrounds every request. Read this first.

From the outside in: `Surround` (host, security headers, metrics, and a problem for what nobody foresaw), `Intake` (sizes,
JSON), then FastAPI: authentication and role (`auth`), validation (`service.schemas`), the handler, errors as problems
(`errors`). Routes by subject: `audits`, `gates`, `artifacts`, `edits`, `uploads`, `hooks`, `administration`, `operations`; the
pages for people are in `pages`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_engine.errors import SaferError
from service.errors import NotFound, ServiceError
from service.http import administration, artifacts, audits, edits, gates, history, hooks, operations, pages, uploads
from service.http.auth import check_host
from service.http.errors import FAULT, TELL, add_handlers, from_error, from_framework, internal
from service.http.limits import Intake
from service.http.pages.render import render
from service.http.pages.session import error_page
from service.http.services import Services, open_services
from service.infra.settings import Settings
from service.schemas import Problem

_LOG = logging.getLogger(__name__)
_ANY_HOST = frozenset(("/healthz", "/readyz", "/metrics"))
"""Asked by probes and scrapers under whatever address they use; they tell nothing that a name could protect."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with `no-referrer` browsers post forms as from nowhere (`Origin: null`)
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
}
_DESCRIPTION = """Audits of reward models: what they reward, which preference pairs look wrong, which edits are recommended.

Send an API key as `Authorization: Bearer sk-safer-…`. Errors are problems (RFC 9457) with a stable `code` and a `hint`."""


def create_app(settings: Settings, services: Services | None = None) -> FastAPI:
    """The API and its pages.

    Args:
        services: in place of those made from the settings; whoever opened them closes them.

    Raises:
        SpecError: a setting that the API needs is missing.
    """
    found = services or open_services(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        found.stopping.set()
        if services is None:
            found.close()

    app = FastAPI(
        title="safer-audit",
        version=operations.tool_version(),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = found
    add_handlers(app)
    app.add_exception_handler(HTTPException, _refused)
    for part in (audits, gates, history, artifacts, edits, uploads, hooks, administration, operations, pages):
        app.include_router(part.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Intake, settings=settings)
    app.add_middleware(Surround, services=found)
    return app


class Surround:
    """What holds for every request, whoever answers it."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services
        url = services.settings.public_url or ""
        secure = {"Strict-Transport-Security": "max-age=31536000"} if url.startswith("https:") else {}
        self._headers = {**_HEADERS, **secure}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        started = False

        async def send_out(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if scope["path"] not in _ANY_HOST:
                host = next((value for name, value in scope["headers"] if name == b"host"), b"")
                check_host(host.decode("latin-1"), self.services.settings.allowed_hosts)
            await self.app(scope, receive, send_out)
        except SaferError as error:
            await from_error(error)(scope, receive, send_out)
        except Exception:
            _LOG.exception("a request failed: %s %s", scope["method"], _route(scope))
            if started:
                raise
            await _fault(scope)(scope, receive, send_out)
        finally:
            self.services.http_metrics.observe(_route(scope), scope["method"], status, time.perf_counter() - began)


def _route(scope: Scope) -> str | None:
    """The template of the route that matched."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path


async def _refused(request: Request, error: Exception) -> Response:
    """What the framework refuses, as a page where a browser asked for one."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", ""):
        return error_page(NotFound("there is no such page", "begin with the list of jobs"))
    return await from_framework(request, error)


def _fault(scope: Scope) -> Response:
    """The answer to an error that nobody foresaw: a page where a page was asked for."""
    if scope["path"].startswith("/v1/"):
        return internal()
    return render("error.html.j2", {"error": ServiceError(FAULT, TELL), "visitor": None}, 500)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"] |= {**problem.pop("$defs", {}), "Problem": problem}
        app.openapi_schema = schema
    return app.openapi_schema
