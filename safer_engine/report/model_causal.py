"""What the report says of causal effects beyond each feature's own."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node


class RankCorrelation(Node):
    """Spearman's correlation of a feature's |salience| with the size of its causal effect."""

    rho: float
    lo: float | None = Field(None, description="95 % interval from resampling features; null where they are too few.")
    hi: float | None = None
    n: Count


class SetAblation(Node):
    """Pair accuracy with a set of latents ablated at once."""

    name: str = Field(description="`safety`: all safety features ablated; `control-N`: as many latents that fire alike.")
    n_latents: Count
    axis: str | None = Field(description="Null: all kept pairs.")
    subset: str | None
    n_pairs: Count
    accuracy: float
    ablated: float
    change: float
    change_lo: float | None
    change_hi: float | None


class CausalReport(Node):
    """Causal effects over the pairs whose residual streams were kept."""

    n_pairs: Count
    n_features: Count
    n_controls: Count
    null_pooled: Count = Field(description="Pooled (feature-bin, control) pairs that p-values are from.")
    null_reason: str = Field(description="Why there are no p-values; empty where there are.")
    correlation: RankCorrelation | None
    sets: list[SetAblation]
