"""What an audit would take: tokens, seconds, disk and memory by stage, before anything is computed.

Times come from rates: the last rate measured on this machine for the stage and device where there is one, else a rate
derived from a short matrix product. Sizes follow from the layout of the artifacts (see `artifacts`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from safer_engine.errors import ModelRefused
from safer_engine.pipeline import AuditRequest, plan
from safer_engine.science.sae_budget import training_size
from safer_engine.spec import AuditSpec
from safer_engine.store import ArtifactStore

_BASE_BYTES = 700e6  # the interpreter with torch and transformers loaded
_BYTES = {"float32": 4, "bfloat16": 2}
_EFFICIENCY = {"activations": 0.5, "evaluation": 0.5, "sae": 0.35, "latents": 0.35}
_FIXED_SECONDS = {"activations": 4.0, "evaluation": 4.0, "sae": 2.0, "latents": 2.0, "report": 2.0}
_ROWS_PER_SECOND = {"pairs": 1500.0, "pair_scores": 1500.0, "edits": 5000.0, "report": 5000.0}
_LABEL_SECONDS = {"lexicon": 0.02, "chat_api": 2.0}
_SAMPLE_ROWS = 200


@dataclass(frozen=True)
class Workload:
    """The size of an audit.

    Attributes:
        tokens: over both sides of all pairs, evaluation included; tokens_eval: of evaluation pairs alone.
        positions: those that are kept.
        exact: whether they were counted, or extrapolated from a sample of rows.
    """

    n_pairs: int
    n_eval: int
    tokens: int
    tokens_eval: int
    positions: int
    exact: bool


@dataclass(frozen=True)
class ModelSize:
    """What the model's files say of its size."""

    d_in: int
    n_blocks: int
    body_parameters: int
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What one stage would take.

    Attributes:
        work: size of the stage's work in its own unit (floating-point operations, rows or calls).
        seconds: None where nothing is computed.
        measured: whether the rate was measured on this machine before.
    """

    stage: str
    state: str
    resource: str
    work: float
    seconds: float | None
    disk_bytes: int
    memory_bytes: int
    gpu_bytes: int | None
    measured: bool


def estimate(request: AuditRequest, store: ArtifactStore) -> dict[str, Estimate]:
    """An estimate for every stage, by name.

    Raises:
        ModelRefused: the model's files do not say how large it is.
    """
    size, load = model_size(request.sources.model.path), workload(request, store)
    rates = _read_rates(store)
    flops: float | None = None
    estimates = {}
    for planned in plan(request, store):
        work, seconds = _work(planned.name, request.spec, load, size), 0.0
        rate = rates.get(f"{planned.name}/{request.spec.runtime.device}/{request.spec.model.dtype}")
        if planned.state == "compute" and rate is None and planned.name in _EFFICIENCY:
            flops = flops or machine_flops(request.spec.runtime.device, request.spec.model.dtype)
        if planned.state == "compute":
            fixed = _FIXED_SECONDS.get(planned.name, 0.0) if work else 0.0
            seconds = work / (rate or _assumed_rate(planned.name, request.spec, flops)) + fixed
        memory, gpu = _memory(planned.name, request.spec, size)
        estimates[planned.name] = Estimate(
            stage=planned.name,
            state=planned.state,
            resource=planned.resource,
            work=work,
            seconds=seconds if planned.state == "compute" else None,
            disk_bytes=_disk(planned.name, request.spec, load, size) if planned.state == "compute" else 0,
            memory_bytes=memory,
            gpu_bytes=gpu,
            measured=rate is not None,
        )
    return estimates


def record_rates(store: ArtifactStore, estimates: dict[str, Estimate], took: dict[str, float], spec: AuditSpec) -> None:
    """Remember the rates of the stages that were just computed, for the next estimate on this machine."""
    rates = _read_rates(store)
    for stage, seconds in took.items():
        working = seconds - _FIXED_SECONDS.get(stage, 0.0)
        if stage in estimates and working > 0.5 and estimates[stage].work > 0:
            rates[f"{stage}/{spec.runtime.device}/{spec.model.dtype}"] = estimates[stage].work / working
    path = _rates_path(store)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(rates, sort_keys=True, indent=1))
        os.replace(temporary, path)


def machine_flops(device: str, dtype: str) -> float:
    """Floating-point operations a second of a square matrix product, from a quarter of a second of them."""
    import torch

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    width = 4096 if device.startswith("cuda") else 512
    left = torch.ones(width, width, device=device, dtype=kind)
    product = left @ left
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.25:
        product = left @ left
        rounds += 1
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    assert bool(torch.isfinite(product).all())
    return float(2 * width**3 * rounds / elapsed)


def model_size(folder: Path) -> ModelSize:
    """Size of a model from its config and the headers of its safetensors files."""
    from safetensors import safe_open

    try:
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config", config)
        d_in = int(text.get("hidden_size") or text.get("d_model") or text["n_embd"])
        n_blocks = int(text.get("num_hidden_layers") or text.get("n_layer") or text["num_layers"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"config.json of {folder} does not say the model's width and depth ({error})") from None
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


def workload(request: AuditRequest, store: ArtifactStore) -> Workload:
    """Pairs and tokens: counted where their stage was run, else extrapolated from the first rows."""
    from safer_engine.workload import dataset_size

    planned = {stage.name: stage for stage in plan(request, store)}
    pairs = dataset_size(request, "dataset", store, planned["pairs"], _SAMPLE_ROWS)
    apart = dataset_size(request, "evaluation", store, planned["evaluation"], _SAMPLE_ROWS)
    return Workload(
        n_pairs=pairs.n_pairs,
        n_eval=apart.n_pairs,
        tokens=pairs.tokens + apart.tokens,
        tokens_eval=apart.tokens,
        positions=int(pairs.tokens * _share_kept(request.spec)),
        exact=pairs.exact and apart.exact,
    )


def sae_width(spec: AuditSpec, d_in: int) -> int:
    """d_sae of a spec."""
    return spec.sae.d_sae or spec.sae.expansion * d_in


def _share_kept(spec: AuditSpec) -> float:
    share = 0.6 if spec.hook.region == "response" else 1.0
    return share * (0.06 if spec.hook.positions == "sentence_ends" else 1.0)


def _work(stage: str, spec: AuditSpec, load: Workload, size: ModelSize) -> float:
    dense = 2.0 * size.d_in * sae_width(spec, size.d_in)
    if stage in ("activations", "evaluation"):
        return 2.0 * size.body_parameters * (load.tokens_eval if stage == "evaluation" else load.tokens - load.tokens_eval)
    if stage == "sae":
        size_of = training_size(spec.sae, max(1, int(load.positions * (1 - spec.split.held_out))))
        return 3 * dense * size_of.batch * size_of.steps
    if stage == "latents":
        return 1.5 * dense * load.positions
    if stage == "labels":
        return float(min(spec.salience.candidates, sae_width(spec, size.d_in)))
    return float(load.n_pairs) if stage in _ROWS_PER_SECOND else 0.0


def _assumed_rate(stage: str, spec: AuditSpec, flops: float | None) -> float:
    if stage in _EFFICIENCY:
        assert flops is not None
        return flops * _EFFICIENCY[stage]
    if stage == "labels":
        return 1 / _LABEL_SECONDS[spec.labels.labeller.kind]
    return _ROWS_PER_SECOND.get(stage, 1.0)


def _disk(stage: str, spec: AuditSpec, load: Workload, size: ModelSize) -> int:
    width = _BYTES.get(spec.model.dtype, 4)
    per_text = load.tokens / max(2 * (load.n_pairs + load.n_eval), 1)
    bytes_of = {
        "pairs": (load.tokens - load.tokens_eval) * 24,
        "evaluation": load.tokens_eval * 24 + load.n_eval * 64,
        "activations": load.positions * (size.d_in * width + 10)
        + 2 * min(spec.causal.pairs, load.n_pairs) * per_text * size.d_in * width
        + load.n_pairs * size.d_in * 8,
        "sae": 2 * size.d_in * sae_width(spec, size.d_in) * 4,
        "latents": 2 * load.n_pairs * min(per_text * spec.sae.k, sae_width(spec, size.d_in)) * 8,
        "pair_scores": load.n_pairs * 400,
        "edits": load.n_pairs * 700,
        "report": 3e6 + load.n_pairs * 300,
    }
    return int(bytes_of.get(stage, 1e5))


def _memory(stage: str, spec: AuditSpec, size: ModelSize) -> tuple[int, int | None]:
    """Peak main memory and, on CUDA, GPU memory of a stage."""
    width = _BYTES.get(spec.model.dtype, 4)
    forward = size.parameters * width + spec.runtime.batch_tokens * size.d_in * width * 24
    working = {
        "activations": forward,
        "evaluation": forward,
        "sae": sae_width(spec, size.d_in) * size.d_in * 4 * 8 + spec.sae.batch * sae_width(spec, size.d_in) * 6,
        "latents": sae_width(spec, size.d_in) * size.d_in * 8 + spec.sae.batch * sae_width(spec, size.d_in) * 6,
    }.get(stage, 0)
    shard = spec.runtime.shard_pairs * 2 * spec.model.max_length / 4 * size.d_in * width if working else 0
    if working and spec.runtime.device.startswith("cuda"):
        return int(_BASE_BYTES * 3 + shard), int(working)
    return int(_BASE_BYTES + working + shard), None


def _rates_path(store: ArtifactStore) -> Path | None:
    root = getattr(store, "root", None)
    return root / "rates.json" if isinstance(root, Path) else None


def _read_rates(store: ArtifactStore) -> dict[str, float]:
    path = _rates_path(store)
    try:
        read = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}  # an estimate without memory is still an estimate
    return {str(key): float(value) for key, value in read.items() if isinstance(value, (int, float)) and value > 0}


def _product(shape: list[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
