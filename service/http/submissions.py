"""From what a client sends to a job that may be stored: the spec validated by the engine, its sources allowed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from safer_engine.drill_spec import DrillSpec
from safer_engine.spec import PAPER_PRESET, AuditSpec, merge
from safer_engine.spec_layers import hub_source, problems, with_kinds
from safer_engine.store import canonical_json, digest_bytes
from safer_engine.train_spec import PAPER_RECIPE, TrainSpec
from service.comparison_spec import ComparedAudit, ComparisonSpec
from service.errors import Conflict, FieldProblem, NotAllowed, RequestInvalid, SourceNotAllowed
from service.http.services import Services
from service.http.views import subject_of
from service.jobs.access import Principal, Role
from service.jobs.model import JobKind, JobState
from service.jobs.requests import NewJob
from service.jobs.stage_plan import stages_of
from service.source_policy import at_revisions, check_audit, check_drill, check_training, upload_digests
from service.submission_schemas import Submission, SubmitAudit, SubmitComparison, SubmitDrill, SubmitTraining, SubmitVerification

Spec = AuditSpec | TrainSpec | ComparisonSpec | DrillSpec
_DATASETS = ("dataset", "evaluation")


def new_audit(services: Services, who: Principal, asked: SubmitAudit, key: str | None) -> NewJob:
    """An audit to store. Raises RequestInvalid, SourceNotAllowed, NotAllowed."""
    spec = audit_spec(asked.spec)
    check_audit(spec, services.settings)
    return _job(services, who, JobKind.AUDIT, asked, spec, key)


def new_verification(services: Services, who: Principal, asked: SubmitVerification, key: str | None) -> NewJob:
    """A verification to store: an audit that also retrains. Raises NotFound, Conflict, RequestInvalid, SourceNotAllowed."""
    given = expanded(asked.spec)
    if asked.audit is not None:
        given = merge(_spec_of(services, who, asked.audit), given)
    spec = audit_spec(merge({"verification": {}}, given))
    if spec.verification is None:
        problem = FieldProblem("spec.verification", "null: there is nothing to verify")
        raise RequestInvalid("spec.verification is null: there is nothing to verify", "leave it out", (problem,))
    check_audit(spec, services.settings)
    return _job(services, who, JobKind.VERIFY, asked, spec, key)


def _spec_of(services: Services, who: Principal, job_id: str) -> dict[str, Any]:
    """The spec of an audit, with the hub revisions that it found: what it computed is then found again."""
    job = services.jobs.get(who.project, job_id)
    if not job.kind.reports:
        raise Conflict(f"job {job_id} is a {job.kind}, no audit", "give the id of an audit")
    found = at_revisions(AuditSpec.model_validate(job.spec), job.inputs).model_dump(mode="json")
    if found["retraining"] is None:  # `retraining.folds` by itself would change that audit's suspicion, and so its edits
        found["retraining"] = {"folds": 0}
    found["verification"] = found["verification"] or {}
    return found


def audit_spec(document: dict[str, Any]) -> AuditSpec:
    """The spec that a document means, its preset and shorthands written out. Raises RequestInvalid."""
    preset: dict[str, Any] = PAPER_PRESET if document.get("preset") == "paper" else {}
    spec = validated(AuditSpec, with_kinds(merge(preset, expanded(document))))
    assert isinstance(spec, AuditSpec)
    return spec


def new_comparison(services: Services, who: Principal, asked: SubmitComparison, key: str | None) -> NewJob:
    """A comparison to store. Raises NotFound, Conflict."""
    if asked.a == asked.b:
        raise Conflict(f"a and b are both {asked.a}", "name two audits")
    spec = ComparisonSpec(a=_compared(services, who, asked.a), b=_compared(services, who, asked.b))
    return _job(services, who, JobKind.COMPARE, asked, spec, key)


def _compared(services: Services, who: Principal, job_id: str) -> ComparedAudit:
    job = services.jobs.get(who.project, job_id)
    if not job.kind.reports:
        raise Conflict(f"job {job_id} is a {job.kind}, no audit", "give the id of an audit")
    found = next((row for row in services.jobs.stages(job_id) if row.name == "report"), None)
    if job.state is not JobState.SUCCEEDED or found is None or found.key is None or found.content_digest is None:
        raise Conflict(f"audit {job_id} is {job.state}: it has no report", "wait until it has succeeded")
    return ComparedAudit(job=job_id, model=subject_of(job.spec).model, report=found.key, content=found.content_digest)


def new_drill(services: Services, who: Principal, asked: SubmitDrill, key: str | None) -> NewJob:
    """A drill to store; each is in the audit log. Raises NotAllowed, RequestInvalid, SourceNotAllowed."""
    if not services.settings.enable_redteam:
        raise NotAllowed(
            "drills poison data, so they are off unless the operator switches them on", "the operator sets SAFER_ENABLE_REDTEAM=1"
        )
    spec = validated(DrillSpec, expanded(asked.spec), hint="docs/drill.md describes every key")
    assert isinstance(spec, DrillSpec)
    if spec.keep_poison:
        raise NotAllowed("the service keeps no poisoned data", "leave out keep_poison")
    check_drill(spec, services.settings)
    job = _job(services, who, JobKind.DRILL, asked, spec, key)
    services.access.record(who.project, who.key_id, "redteam.drill", job.body_digest, {"rules": list(spec.rules)})
    return job


def new_training(services: Services, who: Principal, asked: SubmitTraining, key: str | None) -> NewJob:
    """A training to store. Raises RequestInvalid, SourceNotAllowed, NotAllowed."""
    document = asked.spec
    preset = {"recipe": PAPER_RECIPE} if document.get("preset") == "paper" else {}
    spec = validated(TrainSpec, merge(preset, expanded(document)))
    assert isinstance(spec, TrainSpec)
    check_training(spec, services.settings)
    return _job(services, who, JobKind.TRAIN_RM, asked, spec, key)


def validated(
    model: type[BaseModel], document: dict[str, Any], what: str = "spec", hint: str = "docs/spec.md describes every key"
) -> BaseModel:
    """A document as the engine understands it. Raises RequestInvalid with the path of each wrong field.

    Args:
        what: the field of the request that holds it.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        found = tuple(FieldProblem(_path(item.path, what), item.message) for item in problems(error, model))
        told = "; ".join(f"{item.path}: {item.message}" for item in found[:3])
        raise RequestInvalid(f"the {what} is invalid: {told}", hint, found) from None


