"""The audit spec: every scientific knob, one document, one home and one description per knob.

Sections are stage-facing: a stage declares in `reads` the sections that enter its cache key. `runtime` never
enters a key: it changes how fast results come, not which.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from safer_engine.spec_causal import CausalSpec
from safer_engine.spec_labels import LabelSpec
from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.spec_section import Section
from safer_engine.spec_signals import DEFAULT_SIGNALS, SignalName, require_retraining, with_default_signals
from safer_engine.spec_stability import StabilitySpec
from safer_engine.spec_suspicion import ContestedSpec, PairDecision
from safer_engine.spec_verification import VerificationSpec, require_inputs


class ModelSpec(Section):
    """The reward model under audit."""

    path: str = Field(description="Local folder, or hub id with an optional revision: `org/name@revision`.")
    adapter: str | None = Field(None, description="PEFT adapter (folder or hub id) merged into the model at load.")
    reward_index: int | None = Field(None, ge=0, description="Which output of a head with several outputs is the reward.")
    reward_weights: tuple[float, ...] | None = Field(
        None, description="Weights that combine the outputs of a head with several outputs into one reward."
    )
    max_length: int = Field(1024, ge=8, description="Longest sequence in tokens; longer ones are truncated.")
    truncation_side: Literal["left", "right", "drop"] = Field(
        "left", description="Which end is cut from an over-long sequence; `drop` drops the pair and counts it."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the forward pass; `auto` is bfloat16 on CUDA and float32 on CPU."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention backend; `auto` leaves the choice to Transformers."
    )
    add_special_tokens: bool | Literal["auto"] = Field(
        "auto", description="Whether the tokenizer adds special tokens; `auto`: yes unless a chat template already wrote them."
    )

    @model_validator(mode="after")
    def _one_reward(self) -> ModelSpec:
        if self.reward_index is not None and self.reward_weights is not None:
            raise ValueError("give reward_index or reward_weights, not both")
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError("of reward_weights one must not be 0")
        return self


class LocalSource(Section):
    """A file (JSONL, JSON, parquet, CSV, each also .gz) or a `save_to_disk` folder."""

    kind: Literal["local"] = "local"
    path: str = Field(description="File or folder.")
    split: str | None = Field(None, description="Split, where the folder holds several.")


class HubSource(Section):
    """A dataset of a Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    path: str = Field(description="Dataset id.")
    revision: str | None = Field(None, description="Commit, tag or branch; resolved to a commit and recorded.")
    name: str | None = Field(None, description="Configuration of the dataset.")
    split: str = Field("train", description="Split.")


class MemorySource(Section):
    """Rows given by the caller of the Python interface (rows are not part of the spec; their digest is)."""

    kind: Literal["memory"] = "memory"


DatasetSource = Annotated[LocalSource | HubSource | MemorySource, Field(discriminator="kind")]
DatasetFormat = Literal[
    "auto",
    "trl",
    "anthropic",
    "rewardbench",
    "rmbench",
    "pku-saferlhf",
    "ultrafeedback",
    "helpsteer2",
    "helpsteer3",
    "scored",
    "winner",
]


class DatasetSpec(Section):
    """A preference dataset."""

    source: DatasetSource = Field(description="Where the rows come from.")
    format: DatasetFormat = Field("auto", description="Row layout; `auto` recognises it from the columns.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column map for other layouts: our name (id, prompt, chosen, rejected, group, axis, subset, …; or "
        "response_a, response_b, winner) → theirs.",
    )
    winners: dict[str, Literal["a", "b", "tie"]] = Field(
        default_factory=dict,
        description="Layout `winner`: what values of the winner column mean (`a`: response_a is better, `b`: response_b is, or "
        "`tie`), where they don't say it themselves: `{1: a, 2: b, 0: tie}`.",
    )
    label: Literal["safer", "better"] = Field(
        "safer", description="PKU-SafeRLHF rows: which of `safer_response_id` and `better_response_id` is the preference."
    )
    sample: int | None = Field(None, ge=2, description="Audit only this many pairs, drawn by whole groups.")
    stratify: str | None = Field(None, description="Column (axis or subset) whose shares the sample keeps.")
    min_pairs: int = Field(20, ge=2, description="Fewer usable pairs than this are refused; of an evaluation set, warned of.")
    allow_poisoned: bool = Field(False, description="Read data that are marked as poisoned; else refused (docs/drill.md).")

    @model_validator(mode="after")
    def _stratifies_a_sample(self) -> DatasetSpec:
        if self.stratify is not None and self.sample is None:
            raise ValueError("stratify keeps the shares of a sample, and no sample is asked for: give sample, or leave it out")
        return self

    @field_validator("winners", mode="before")
    @classmethod
    def _values_are_text(cls, given: Any) -> Any:
        """YAML reads the values of a winner column as numbers or truth values."""
        return {str(value): meaning for value, meaning in given.items()} if isinstance(given, dict) else given


