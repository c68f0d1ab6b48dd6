"""What an audit would take: tokens, seconds, disk and memory by stage, before anything is computed.

Times come from rates: the last rate measured on this machine for the stage and device where there is one, else a rate
derived from that of a matrix product, which is timed once and remembered too. Sizes follow from the layout of the artifacts
(see `artifacts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safer_engine.causal_cost import causal_runs
from safer_engine.cost import Planned, planned_total
from safer_engine.label_plan import label_requests
from safer_engine.pipeline import AuditRequest, StagePlan, plan
from safer_engine.rates import MATMUL, machine_flops, rate_name, rates_file, read_rates, remember_rates
from safer_engine.retraining_cost import TRAINED, trained_memory, trained_work, trains
from safer_engine.science.sae_budget import sae_width, training_size
from safer_engine.spec import AuditSpec
from safer_engine.store import ArtifactStore, Manifest

_BASE_BYTES = 700e6  # the interpreter with torch and transformers loaded
_BYTES = {"float32": 4, "bfloat16": 2}
_EFFICIENCY = {
    "activations": 0.5,
    "evaluation": 0.5,
    "causal": 0.5,
    "sae": 0.35,
    "latents": 0.35,
    "second_sae": 0.35,
    "stability": 0.35,
    "retraining": 0.3,
    "verification": 0.3,
}
_FIXED_SECONDS = {
    "activations": 4.0, "evaluation": 4.0, "causal": 4.0, "sae": 2.0, "latents": 2.0, "second_sae": 2.0, "stability": 2.0,
    "retraining": 4.0, "verification": 4.0, "report": 2.0,
}  # fmt: skip
_ROWS_PER_SECOND = {"pairs": 1500.0, "pair_scores": 1500.0, "edits": 5000.0, "report": 5000.0}
_LABEL_SECONDS = {"lexicon": 0.02, "chat_api": 2.0, "local_lm": 30.0}
"""Seconds of a candidate (lexicon), or of a request."""
_SAMPLE_ROWS = 200
_SIZED = ("activations", "evaluation", "sae", "latents", "labels", "causal", "second_sae", "stability")
"""Stages whose work follows from the model's size."""
_LIKE = {"second_sae": "sae", "stability": "latents"}
"""Stages that do once more what others did, where a second SAE is asked for."""
_WIDTHS, _DEPTHS = ("hidden_size", "d_model", "n_embd", "dim"), ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What the configs of models call their width and their number of blocks."""


@dataclass(frozen=True)
class Workload:
    """The size of an audit.

    Attributes:
        tokens: over both sides of all pairs, evaluation included; tokens_eval: of evaluation pairs alone.
        positions: those of the audited pairs that are kept.
        exact: whether pairs and tokens were counted, or extrapolated from a sample of rows.
        positions_exact: whether the positions were counted (by `activations`), or are a usual share of the tokens.
    """

    n_pairs: int
    n_eval: int
    tokens: int
    tokens_eval: int
    positions: int
    exact: bool
    positions_exact: bool

    @property
    def per_text(self) -> float:
        """Mean tokens of a text."""
        return self.tokens / max(2 * (self.n_pairs + self.n_eval), 1)


@dataclass(frozen=True)
class ModelSize:
    """What the model's files say of its size."""

    d_in: int
    n_blocks: int
    body_parameters: int
    parameters: int
    weight_bytes: int


_NO_SIZE = ModelSize(0, 0, 0, 0, 0)
"""Stands where the size is not known, for stages whose work does not follow from it."""