def expanded(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the shorthands `model: NAME` and `dataset: NAME` written out. Nothing is looked for on this machine."""
    full = dict(document)
    if isinstance(full.get("model"), str):
        full["model"] = {"path": full["model"]}
    for section in _DATASETS:
        value = full.get(section)
        if isinstance(value, str):
            full[section] = {"source": _source(value)}
        elif isinstance(value, dict) and isinstance(value.get("source"), str):
            full[section] = {**value, "source": _source(value["source"])}
    return full


def _source(text: str) -> dict[str, Any]:
    return hub_source(text) or {"kind": "local", "path": text}


def _path(path: str, what: str) -> str:
    return f"{what}.{path}" if path else what


def _job(services: Services, who: Principal, kind: JobKind, asked: Submission, spec: Spec, key: str | None) -> NewJob:
    if asked.callback_url is not None:
        services.outbound.precheck(asked.callback_url)
    _check_poisoned(services, who, kind, spec)
    inputs = {} if isinstance(spec, ComparisonSpec) else upload_digests(spec)
    for digest in inputs.values():
        if services.uploads.find(who.project, digest) is None:
            raise SourceNotAllowed(f"the project has no upload:{digest}", "upload the files first: POST /v1/uploads")
    document = spec.model_dump(mode="json")
    return NewJob(
        kind=kind,
        spec=document,
        stages=stages_of(kind),
        priority=asked.priority,
        labels=asked.labels,
        callback_url=asked.callback_url,
        idempotency_key=key,
        body_digest=digest_bytes(canonical_json([kind, asked.model_dump(mode="json")])),
        submitted_by=who.key_id,
        inputs=inputs,
        gpu_seconds_budget=asked.gpu_seconds_budget,
    )


def _check_poisoned(services: Services, who: Principal, kind: JobKind, spec: Spec) -> None:
    """Data marked as poisoned are for the role `redteam`, and each use is in the audit log. Raises NotAllowed."""
    forced = [name for name in _DATASETS if (data := getattr(spec, name, None)) is not None and data.allow_poisoned]
    if not forced:
        return
    if not who.may(Role.REDTEAM):
        raise NotAllowed(f"{forced[0]}.allow_poisoned needs a key with role redteam", "leave it out, or ask an administrator")
    document = spec.model_dump(mode="json")
    digest = digest_bytes(canonical_json(document))
    services.access.record(who.project, who.key_id, "redteam.force", digest, {"kind": str(kind), "sections": forced})
