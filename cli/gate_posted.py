"""Gates that the service decides: posting one, and waiting for its verdict."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cli.gate_sources import is_path, submission
from cli.profile import connect
from safer_engine.errors import Interrupted, SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from safer_engine.gate.judge import Decision
    from safer_engine.gate.policy import Policy
    from service.client import AuditClient
    from service.gate_schemas import GateView

Flags = tuple[dict[str, Any], tuple[str, ...]]
"""The flags of an audit to be made, and its labels as they were given."""
_POLL_SECONDS = 1.0


def post(audit: str | Flags, policy: Policy, baselines: tuple[str, ...], callback: str | None, shown: Console | None) -> GateView:
    """Post a gate. The policy travels whole: what this version knows of it decides, whatever the service has built in.

    Args:
        audit: an audit's id, or one to be made.
        baselines: at most one.
        callback: is told of the verdict.
    """
    from cli.submit import uploaded
    from service.client import GateRequest

    if len(baselines) > 1:
        raise SpecError(
            f"{len(baselines)} baselines cannot be given with --detach: the service judges against one",
            "leave --detach out to judge against several here, when the audit has ended, or give one",
        )
    baseline = next(iter(baselines), None)
    if baseline is not None and is_path(baseline):
        raise SpecError(
            f"--detach lets the service judge, which cannot read {baseline}", "name the baseline by its job's id or by a label"
        )
    document = policy.model_dump(mode="json")
    if isinstance(audit, str):
        with connect() as client:
            return client.post_gate(GateRequest(audit, document, baseline, callback))
    with uploaded(submission(*audit, None), shown) as (client, ready):
        return client.post_gate(GateRequest(ready, document, baseline, callback))


def decision_of(gate_id: str, shown: Console | None, *, wait: bool) -> Decision | None:
    """The service's decision on a gate; None where it is pending and is not waited for.

    Raises:
        SaferError: nothing could be judged; with the code, and so the exit code, that judging here would have had.
        Interrupted: Ctrl-C; the service goes on.
    """
    from safer_engine.gate.decisions import read_decision
    from service.client import make_error
    from service.errors import Gone

    with connect() as client:
        gate = client.gate(gate_id)
        if gate.verdict is None and wait:
            gate = _decided(client, gate, shown)
    if gate.verdict is None:
        return None
    if gate.error is not None:
        raise make_error(gate.error.code, f"gate {gate.id} is {gate.verdict}: {gate.error.message}", gate.error.hint)
    if gate.decision is None:
        raise Gone(
            f"the decision of gate {gate.id} ({gate.verdict}) was removed by a purge of someone's data", "post another gate"
        )
    return read_decision(gate.decision, gate.policy_document)


def _decided(client: AuditClient, gate: GateView, shown: Console | None) -> GateView:
    """The gate once it is decided; the audit is shown as it goes on."""
    from cli.live import in_turn, wait_for
    from service.errors import NotFound

    gate_id = gate.id
    try:
        while gate.verdict is None:
            with suppress(NotFound):  # an audit that was deleted meanwhile is the service's to judge
                wait_for(client, gate.audit, shown)  # one that is tried again has another end
            time.sleep(_POLL_SECONDS)
            gate = in_turn(lambda: client.gate(gate_id))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"no longer waiting; gate {gate.id} goes on", f"come back with: safer-audit gate --gate {gate.id}"
        ) from None
    return gate
