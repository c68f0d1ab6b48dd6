"""What report.json says of labels as a whole, and of how one was checked."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node, Rate


class LabelDetection(Node):
    """How well a label tells held-out windows in which the latent fires from matched ones in which it does not."""

    score: Rate = Field(description="Balanced accuracy; guessing gives 0.5.")
    lo: Rate
    hi: Rate
    recall: Rate = Field(description="Share of the windows with the latent that were taken for such.")
    specificity: Rate = Field(description="Share of the windows without it that were taken for such.")
    n: Count = Field(description="Windows of both kinds that were judged.")


class LabelAgreement(Node):
    """How two readings of the same latents agree, their contexts in another order the second time."""

    kappa: float | None = Field(description="Cohen's, with quadratic weights; null where all ratings are the same.")
    lo: float | None
    hi: float | None
    same: Rate = Field(description="Share rated exactly alike.")
    n: Count = Field(description="Latents rated twice.")


class LabelCost(Node):
    """What one purpose took: labels, detection or repeats."""

    calls: Count
    cost: float = Field(description="In the currency of the prices given.")


class LabelsReport(Node):
    """Who labelled, and how the labels were checked."""

    labeller: str
    rubric: str
    statuses: dict[str, Count] = Field(description="Candidates by status.")
    n_safety_features: Count
    min_rating: int
    detection_floor: float | None = Field(description="Labels below it are unverified; 0: measured only, null: not asked for.")
    agreement: LabelAgreement | None
    no_agreement: str | None = Field(description="Why there is none.")
    n_again_unrated: Count = Field(description="Second readings that gave no rating.")
    n_corrected: Count = Field(description="Candidates of which a person said what they are about.")
    n_corrections_unused: Count = Field(description="Corrections about another SAE, or about latents that are no candidates.")
    spent: dict[str, LabelCost]
