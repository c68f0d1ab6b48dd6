"""The report as one value: what report.json holds, and all that the pages are made from.

Top-level keys are fixed. What was not computed is null, and `provenance.not_computed` says why, by the path of the
null (`"verification"`, `"sae.recovered"`, `"features[].causal_effect"`). Whatever differs between two identical
audits stands in `provenance.timing` and nowhere else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from safer_engine.report.model_causal import CausalReport
from safer_engine.report.model_doubts import AxisDoubt
from safer_engine.report.model_labels import LabelDetection, LabelsReport
from safer_engine.report.model_plots import Curve, Overview
from safer_engine.report.model_salience import ClusterSalience, PromptCluster, SalienceTests, SeedMatch, SeedStability
from safer_engine.report.model_verification import VerificationReport
from safer_engine.report.nodes import Count, Facts, Node, Rate
from safer_engine.report.provenance import Provenance

SCHEMA_VERSION: Literal[1] = 1
SECTIONS = ("dataset", "reward_model", "evaluation", "sae", "features", "edits", "verification", "verdict")
"""Top-level keys that are null while there is nothing to show."""
_VERIFIED = "yes: the effect's interval leaves out 0 and its adjusted p is at most 0.05. Null: not ablated."


class Text(Node):
    """A piece of a text that came with the data or from a labeller."""

    text: str = Field(description="The first characters, as they came; readers must escape it.")
    omitted: Count = Field(0, description="Characters left out after them.")


class Estimate(Node):
    """A figure with its 95 % interval."""

    estimate: float
    lo: float | None = Field(None, description="Lower end; null where fewer than two groups leave nothing to estimate it from.")
    hi: float | None = Field(None, description="Upper end, likewise.")
    n: Count = Field(description="Values it is made of.")
    n_groups: Count = Field(description="Groups they fall into: the unit of resampling.")


class Histogram(Node):
    """Counts between edges; values outside the first and last edge are counted in the end bins."""

    edges: list[float] = Field(description="n + 1 rising edges.")
    counts: list[Count] = Field(description="n counts.")

    @model_validator(mode="after")
    def _shape(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram has one edge more than counts")
        return self


class Health(Node):
    """What was read, kept and dropped."""

    n_in: Count = Field(description="Pairs that the input rows gave, dropped ones included.")
    n_kept: Count
    dropped: dict[str, Count] = Field(description="Pairs dropped, by reason.")
    facts: Facts = Field(default_factory=dict, description="Further counts of the reader.")

    @model_validator(mode="after")
    def _adds_up(self) -> Health:
        if self.n_in != self.n_kept + sum(self.dropped.values()):
            raise ValueError(f"{self.n_in} read, {self.n_kept} kept and {sum(self.dropped.values())} dropped do not add up")
        return self


class Dataset(Node):
    """The audited preference pairs."""

    health: Health
    evaluation_health: Health | None = Field(
        None, description="The same of the evaluation set, where one was given and any of it is usable."
    )
    n_pairs: Count
    n_groups: Count = Field(description="Pairs linked by a prompt or a response form a group.")
    n_both_orders: Count = Field(description="Pairs whose two texts also occur the other way round.")
    tokens: Count | None = Field(None, description="Tokens of all sequences.")
    axes: dict[str, Count]
    subsets: dict[str, Count]
    longer_chosen: Rate = Field(description="Share of pairs whose chosen response has more characters than the rejected one.")


class Measured(Node):
    """Pair accuracy and reward margin of a slice of pairs. A tie of the two rewards is not counted as right."""

    axis: str | None = Field(description="Null: all axes.")
    subset: str | None = Field(description="Null: the whole axis.")
    accuracy: Estimate = Field(description="Share of pairs with margin > 0.")
    margin: Estimate = Field(description="Mean reward margin, in the reward model's own units.")
    ties: Count = Field(description="Pairs with equal rewards.")


class Margins(Node):
    """How reward margins spread in a slice."""

    axis: str
    subset: str | None
    histogram: Histogram


class RewardModel(Node):
    """The reward model and what it makes of the audited pairs."""

    facts: Facts = Field(description="Architecture, size, precision.")
    hook: Facts = Field(description="Where activations were read.")
    invariance: Facts = Field(default_factory=dict, description="How rewards move with batching and padding.")
    on_audited_pairs: list[Measured] = Field(
        description="On the audited pairs themselves; a reward model trained on them is at its best here."
    )
    retrained: list[Measured] = Field(
        default_factory=list, description="The same by models that saw neither the pair nor its group; empty: none was trained."
    )
    margins: list[Margins]


class Score(Node):
    """One figure of a benchmark's own scoring."""

    name: str = Field(description="best_of_n, easy, normal or hard.")
    axis: str | None
    subset: str | None
    accuracy: Estimate


