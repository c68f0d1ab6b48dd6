"""What the report says of retraining with the edits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from safer_engine.report.nodes import Count, Node


class ArmEffect(Node):
    """Accuracy of an arm less that of its reference, over seeds and evaluation pairs; subsets of a scope count alike."""

    arm: str
    reference: str
    axis: str | None = Field(description="Null: all axes.")
    subset: str | None = Field(description="Null: the whole axis.")
    change: float
    lo: float | None = Field(description="95 % interval over seeds and groups of prompts; null with one seed or one group.")
    hi: float | None
    p: float | None = Field(description="Two-sided, not adjusted.")
    n_seeds: Count
    n_groups: Count
    n_items: Count


class ArmAccuracy(Node):
    """Pair accuracy of an arm's models; subsets count alike."""

    arm: str
    axis: str | None
    subset: str | None
    accuracy: float = Field(description="Mean over seeds.")
    by_seed: list[float]


class ShapeReport(Node):
    """Accuracy of the arms as a benchmark scores items that are more than one pair."""

    name: Literal["best_of_n", "hard", "normal", "easy"] = Field(description="RewardBench 2's credit; RM-Bench's accuracies.")
    accuracy: list[ArmAccuracy]
    effects: list[ArmEffect]


class SweptBudget(Node):
    """The arms of one budget; `as given` is that of the verification."""

    budget: float = Field(description="Share of the rows of each axis.")
    edits: dict[str, int] = Field(description="Pairs dropped and flipped, in each arm but `as given`.")
    accuracy: list[ArmAccuracy]
    effects: list[ArmEffect]
    shapes: list[ShapeReport]


class HeldOutEffect(Node):
    """Accuracy with the edits of the chosen budget less that of a reference, on pairs that the budget was not chosen by."""

    reference: str
    change: float
    lo: float | None
    hi: float | None
    p: float | None = Field(description="Two-sided, not adjusted.")


class SweepReport(Node):
    """How much to edit: the budget of the largest gain on half of the evaluation groups, judged on the other half."""

    budgets: list[SweptBudget]
    axes: list[str] = Field(description="Edited axes on which the gain is measured, subsets alike.")
    chosen: float | None = Field(description="Null where the halves have no edited axis in common.")
    outcome: Literal["benefit shown", "no benefit shown", "harm shown", "inconclusive"] = Field(
        description="Of the chosen budget on the judging half, by the rules of the verification; inconclusive without one."
    )
    harmed: list[str]
    p_benefit: dict[str, float | None] = Field(description="Adjusted, by reference.")
    against: list[HeldOutEffect]
    n_choosing: Count = Field(description="Evaluation pairs by which the budget was chosen.")
    n_judging: Count


class VerificationReport(Node):
    """Reward models trained on the data as given, with our edits, and with as many edits chosen by margin and at random."""

    outcome: Literal["benefit shown", "no benefit shown", "harm shown", "inconclusive"]
    harmed: list[str] = Field(description="`axis/subset` on which harm is shown.")
    level: float = Field(
        description="Level of the tests at this look: a fifth of the spec's after 5 seeds of more, the rest at the end."
    )
    p_benefit: dict[str, float | None] = Field(description="Adjusted p on the edited axes, by reference: both must be small.")
    p_harm: dict[str, float | None] = Field(description="Adjusted p of each subset's loss.")
    seeds: Count
    planned: Count
    edited_axes: list[str]
    edits: dict[str, int] = Field(description="Pairs dropped and flipped, in each arm but `as given`.")
    pairs: dict[str, int] = Field(description="Pairs that each arm trains on.")
    steps: Count = Field(description="Optimiser steps of every training.")
    n_evaluated: Count
    accuracy: list[ArmAccuracy]
    effects: list[ArmEffect]
    shapes: list[ShapeReport] = Field([], description="Scored as RewardBench 2 and RM-Bench do; empty without such items.")
    sweep: SweepReport | None = Field(None, description="Arms at other budgets; null where none was asked for.")
