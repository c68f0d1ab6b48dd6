"""The comparison of two audits as one value: what comparison.json holds, and all that the page is made from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from safer_engine.report.model import Estimate
from safer_engine.report.nodes import Count, Node, Rate

SCHEMA_VERSION: Literal[1] = 1
PairSetName = Literal["evaluation", "audited"]


class SideRecord(Node):
    """One of the two audits."""

    origin: str = Field(description="What the user named.")
    model: str = Field(description="Origin of its reward model.")
    model_digest: str
    dataset_digest: str
    evaluation_digest: str | None
    sae_digest: str | None = Field(description="sha256 of its SAE's weights; null where it has none.")
    architecture: str | None


class SliceComparison(Node):
    """What changed from A to B on a slice of the common pairs. Intervals are 95 %, over groups."""

    axis: str | None = Field(description="Null: all axes.")
    subset: str | None = Field(description="Null: the whole axis.")
    n: Count
    n_groups: Count
    accuracy_a: Rate = Field(description="Share of pairs with margin > 0.")
    accuracy_b: Rate
    accuracy_change: Estimate = Field(description="B less A, paired by pair.")
    right_to_wrong: Count = Field(description="Pairs that A has right and B wrong.")
    wrong_to_right: Count
    both_right: Count
    both_wrong: Count
    changed: Estimate = Field(description="Share of pairs whose preferred response is another; equal rewards are neither.")
    lost: Estimate = Field(description="Share of pairs that A has right and B wrong.")
    margin_change: Estimate = Field(
        description="Mean of B's margin less A's, each divided by its model's root mean square margin over the common pairs."
    )
    rank_correlation: Estimate | None = Field(description="Spearman's, of the margins; null where one model's are all alike.")
    length_gap_change: Estimate | None = Field(
        description="Change of (accuracy where the chosen response is longer less where it is shorter), as the report's "
        "`length.gap`; null where lengths are not known or no subset has both kinds."
    )

    @model_validator(mode="after")
    def _adds_up(self) -> SliceComparison:
        if self.n != self.right_to_wrong + self.wrong_to_right + self.both_right + self.both_wrong:
            raise ValueError("pairs that were right and wrong do not add up to n")
        return self


class ChangedPair(Node):
    """A pair whose preferred response is another. The text is in the dataset, by pair_id."""

    pair_id: str
    group: str
    axis: str
    subset: str
    margin_a: float = Field(description="In A's own units.")
    margin_b: float
    moved: float = Field(description="Change of the scaled margin, B less A.")


class PairsComparison(Node):
    """The common pairs of one kind."""

    same_data: bool = Field(description="Both audits read the same data (digest).")
    n_common: Count
    n_only_a: Count
    n_only_b: Count
    scale_a: float = Field(gt=0, description="Root mean square margin of A over the common pairs, in its own units.")
    scale_b: float = Field(gt=0)
    slices: list[SliceComparison] = Field(description="All pairs, then axes, then subsets.")
    n_changed: Count
    changed_pairs: list[ChangedPair] = Field(description="By falling size of `moved`.")
    n_omitted: Count = Field(description="Changed pairs that are not listed.")


class Drift(Node):
    """A change with its interval; null ends where one of the two figures has none."""

    estimate: float
    lo: float | None
    hi: float | None


class LatentSide(Node):
    """A latent as one audit has it."""

    safety_feature: bool | None = Field(description="Null: no candidate of this audit, so it was not labelled.")
    firing_rate: float | None
    axis: str | None = Field(description="Axis that the salience is of; null: all pairs, or not known.")
    salience: float | None
    salience_lo: float | None
    salience_hi: float | None
    effect: float | None = Field(
        description="Mean change of the margin when it is ablated, divided by the SD of this model's margins on those pairs; "
        "null where it was not ablated."
    )
    effect_lo: float | None
    effect_hi: float | None


class LatentDrift(Node):
    """A latent of the shared SAE in both audits."""

    latent_id: Count
    name: str = Field(description="Of its label: where it is a safety feature, else by A, else by B; empty where there is none.")
    a: LatentSide
    b: LatentSide
    firing_ratio: float | None = Field(description="B's firing rate over A's; null where one is not known, or A's is 0.")
    salience_change: Drift | None = Field(
        description="B less A; null where one is not known, or they are of different axes. The interval takes the two as "
        "independent, which is wider than need be on the same pairs."
    )
    effect_change: Drift | None = Field(description="B less A, of `effect`; likewise.")


class ChangeEvidence(Node):
    """What a latent says of pairs whose preference changed, by the evidence that both audits list on them."""

    latent_id: Count
    name: str
    n_pairs: Count = Field(description="Changed pairs on which either audit lists it.")
    contribution_a: float = Field(description="Mean contribution to the evidence for the label; 0 where it is not listed.")
    contribution_b: float
    moved: float = Field(description="B less A.")


class FeaturesComparison(Node):
    """Latents of one SAE that both audits used."""

    sae_digest: str
    interpretable_a: bool
    interpretable_b: bool
    fvu_a: float = Field(description="Fraction of the variance of A's activations that the SAE leaves unexplained; 0 is perfect.")
    fvu_b: float = Field(description="Likewise of B's; from 1 on it explains none of it.")
    complete: bool = Field(description="Figures of all latents were at hand, not only of each audit's candidates.")
    n_safety_a: Count
    n_safety_b: Count
    n_safety_both: Count
    n_compared: Count = Field(description="Latents with a salience in both.")
    latents: list[LatentDrift] = Field(description="Safety features of either, then by falling size of the salience's change.")
    n_omitted: Count
    evidence: list[ChangeEvidence] | None = Field(
        description="Of the audited pairs, by falling n_pairs × |moved|; null where a pair_scores.parquet is not at hand."
    )


class ComparisonDocument(Node):
    """Two audits on the same pairs; B is the newer one, or the one in question."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)
    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    a: SideRecord
    b: SideRecord
    same_model: bool = Field(description="Both are of the same reward model (digest).")
    evaluation: PairsComparison | None = Field(description="Pairs that only measure.")
    audited: PairsComparison | None = Field(description="The audited pairs; a reward model trained on them is at its best there.")
    features: FeaturesComparison | None
    not_computed: dict[str, str] = Field(description="evaluation, audited or features → why it is null.")

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> ComparisonDocument:
        wrong = [
            name for name in ("evaluation", "audited", "features") if (getattr(self, name) is None) != (name in self.not_computed)
        ]
        if wrong:
            raise ValueError(f"null without a reason, or a reason without a null: {', '.join(wrong)}")
        return self


def json_schema() -> dict[str, Any]:
    """JSON Schema of comparison.json."""
    schema = ComparisonDocument.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