class Length(Node):
    """How rewards follow the length of responses in a slice: tokens of the last response, as the reward model reads them.

    Shares are of the pairs whose two responses differ in length.
    """

    axis: str | None
    subset: str | None
    n_equal: Count = Field(description="Pairs with responses of equal length: in none of the figures.")
    longer_chosen: Estimate | None = Field(description="Share whose chosen response is the longer one: what the labels ask for.")
    longer_preferred: Estimate | None = Field(description="Share whose longer response has the higher reward; a tie is half.")
    excess: Estimate | None = Field(description="longer_preferred less longer_chosen.")
    accuracy_longer: Estimate | None = Field(description="Pair accuracy where the chosen response is the longer one.")
    accuracy_shorter: Estimate | None = Field(description="Pair accuracy where the chosen response is the shorter one.")
    gap: Estimate | None = Field(
        description="accuracy_longer less accuracy_shorter, each subset compared within itself and weighted as Mantel and "
        "Haenszel do; positive: errors go towards length. `n` are pairs of subsets that have both kinds."
    )
    correlation: Estimate | None = Field(
        description="Spearman's, of the margin with the length of the chosen less that of the rejected response."
    )
    reasons: dict[str, str] = Field(default_factory=dict, description="Why a figure is null, by its name.")


class StyleMatrix(Node):
    """Accuracy by style of the chosen (rows) and the rejected response (columns): concise, detailed-plain, detailed-markdown."""

    axis: str | None
    subset: str | None
    n_prompts: Count
    accuracy: list[list[Rate | None]]


class Evaluation(Node):
    """The reward model on pairs that only measure."""

    n_pairs: Count = Field(description="Usable evaluation pairs.")
    min_pairs: Count = Field(description="The least that were asked for (`evaluation.min_pairs`).")
    too_few: bool = Field(description="There are fewer: the figures are unsure.")
    groups: list[Measured]
    length: list[Length] = Field(
        default_factory=list, description="How rewards follow the length of responses, in the slices of `groups`."
    )
    margins: list[Margins]
    best_of_n: list[Score] | None = Field(None, description="RewardBench 2's credit of items; null without such items.")
    styles: list[Score] | None = Field(None, description="RM-Bench's easy, normal and hard accuracies; null without styles.")
    style_matrices: list[StyleMatrix] | None = None


class LatentsReport(Node):
    """All latents of the SAE, before any label."""

    estimator: str = Field(description="How salience was estimated.")
    n_latents: Count
    n_ranked: Count = Field(description="Latents whose firing rate is neither too small nor too large to rank.")
    n_candidates: Count = Field(description="Most salient latents, which went on to be labelled.")
    overview: Overview
    tests: SalienceTests | None = Field(None, description="Null for the paper's estimator, which is not tested.")
    clusters: list[PromptCluster] = Field(default_factory=list)
    stability: SeedStability | None = Field(None, description="Null where no second SAE was trained.")


class SaeReport(Node):
    """The sparse autoencoder and how faithful it is, on held-out groups."""

    kind: str
    d_in: Count
    d_sae: Count
    k: Count
    facts: Facts = Field(default_factory=dict)
    fvu: float = Field(description="Fraction of variance unexplained, in raw units; 0 is perfect.")
    nmse: float | None = Field(None, description="Mean of ‖x − x̂‖² / ‖x‖².")
    l0: float = Field(description="Mean number of active latents at a position.")
    dead_share: Rate = Field(description="Share of latents that did not fire in the last `dead_window` training positions.")
    dead_window: Count | None = None
    silent_share: Rate | None = Field(None, description="Share of latents that fired at no held-out position.")
    n_positions: Count = Field(description="Held-out positions measured.")
    density: Histogram | None = Field(None, description="Latents by log10 of their firing rate; silent ones in the first bin.")
    recovered: dict[str, dict[str, float]] | None = Field(
        None, description="Reward recovered with `covered` and with `all` positions replaced by their reconstruction."
    )
    interpretable: bool | None = Field(None, description="Whether reward recovered is above the spec's floor.")
    digest: str | None = Field(None, description="sha256 of its weights, `sae/sae.safetensors`: what corrections of labels name.")
    curve: Curve | None = None
    latents: LatentsReport | None = Field(None, description="Null until salience is computed.")


