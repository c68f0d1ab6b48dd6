"""Who is asking, and whether they may: API keys as bearer tokens, and a signed cookie for the pages.

Every route names the roles of which one suffices; `admin` suffices for all. The cookie stands for an API key, looked up anew
on each request, so that revoking the key ends the session. On `/v1` it is accepted for reading only: nothing is changed by
a request that a browser attaches it to. Forms of the pages carry a token besides (`csrf_token`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from service.errors import Malformed, NotAllowed, NotAuthenticated
from service.http.services import Services, services_of
from service.jobs.access import Principal

COOKIE = "safer_session"
SESSION_SECONDS = 12 * 3600
SAFE_METHODS = frozenset(("GET", "HEAD"))
_BEARER = HTTPBearer(auto_error=False, description="An API key: `sk-safer-…`.")
_SESSION = APIKeyCookie(name=COOKIE, auto_error=False, description="Session of the pages; reads only.")


def require(*roles: str) -> Callable[..., Principal]:
    """A dependency: whoever holds one of the roles. Raises NotAuthenticated, NotAllowed, TooManyRequests."""

    def check(
        request: Request,
        services: Annotated[Services, Depends(services_of)],
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
        cookie: Annotated[str | None, Security(_SESSION)] = None,
    ) -> Principal:
        principal = _identify(request, services, bearer, cookie)
        services.rate.take(principal.key_id)
        return allow(principal, *roles)

    check.roles = roles  # type: ignore[attr-defined]
    return check


def allow(principal: Principal, *roles: str) -> Principal:
    """The principal, if it holds one of the roles. Raises NotAllowed."""
    if "admin" not in principal.roles and not set(roles) & set(principal.roles):
        wanted = " or ".join(dict.fromkeys((*roles, "admin")))
        raise NotAllowed(f"this needs the role {wanted}", "ask an admin of the project for a key that has it")
    return principal


def _identify(request: Request, services: Services, bearer: HTTPAuthorizationCredentials | None, cookie: str | None) -> Principal:
    found = None
    if bearer is not None:
        found = authenticate(services, bearer.credentials)
    elif cookie and request.method in SAFE_METHODS:
        found = session_principal(services, cookie)
    if found is None:
        services.strangers.take(client_of(request))
        raise NotAuthenticated("no valid API key was given", "send `Authorization: Bearer sk-safer-…`")
    return found


def authenticate(services: Services, secret: str) -> Principal | None:
    """Whose secret it is; None for anything that is not the secret of a living key."""
    return services.access.authenticate(secret) if secret.isascii() and len(secret) <= 200 else None


def client_of(request: Request) -> str:
    """The peer's address; behind a proxy, the proxy's."""
    return request.client.host if request.client else "local"


def new_session(services: Services, principal: Principal) -> str:
    """The cookie's value: key id and end, by the database's clock, signed."""
    ends = int(services.outlook.now().timestamp()) + SESSION_SECONDS
    payload = base64.urlsafe_b64encode(json.dumps([principal.key_id, ends]).encode()).decode()
    return f"{payload}.{_sign(services, 'session', payload)}"


def session_principal(services: Services, cookie: str) -> Principal | None:
    """Whose session it is; None when it was not signed here, is over, or its key no longer lives."""
    payload, _, signature = cookie.partition(".")
    if not cookie.isascii() or not hmac.compare_digest(signature, _sign(services, "session", payload)):
        return None
    try:
        key_id, expires = json.loads(base64.urlsafe_b64decode(payload))
    except (ValueError, binascii.Error):
        return None
    return services.access.principal(key_id) if services.outlook.now().timestamp() < expires else None


def csrf_token(services: Services, cookie: str) -> str:
    """What forms of a session carry."""
    return _sign(services, "form", cookie)


def check_form(services: Services, request: Request, cookie: str | None, token: str) -> None:
    """Raises NotAllowed unless a form comes from a page of this session and of this site."""
    check_origin(request)
    if not cookie or not token.isascii() or not hmac.compare_digest(token, csrf_token(services, cookie)):
        raise NotAllowed("the form is not of this session", "load the page again")


def check_origin(request: Request) -> None:
    """Raises NotAllowed when a browser says that another site sent the request."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    foreign = origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower()
    if foreign or (site is not None and site not in ("same-origin", "none")):
        raise NotAllowed("the request comes from another site", "open the page itself and try again")


def check_host(host: str, allowed: tuple[str, ...]) -> None:
    """Raises Malformed unless a Host header names one of the allowed hosts, at any port."""
    name = host.lower()
    name = name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]
    if "*" not in allowed and name not in {known.lower() for known in allowed}:
        raise Malformed("this Host is not served here", "the operator names the accepted ones in SAFER_ALLOWED_HOSTS")


def _sign(services: Services, purpose: str, text: str) -> str:
    pepper = services.pepper
    return hmac.new(pepper, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


Submitter = Annotated[Principal, Depends(require("submit"))]
Reader = Annotated[Principal, Depends(require("read"))]
Watcher = Annotated[Principal, Depends(require("submit", "read", "review"))]
RedTeam = Annotated[Principal, Depends(require("redteam"))]
EditReader = Annotated[Principal, Depends(require("read", "review"))]
Reviewer = Annotated[Principal, Depends(require("review"))]
Admin = Annotated[Principal, Depends(require("admin"))]
Anyone = Annotated[Principal, Depends(require("submit", "read", "review", "redteam"))]
