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
    doubtful_lo: Rate | None = None
    doubtful_hi: Rate | None = None
    expected_wrong: float | None = Field(None, description="Wrong labels to be expected among the pairs dropped or flipped.")
    curve: list[ExpectedPrecision] = Field(default_factory=list)
    sae: SaeAdds | None = Field(None, description="Null where it could not be told.")
    sae_left_out: bool = Field(False, description="Whether a dense probe stands in the SAE's place, for the SAE added nothing.")