class SubsetSalience(Node):
    """Salience of a feature in one subset."""

    axis: str
    subset: str
    n_groups: Count
    salience: float
    t: float | None


class Context(Node):
    """A text window where a feature fires strongly."""

    pair_id: str
    side: Literal["chosen", "rejected"]
    position: int
    activation: float
    tokens: list[str] = Field(description="Text of each token of the window.")
    activations: list[float | None] = Field(description="The feature's activation at each; null where none was read.")
    focus: int = Field(description="Index of the token with `activation`.")


class Feature(Node):
    """A candidate latent with its label. The list of features begins with safety features, then goes by salience."""

    latent_id: int
    rank: int = Field(description="Among candidates, 1 = most salient.")
    safety_feature: bool | None = Field(description="Null while there are no labels.")
    safety_rank: int | None = None
    status: str | None = Field(
        None, description="Outcome of labelling: labelled, unverified, unparsed, too_few_contexts, error, skipped."
    )
    rating: int | None = Field(None, description="Relevance to the rubric, 1–5.")
    explanation: Text | None = None
    direction: str | None = None
    terms: list[Text] = Field(default_factory=list)
    labeller: str | None = None
    detection: LabelDetection | None = Field(None, description="How well the label tells where the latent fires.")
    detection_problem: str | None = Field(None, description="Why there is none, or why some windows were not judged.")
    rating_again: int | None = Field(None, description="Of a second reading, with the contexts in another order.")
    status_again: str | None = None
    corrected_by: str | None = Field(None, description="The person whose correction this label is.")
    fires_on: Literal["chosen", "rejected"] = Field(description="The side it fires more on: the sign of its salience.")
    axis: str | None = Field(None, description="Axis that the salience is of; null: all pairs.")
    salience: float = Field(description="In [−1, 1]; positive: fires more on chosen responses.")
    salience_lo: float | None = None
    salience_hi: float | None = None
    t: float | None = Field(None, description="Cluster-robust t statistic of the paired difference.")
    salience_paper: float | None = Field(None, description="The paper's contrast of sums.")
    discovery: bool | None = Field(None, description="q is at most salience.fdr; null where it was not tested.")
    p: float | None = Field(None, description="By sign flips in the half of the groups that chooses; `salience` is of the other.")
    q: float | None = Field(None, description="By Benjamini and Hochberg over all tests.")
    q_by: float | None = Field(None, description="By Benjamini and Yekutieli.")
    p_max_t: float | None = Field(None, description="Adjusted for the largest of all latents.")
    salience_selection: float | None = Field(None, description="In the half that chooses: ranked by it, and the larger for it.")
    replicated: bool | None = Field(None, description="A discovery found again in the other half; null where it is none.")
    second_seed: SeedMatch | None = Field(None, description="Null where no second SAE was trained.")
    salience_equal_length: float | None = Field(None, description="What is left where both responses are equally long.")
    equal_length_lo: float | None = None
    equal_length_hi: float | None = None
    length_bound: bool | None = Field(
        None, description="Length accounts for it: away from 0 as it stands, not at equal length, and the difference is sure."
    )
    mixed: bool | None = Field(None, description="Its sign differs, surely, between parts of the data (subsets or clusters).")
    clusters: list[ClusterSalience] = Field(default_factory=list, description="Salience by cluster of prompts.")
    firing_rate: float
    responses: Count = Field(description="Responses it fires in.")
    subsets: list[SubsetSalience] = Field(default_factory=list)
    contexts: list[Context] = Field(default_factory=list, description="Only on as many features as the report shows in full.")
    causal_effect: float | None = Field(None, description="Mean change of the margin when the feature is ablated.")
    causal_effect_lo: float | None = None
    causal_effect_hi: float | None = None
    causal_p: float | None = Field(None, description="Adjusted p against latents that fire alike.")
    causal_verified: Literal["yes", "no", "not measured"] | None = Field(None, description=_VERIFIED)

    @property
    def saliences(self) -> list[float]:
        """By subset and by cluster of prompts."""
        return [*(part.salience for part in self.subsets), *(part.salience for part in self.clusters)]


