"""Webhooks of other systems: what they tell is stored before they are answered, and acted on by a thread of its own."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from service.errors import NotAuthenticated, NotFound
from service.http.auth import client_of
from service.http.errors import Responses, responses
from service.http.parameters import ServicesDep
from service.mlflow.deliveries import delivery_id, read_event
from service.schemas import Wire

router = APIRouter(prefix="/v1/hooks", tags=["hooks"])
_LOG = logging.getLogger(__name__)


class HookView(Wire):
    """What became of a delivery."""

    state: Literal["accepted", "duplicate", "ignored"] = Field(
        description="accepted: stored, and an audit follows. duplicate: it was here before. ignored: nothing is done about it."
    )
    reason: str = Field("", description="Why it is ignored.")


_TAKEN: Responses = {
    202: {"model": HookView, "description": "Stored; an audit follows."},
    200: {"model": HookView, "description": "It was here before, or nothing is done about it."},
}
_BODY = {
    "parameters": [
        {"in": "header", "name": f"X-MLflow-{name}", "required": True, "schema": {"type": "string", "maxLength": 200}}
        for name in ("Delivery-Id", "Timestamp", "Signature")
    ],
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
}


async def _raw(request: Request) -> bytes:
    return await request.body()


@router.post("/mlflow", status_code=202, response_model=HookView, responses=responses(own=_TAKEN), openapi_extra=_BODY)
def mlflow_webhook(
    request: Request, services: ServicesDep, response: Response, body: Annotated[bytes, Depends(_raw)]
) -> HookView:  # fmt: skip
    """Take a webhook of MLflow's model registry, signed with the secret of the webhook. No API key is needed."""
    hook = services.mlflow
    if hook is None:
        raise NotFound("this service takes no webhooks of MLflow", "its operator may set SAFER_MLFLOW_URL: docs/mlflow.md")
    try:
        delivery = delivery_id(hook.secret, request.headers, body, time.time())
    except NotAuthenticated as error:
        services.strangers.take(client_of(request))
        _LOG.warning("a webhook was refused: %s", error.message)
        raise
    found = read_event(body)
    response.status_code = 200
    if isinstance(found, str):
        return HookView(state="ignored", reason=f"nothing is done about {found}")
    entry = hook.template.entry(found.model)
    if entry is None or not entry.wants(found.alias):
        return HookView(state="ignored", reason="no entry of the template asks for it")
    if not hook.versions.receive(delivery, found):
        return HookView(state="duplicate")
    response.status_code = 202
    return HookView(state="accepted")
