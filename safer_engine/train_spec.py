"""How a reward model is trained: every knob of `safer-audit train-rm`, one document, one description per knob."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from safer_engine.errors import SpecError
from safer_engine.spec import DatasetSpec, RuntimeSpec, merge
from safer_engine.spec_recipe import LoraSpec, RecipeSpec
from safer_engine.spec_section import Section


class TrainSpec(Section):
    """One training of a reward model, in full."""

    preset: Literal["default", "paper"] = Field("default", description="Where the values not given come from.")
    seed: int = Field(0, ge=0, description="Seed of the head, the order of pairs and dropout.")
    base: str = Field(description="Encoder or decoder to start from: local folder, or hub id (`org/name@revision`).")
    dataset: DatasetSpec
    evaluation: DatasetSpec | None = Field(None, description="Preference pairs that only measure.")
    recipe: RecipeSpec = Field(default_factory=RecipeSpec)
    lora: LoraSpec | None = Field(None, description="Train low-rank adapters only.")
    runtime: RuntimeSpec = Field(default_factory=lambda: RuntimeSpec(batch_tokens=4096))


PAPER_RECIPE: dict[str, Any] = {
    "lr": 2e-5, "epochs": 2, "weight_decay": 0.001, "schedule": "cosine", "warmup": 0.03, "batch": 128,
    "max_length": 4096, "truncation_side": "left",
}  # fmt: skip
"""METHOD §1, row `reward model` (arXiv 2507.00665): merged under what the user gives when `preset: paper`."""


def build_train_spec(document: dict[str, Any]) -> TrainSpec:
    """A validated spec from what the user gives, over the preset it names.

    Raises:
        SpecError: unknown keys, values out of range, no base or dataset.
    """
    preset = {"recipe": PAPER_RECIPE} if document.get("preset") == "paper" else {}
    try:
        return TrainSpec.model_validate(merge(preset, document))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
        raise SpecError(f"the training spec is wrong: {wrong}", "`safer-audit train-rm --help` lists the knobs") from None
