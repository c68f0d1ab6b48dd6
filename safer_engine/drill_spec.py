"""Spec of a drill: which preferences are turned round, how reward models are trained on them, how they are audited."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from safer_engine.errors import SpecError
from safer_engine.spec import DatasetSpec, RuntimeSpec
from safer_engine.spec_recipe import LoraSpec, RecipeSpec
from safer_engine.spec_section import Section

RuleName = Literal["score", "margin", "length", "random"]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
BUDGETS = (0.005, 0.01, 0.025, 0.05)
_OURS = ("model", "dataset", "evaluation", "runtime", "seed", "verification", "retraining")


class DrillSpec(Section):
    """One drill: rules × budgets × seeds, each a training and an audit; and a clean training and audit of each seed."""

    base: str = Field(description="Model to train from, as `train-rm --base` takes it.")
    dataset: DatasetSpec = Field(description="Clean preference pairs; they are copied, never changed.")
    evaluation: DatasetSpec = Field(description="Preference pairs that only measure harm.")
    axis: str = Field("safety", description="Only pairs of this axis are flipped; harm is its accuracy against the other axes'.")
    rules: tuple[RuleName, ...] = Field(
        RULE_NAMES,
        min_length=1,
        description="What is flipped first: the highest pair score or the highest reward margin of the clean audit, the chosen "
        "response that is longer by most, or pairs at random.",
    )
    budgets: tuple[float, ...] = Field(BUDGETS, min_length=1, description="Shares of all pairs that are flipped.")
    seeds: int = Field(3, ge=1, le=100, description="Trainings of each arm; each seed has its own clean arm.")
    unit: Literal["groups", "pairs"] = Field(
        "groups",
        description="Flip all pairs of a prompt group, or single pairs, as the published attack does: contradictions within a "
        "group give those away.",
    )
    recipe: RecipeSpec = Field(default_factory=RecipeSpec, description="How every reward model is trained.")
    lora: LoraSpec | None = Field(None, description="Train low-rank adapters only; they are merged.")
    audit: dict[str, Any] = Field(default_factory=dict, description="Sections of the audit spec that are not the defaults.")
    keep_poison: bool = Field(
        False, description="Keep poisoned data, the models trained on them and their audits; else they are removed arm by arm."
    )
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec)

    @field_validator("budgets")
    @classmethod
    def _shares(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [budget for budget in budgets if not 0 < budget <= 0.5]:
            raise ValueError(f"a budget is a share above 0 and at most 0.5, which {wrong[0]:g} is not")
        return tuple(sorted(set(budgets)))

    @field_validator("rules")
    @classmethod
    def _once(cls, rules: tuple[RuleName, ...]) -> tuple[RuleName, ...]:
        return tuple(rule for rule in RULE_NAMES if rule in rules)

    @field_validator("audit")
    @classmethod
    def _only_how(cls, audit: dict[str, Any]) -> dict[str, Any]:
        if wrong := sorted(set(audit) & set(_OURS)):
            raise ValueError(f"audit.{wrong[0]} is set by the drill itself: leave it out")
        return audit

    @model_validator(mode="after")
    def _clean(self) -> DrillSpec:
        if self.dataset.allow_poisoned or self.evaluation.allow_poisoned:
            raise ValueError("a drill starts from clean data: leave out allow_poisoned")
        if self.evaluation.sample is not None:
            raise ValueError(
                "every seed of a drill is measured on the same evaluation pairs, and a sample is drawn by seed: leave out "
                "evaluation.sample, or give a smaller file"
            )
        if self.lora is not None and not self.lora.merge:
            raise ValueError("a drill audits merged models: leave out lora.merge")
        return self


def build_drill_spec(document: dict[str, Any]) -> DrillSpec:
    """A validated spec. Raises SpecError: unknown keys, values out of range, no base, dataset or evaluation."""
    try:
        return DrillSpec.model_validate(document)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
        raise SpecError(
            f"the drill's spec is wrong: {wrong}", "`safer-audit drill --help` and docs/drill.md list the values"
        ) from None
