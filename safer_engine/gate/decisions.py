"""A decision that was made elsewhere, read back from its document, so that every output can be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from pydantic import ValidationError

from safer_engine.errors import InputRefused
from safer_engine.gate.documents import Audit
from safer_engine.gate.intervals import Bounds
from safer_engine.gate.judge import Check, Decision
from safer_engine.gate.outputs import SCHEMA_VERSION
from safer_engine.gate.policy import Policy, Waiver

_PLAIN = ("id", "rule", "outcome", "effect", "reason", "demand", "value", "n", "n_groups", "note")


def read_decision(document: Mapping[str, Any], policy: Mapping[str, Any]) -> Decision:
    """The decision of a document (`safer_engine.gate.outputs.as_document`) and its policy, whole.

    `audit` and `baseline` hold the digests of their inputs and nothing else.

    Raises:
        InputRefused: it is of a version that this one cannot read.
    """
    try:
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(document["schema_version"])
        return Decision(
            verdict=document["verdict"],
            policy=Policy.model_validate(policy),
            checks=tuple(_check(each) for each in document["checks"]),
            audit=_audit(document["report"]),
            baseline=None if document["baseline"] is None else _audit(document["baseline"]),
            judged_on=date.fromisoformat(document.get("judged_on", "0001-01-01")),  # told where it counts: with waivers
            lost=tuple(document["lost_pairs"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError):
        raise InputRefused("the decision is of a version that this one cannot read", "use the service's version") from None


def _check(made: Mapping[str, Any]) -> Check:
    bounds = None if made["lo"] is None else Bounds(made["lo"], made["hi"])
    waiver = Waiver.model_validate(made["waiver"]) if "waiver" in made else None
    return Check(**{name: made[name] for name in _PLAIN}, bounds=bounds, tail=made["false_alarm_share"], waiver=waiver)


def _audit(digests: Mapping[str, str | None]) -> Audit:
    inputs = {name: {"digest": digest} for name, digest in digests.items()}
    return Audit({"provenance": {"inputs": inputs}}, None)
