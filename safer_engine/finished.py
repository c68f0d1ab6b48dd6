"""Artifacts of an audit that was made: found in a store, never computed."""

from __future__ import annotations

from typing import Any

from safer_engine import pipeline
from safer_engine.artifacts import Absent, Artifact, view
from safer_engine.errors import SpecError
from safer_engine.pipeline import AuditRequest
from safer_engine.store import ArtifactStore


def finished(request: AuditRequest, store: ArtifactStore, kinds: tuple[type[Artifact], ...]) -> dict[type[Artifact], Any]:
    """The artifacts of some types. Raises SpecError where one was not computed, or is absent."""
    plans = {plan.name: plan for plan in pipeline.plan(request, store)}
    found: dict[type[Artifact], Any] = {}
    for stage in pipeline.STAGES:
        plan = plans[stage.name]
        if stage.produces not in kinds:
            continue
        if plan.state != "cached" or plan.key is None:
            raise SpecError(f"the store has no stage `{stage.name}` of this audit", "run it first: `safer-audit run`, same flags")
        value = view(stage.produces, store.read(stage.name, plan.key))
        if isinstance(value, Absent):
            raise SpecError(f"the audit has no stage `{stage.name}`: {value.reason}")
        found[stage.produces] = value
    return found
