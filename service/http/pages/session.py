"""Beginning and ending a session, forms, and which page is shown when something is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, urlsplit

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute

from safer_engine.errors import SaferError
from service.errors import Malformed, NotAuthenticated, RequestInvalid, TooManyRequests
from service.http.auth import COOKIE, SESSION_SECONDS, check_form, check_origin, csrf_token, new_session, session_principal
from service.http.errors import status_of, wrong_fields
from service.http.limits import require_text
from service.http.pages.render import render
from service.http.services import Services, services_of
from service.jobs.access import Principal

_FORM = "application/x-www-form-urlencoded"
_MAX_FIELDS = 20


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page, and what its forms carry."""

    who: Principal
    token: str

    def may(self, *roles: str) -> bool:
        """Whether one of the roles is held, or `admin`."""
        return "admin" in self.who.roles or bool(set(roles) & set(self.who.roles))


def error_page(error: SaferError) -> Response:
    """An error for people."""
    page = render("error.html.j2", {"error": error, "visitor": None}, status_of(error))
    if isinstance(error, TooManyRequests):
        page.headers["Retry-After"] = str(math.ceil(error.retry_after))
    return page


class PageRoute(APIRoute):
    """A route whose errors are pages: whoever is not logged in comes to the login page, and back."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except NotAuthenticated:
                asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(f"/login?next={quote(asked)}", 303)
            except RequestValidationError as error:
                said = "; ".join(f"{item.path}: {item.message}" for item in wrong_fields(error))
                return error_page(RequestInvalid(f"fields are wrong: {said}", "go back, and choose from what is offered"))
            except SaferError as error:
                return error_page(error)

        return handler


def visitor(request: Request, services: Annotated[Services, Depends(services_of)]) -> Visitor:
    """The session's principal. Raises NotAuthenticated, TooManyRequests."""
    cookie = request.cookies.get(COOKIE, "")
    who = session_principal(services, cookie) if cookie else None
    if who is None:
        raise NotAuthenticated("nobody is logged in", "log in")
    services.rate.take(who.key_id)
    return Visitor(who, csrf_token(services, cookie))


async def form_fields(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name. Raises Malformed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise Malformed("this is not a form", "use the page")
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError:
        raise Malformed("the form cannot be read", "load the page again") from None
    return {name: require_text(value) for name, value in pairs}


def session_form(
    request: Request,
    services: Annotated[Services, Depends(services_of)],
    seen: Annotated[Visitor, Depends(visitor)],
    fields: Annotated[dict[str, str], Depends(form_fields)],
) -> dict[str, str]:
    """The fields of a form that a page of this very session sent. Raises NotAllowed."""
    check_form(services, request, request.cookies.get(COOKIE), fields.get("token", ""))
    return fields


def begin(request: Request, services: Services, who: Principal, after: str) -> Response:
    """Log in: the cookie, and on to the page that was asked for."""
    check_origin(request)
    response = RedirectResponse(local_path(after), 303)
    secure = request.url.scheme == "https" or (services.settings.public_url or "").startswith("https:")
    response.set_cookie(
        COOKIE, new_session(services, who), SESSION_SECONDS, path="/", secure=secure, httponly=True, samesite="strict"
    )
    return response


def end() -> Response:
    """Log out."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


def local_path(given: str) -> str:
    """A path of this site; anything else becomes the first page."""
    parts = urlsplit(given)
    plain = given.startswith("/") and not given.startswith(("//", "/\\")) and given.isascii() and given.isprintable()
    return given if plain and not parts.scheme and not parts.netloc and "\\" not in given else "/"


VisitorDep = Annotated[Visitor, Depends(visitor)]
SessionForm = Annotated[dict[str, str], Depends(session_form)]
Form = Annotated[dict[str, str], Depends(form_fields)]
