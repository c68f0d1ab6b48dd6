"""What a child process is asked to do, as one JSON document; and the cache key of it, which needs neither torch nor files.

`pins` are the job's inputs as `prepare` found them: role → content digest, `<role>.revision` → commit of a hub,
`model.dtype`, `sae.dtype` and `retraining.dtype` → precision. Every later stage uses them, whichever machine it runs on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.artifacts import Absent, Artifact, view
from safer_engine.decisions import decision_digests
from safer_engine.drill import drill_key
from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import ArtifactError, DamagedArtifact, SaferError
from safer_engine.pipeline import STAGES, AuditRequest, Found, stage_key
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.spec_labels import LocalLmLabeller
from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.stage import Inputs, PartedStage, SpecView, Stage
from safer_engine.store import ArtifactStore, canonical_json, digest_bytes
from safer_engine.train_spec import TrainSpec
from safer_engine.training import training_key
from service.comparison_spec import ComparisonSpec
from service.jobs.model import JobKind, JobRecord, Lease, StageRecord, StageState, UnitKind
from service.jobs.stage_plan import DRILLING, PREPARE

_AGAIN = "submit the job as a new one: what is there is used, what is gone computed anew"
PRECISIONS = ("model.dtype", "sae.dtype")
RETRAINING_PRECISION = "retraining.dtype"
DRILL_OPENED, DRILL_PART = "open", "seed-"
"""Parts of a drill: nothing, so that the seeds are handed out at once; and each seed."""


class ArtifactGone(ArtifactError):
    """What an earlier stage of the job made is not in the store any more.

    Attributes:
        stage, key: which it is.
    """

    code = "artifact_gone"

    def __init__(self, stage: str, key: str) -> None:
        super().__init__(f"the artifact of stage {stage} is gone", _AGAIN)
        self.stage = stage
        self.key = key


def lost_artifact(error: SaferError) -> tuple[str, str] | None:
    """Stage and key of the artifact whose absence or damage an error tells of."""
    return (error.stage, error.key) if isinstance(error, (ArtifactGone, DamagedArtifact)) else None


@dataclass(frozen=True)
class Order:
    """One unit to compute.

    Attributes:
        part: of a stage that has parts; empty for all of it.
        key: cache key under which the outcome is to be committed; None for `prepare`.
        keys: finished stage → key of its artifact.
        plan: what `prepare` expected of the job, if it did.
    """

    job_id: str
    project: str
    kind: JobKind
    stage: str
    part: str
    key: str | None
    spec: dict[str, Any]
    pins: dict[str, str]
    keys: dict[str, str]
    plan: dict[str, Any] | None = None

    def to_json(self) -> str:
        """As one document."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """What `to_json` wrote."""
        document = json.loads(text)
        return cls(**{**document, "kind": JobKind(document["kind"])})


def make_order(lease: Lease, job: JobRecord, stages: Sequence[StageRecord], store: ArtifactStore) -> Order:
    """What is to be done for a leased unit. Raises ArtifactError when a stage before it has no artifact."""
    keys = {row.name: row.key for row in stages if row.state is StageState.DONE and row.key is not None}
    part = lease.name if lease.kind is UnitKind.PART else ""
    order = Order(job.id, job.project, job.kind, lease.stage, part, None, job.spec, job.inputs, keys, job.plan)
    return dataclasses.replace(order, key=_key(order, stages, store))


def engine_stage(name: str) -> Stage:
    """A stage of the engine. Raises ArtifactError for a name it does not know."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ArtifactError(f"this worker knows no stage {name!r}", "workers and service are to be of one version")


def parts_of(order: Order, store: ArtifactStore) -> tuple[str, ...]:
    """Parts in which the stage may be computed; fewer than two where it is not worth it."""
    if order.kind is JobKind.DRILL and order.stage == DRILLING:
        return (DRILL_OPENED, *(f"{DRILL_PART}{seed}" for seed in range(DrillSpec.model_validate(order.spec).seeds)))
    if not order.kind.reports or order.stage == PREPARE:
        return ()
    stage = engine_stage(order.stage)
    if not isinstance(stage, PartedStage):
        return ()
    found = found_artifacts(stage, order, store)
    spec = audit_spec(order)
    return stage.parts(SpecView(spec, stage.reads), spec.runtime, Inputs({kind: found[kind] for kind in stage.consumes}))


def found_artifacts(stage: Stage, order: Order, store: ArtifactStore) -> Found:
    """The artifacts a stage consumes. Raises ArtifactError when one is gone."""
    found: dict[type[Artifact], Artifact | Absent] = {}
    for maker in STAGES:
        if maker.produces in stage.consumes:
            key = order.keys.get(maker.name)
            if key is None or not store.has(maker.name, key):
                raise ArtifactGone(maker.name, key or "")
            found[maker.produces] = view(maker.produces, store.read(maker.name, key))
    return found