class Evidence(Node):
    """What one latent says about a pair."""

    latent_id: int
    contribution: float = Field(description="Positive: speaks for the label as given.")


class SuspiciousPair(Node):
    """A pair among those whose labels the evidence supports least."""

    pair_id: str
    group: str
    axis: str
    subset: str
    action: str | None
    suspicion: Rate
    suspicion_kind: str
    status: str | None = Field(
        None, description="suspicious | contested; null where the evidence does not speak against the label."
    )
    disputed_by: list[str] = Field(default_factory=list, description="Why its label is open to dispute, suspicious or not.")
    reward_margin: float
    pair_score: float | None
    signals: dict[str, float | None] = Field(description="Each signal's value; higher = more doubtful.")
    evidence: list[Evidence] = Field(description="The latents that say most; there may be more than are listed.")
    annotators: list[int] | None = Field(None, description="Individual preferences, positive for the chosen response.")
    both_orders: bool = False
    undoubted: bool = Field(False, description="No signal is above 0: only the rank of its suspicion brings the pair here.")
    prompt: Text | None = Field(None, description="Null where the report was asked to hold no text.")
    chosen: Text | None = None
    rejected: Text | None = None


class AxisEdits(Node):
    """What is recommended within an axis, or a subset of it."""

    axis: str
    subset: str | None
    n: Count
    not_scored: Count
    actions: dict[str, Count]


class EditsReport(Node):
    """Suspicion, and what is recommended for it."""

    estimator: str
    suspicion_kind: str = Field(description="probability | rank; `mixed` where axes differ (see `axes`).")
    axes: list[AxisDoubt] = Field(default_factory=list)
    doubtful_share: Rate | None = Field(None, description="Estimated share of wrong labels; null unless every axis has one.")
    signals: Facts = Field(description="Fused signals and their weights.")
    left_out: dict[str, str] = Field(default_factory=dict, description="Signals that could not be computed, and why.")
    budget: float | None = Field(
        None, description="Share of each axis that is dropped; null: by gain, where suspicion is a probability."
    )
    actions: dict[str, Count] | None = Field(None, description="Input rows by recommended action.")
    not_scored: dict[str, Count] | None = Field(None, description="Input rows without a score, by reason.")
    by_axis: list[AxisEdits] = Field(default_factory=list)
    n_scored: Count = Field(description="Pairs with a suspicion.")
    n_removed: Count | None = Field(None, description="Of these, pairs of rows recommended for dropping or flipping.")
    n_removed_undoubted: Count | None = Field(None, description="Of those, pairs none of whose signals is above 0.")
    pairs: list[SuspiciousPair] = Field(description="The most suspicious pairs; all are in pair_scores.parquet.")


class ReportDocument(Node):
    """An audit's report."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)
    schema_version: Literal[1] = SCHEMA_VERSION
    spec: dict[str, Any] = Field(description="The resolved spec, without `runtime`.")
    provenance: Provenance
    dataset: Dataset | None
    reward_model: RewardModel | None
    evaluation: Evaluation | None
    sae: SaeReport | None
    features: list[Feature] | None
    labels: LabelsReport | None = Field(None, description="Who labelled the candidates, and how the labels were checked.")
    causal: CausalReport | None = Field(None, description="Null where no latent was ablated.")
    edits: EditsReport | None
    verification: VerificationReport | None = Field(description="Retraining arms and their effects.")
    verdict: None = Field(description="pass, fail or inconclusive, by a named policy.")

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> ReportDocument:
        missing = [name for name in SECTIONS if getattr(self, name) is None and name not in self.provenance.not_computed]
        if missing:
            raise ValueError(f"null without a reason in provenance.not_computed: {', '.join(missing)}")
        wrong = [name for name in SECTIONS if getattr(self, name) is not None and name in self.provenance.not_computed]
        if wrong:
            raise ValueError(f"provenance.not_computed names what was computed: {', '.join(wrong)}")
        return self


def json_schema() -> dict[str, Any]:
    """JSON Schema of report.json."""
    schema = ReportDocument.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
