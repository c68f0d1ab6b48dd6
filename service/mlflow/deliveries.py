"""What a webhook of MLflow brings: who sent it, and what it asks for.

MLflow signs `<delivery id>.<seconds since the epoch>.<body>` with HMAC-SHA256, keyed with the secret's own bytes; the header
holds `v1,<base64 of the HMAC>`. A delivery that it tries again has the same id and time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from service.errors import FieldProblem, NotAuthenticated, RequestInvalid

SIGNATURE, DELIVERY, TIMESTAMP = "X-MLflow-Signature", "X-MLflow-Delivery-Id", "X-MLflow-Timestamp"
FRESH_SECONDS = 300.0
"""How far a delivery's time may be from now: longer than MLflow goes on trying, shorter than what could be replayed for long."""
_DELIVERY_ID = re.compile(r"[A-Za-z0-9-]{1,100}")
_HINT = "the webhook's secret in MLflow and SAFER_MLFLOW_SECRET are to be the same"


@dataclass(frozen=True)
class VersionEvent:
    """A model version was created, or (`alias`) an alias set on it."""

    model: str
    version: str
    alias: str | None = None


class _Named(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")]


class _Aliased(_Named):
    alias: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class _Envelope(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    entity: str
    action: str
    data: dict[str, Any]
    workspace: str | None = None


_KINDS: dict[tuple[str, str], type[_Named]] = {
    ("model_version", "created"): _Named,
    ("model_version_alias", "created"): _Aliased,
}


def delivery_id(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """The id of a delivery that really comes from MLflow.

    Args:
        headers: looked up without regard to case.
        now: seconds since the epoch.

    Raises:
        NotAuthenticated: it is not signed with the secret, or was sent too long ago.
    """
    sent_as, at, signature = (headers.get(name) or "" for name in (DELIVERY, TIMESTAMP, SIGNATURE))
    if not _DELIVERY_ID.fullmatch(sent_as) or not (at.isascii() and at.isdigit() and len(at) <= 12):
        raise NotAuthenticated(f"the delivery has no {SIGNATURE}, {DELIVERY} and {TIMESTAMP}", _HINT)
    mac = hmac.new(secret.encode(), f"{sent_as}.{at}.".encode() + body, hashlib.sha256).digest()
    wanted = f"v1,{base64.b64encode(mac).decode()}"
    if not hmac.compare_digest(signature.encode("utf-8", "replace"), wanted.encode()):
        raise NotAuthenticated("the delivery is not signed with the secret that is set here", _HINT)
    if abs(now - int(at)) > FRESH_SECONDS:
        raise NotAuthenticated(f"the delivery was sent {now - int(at):.0f} s ago", "if it was not: set the machines' clocks")
    return sent_as


def read_event(body: bytes) -> VersionEvent | str:
    """What a delivery asks for; a text, where it asks for nothing that is done here, says what it is.

    Raises:
        RequestInvalid: it is no event of MLflow.
    """
    try:
        found = _Envelope.model_validate_json(body)
        kind = _KINDS.get((found.entity, found.action))
        if kind is None:
            return f"{found.entity}.{found.action}"[:200]
        data = kind.model_validate(found.data)
    except ValidationError as error:
        problems = tuple(FieldProblem(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()[:5])
        raise RequestInvalid("this is no event of MLflow 3", "subscribe to model_version.created", problems) from None
    if found.workspace not in (None, "default"):
        return "an event of another workspace than `default`"
    return VersionEvent(data.name, data.version, data.alias if isinstance(data, _Aliased) else None)
