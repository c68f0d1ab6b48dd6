"""Every error as an RFC 9457 problem. `STATUS` is the one table from SaferError to HTTP status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from safer_engine import errors as engine
from safer_engine.errors import SaferError
from service import errors as service
from service.schemas import Problem, ProblemField

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[SaferError], int] = {
    engine.SaferError: 500,
    engine.SpecError: 422,
    engine.InputRefused: 422,
    engine.ModelRefused: 422,
    engine.DatasetRefused: 422,
    engine.ArtifactError: 500,
    engine.DamagedArtifact: 500,
    engine.WorkBusy: 409,
    engine.NumericalError: 500,
    engine.LabellerError: 502,
    engine.ResourceError: 503,
    engine.Interrupted: 503,
    service.ServiceError: 500,
    service.Malformed: 400,
    service.RequestInvalid: 422,
    service.NotFound: 404,
    service.Gone: 410,
    service.Conflict: 409,
    service.NotAuthenticated: 401,
    service.NotAllowed: 403,
    service.SourceNotAllowed: 422,
    service.QuotaExceeded: 429,
    service.TooManyRequests: 429,
    service.TooLarge: 413,
    service.Unavailable: 503,
    service.SchemaMismatch: 503,
    service.LeaseLost: 409,
}
_FOUND_BY_ROUTER = {404: "not_found", 405: "method_not_allowed", 400: "malformed", 415: "media_type"}
_MAX_PROBLEMS = 50
FAULT, TELL = "the service failed on this request", "tell the operator; the service's log says more"


def status_of(error: SaferError) -> int:
    """The HTTP status of an error: its own class's, else its nearest base's."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem(status: int, code: str, detail: str, hint: str = "", **more: Any) -> Problem:
    """A problem document."""
    return Problem(
        type=f"urn:safer-audit:error:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
        **more,
    )


def respond(found: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that carries a problem."""
    return JSONResponse(found.model_dump(mode="json"), found.status, headers, MEDIA_TYPE)


def from_error(error: SaferError) -> JSONResponse:
    """The response to an error raised on purpose. Of a fault of the service only the code is told: the rest is for its log."""
    status = status_of(error)
    if status == 500:
        return respond(problem(500, error.code, FAULT, TELL))
    headers: dict[str, str] = {}
    if isinstance(error, service.TooManyRequests):
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    elif status == 503:
        headers["Retry-After"] = "5"
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    problems = getattr(error, "problems", ())
    return respond(
        problem(
            status,
            error.code,
            error.message,
            error.hint,
            retryable=error.retryable,
            errors=[ProblemField(path=found.path, message=found.message) for found in problems[:_MAX_PROBLEMS]],
        ),
        headers,
    )


def internal() -> JSONResponse:
    """The response to an error that nobody foresaw: what it was stands in the service's log."""
    return respond(problem(500, "internal", FAULT, TELL))


def add_handlers(app: FastAPI) -> None:
    """Make an application answer every error with a problem."""
    app.add_exception_handler(SaferError, _safer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, from_framework)
    for kind in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(kind, _database)


async def _safer(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SaferError)
    return from_error(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = wrong_fields(error)
    names = ", ".join(dict.fromkeys(item.path or "body" for item in found[:5]))
    return respond(problem(422, "request_invalid", f"fields are wrong: {names}", "see errors, and /openapi.json", errors=found))


def wrong_fields(error: RequestValidationError) -> list[ProblemField]:
    """What is wrong with the fields of a request."""
    found = []
    for item in error.errors()[:_MAX_PROBLEMS]:
        where, *rest = (part for part in item["loc"] if part != "[key]")
        path = ".".join(str(part) for part in rest) if where == "body" else f"{where}.{'.'.join(map(str, rest))}"
        found.append(ProblemField(path=path, message=item["msg"].removeprefix("Value error, ")))
    return found


async def from_framework(_request: Request, error: Exception) -> Response:
    """The answer to what the framework refuses: a path that is none, a method that a path does not take."""
    assert isinstance(error, HTTPException)
    code = _FOUND_BY_ROUTER.get(error.status_code, "error")
    return respond(problem(error.status_code, code, str(error.detail)), dict(error.headers or {}))


async def _database(_request: Request, _error: Exception) -> Response:
    return from_error(service.Unavailable("the database cannot be reached", "try again in a few seconds"))


Responses = dict[int | str, dict[str, Any]]


def responses(*statuses: int, own: Responses | None = None) -> Responses:
    """What OpenAPI says of a route's errors: those given, and those that any route may answer; `own` goes before them."""
    every = sorted({400, 401, 403, 404, 413, 422, 429, 500, 503, *statuses})
    problems: Responses = {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": _PROBLEM}}} for status in every
    }
    return problems | (own or {})


_PROBLEM = {"$ref": "#/components/schemas/Problem"}