class HookSpec(Section):
    """Which activations are read."""

    layer: int | None = Field(None, ge=1, description="Residual stream after so many blocks; default round(`depth` × blocks).")
    depth: float = Field(0.7, gt=0, le=1, description="Where `layer` is not given: the hook's place as a share of the blocks.")
    positions: Literal["all", "sentence_ends"] = Field(
        "all", description="Every token of the region, or only tokens that end a sentence."
    )
    region: Literal["response", "text"] = Field("response", description="Response tokens only, or prompt and response.")
    min_gap: int = Field(5, ge=1, description="Sentence ends nearer than this to the previous one are skipped (tokens).")


class SplitSpec(Section):
    """Which groups are kept apart."""

    held_out: float = Field(0.1, gt=0, lt=0.5, description="Share of groups kept from SAE training for its measures.")


class PretrainSpec(Section):
    """Token-level pre-training of the SAE on general text."""

    corpus: DatasetSource = Field(description="Text corpus; rows with a `text` column, or plain text lines.")
    tokens: int = Field(2_000_000, gt=0, description="Positions to train on.")
    lr: float | None = Field(None, gt=0, description="Learning rate; default as for the main training.")
    max_length: int = Field(512, ge=8, description="Sequence length in tokens.")


class SaeBase(Section):
    """What all SAE kinds share."""

    d_sae: int | None = Field(None, gt=1, description="Number of latents; default `expansion` × d_in.")
    expansion: int = Field(8, gt=0, le=4096, description="d_sae / d_in where `d_sae` is not given.")
    k: int = Field(32, gt=0, description="Active latents per position (on average, for batch_topk).")
    normalisation: Literal["scalar", "layernorm"] = Field(
        "scalar", description="Input scaling: one scalar (mean ‖x‖² becomes d_in), or per-position LayerNorm (the paper's)."
    )
    relu: bool = Field(True, description="Drop negative activations after top-k; false reproduces the paper's code.")
    batch: int = Field(4096, gt=0, description="Positions per training step, at most.")
    passes: float = Field(2.0, gt=0, description="Passes over the training positions.")
    min_steps: int = Field(400, ge=0, description="At least this many steps: small data get smaller batches, then more passes.")
    max_steps: int = Field(50_000, gt=0, description="At most this many steps.")
    lr: float | None = Field(
        None, gt=0, description="Adam learning rate; default 2e-4 / √(d_sae / 2¹⁴), more for runs under 40 000 steps."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a linearly rising rate.")
    decay: float = Field(0.2, ge=0, lt=1, description="Share of the steps at the end with a linearly falling rate.")
    aux_k: int | None = Field(None, ge=0, description="Dead latents in the AuxK loss; default d_in / 2; 0 turns it off.")
    aux_weight: float = Field(1 / 32, ge=0, description="Weight of the AuxK loss.")
    dead_after: int = Field(200_000, gt=0, description="A latent is dead when it did not fire in this many positions.")
    loss: Literal["fvu", "nmse"] = Field(
        "fvu", description="Batch-variance normalised error, or the paper's mean of ‖x̂ − x‖² / ‖x‖²."
    )
    renorm_every: int = Field(
        1, gt=0, description="Steps between renormings of the decoder; with 1 the parallel gradient is removed too."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the encoder product in training; `auto` is bfloat16 on CUDA and float32 on CPU."
    )
    interpretable_floor: float = Field(
        0.5, ge=0, le=1, description="Reward recovered below this: features are shown as not interpretable."
    )
    pretrain: PretrainSpec | None = Field(None, description="Token-level pre-training before the preference texts.")
    given: str | None = Field(None, description="Folder `sae` of a finished audit: its SAE is used as it is, none is trained.")

    @model_validator(mode="after")
    def _k_fits(self) -> SaeBase:
        if self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, more than the {self.d_sae} latents of d_sae")
        return self


class TopKSpec(SaeBase):
    """k largest pre-activations per position (arXiv 2406.04093)."""

    kind: Literal["topk"] = "topk"


class BatchTopKSpec(SaeBase):
    """k × batch largest pre-activations per batch; a threshold at inference (arXiv 2412.06410)."""

    kind: Literal["batch_topk"] = "batch_topk"


SaeSpec = Annotated[TopKSpec | BatchTopKSpec, Field(discriminator="kind")]


class SalienceSpec(Section):
    """How differently a latent fires on chosen and rejected responses."""

    estimator: Literal["paired_mean", "paper"] = Field(
        "paired_mean", description="Paired per-response means (default), or the paper's contrast of sums."
    )
    candidates: int = Field(
        256,
        gt=0,
        description="Latents that go on: those of largest absolute salience within each axis, as many per axis as its share "
        "of the prompt groups (`paper`: over all pairs together).",
    )
    min_rate: float = Field(1e-4, ge=0, lt=1, description="Latents firing in a smaller share of positions are not ranked.")
    max_rate: float = Field(0.5, gt=0, le=1, description="Latents firing in a larger share of positions are not ranked.")
    fdr: float = Field(
        0.05, gt=0, lt=0.5, description="False-discovery rate of discoveries among the tested latents (`paper`: none are tested)."
    )
    draws: int = Field(
        8192, ge=1024, le=1_000_000, description="Sign flips at most; fewer where p-values are fine enough before that."
    )
    clusters: int = Field(
        8, ge=0, le=64, description="Clusters of prompts by which the salience of candidates is given too; 0: none."
    )


class ContextSpec(Section):
    """Highest-activating contexts of each candidate."""

    per_latent: int = Field(10, gt=0, description="Contexts kept, each from another prompt group.")
    minimum: int = Field(4, gt=0, description="Latents with fewer contexts are not labelled.")
    window: int = Field(128, gt=3, description="Tokens shown round the focus.")
    held_out: int = Field(
        20,
        ge=0,
        le=1000,
        description="Contexts kept apart to check labels on, and as many matched ones in which it does not fire.",
    )
    held_out_window: int = Field(32, gt=3, description="Tokens of each of those.")


class SuspicionSpec(Section):
    """Which signals say that a pair's label contradicts the evidence."""

    estimator: Literal["fusion", "paper"] = Field("fusion", description="Fusion of signals, or the paper's pair score.")
    signals: dict[SignalName, float] = Field(
        default_factory=DEFAULT_SIGNALS.copy,
        description="Fused signals and their weights; default: `latents` 1 and `knn` 0.5 (docs/label-noise.md), and "
        "`retrained` 0.5 beside them where section `retraining` is given.",
    )
    folds: int = Field(5, ge=2, le=100, description="Cross-fitting folds, by group.")
    shrinkage: float = Field(1.0, gt=0, description="λ of the matched filter, in units of the mean latent variance.")
    neighbours: int = Field(20, gt=0, description="Neighbours of the kNN agreement.")
    contested: ContestedSpec = Field(default_factory=ContestedSpec, description="Which pairs are open to dispute.")
    decisions: str | tuple[PairDecision, ...] | None = Field(
        None,
        description="What people decided on pairs, which checks and recalibrates probabilities: a JSONL file, or the entries.",
    )
    labels_seen: bool = Field(
        True,
        description="Whether the reward model was trained on these labels. If not, the SAE is left out of the suspicion of an "
        "axis where it adds nothing; if so, what it adds cannot be told from the labels (docs/label-noise.md).",
    )

    @model_validator(mode="after")
    def _weights(self) -> SuspicionSpec:
        if any(weight < 0 for weight in self.signals.values()) or not sum(self.signals.values()) > 0:
            raise ValueError("weights of signals must not be negative, and one must be above 0")
        return self


class EditSpec(Section):
    """What is recommended for suspicious pairs."""

    budget: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="Share of each axis that is dropped; the next as many are `review`. Not given: by gain where suspicion is a "
        "probability, else 0.04.",
    )
    allow_flip: bool = Field(False, description="Recommend `flip` in place of `drop`.")
    false_edits: float = Field(
        0.3, gt=0, lt=1, description="By gain: largest share of right labels to be expected among what is dropped or flipped."
    )
    cost_wrong: float = Field(1.0, gt=0, description="By gain: what a wrong label costs that stays.")
    cost_lost: float = Field(1.0, gt=0, description="By gain: what a right label costs that is dropped.")


