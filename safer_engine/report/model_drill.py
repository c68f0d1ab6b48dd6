"""What drill.json holds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from safer_engine.report.nodes import Count, Node, Rate

Change = Annotated[float, Field(ge=-2, le=2)]


class Effect(Node):
    """A mean difference of accuracies over seeds and prompts."""

    change: Change
    lo: float | None = Field(description="95 % interval over seeds and prompts together; null with one seed.")
    hi: float | None
    p: float | None = Field(description="Two-sided, of no change.")
    n_seeds: Count
    n_groups: Count
    n_pairs: Count


class At(Node):
    """What is found when a share of the axis's pairs is looked at, most doubtful first."""

    share: Rate
    recall: Rate = Field(description="Mean over seeds.")
    precision: Rate


class Ranked(Node):
    """How one ranking finds the poison; means over seeds."""

    name: Literal["suspicion", "margin", "pair_score", "before"] = Field(
        description="Suspicion, reward margin and pair score of the audit of the model trained on the poison; `before`: "
        "suspicion of the clean audit on the very same pairs, which holds no trace of the poison."
    )
    average_precision: Rate
    by_seed: list[Rate] = Field(description="Average precision.")
    auroc: Rate
    at_number: Rate = Field(description="Recall, and so precision, when as many pairs are looked at as were flipped.")
    at: list[At]


class Flagged(Node):
    """Pairs of the axis that the audit names of itself; means over seeds."""

    name: Literal["suspicious", "edited"] = Field(description="Status suspicious; recommended to be dropped or flipped.")
    n: float = Field(ge=0)
    recall: Rate
    precision: Rate | None = Field(description="Of all flagged pairs of all seeds; null where none was flagged.")


class Cell(Node):
    """One rule with one budget."""

    rule: Literal["score", "margin", "length", "random"]
    budget: Rate
    seeds: Count
    n_flipped: list[Count] = Field(description="Pairs, by seed; whole groups may leave some of the budget unused.")
    chance: Rate = Field(description="Mean share of the axis's pairs that is poisoned: average precision by chance.")
    axis: Effect = Field(description="Accuracy on the poisoned axis, with the poison less without it; negative is harm.")
    rest: Effect | None = Field(description="On all other axes; null where the evaluation pairs have none.")
    apart: Effect | None = Field(description="The first less the second.")
    rankings: list[Ranked]
    flagged: list[Flagged]


class DrillDocument(Node):
    """A finished drill, or what of it is finished."""

    schema_version: Literal[1] = Field(1, description="Changes when a key is renamed, removed, or comes to mean something else.")
    mark: str = Field(description="Says that poisoned data of the drill carry a mark, and which.")
    tool_version: str
    spec: dict[str, Any]
    inputs: dict[str, str] = Field(description="base, dataset, evaluation: sha256 of what was read.")
    axis: str
    n_pairs: Count = Field(description="Pairs that each model was trained on; with `dataset.sample` of the first seed.")
    n_axis_pairs: Count
    steps: Count = Field(description="Optimiser steps of each training; the same for all arms.")
    clean_accuracy: Rate = Field(
        description="Of the clean arms on the axis, mean over seeds; subsets count alike, as in changes."
    )
    clean_rest_accuracy: Rate | None
    cells: list[Cell]
    planned: Count = Field(description="Poisoned arms asked for.")
    done: Count
    notes: list[str] = Field(description="What to keep in mind.")
