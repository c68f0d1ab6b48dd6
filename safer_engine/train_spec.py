"""How a reward model is trained: every knob of `safer-audit train-rm`, one document, one description per knob."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from safer_engine.errors import SpecError
from safer_engine.spec import DatasetSpec, RuntimeSpec, merge
from safer_engine.spec_section import Section


class RecipeSpec(Section):
    """Bradley–Terry training of a reward model."""

    epochs: int = Field(2, ge=1, description="Passes over the pairs.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; default 2e-4 with LoRA, else 5e-5 below 100 M parameters and 2e-5 above."
    )
    batch: int = Field(32, ge=1, description="Pairs per optimiser step, however many forward passes that takes.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of the matrices; biases and norms have none.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How the rate falls to zero after the warm-up.")
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps with a linearly rising rate.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient; longer ones are scaled down to it.")
    centring: float = Field(
        0.0, ge=0, description="Weight of the squared sum of a pair's two rewards, which keeps rewards near zero; 0 is off."
    )
    dropout: bool = Field(False, description="Keep the base's dropout; off, training is faster and rewards are repeatable.")
    max_length: int = Field(1024, ge=8, description="Longest sequence in tokens, or what the base can read if that is less.")
    truncation_side: Literal["left", "right"] = Field("left", description="Which end is cut from an over-long sequence.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the forward and backward pass (weights stay float32): `auto` is bfloat16 on CUDA and float32 "
        "on CPU, where bfloat16 is faster only on processors with AMX.",
    )


class LoraSpec(Section):
    """Low-rank adapters in place of all weights (arXiv 2106.09685); merged into the base when training ends."""

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: int = Field(32, ge=1, description="Scale of the update, in units of 1 / rank.")
    merge: bool = Field(True, description="Save the merged model; false saves the adapter.")


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