class ReportSpec(Section):
    """What the report shows."""

    features: int = Field(32, gt=0, description="Feature cards.")
    pairs: int = Field(60, gt=0, description="Most suspicious pairs shown in full.")
    text: bool = Field(True, description="False leaves ids and figures only.")
    bootstrap: int = Field(2000, ge=100, le=100_000, description="Resamples for intervals.")


class RuntimeSpec(Section):
    """How the work is done; never part of a cache key."""

    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:N`; `auto` is CUDA where present.")
    device_map: str | None = Field(None, description="Transformers device_map, for a model over several GPUs (`auto`).")
    batch_tokens: int = Field(8192, gt=0, description="Tokens per forward pass, padding included.")
    shard_pairs: int = Field(256, gt=0, description="Pairs per activation shard: bounds memory, is the unit of resume.")
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores.")
    processes: int = Field(1, ge=1, le=1024, description="Processes that share each training (FSDP): one for each GPU.")
    checkpoint_seconds: float = Field(60.0, gt=0, description="Seconds between checkpoints of a training.")
    trust_remote_code: bool = Field(False, description="Run code shipped with the model. For operators who have read it.")


class AuditSpec(Section):
    """One audit, in full."""

    spec_version: Literal[1] = Field(1, description="Version of this document's layout.")
    preset: Literal["default", "paper"] = Field("default", description="Where the values not given come from.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    model: ModelSpec
    dataset: DatasetSpec
    evaluation: DatasetSpec | None = Field(None, description="Preference pairs that only measure; never trained on.")
    hook: HookSpec = Field(default_factory=HookSpec)
    split: SplitSpec = Field(default_factory=SplitSpec)
    sae: SaeSpec = Field(default_factory=TopKSpec)
    salience: SalienceSpec = Field(default_factory=SalienceSpec)
    contexts: ContextSpec = Field(default_factory=ContextSpec)
    labels: LabelSpec = Field(default_factory=LabelSpec)
    causal: CausalSpec = Field(default_factory=CausalSpec)
    stability: StabilitySpec = Field(default_factory=StabilitySpec)
    retraining: RetrainingSpec | None = Field(None, description="Reward models trained without a part of the pairs; off: null.")
    suspicion: SuspicionSpec = Field(default_factory=SuspicionSpec)
    edits: EditSpec = Field(default_factory=EditSpec)
    verification: VerificationSpec | None = Field(None, description="Retraining with the edits and with controls; off: null.")
    report: ReportSpec = Field(default_factory=ReportSpec)
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec)

    @model_validator(mode="before")
    @classmethod
    def _default_signals(cls, given: Any) -> Any:
        return with_default_signals(given)

    @model_validator(mode="after")
    def _signals_have_their_source(self) -> AuditSpec:
        require_retraining(self.suspicion.signals, self.retraining)
        require_inputs(self.verification, self.retraining, evaluation=self.evaluation is not None)
        return self


PAPER_PRESET: dict[str, Any] = {
    "hook": {"depth": 0.75, "positions": "sentence_ends", "region": "text", "min_gap": 5},
    "sae": {
        "kind": "topk", "k": 64, "normalisation": "layernorm", "relu": False, "loss": "nmse",
        "lr": 3e-4, "batch": 256, "passes": 1.0, "aux_k": 0, "min_steps": 0, "renorm_every": 10,
    },
    "salience": {"estimator": "paper", "candidates": 256, "min_rate": 0.0, "max_rate": 1.0},
    "contexts": {"per_latent": 10, "minimum": 4, "window": 128},
    "labels": {"min_rating": 5, "keep": 32, "detection_floor": None, "repeats": 0.0},
    "suspicion": {"estimator": "paper", "signals": {"paper": 1.0}},
}  # fmt: skip
"""METHOD §1 as a spec: merged under what the user gives when `preset: paper`."""


_MAPPINGS = frozenset({"columns", "signals", "winners"})
"""Fields that are mappings, not sections: a value of theirs is given as a whole."""


def merge(base: dict[str, Any], over: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """Deep-merge two spec documents; `over` wins; neither is changed.

    Args:
        whole: a mapping (signals, columns, winners), and a source or a labeller that names its kind, replaces another as a
            whole. False for parts of one document, which make it up together.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        goes_on = isinstance(old, dict) and isinstance(value, dict) and not (whole and _replaces(key, old, value))
        merged[key] = merge(old, value, whole=whole) if goes_on else value  # type: ignore[arg-type]
    return merged


def _replaces(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if key == "labeller":
        return "kind" in new and new["kind"] != old.get("kind")
    return key in _MAPPINGS or (key in ("source", "corpus") and "kind" in new)
