"""The pipeline: which stages there are, in which order, and how one of them is run. Read this first.

An audit is a walk over `STAGES`. Each stage's cache key depends on its version, the spec sections it reads and the
content of the artifacts it consumes; a committed artifact under that key means the stage is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from safer_engine.artifacts import ABSENT, Absent, Artifact, view
from safer_engine.attempts import Attempt, added, counted_part
from safer_engine.cost import Planned
from safer_engine.errors import ArtifactError, DamagedArtifact, Interrupted, WorkBusy
from safer_engine.events import NullObserver, Observer
from safer_engine.machine import measured, provenance
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.spec import AuditSpec
from safer_engine.stage import Draft, Inputs, PartedStage, SpecView, Stage, StageContext, cache_key
from safer_engine.stages.activations import ActivationsStage
from safer_engine.stages.causal import CausalStage
from safer_engine.stages.edits import EditsStage
from safer_engine.stages.evaluation import EvaluationStage
from safer_engine.stages.labels import LabelsStage
from safer_engine.stages.latents import LatentsStage
from safer_engine.stages.pair_scores import PairScoresStage
from safer_engine.stages.pairs import PairsStage
from safer_engine.stages.report import ReportStage
from safer_engine.stages.retraining import RetrainingStage
from safer_engine.stages.sae import SaeStage
from safer_engine.stages.second_sae import SecondSaeStage
from safer_engine.stages.stability import StabilityStage
from safer_engine.stages.verification import VerificationStage
from safer_engine.store import ArtifactStore, ManifestDraft, MendingStore, StoredArtifact, WorkArea

STAGES: tuple[Stage, ...] = (
    PairsStage(),
    ActivationsStage(),
    EvaluationStage(),
    SaeStage(),
    LatentsStage(),
    LabelsStage(),
    CausalStage(),
    RetrainingStage(),
    PairScoresStage(),
    EditsStage(),
    SecondSaeStage(),
    StabilityStage(),
    VerificationStage(),
    ReportStage(),
)

T = TypeVar("T")
Found = dict[type[Artifact], Artifact | Absent]
OnArtifact = Callable[[Stage, Found], None]
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class AuditRequest:
    """A resolved spec and the inputs it names, found and fingerprinted.

    Attributes:
        planned: stage → what it is expected to take; kept beside its cost, and part of no cache key.
    """

    spec: AuditSpec
    sources: ResolvedInputs
    planned: Mapping[str, Planned] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePlan:
    """What will happen to one stage.

    Attributes:
        key: its cache key, or None while an input of it is still to be computed.
        state: `cached` (will be skipped) or `compute`.
    """

    name: str
    resource: Literal["cpu", "gpu"]
    key: str | None
    state: Literal["cached", "compute"]


def plan(request: AuditRequest, store: ArtifactStore, stages: tuple[Stage, ...] = STAGES) -> tuple[StagePlan, ...]:
    """What `run` would do, without computing anything."""
    digests: dict[type[Artifact], str] = {}
    plans = []
    for stage in stages:
        if not all(kind in digests for kind in stage.consumes):
            plans.append(StagePlan(stage.name, stage.resource, None, "compute"))
            continue
        key = stage_key(stage, request, store, digests)
        cached = store.has(stage.name, key)
        if cached:
            digests[stage.produces] = store.read(stage.name, key).manifest.content_digest
        plans.append(StagePlan(stage.name, stage.resource, key, "cached" if cached else "compute"))
    return tuple(plans)


def run(
    request: AuditRequest,
    store: ArtifactStore,
    observer: Observer | None = None,
    on_artifact: OnArtifact | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> Found:
    """Run every stage that is not committed yet.

    Args:
        on_artifact: called after each stage with all artifacts so far, for results that appear as they come.
        stages: the stages, in an order in which each finds what it consumes.

    Returns:
        The artifact of every stage, by type.

    An artifact that is found damaged is computed anew, and `on_artifact` is told of all stages once more.

    Raises:
        SaferError: whatever a stage raises; what was finished stays in the store and its work areas.
    """
    watcher = observer or NullObserver()
    return mending(lambda: _walk(request, store, watcher, on_artifact, stages), watcher)


def mending(work: Callable[[], T], observer: Observer) -> T:
    """Do work that reads artifacts; done again where one of them is damaged, for it was set aside and is computed anew.

    Raises:
        DamagedArtifact: the same artifact was damaged twice, so the disk is not to be trusted.
    """
    seen: set[tuple[str, str]] = set()
    while True:
        try:
            return work()
        except DamagedArtifact as error:
            if (error.stage, error.key) in seen:
                raise
            seen.add((error.stage, error.key))
            observer.note(error.stage, f"{error.message}; it is computed anew")


def _walk(
    request: AuditRequest, store: ArtifactStore, observer: Observer, on_artifact: OnArtifact | None, stages: tuple[Stage, ...]
) -> Found:
    found: Found = {}
    for stage in stages:
        stored = run_stage(stage, request, store, found, observer)
        found[stage.produces] = view(stage.produces, stored)
        if on_artifact is not None:
            on_artifact(stage, dict(found))
    return found


def run_stage(stage: Stage, request: AuditRequest, store: ArtifactStore, found: Found, observer: Observer) -> StoredArtifact:
    """Run one stage, or return what is committed under its key; waits while another process computes the same key."""
    digests = {kind: content_digest(found[kind]) for kind in stage.consumes}
    key = stage_key(stage, request, store, digests)
    told = False
    while not store.has(stage.name, key):
        try:
            return _compute(stage, key, request, store, found, observer)
        except WorkBusy as busy:
            told = _wait_for(busy, stage, observer, told)
    stored = store.read(stage.name, key)
    observer.stage_finished(stage.name, "cached", 0.0)
    return stored


def run_part(stage: Stage, part: str, request: AuditRequest, store: ArtifactStore, found: Found, observer: Observer) -> None:
    """Compute one part of a stage (see `PartedStage`); returns at once where the stage is committed already.

    Raises:
        ArtifactError: the stage has no parts.
        SaferError: whatever the stage raises; what was published stays in the work area.
    """
    if not isinstance(stage, PartedStage):
        raise ArtifactError(f"stage {stage.name} has no parts")
    key = stage_key(stage, request, store, {kind: content_digest(found[kind]) for kind in stage.consumes})
    told = False
    while not store.has(stage.name, key):
        try:
            with store.open_work(stage.name, key, shared=True) as work, counted_part(work, part):
                return stage.run_part(_context(stage, request, work, observer), _inputs(stage, found), part)
        except WorkBusy as busy:
            told = _wait_for(busy, stage, observer, told)


def _wait_for(busy: WorkBusy, stage: Stage, observer: Observer, told: bool) -> bool:
    """Wait a little for the process that holds a work area; the reader is told once. Raises Interrupted."""
    if not told:
        observer.note(stage.name, f"{busy.message}; waiting for it")
    if observer.cancelled():
        raise Interrupted("stopped while waiting for another process", "run the same command again") from busy
    time.sleep(_POLL_SECONDS)
    return True


def _context(stage: Stage, request: AuditRequest, work: WorkArea, observer: Observer) -> StageContext:
    return StageContext(
        stage=stage.name,
        spec=SpecView(request.spec, stage.reads),
        runtime=request.spec.runtime,
        sources=request.sources,
        work=work,
        observer=observer,
        base_seed=request.spec.seed,
    )


def _inputs(stage: Stage, found: Found) -> Inputs:
    return Inputs({kind: found[kind] for kind in stage.consumes})


def _compute(
    stage: Stage, key: str, request: AuditRequest, store: ArtifactStore, found: Found, observer: Observer
) -> StoredArtifact:
    with store.open_work(stage.name, key) as work:
        if store.has(stage.name, key):
            observer.stage_finished(stage.name, "cached", 0.0)
            return store.read(stage.name, key)
        if isinstance(store, MendingStore) and (damage := store.set_aside(stage.name, key)):
            observer.note(stage.name, f"{damage}; it is computed anew")
        observer.stage_started(stage.name, key)
        with measured() as measurement:
            attempt = Attempt(work, measurement, observer)
            try:
                with attempt.saved_on_failure():
                    outcome = stage.run(_context(stage, request, work, attempt), _inputs(stage, found))
            except BaseException as error:
                stopped = isinstance(error, (KeyboardInterrupt, Interrupted))
                observer.stage_finished(stage.name, "stopped" if stopped else "failed", measurement.seconds)
                raise
        draft = _draft(stage, outcome, request, {k.__name__: content_digest(found[k]) for k in stage.consumes})
        stored: StoredArtifact = store.commit(stage.name, key, work, replace(draft, cost=added(attempt.before, measurement.cost)))
        observer.stage_finished(stage.name, "absent" if isinstance(outcome, Absent) else "computed", measurement.seconds)
        return stored


def _draft(stage: Stage, outcome: Draft | Absent, request: AuditRequest, inputs: dict[str, str]) -> ManifestDraft:
    absent = isinstance(outcome, Absent)
    return ManifestDraft(
        stage_version=stage.version,
        artifact=ABSENT if absent else stage.produces.__name__,
        meta={"reason": outcome.reason} if isinstance(outcome, Absent) else outcome.meta,
        inputs=inputs,
        provenance=provenance(request.spec.runtime.device),
        planned=request.planned.get(stage.name),
    )


def stage_key(stage: Stage, request: AuditRequest, store: ArtifactStore, digests: Mapping[type[Artifact], str]) -> str:
    """Cache key of a stage, given the content digests of the artifacts it consumes. Reads nothing of the sources but digests."""
    inputs = {kind.__name__: digests[kind] for kind in stage.consumes}
    return cache_key(stage, request.spec, request.sources, inputs, store.project)


def content_digest(value: Artifact | Absent) -> str:
    """What stands for an artifact in the keys of stages that consume it."""
    return value.stored.manifest.content_digest if isinstance(value, Artifact) else value.digest
