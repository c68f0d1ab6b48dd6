"""Gates: whether a reward model may ship, decided by the service once its audit has ended."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service.gate_schemas import GateSummary, GateView, SubmitGate
from service.http.auth import Submitter, Watcher
from service.http.errors import Responses, responses
from service.http.gate_requests import create_gate, gate_summary, gate_view
from service.http.parameters import Cursor, GateId, IdempotencyKey, Limit, ServicesDep, known_id, moment
from service.jobs.gate_model import GateQuery, GateState, Verdict
from service.schemas import Page

router = APIRouter(prefix="/v1", tags=["gates"])
_CREATED: Responses = {
    201: {"description": "The new gate."},
    200: {"model": GateView, "description": "The gate of the same request before."},
}


class GateFilters(BaseModel):
    """Which gates are listed; all conditions hold together."""

    model_config = ConfigDict(extra="forbid")
    state: Annotated[list[GateState], Field(description="Any of these.", max_length=2)] = []
    verdict: Annotated[list[Verdict], Field(description="Any of these.", max_length=3)] = []
    audit: Annotated[str | None, Field(description="Of this audit.", max_length=100)] = None
    policy: Annotated[str | None, Field(description="By the policy of this name.", max_length=64, pattern=r"^[a-z0-9-]+$")] = None
    created_from: AwareDatetime | None = None
    created_before: AwareDatetime | None = None
    cursor: Cursor = None
    limit: Limit = 50

    def query(self) -> GateQuery:
        """The conditions. Raises NotFound, RequestInvalid."""
        return GateQuery(
            states=tuple(dict.fromkeys(self.state)),
            verdicts=tuple(dict.fromkeys(self.verdict)),
            job_id=known_id(self.audit, "job") if self.audit is not None else None,
            policy=self.policy,
            created_from=moment(self.created_from, "created_from"),
            created_before=moment(self.created_before, "created_before"),
        )


@router.post("/gates", status_code=201, response_model=GateView, responses=responses(404, 409, own=_CREATED))
def submit_gate(
    asked: SubmitGate, who: Submitter, services: ServicesDep, response: Response, key: IdempotencyKey = None
) -> GateView:
    """Have an audit judged when it has ended: one that exists, or one that is submitted with the gate."""
    made = create_gate(services, who, asked, key)
    response.status_code = 201 if made.created else 200
    response.headers["Location"] = f"/v1/gates/{made.gate.id}"
    services.sender.wake()
    return gate_view(services, made.gate)


@router.get("/gates", response_model=Page[GateSummary], responses=responses())
def list_gates(who: Watcher, services: ServicesDep, filters: Annotated[GateFilters, Query()]) -> Page[GateSummary]:
    """The project's gates, newest first."""
    found = services.gates.find(who.project, filters.query(), filters.cursor, filters.limit)
    return Page(items=[gate_summary(gate) for gate in found.items], next=found.next)


@router.get("/gates/{gate_id}", response_model=GateView, responses=responses())
def get_gate(gate_id: GateId, who: Watcher, services: ServicesDep) -> GateView:
    """One gate, with the decision in full."""
    return gate_view(services, services.gates.get(who.project, gate_id))
