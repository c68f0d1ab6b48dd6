"""What a report holds about how many labels are wrong."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node, Rate


class ExpectedPrecision(Node):
    """What an edit of the most doubtful pairs of an axis would meet, by the probabilities."""

    budget: Rate = Field(description="Share of the axis that is edited.")
    n: Count = Field(description="Pairs that is.")
    precision: Rate = Field(description="Expected share of wrong labels among them.")
    recall: Rate = Field(description="Expected share of the axis's wrong labels that is among them.")


class Interval(Node):
    """A figure with its 95 % interval over groups of pairs."""

    value: float
    lo: float
    hi: float


class Reliability(Node):
    """How far probabilities are from what people decided, on the pairs decided on and no others."""

    brier: Interval = Field(description="Mean squared difference; 0 is best.")
    ece: Interval = Field(
        description="Calibration error: mean distance, by bins of equally many decisions. Chance alone keeps it above 0."
    )
    ece_chance: float = Field(description="What it would be on average if every probability were exactly right.")


class Decisions(Node):
    """What people's decisions say of the probabilities of an axis."""

    n: Count = Field(description="Decisions used.")
    n_wrong: Count = Field(description="Of these, labels called wrong.")
    n_groups: Count
    used: bool = Field(description="Whether the probabilities were recalibrated by them.")
    reason: str | None = Field(description="Why not.")
    intercept: float | None = Field(description="logit p′ = intercept + slope · logit p.")
    slope: float | None
    lowest: Rate | None = Field(description="Smallest probability decided on; below it the map is a guess.")
    highest: Rate | None = Field(description="Largest probability decided on.")
    before: Reliability | None = Field(description="Of the probabilities as the model gave them.")
    after: Reliability | None = Field(description="With maps fitted to decisions on other groups.")


class SaeAdds(Node):
    """What held-out scores with the SAE's signals tell about the labels beyond a dense probe in their place."""

    bits: float = Field(description="Bits a pair; below 0 where the dense probe tells more.")
    lo: float | None = Field(description="Ends of the 95 % interval over groups.")
    hi: float | None
    agree_with: Rate = Field(description="Share of the labels that are as the held-out score with the SAE says.")
    agree_without: Rate = Field(description="The same with the dense probe.")
    fair: bool = Field(description="Whether the reward model had not been trained on these labels (suspicion.labels_seen).")


class AxisDoubt(Node):
    """How the suspicion of an axis was made, and how many of its labels are estimated to be wrong."""

    axis: str
    kind: str = Field(description="probability | rank")
    reason: str | None = Field(description="Why suspicion is a rank.")
    doubtful_share: Rate | None = Field(description="Estimated share of wrong labels; null under a rank.")
    doubtful_share_lo: Rate | None = None
    doubtful_share_hi: Rate | None = None
    expected_wrong: float | None = Field(None, description="Wrong labels to be expected among the pairs dropped or flipped.")
    n: Count = Field(0, description="Pairs of the axis.")
    n_suspicious: Count = Field(0, description="Pairs that the evidence speaks against, contested ones among them.")
    n_contested: Count = Field(0, description="Suspicious pairs whose label is open to dispute: never dropped or flipped.")
    contested_share: Rate | None = Field(None, description="n_contested / n.")
    contested_by: dict[str, Count] = Field(
        default_factory=dict,
        description="Contested pairs by reason: annotators, weak_preference, no_evidence. A pair may have two.",
    )
    decisions: Decisions | None = Field(
        None, description="What people decided and what follows; null where nobody did: then no probability has been checked."
    )
    curve: list[ExpectedPrecision] = Field(default_factory=list)
    sae: SaeAdds | None = Field(None, description="Null where it could not be told.")
    sae_left_out: bool = Field(False, description="Whether a dense probe stands in the SAE's place, for the SAE added nothing.")
