"""What the report says of causal effects beyond each feature's own."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node

SAFETY_SET = "safety"


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
    margin: float = Field(description="Mean change of the margin.")
    margin_lo: float | None
    margin_hi: float | None


class CausalEffect(Node):
    """What ablating a latent does, on the pairs of an axis: mean changes with 95 % intervals from resampling groups."""

    latent_id: Count
    role: str = Field(description="Why it was ablated: `safety` feature, by `salience`, or by `attribution`.")
    axis: str | None = Field(description="Null: all kept pairs.")
    n_pairs: Count
    n_fired: Count = Field(description="Pairs in which it fires on a side; in the others the change is exactly 0.")
    margin: float
    margin_lo: float | None
    margin_hi: float | None
    chosen: float = Field(description="Change of the chosen side's reward.")
    chosen_lo: float | None
    chosen_hi: float | None
    rejected: float
    rejected_lo: float | None
    rejected_hi: float | None
    mean_margin: float | None = Field(description="Change of the margin when it is set to its mean, on a sample of the pairs.")
    mean_margin_lo: float | None
    mean_margin_hi: float | None
    attribution: float | None = Field(description="First-order change of the margin (gradient × activation); all pairs only.")


class CausalReport(Node):
    """Causal effects over the pairs whose residual streams were kept."""

    n_pairs: Count
    n_features: Count
    n_controls: Count
    margin_mean: float = Field(description="Mean margin of these pairs as they are, to hold changes against.")
    margin_sd: float
    null_pooled: Count = Field(description="Pooled (feature-bin, control) pairs that p-values are from.")
    null_reason: str = Field(description="Why there are no p-values; empty where there are.")
    correlation: RankCorrelation | None
    effects: list[CausalEffect] = Field(description="Reported latents in order, all pairs before each axis.")
    sets: list[SetAblation]
