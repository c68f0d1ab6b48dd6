"""From the artifacts of an audit, all of them or the first few, to its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from safer_engine.artifacts import (
    Absent,
    Activations,
    Artifact,
    CausalEffects,
    Edits,
    EvaluationSet,
    Labels,
    Latents,
    PairScores,
    PairSet,
    Report,
    RetrainedMargins,
    SparseAutoencoder,
    Stability,
    Verification,
)
from safer_engine.cost import Planned, planned_total
from safer_engine.evaluation_pairs import NO_EVALUATION
from safer_engine.pipeline import STAGES
from safer_engine.report.build_causal import causal_section, with_effects
from safer_engine.report.build_data import dataset_section, evaluation_section, reward_model_section
from safer_engine.report.build_edits import edits_section
from safer_engine.report.build_features import features_section, labels_section, sae_section
from safer_engine.report.build_verification import verification_section
from safer_engine.report.model import ReportDocument
from safer_engine.report.nodes import Node
from safer_engine.report.provenance import InputRecord, PlannedCost, Progress, Provenance, StageCost, StageRecord, Timing
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.spec import AuditSpec
from safer_engine.store import Manifest

A = TypeVar("A", bound=Artifact)
Found = Mapping[type[Artifact], Artifact | Absent]
STAGE_ARTIFACTS = tuple((stage.name, stage.produces) for stage in STAGES if stage.produces is not Report)
"""What a report is made from, in the order in which it comes."""

_PENDING = "not computed yet"
_NO_POLICY = "no policy was given"


@dataclass(frozen=True)
class Stopped:
    """Where and why an audit ended early."""

    stage: str
    reason: str


@dataclass(frozen=True)
class ReportRequest:
    """What a report is about.

    Attributes:
        found: artifacts by type; a type that is missing is shown as not computed yet.
        created: UTC time of writing, ISO 8601.
        stopped: the stage that failed and why, or None while the audit goes on.
    """

    spec: AuditSpec
    sources: ResolvedInputs
    found: Found
    created: str
    stopped: Stopped | None = None


def build_report(request: ReportRequest) -> ReportDocument:
    """The report of what there is.

    Raises:
        ArtifactError: artifacts that do not belong together. NumericalError: a figure that is not finite.
    """
    reader = _Reader(request.found)
    sections = _sections(reader, request)
    return ReportDocument(
        spec=request.spec.model_dump(mode="json", exclude={"runtime"}),
        provenance=_provenance(request, reader, sections),
        **sections,
    )


class _Reader:
    """Artifacts by type, or why there is none."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def get(self, kind: type[A]) -> A | None:
        value = self._found.get(kind)
        return value if isinstance(value, kind) else None

    def reason(self, *kinds: type[Artifact]) -> str:
        """Why the first of `kinds` that is not there is not there."""
        for kind in kinds:
            value = self._found.get(kind)
            if isinstance(value, Absent):
                return value.reason
            if value is None:
                return _PENDING
        return _PENDING


def _sections(reader: _Reader, request: ReportRequest) -> dict[str, Node | list[Any] | None]:
    spec = request.spec
    pairs, activations, evaluation = reader.get(PairSet), reader.get(Activations), reader.get(EvaluationSet)
    sae, latents, labels = reader.get(SparseAutoencoder), reader.get(Latents), reader.get(Labels)
    scores, edits, stability = reader.get(PairScores), reader.get(Edits), reader.get(Stability)
    sections: dict[str, Node | list[Any] | None] = dict.fromkeys(_DEPENDS)
    if pairs is not None:
        sections["dataset"] = dataset_section(pairs, evaluation)
        if activations is not None:
            sections["reward_model"] = reward_model_section(pairs, activations, reader.get(RetrainedMargins), spec)
        if scores is not None:
            sections["edits"] = edits_section(pairs, scores, edits, spec.report)
    if evaluation is not None:
        sections["evaluation"] = evaluation_section(evaluation, spec)
    if sae is not None:
        sections["sae"] = sae_section(sae, latents, stability, text=spec.report.text)
    if latents is not None:
        causal = reader.get(CausalEffects)
        features = features_section(latents, labels, spec.report, stability)
        sections["features"] = list(features if causal is None else with_effects(features, causal))
        if causal is not None:
            sections["causal"] = causal_section(causal)
    if labels is not None:
        sections["labels"] = labels_section(labels)
    if (verified := reader.get(Verification)) is not None:
        sections["verification"] = verification_section(verified)
    return sections


_DEPENDS: dict[str, tuple[type[Artifact], ...]] = {
    "dataset": (PairSet,),
    "reward_model": (PairSet, Activations),
    "evaluation": (EvaluationSet,),
    "sae": (SparseAutoencoder,),
    "features": (Latents,),
    "labels": (Labels,),
    "edits": (PairSet, PairScores),
    "verification": (Verification,),
    "verdict": (),
}
"""Artifacts that each section is made from."""


