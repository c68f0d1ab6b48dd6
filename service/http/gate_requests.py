"""From what a client sends to a gate that may be stored: the policy validated, the baseline found."""

from __future__ import annotations

import json
from typing import Any

from safer_engine.gate.policy import Policy, load_policy, policy_names
from safer_engine.store import canonical_json, digest_bytes
from service.errors import FieldProblem, RequestInvalid
from service.gate_schemas import GateSummary, GateView, SubmitGate
from service.http.services import Services
from service.http.submissions import new_audit, validated
from service.jobs.access import Principal
from service.jobs.deliveries import CALLBACK, Delivery, NewDelivery
from service.jobs.gate_model import CreatedGate, GateRecord, NewGate
from service.jobs.ids import is_id
from service.schemas import ErrorView

_POLICY_HINT = "docs/gate.md and docs/policy.schema.json say what a policy holds"


def create_gate(
    services: Services, who: Principal, asked: SubmitGate, key: str | None, more: tuple[NewDelivery, ...] = ()
) -> CreatedGate:
    """Store a gate as it was asked for; what it names is looked up now.

    Args:
        key: idempotency key.
        more: who is told of the decision besides `callback_url`.

    Raises:
        RequestInvalid, SourceNotAllowed, NotFound, Conflict, QuotaExceeded, SpecError.
    """
    if (asked.audit is None) == (asked.submission is None):
        found = (FieldProblem("audit", "one of audit and submission"),)
        raise RequestInvalid("give either audit or submission", "the id of an audit, or one to be made", found)
    digest = digest_bytes(canonical_json(asked.model_dump(mode="json")))
    before = services.gates.earlier(who.project, key, digest)
    if before is not None:  # what it named may be called otherwise by now, or be gone
        return CreatedGate(before, created=False)
    policy = policy_of(asked.policy)
    if asked.callback_url is not None:
        services.outbound.precheck(asked.callback_url)
    audit = new_audit(services, who, asked.submission, None) if asked.submission is not None else _job_id(asked.audit)
    called = () if asked.callback_url is None else (NewDelivery(CALLBACK, {"url": asked.callback_url}),)
    new = NewGate(
        policy=policy.model_dump(mode="json"),
        policy_name=policy.name,
        policy_digest=policy.digest,
        baseline=asked.baseline,
        baseline_job_id=services.gates.baseline(who.project, asked.baseline, asked.audit) if asked.baseline else None,
        deliveries=(*called, *more),
        idempotency_key=key,
        body_digest=digest,
        submitted_by=who.key_id,
    )
    return services.gates.create(who.project, new, audit)


def policy_of(asked: str | dict[str, Any]) -> Policy:
    """A built-in policy by name, or one that was sent. Nothing is looked for on this machine. Raises RequestInvalid."""
    if isinstance(asked, dict):
        policy = validated(Policy, asked, "policy", _POLICY_HINT)
        assert isinstance(policy, Policy)
        return policy
    if asked not in policy_names():
        known = f"built in are: {', '.join(policy_names())}; send any other as a document"
        raise RequestInvalid("there is no such policy", known, (FieldProblem("policy", "not built in"),))
    return load_policy(asked)


def gate_summary(gate: GateRecord) -> GateSummary:
    """A gate as lists show it."""
    error = gate.error
    return GateSummary(
        id=gate.id,
        audit=gate.job_id,
        state=gate.state,
        verdict=gate.verdict,
        reason=gate.reason,
        error=ErrorView(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable) if error else None,
        policy=gate.policy_name,
        policy_digest=gate.policy_digest,
        baseline=gate.baseline,
        baseline_audit=gate.baseline_job_id,
        submitted_by=gate.submitted_by,
        created=gate.created,
        decided=gate.decided,
    )


def gate_view(services: Services, gate: GateRecord) -> GateView:
    """A gate in full, with what stands in other tables."""
    decision = services.gates.decision(gate.id)
    called = next((each for each in services.deliveries.of_gate(gate.id) if each.kind == CALLBACK), None)
    return GateView(
        **dict(gate_summary(gate)),
        decision=json.loads(decision) if decision is not None else None,
        policy_document=services.gates.policy(gate.id),
        callback_url=_url(called),
        callback_state=called.state if called else None,
        links={"self": f"/v1/gates/{gate.id}", "audit": f"/v1/audits/{gate.job_id}"},
    )


def _url(called: Delivery | None) -> str | None:
    return str(called.target["url"]) if called else None


def _job_id(audit: str | None) -> str:
    if audit is None or not is_id(audit):
        raise RequestInvalid("audit is no job's id", "see `safer-audit list`", (FieldProblem("audit", "no id"),))
    return audit
