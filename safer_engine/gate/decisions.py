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

    `audit` and `baselines` hold the digests of their inputs and nothing else.

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
            baselines=tuple(map(_audit, _baselines(document))),
            judged_on=date.fromisoformat(document.get("judged_on", "0001-01-01")),  # told where it counts: with waivers
            lost=tuple(document["lost_pairs"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError):
        raise InputRefused("the decision is of a version that this one cannot read", "use the service's version") from None


def _check(made: Mapping[str, Any]) -> Check:
    bounds = None if made["lo"] is None else Bounds(made["lo"], made["hi"])
    waiver = Waiver.model_validate(made["waiver"]) if "waiver" in made else None
    plain, sd = {name: made[name] for name in _PLAIN}, made.get("training_sd")
    return Check(**plain, bounds=bounds, tail=made["false_alarm_share"], waiver=waiver, training_sd=sd)


def _baselines(document: Mapping[str, Any]) -> list[Mapping[str, str | None]]:
    if "baselines" in document:
        return list(document["baselines"])
    return [] if document["baseline"] is None else [document["baseline"]]


def _audit(digests: Mapping[str, str | None]) -> Audit:
    inputs = {name: {"digest": digest} for name, digest in digests.items()}
    return Audit({"provenance": {"inputs": inputs}}, None)
