"""What is planned of an audit's stages: their work when the job is prepared, their time and memory where they are computed.

Work follows from the inputs and is the same everywhere; time follows from the rates of the machine, which it keeps
(`rates.json` in its folder) and learns from what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safer_engine.pipeline import AuditRequest, StagePlan, plan
from safer_engine.planning import AuditEstimate, AuditSize, audit_size, estimate_of, record_rates
from safer_engine.spec import AuditSpec
from safer_engine.stage import Stage
from safer_engine.store import ArtifactStore, Manifest
from service.infra.settings import Settings
from service.jobs.outlook import JobPlan, StageOutlook


def plan_audit(request: AuditRequest, store: ArtifactStore, settings: Settings) -> JobPlan:
    """What the stages of an audit will take; seconds of those that workers like this one compute.

    Raises:
        DatasetRefused, ModelRefused: the rows or the tokenizer cannot be read.
    """
    planned = plan(request, store)
    size = audit_size(request, store, planned)
    expected = estimate_of(request.spec, size, planned, rates_here(settings))
    record_rates(rates_here(settings), expected, [], request.spec)
    stages = {
        name: StageOutlook(each.state == "cached", each.work, each.seconds if each.resource in settings.queues else None)
        for name, each in expected.stages.items()
    }
    return JobPlan(size.dumped(), stages)


def expect(stage: Stage, spec: AuditSpec, planned: Mapping[str, Any] | None, settings: Settings) -> AuditEstimate | None:
    """What computing one stage will take on this machine; None where the job has no plan."""
    if planned is None:
        return None
    one = (StagePlan(stage.name, stage.resource, None, "compute"),)
    return estimate_of(spec, AuditSize.loaded(JobPlan.loaded(planned).size), one, rates_here(settings))


def learn(expected: AuditEstimate | None, manifest: Manifest, spec: AuditSpec, settings: Settings) -> None:
    """Remember at what rate this machine computed a stage."""
    if expected is not None:
        record_rates(rates_here(settings), expected, [manifest], spec)


def rates_here(settings: Settings) -> Path:
    """The rates of this machine."""
    return settings.folder / "rates.json"
