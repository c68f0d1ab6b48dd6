"""What `verify export-arms` writes beside the arms' data: which file is which arm, and how each is to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safer_engine.errors import InputRefused
from safer_engine.science.arms import Arm
from safer_engine.spec import AuditSpec

MANIFEST = "manifest.json"
_LARGEST = 50_000_000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArmData(_Part):
    """The pairs of an arm, one JSON object a line: pair_id, group, axis, subset, chosen, rejected."""

    file: str
    digest: str = Field(description="sha256 of the file.")
    pairs: int
    dropped: int
    flipped: int


class ArmRun(_Part):
    """One training: an arm with a seed."""

    arm: Arm
    seed: int = Field(ge=0, description="Counts from 0; what `verify import` calls it.")
    training_seed: int = Field(ge=0, description="For the trainer; the same for all arms of a seed.")
    data: str = Field(description="File of an `ArmData`.")
    output: str = Field(description="Folder that the scripts save the trained model in.")


class ArmManifest(_Part):
    """Arms as datasets."""

    manifest_version: Literal[1] = 1
    spec: AuditSpec = Field(description="Spec of the audit and its verification, from which `verify import` evaluates.")
    digests: dict[str, str] = Field(description="Content of model, dataset, evaluation and base, and of the edits.")
    steps: int = Field(ge=1, description="Optimiser steps that every training is to take, whatever the number of its pairs.")
    layout: Literal["conversations", "texts"] = Field(description="Texts: the base has no chat template.")
    left_out: int = Field(ge=0, description="Pairs of the audit that the base cannot read; they are in no arm.")
    edited_axes: tuple[str, ...] = Field(min_length=1)
    data: tuple[ArmData, ...]
    runs: tuple[ArmRun, ...]

    @model_validator(mode="after")
    def _whole(self) -> ArmManifest:
        spec = self.spec
        if spec.verification is None or spec.retraining is None or spec.evaluation is None:
            raise ValueError("the spec lacks section verification, retraining or evaluation")
        if missing := [name for name in ("dataset", "evaluation") if name not in self.digests]:
            raise ValueError(f"no digest of the {missing[0]}")
        if unknown := {run.data for run in self.runs} - {data.file for data in self.data}:
            raise ValueError(f"a run is of data that are not listed: {min(unknown)}")
        if "edits" not in {run.arm for run in self.runs}:
            raise ValueError("there is no run of arm edits")
        return self

    def run(self, arm: str, seed: int) -> ArmRun | None:
        """The training of an arm with a seed, if there is to be one."""
        return next((run for run in self.runs if (run.arm, run.seed) == (arm, seed)), None)


def read_manifest(path: Path) -> ArmManifest:
    """A manifest, or that of a folder. Raises InputRefused."""
    found = path / MANIFEST if path.is_dir() else path
    try:
        if found.stat().st_size > _LARGEST:
            raise InputRefused(f"{found} is too large to be a manifest of arms", "give what `verify export-arms` wrote")
        return ArmManifest.model_validate_json(found.read_bytes())
    except OSError as error:
        raise InputRefused(
            f"{found} cannot be read: {error.strerror}", "give the folder that `verify export-arms` wrote"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputRefused(
            f"{found} is no manifest of arms: {where}: {first['msg']}", "give what `verify export-arms` wrote"
        ) from error
