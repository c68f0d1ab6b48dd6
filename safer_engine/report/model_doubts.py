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
