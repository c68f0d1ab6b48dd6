"""What goes over the wire when a job is asked for: see `service.schemas`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from safer_engine.drill_spec import DrillSpec
from safer_engine.spec import AuditSpec
from safer_engine.train_spec import TrainSpec
from service.schemas import Labels, Request, SchemaOf


class Submission(Request):
    """What every kind of job is asked for with, beside what it is to do."""

    priority: int = Field(0, ge=-100, le=100, description="Higher goes first within a project.")
    labels: Labels = Field(default_factory=dict, description="For finding jobs again.")
    callback_url: str | None = Field(
        None, max_length=2000, description="Told of the end with a POST; never contains text of the dataset."
    )
    gpu_seconds_budget: float | None = Field(
        None, gt=0, le=1e9, description="GPU seconds over all attempts, after which the job fails; at most the project's."
    )


class SubmitAudit(Submission):
    """An audit to run."""

    spec: Annotated[dict[str, Any], SchemaOf(AuditSpec)] = Field(description="The audit spec (docs/spec.md).")


class SubmitVerification(Submission):
    """Edits to verify by retraining: an audit with sections `verification`, `retraining` and `evaluation`."""

    audit: str | None = Field(
        None, max_length=100, description="Id of an audit: its spec, at the hub revisions it found, is what `spec` is laid over."
    )
    spec: dict[str, Any] = Field(description="An audit spec (docs/spec.md); with `audit` only what is to be other than there.")


class SubmitComparison(Submission):
    """Two finished audits to compare."""

    a: str = Field(min_length=1, max_length=100, description="Id of an audit.")
    b: str = Field(min_length=1, max_length=100, description="Id of the audit that is held against it.")


class SubmitDrill(Submission):
    """A poisoning drill, where the operator allows it."""

    spec: Annotated[dict[str, Any], SchemaOf(DrillSpec)] = Field(description="The drill's spec (docs/drill.md).")


class SubmitTraining(Submission):
    """A reward model to train."""

    spec: Annotated[dict[str, Any], SchemaOf(TrainSpec)] = Field(description="The training spec (`train-rm`).")