@dataclass(frozen=True)
class AuditSize:
    """All that an estimate needs to know of an audit's inputs; the same on every machine.

    Attributes:
        model: None where not known; labeller: of the model of a `local_lm` labeller, if there is one and its size is known;
            base: likewise of what reward models are retrained from.
    """

    workload: Workload
    model: ModelSize | None
    labeller: ModelSize | None = None
    base: ModelSize | None = None

    def dumped(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def loaded(cls, document: Mapping[str, Any]) -> AuditSize:
        """What `dumped` gave."""
        sizes = {name: document.get(name) for name in ("model", "labeller", "base")}
        known = {name: None if size is None else ModelSize(**size) for name, size in sizes.items()}
        return cls(Workload(**document["workload"]), **known)


@dataclass(frozen=True)
class Estimate:
    """What one stage would take.

    Attributes:
        work: size of the stage's work in its own unit (floating-point operations, rows or calls).
        seconds: None where nothing is computed.
        measured: whether the rate was measured on this machine before.

    Where a model's size is not known, what follows from it is None.
    """

    stage: str
    state: str
    resource: str
    work: float | None
    seconds: float | None
    disk_bytes: int | None
    memory_bytes: int | None
    gpu_bytes: int | None
    measured: bool

    @property
    def planned(self) -> Planned:
        """What is kept beside the cost."""
        seconds = None if self.seconds is None else round(self.seconds, 3)
        return Planned(
            seconds=seconds, peak_memory_bytes=self.memory_bytes, peak_gpu_bytes=self.gpu_bytes, disk_bytes=self.disk_bytes
        )


@dataclass(frozen=True)
class AuditEstimate:
    """What an audit would take.

    Attributes:
        stages: an estimate for every stage, by name.
        flops: floating-point operations a second of a matrix product, where the time of a stage was derived from them.
    """

    workload: Workload
    stages: dict[str, Estimate]
    flops: float | None

    @property
    def total(self) -> Planned:
        """All stages that are to be computed, one after another."""
        return planned_total(self.planned.values())

    @property
    def planned(self) -> dict[str, Planned]:
        """What a run keeps beside the cost of each stage that it computes."""
        return {name: stage.planned for name, stage in self.stages.items() if stage.state == "compute"}


def estimate(request: AuditRequest, store: ArtifactStore) -> AuditEstimate:
    """What `pipeline.run` would take; nothing is computed.

    Raises:
        DatasetRefused: the rows cannot be read. ModelRefused: the tokenizer cannot.
    """
    planned = plan(request, store)
    return estimate_of(request.spec, audit_size(request, store, planned), planned, rates_file(store))


def audit_size(request: AuditRequest, store: ArtifactStore, planned: tuple[StagePlan, ...]) -> AuditSize:
    """How large an audit is, by its inputs and what is computed already. Raises as `estimate`."""
    load = _workload(request, store, {stage.name: stage for stage in planned})
    others = (request.sources.labeller, request.sources.base)
    labeller, base = (None if found is None else model_size(found.path) for found in others)
    return AuditSize(load, model_size(request.sources.model.path), labeller, base)


def estimate_of(spec: AuditSpec, size: AuditSize, planned: tuple[StagePlan, ...], rates: Path | None) -> AuditEstimate:
    """What stages would take on this machine, `spec.runtime.device` being its device. Opens no input.

    Args:
        planned: the stages to be estimated.
        rates: file of the rates measured on this machine.
    """
    remembered = read_rates(rates)
    known = {stage.name: _rate_of(stage.name, spec, remembered) for stage in planned}
    unknown = {stage.name for stage in planned if stage.state == "compute" and known[stage.name] is None}
    if not size.workload.n_eval:
        unknown.discard("evaluation")
    if not spec.stability.second_sae:
        unknown -= set(_LIKE)
    unknown -= {stage for stage in TRAINED if not trains(stage, spec)}
    flops = None
    if (size.model or size.base) is not None and unknown & set(_EFFICIENCY):
        flops = remembered.get(rate_name(MATMUL, spec)) or machine_flops(spec.runtime.device, spec.model.dtype)
    stages = {}
    for stage in planned:
        sized_by = _sized_by(stage.name, spec, size)
        if sized_by is None:
            stages[stage.name] = Estimate(stage.name, stage.state, stage.resource, None, None, None, None, None, measured=False)
            continue
        rate = known[stage.name] or _assumed_rate(stage.name, spec, flops)
        made = _estimate(stage, spec, size.workload, sized_by, rate)
        if stage.name == "labels" and size.labeller is not None:
            made = replace(made, memory_bytes=int(_BASE_BYTES + 1.2 * size.labeller.parameters * _BYTES["float32"]))
        stages[stage.name] = replace(made, measured=known[stage.name] is not None)
    return AuditEstimate(size.workload, stages, flops)


def _sized_by(stage: str, spec: AuditSpec, size: AuditSize) -> ModelSize | None:
    """The model whose size a stage's work follows from; None where that is not known."""
    if stage in TRAINED:
        return size.base if trains(stage, spec) else _NO_SIZE
    return size.model or (None if stage in _SIZED else _NO_SIZE)


def _estimate(stage: StagePlan, spec: AuditSpec, load: Workload, size: ModelSize, rate: float) -> Estimate:
    """An estimate from a rate, in units of the stage's work a second, that nobody measured."""
    like = _model_for(stage.name, spec)
    work = _work(like, spec, load, size)
    memory, gpu = _memory(like, spec, load, size)
    computing = stage.state == "compute"
    return Estimate(
        stage=stage.name,
        state=stage.state,
        resource=stage.resource,
        work=work,
        seconds=work / rate + (_FIXED_SECONDS.get(stage.name, 0.0) if work else 0.0) if computing else None,
        disk_bytes=_disk("" if stage.name == "stability" else like, spec, load, size) if computing else 0,
        memory_bytes=memory,
        gpu_bytes=gpu,
        measured=False,
    )


def record_rates(path: Path | None, expected: AuditEstimate, manifests: Iterable[Manifest], spec: AuditSpec) -> None:
    """Remember the rates of the stages that were computed since the estimate, and of the matrix product if it was timed."""
    rates = {} if expected.flops is None else {rate_name(MATMUL, spec): expected.flops}
    for manifest in manifests:
        stage = expected.stages[manifest.stage]
        working = manifest.cost.seconds - _FIXED_SECONDS.get(manifest.stage, 0.0)
        if stage.state == "compute" and stage.work and working > 0.5:
            rates[rate_name(manifest.stage, spec)] = stage.work / working
    remember_rates(path, rates)


def model_size(folder: Path) -> ModelSize | None:
    """Size of a model from its config and the headers of its safetensors files; None where the config does not say it."""
    from safetensors import safe_open

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    text = config.get("text_config", config)
    d_in, n_blocks = (next((text[name] for name in names if text.get(name)), None) for names in (_WIDTHS, _DEPTHS))
    if not isinstance(d_in, int) or not isinstance(n_blocks, int):
        return None
    total, embeddings, size = 0, 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 — safe_open is no mapping
                shape = tensors.get_slice(name).get_shape()
                count = _product(shape)
                total += count
                embeddings += count if "embed" in name else 0
    return ModelSize(d_in, n_blocks, total - embeddings, total, size)


def _workload(request: AuditRequest, store: ArtifactStore, planned: Mapping[str, StagePlan]) -> Workload:
    """Pairs and tokens: counted where their stage was run, else extrapolated from the first rows."""
    from safer_engine.workload import dataset_size, kept_positions

    pairs = dataset_size(request, "dataset", store, planned["pairs"], _SAMPLE_ROWS)
    apart = dataset_size(request, "evaluation", store, planned["evaluation"], _SAMPLE_ROWS)
    counted = kept_positions(store, planned["activations"])
    return Workload(
        n_pairs=pairs.n_pairs,
        n_eval=apart.n_pairs,
        tokens=pairs.tokens + apart.tokens,
        tokens_eval=apart.tokens,
        positions=int(pairs.tokens * _share_kept(request.spec)) if counted is None else counted,
        exact=pairs.exact and apart.exact,
        positions_exact=counted is not None,
    )


def _share_kept(spec: AuditSpec) -> float:
    share = 0.6 if spec.hook.region == "response" else 1.0
    return share * (0.06 if spec.hook.positions == "sentence_ends" else 1.0)


def _rate_of(stage: str, spec: AuditSpec, remembered: Mapping[str, float]) -> float | None:
    """The rate measured for a stage, or for the one that it is like."""
    names = (stage, _LIKE[stage]) if stage in _LIKE else (stage,)
    return next((remembered[key] for key in (rate_name(name, spec) for name in names) if key in remembered), None)


def _model_for(stage: str, spec: AuditSpec) -> str:
    """The stage that one is like: itself, another one, or, where it is switched off, none."""
    if stage not in _LIKE:
        return stage
    return _LIKE[stage] if spec.stability.second_sae else ""


def _work(stage: str, spec: AuditSpec, load: Workload, size: ModelSize) -> float:  # noqa: PLR0911 - one answer per stage
    dense = 2.0 * size.d_in * sae_width(spec.sae, size.d_in)
    if stage in ("activations", "evaluation"):
        return 2.0 * size.body_parameters * (load.tokens_eval if stage == "evaluation" else load.tokens - load.tokens_eval)
    if stage == "causal":
        above = 2.0 * size.body_parameters * load.per_text * (1 - spec.hook.depth)
        return causal_runs(spec.causal, load.n_pairs) * above
    if stage in TRAINED:
        return trained_work(stage, spec, (load.tokens - load.tokens_eval, load.tokens_eval), size.body_parameters)
    if stage == "sae" and spec.sae.given is not None:
        return 0.0
    if stage == "sae":
        size_of = training_size(spec.sae, max(1, int(load.positions * (1 - spec.split.held_out))))
        return 3 * dense * size_of.batch * size_of.steps
    if stage == "latents":
        return 1.5 * dense * load.positions
    if stage == "labels":
        requests = label_requests(spec, size.d_in)
        return float(requests.total if requests else min(spec.salience.candidates, sae_width(spec.sae, size.d_in)))
    return float(load.n_pairs) if stage in _ROWS_PER_SECOND else 0.0


def _assumed_rate(stage: str, spec: AuditSpec, flops: float | None) -> float:
    if stage in _EFFICIENCY and flops is not None:
        return flops * _EFFICIENCY[stage]
    if stage == "labels":
        return 1 / _LABEL_SECONDS[spec.labels.labeller.kind]
    return _ROWS_PER_SECOND.get(stage, 1.0)


def _disk(stage: str, spec: AuditSpec, load: Workload, size: ModelSize) -> int:
    width = _BYTES.get(spec.model.dtype, 4)
    bytes_of = {
        "pairs": (load.tokens - load.tokens_eval) * 24,
        "evaluation": load.tokens_eval * 24 + load.n_eval * 64,
        "activations": load.positions * (size.d_in * width + 10)
        + 2 * min(spec.causal.pairs, load.n_pairs) * load.per_text * size.d_in * width
        + load.n_pairs * size.d_in * 8,
        "sae": 2 * size.d_in * sae_width(spec.sae, size.d_in) * 4,
        "latents": 2 * load.n_pairs * min(load.per_text * spec.sae.k, sae_width(spec.sae, size.d_in)) * 8,
        "retraining": load.n_pairs * 60 if trains("retraining", spec) else 1e5,
        "verification": load.n_eval * (100 + 4 * 24 * (spec.verification.seeds if spec.verification else 0)),
        "pair_scores": load.n_pairs * 400,
        "edits": load.n_pairs * 700,
        "report": 3e6 + load.n_pairs * 300,
    }
    return int(bytes_of.get(stage, 1e5))


def _memory(stage: str, spec: AuditSpec, load: Workload, size: ModelSize) -> tuple[int, int | None]:
    """Peak main memory and, on CUDA, GPU memory of a stage."""
    width = _BYTES.get(spec.model.dtype, 4)
    forward = size.parameters * width + spec.runtime.batch_tokens * size.d_in * width * 24
    working = {
        "activations": forward,
        "evaluation": forward,
        "causal": forward,
        "sae": sae_width(spec.sae, size.d_in) * size.d_in * 4 * 8 + spec.sae.batch * sae_width(spec.sae, size.d_in) * 6,
        "latents": sae_width(spec.sae, size.d_in) * size.d_in * 8 + spec.sae.batch * sae_width(spec.sae, size.d_in) * 6,
        **{name: trained_memory(name, spec, size.parameters, size.d_in * size.n_blocks) for name in TRAINED},
    }.get(stage, 0)
    texts = 2 * min(spec.runtime.shard_pairs, load.n_pairs)
    shard = texts * load.per_text * _share_kept(spec) * size.d_in * width if working and stage not in TRAINED else 0
    if working and spec.runtime.device.startswith("cuda"):
        return int(_BASE_BYTES * 3 + shard), int(working)
    return int(_BASE_BYTES + working + shard), None


def _product(shape: list[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
