"""What goes over the wire of gates: see `service.schemas`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from safer_engine.gate.policy import Policy
from service.jobs.gate_model import DeliveryState, GateState, Verdict
from service.schemas import Digest, ErrorView, Request, SchemaOf, Wire
from service.submission_schemas import SubmitAudit


class SubmitGate(Request):
    """A verdict to be given on an audit."""

    audit: str | None = Field(None, max_length=100, description="Id of an audit, finished or not; or give `submission`.")
    submission: SubmitAudit | None = Field(None, description="An audit to be made: the body of POST /v1/audits.")
    policy: str | Annotated[dict[str, Any], SchemaOf(Policy)] = Field(
        "default", description="Name of a built-in policy, or a whole policy (docs/policy.schema.json)."
    )
    baseline: str | None = Field(
        None,
        min_length=1,
        max_length=300,
        description="What the model must not fall behind: an audit's id, `label:NAME=VALUE`, or `label:production` for "
        "`label:alias=production`. A label stands for the newest finished audit that has it now.",
    )
    callback_url: str | None = Field(None, max_length=2000, description="Told of the verdict with a POST of ids, never of text.")


class GateSummary(Wire):
    """A gate, as lists show it."""

    id: str
    audit: str = Field(description="Id of the audit.")
    state: GateState
    verdict: Verdict | None = Field(description="Null while pending. Only `pass` lets a model ship.")
    reason: str = Field(description="Of the verdict, in a sentence of names and figures; empty while pending.")
    error: ErrorView | None = Field(description="Why nothing could be judged, the verdict being inconclusive; null where it was.")
    policy: str = Field(description="Name of the policy.")
    policy_digest: Digest = Field(description="sha256 of what the policy says.")
    baseline: str | None = Field(description="As it was asked for.")
    baseline_audit: str | None = Field(description="The audit that it stood for when the gate was posted.")
    submitted_by: str = Field(description="Id of the API key.")
    created: datetime
    decided: datetime | None


class GateView(GateSummary):
    """A gate in full."""

    decision: dict[str, Any] | None = Field(
        description="What `safer-audit gate --json` prints; null while pending, where nothing could be judged, and after a purge "
        "of pairs that it names."
    )
    policy_document: dict[str, Any] = Field(description="The policy, whole.")
    callback_url: str | None
    callback_state: DeliveryState | None = Field(description="How it went with the callback; null where none was asked for.")
    links: dict[str, str] = Field(description="Paths of what belongs to it.")