def _not_computed(request: ReportRequest, reader: _Reader, sections: dict[str, Any]) -> dict[str, str]:
    reasons = {name: reader.reason(*_DEPENDS[name]) for name, value in sections.items() if value is None}
    reasons["verdict"] = _NO_POLICY
    if "evaluation" in reasons and request.spec.evaluation is None and request.sources.evaluation is None:
        reasons["evaluation"] = NO_EVALUATION
    sae = sections["sae"]
    if sae is not None:
        if sae.latents is None:
            reasons["sae.latents"] = reader.reason(Latents)
        elif sae.latents.stability is None:
            reasons["sae.latents.stability"] = reader.reason(Stability)
        if sae.recovered is None:
            reasons["sae.recovered"] = _recovered_reason(reader)
    if sections["features"] is not None:
        columns = {"features[].causal_effect": CausalEffects, "features[].safety_feature": Labels}
        reasons |= {name: reader.reason(kind) for name, kind in columns.items() if reader.get(kind) is None}
    if sections["edits"] is not None and reader.get(Edits) is None:
        reasons["edits.actions"] = reader.reason(Edits)
    if sections["edits"] is not None:
        ranks = [f"{axis.axis}: {axis.reason}" for axis in sections["edits"].axes if axis.doubtful_share is None]
        reasons |= {"edits.axes[].doubtful_share": "suspicion is a rank; " + "; ".join(ranks)} if ranks else {}
    return dict(sorted(reasons.items()))


def _recovered_reason(reader: _Reader) -> str:
    sae = reader.get(SparseAutoencoder)
    reason = sae.json("metrics.json").get("recovered_reason") if sae is not None else None
    return str(reason or "the SAE stage gave no reason")


def _provenance(request: ReportRequest, reader: _Reader, sections: dict[str, Any]) -> Provenance:
    inputs = {name: getattr(request.sources, name) for name in ("model", "dataset", "evaluation", "corpus", "base")}
    return Provenance(
        tool="safer-audit",
        tool_version=_version(),
        seed=request.spec.seed,
        inputs={
            name: InputRecord(origin=found.origin, revision=found.revision, digest=found.digest)
            for name, found in inputs.items()
            if found is not None
        },
        stages=[_stage_record(name, request.found.get(kind)) for name, kind in STAGE_ARTIFACTS],
        not_computed=_not_computed(request, reader, sections),
        text_included=request.spec.report.text,
        progress=_progress(request.found, request.stopped),
        timing=_timing(request),
    )


def _version() -> str:
    try:
        return metadata.version("safer-audit")
    except metadata.PackageNotFoundError:
        return "unknown"


def _stage_record(name: str, value: Artifact | Absent | None) -> StageRecord:
    if value is None:
        return StageRecord(stage=name, state="pending", reason=_PENDING)
    if isinstance(value, Absent):
        return StageRecord(stage=name, state="absent", reason=value.reason)
    manifest = value.stored.manifest
    return StageRecord(
        stage=name,
        state="computed",
        version=manifest.stage_version,
        cache_key=manifest.key,
        content_digest=manifest.content_digest,
        inputs=manifest.inputs,
        machine=manifest.provenance,
    )


def _progress(found: Found, stopped: Stopped | None) -> Progress | None:
    pending = [name for name, kind in STAGE_ARTIFACTS if kind not in found]
    done, total = len(STAGE_ARTIFACTS) - len(pending), len(STAGE_ARTIFACTS)
    if stopped is not None:
        return Progress(done=done, total=total, following=stopped.stage, stopped=stopped.reason)
    return Progress(done=done, total=total, following=pending[0]) if pending else None


_UNPLANNED = "it was computed without a plan"


def _timing(request: ReportRequest) -> Timing:
    values = ((name, request.found.get(kind)) for name, kind in STAGE_ARTIFACTS)
    manifests = {name: value.stored.manifest for name, value in values if isinstance(value, Artifact)}
    costs = [_stage_cost(name, manifest) for name, manifest in manifests.items()]
    planned = [manifest.planned for manifest in manifests.values() if manifest.planned is not None]
    return Timing(
        created=request.created,
        total_seconds=round(sum(cost.seconds for cost in costs), 3),
        peak_memory_bytes=max((cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes is not None), default=None),
        peak_gpu_bytes=max((cost.peak_gpu_bytes for cost in costs if cost.peak_gpu_bytes is not None), default=None),
        disk_bytes=sum(cost.disk_bytes for cost in costs),
        planned=_planned(planned_total(planned)) if len(planned) == len(manifests) else None,
        stages=costs,
        runtime=request.spec.runtime.model_dump(mode="json"),
    )


def _stage_cost(name: str, manifest: Manifest) -> StageCost:
    return StageCost(
        stage=name,
        **manifest.cost.model_dump(),
        disk_bytes=sum(entry.size for entry in manifest.files.values()),
        planned=None if manifest.planned is None else _planned(manifest.planned),
        unplanned=_UNPLANNED if manifest.planned is None else None,
    )


def _planned(planned: Planned) -> PlannedCost:
    return PlannedCost(**planned.model_dump())