def audit_spec(order: Order) -> AuditSpec:
    """The spec of an audit with the precisions that `prepare` settled."""
    spec = AuditSpec.model_validate(order.spec)
    if not all(name in order.pins for name in PRECISIONS):
        return spec
    model = spec.model.model_copy(update={"dtype": order.pins["model.dtype"]})
    sae = spec.sae.model_copy(update={"dtype": order.pins["sae.dtype"]})
    return spec.model_copy(update={"model": model, "sae": sae, "retraining": _settled_retraining(spec, order.pins)})


def _settled_retraining(spec: AuditSpec, pins: Mapping[str, str]) -> RetrainingSpec | None:
    if spec.retraining is None:
        return None
    recipe = spec.retraining.recipe.model_copy(update={"dtype": pins[RETRAINING_PRECISION]})
    return spec.retraining.model_copy(update={"recipe": recipe})


def drill_artifact_key(spec: DrillSpec, pins: Mapping[str, str]) -> str:
    """Cache key of a whole drill: what makes its arms comparable, and which arms they are."""
    digests = {role: pins[role] for role in ("base", "dataset", "evaluation")}
    arms = [list(spec.rules), list(spec.budgets), spec.seeds]
    return digest_bytes(canonical_json(["drill", drill_key(spec, digests), arms]))


def pinned_inputs(spec: AuditSpec, pins: Mapping[str, str]) -> ResolvedInputs:
    """The inputs of an audit as far as `prepare` recorded them: digests and names; none of them can be opened."""
    pretrain, labeller = spec.sae.pretrain, spec.labels.labeller
    return ResolvedInputs(
        model=pinned_model(spec.model.path, "model", pins),
        dataset=pinned_dataset(source_name(spec.dataset.source), "dataset", pins),
        evaluation=pinned_dataset(source_name(spec.evaluation.source), "evaluation", pins) if spec.evaluation else None,
        corpus=pinned_dataset(source_name(pretrain.corpus), "corpus", pins) if pretrain else None,
        extra={"labels": pins["labels"], **decision_digests(spec)},
        labeller=pinned_model(labeller.path, "labeller", pins) if isinstance(labeller, LocalLmLabeller) else None,
        base=pinned_model(spec.retraining.base, "base", pins) if spec.retraining else None,
    )


def pinned_model(origin: str, role: str, pins: Mapping[str, str]) -> ResolvedModel:
    """A model that cannot be opened."""
    return ResolvedModel(Path("/nonexistent"), pins[role], origin, pins.get(f"{role}.revision"))


def pinned_dataset(origin: str, role: str, pins: Mapping[str, str]) -> ResolvedDataset:
    """A dataset that cannot be opened."""

    def rows() -> Iterator[dict[str, Any]]:
        raise ArtifactError(f"the {role} was not to be opened by this stage", "it is missing in the stage's `opens`")

    return ResolvedDataset(pins[role], origin, rows, pins.get(f"{role}.revision"))


def source_name(source: Any) -> str:
    """What a spec calls a dataset."""
    return str(getattr(source, "path", source.kind))


def _key(order: Order, stages: Sequence[StageRecord], store: ArtifactStore) -> str | None:
    if order.stage == PREPARE:
        return None
    if order.kind is JobKind.DRILL:
        return drill_artifact_key(DrillSpec.model_validate(order.spec), order.pins)
    if order.kind is JobKind.COMPARE:
        return ComparisonSpec.model_validate(order.spec).key
    if order.kind is JobKind.TRAIN_RM:
        spec = TrainSpec.model_validate(order.spec)
        base = pinned_model(spec.base, "base", order.pins)
        sets = [pinned_dataset(source_name(spec.dataset.source), "dataset", order.pins)]
        if spec.evaluation:
            sets.append(pinned_dataset(source_name(spec.evaluation.source), "evaluation", order.pins))
        return training_key(spec, base, *sets)
    stage = engine_stage(order.stage)
    contents = {row.name: row.content_digest for row in stages if row.state is StageState.DONE}
    digests: dict[type[Artifact], str] = {}
    for maker in STAGES:
        if maker.produces in stage.consumes:
            content = contents.get(maker.name)
            if content is None:
                raise ArtifactError(f"stage {maker.name} of this job has no artifact", _AGAIN)
            digests[maker.produces] = content
    spec_now = audit_spec(order)
    return stage_key(stage, AuditRequest(spec_now, pinned_inputs(spec_now, order.pins)), store, digests)
