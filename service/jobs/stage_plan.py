"""Which stages a job of each kind walks, in order, and the queue of each."""

from __future__ import annotations

from safer_engine.pipeline import STAGES
from service.jobs.model import JobKind, StagePart

PREPARE = "prepare"
TRAINING = "training"
COMPARISON = "comparison"
DRILLING = "drill"


def stage_names() -> tuple[str, ...]:
    """The name of every stage of every kind of job, in order, each once."""
    return tuple(dict.fromkeys(part.name for kind in JobKind for part in stages_of(kind)))


def stages_of(kind: JobKind) -> tuple[StagePart, ...]:
    """`prepare` finds and fingerprints the inputs; then an audit walks the engine's stages, others have one."""
    first = StagePart(PREPARE, "cpu")
    if kind is JobKind.TRAIN_RM:
        return (first, StagePart(TRAINING, "gpu"))
    if kind is JobKind.DRILL:
        return (first, StagePart(DRILLING, "gpu"))
    if kind is JobKind.COMPARE:
        return (first, StagePart(COMPARISON, "cpu"))
    return (first, *(StagePart(stage.name, stage.resource) for stage in STAGES))
