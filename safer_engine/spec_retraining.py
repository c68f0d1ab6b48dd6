"""Spec section `retraining`: reward models trained without a part of the pairs, to read margins that no label has shaped."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from safer_engine.spec_recipe import LoraSpec, RecipeSpec
from safer_engine.spec_section import Section

RETRAINED = "retrained"
"""The signal that retrained margins give."""
MOST_FOLDS = 5


class RetrainingSpec(Section):
    """Reward models trained without each fold of prompt groups; their margins on what they never saw are signal `retrained`."""

    base: str = Field(
        description="Encoder or decoder to train from, as `train-rm --base` takes it: local folder, or hub id "
        "(`org/name@revision`). Best the one that the reward model under audit was trained from."
    )
    folds: int = Field(
        2,
        description="Trainings, 2 to 5: each leaves out one fold, so each sees (folds − 1) / folds of the pairs. 0: none, and "
        "the section only says how `verification` trains.",
    )
    recipe: RecipeSpec = Field(default_factory=RecipeSpec, description="How they are trained.")
    lora: LoraSpec | None = Field(None, description="Train low-rank adapters only.")

    @model_validator(mode="before")
    @classmethod
    def _has_a_base(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.get("base"):
            raise ValueError(
                "give retraining.base, the model to train from (`train-rm --base` takes the same), or leave the section out"
            )
        return given

    @field_validator("folds")
    @classmethod
    def _few_folds(cls, folds: int) -> int:
        if folds != 0 and not 2 <= folds <= MOST_FOLDS:
            raise ValueError(
                f"give 2 to {MOST_FOLDS} folds; each is a training. To retrain nothing, leave out section retraining, or give 0 "
                "where section verification needs it"
            )
        return folds


def folds_of(spec: RetrainingSpec | None) -> int:
    """Trainings that the section asks for; 0 without it."""
    return spec.folds if spec is not None else 0
