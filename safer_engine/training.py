"""Training a reward model, from files to a model folder.

The pairs are read, dropped and rendered by the pipeline's own code, so that an audit of the trained model
reads exactly what it was trained on. All state lies in a work folder beside the output until the model is complete; the
same call goes on from the last checkpoint, and returns at once when the output is there already.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import PairSet
from safer_engine.errors import NumericalError, SpecError
from safer_engine.evaluation_pairs import EvaluationInput, read_evaluation, scored_pairs
from safer_engine.events import NullObserver, Observer
from safer_engine.machine import provenance, resolve_device
from safer_engine.model_training import Training, train
from safer_engine.publishing import require_writable, write_failed
from safer_engine.sources.base_models import BaseModel, BaseTokenizer, load_base_tokenizer, save_model
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.memory import plain_rows
from safer_engine.sources.models import resolve_base
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.sources.tokenizers import load_renderer
from safer_engine.spec import AuditSpec, ModelSpec
from safer_engine.store import ArtifactStore, LocalArtifactStore, WorkArea, canonical_json, digest_bytes
from safer_engine.train_loop import Checkpoints
from safer_engine.train_spec import TrainSpec

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.pipeline import AuditRequest
    from safer_engine.science.rm_training import OptimSettings, RewardTrainer, TokenPairs

STAGE = "train"
RECORD = "training.json"
RECORD_VERSION = 1
MODEL = "model"
_VERSION = 1
_BOOTSTRAP = 2000
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """A trained reward model.

    Attributes:
        path: model folder: weights, config, tokenizer and training.json.
        record: what training.json says.
        cached: the folder held this very training already.
    """

    path: Path
    record: dict[str, Any]
    cached: bool


@dataclass(frozen=True)
class TrainSources:
    """What a training reads, found and fingerprinted."""

    base: ResolvedModel
    dataset: ResolvedDataset
    evaluation: ResolvedDataset | None


@dataclass(frozen=True)
class _Evaluation:
    """Usable evaluation pairs, columns as in `PairSet`, and what became of all (see `pair_tables.health`)."""

    table: pa.Table
    health: dict[str, Any]


def train_reward_model(
    spec: TrainSpec,
    out: Path | str,
    observer: Observer | None = None,
    *,
    rows: Rows | None = None,
    evaluation_rows: Rows | None = None,
) -> TrainResult:
    """Train a reward model and save it as a folder that `safer-audit run --model` takes.

    Args:
        out: folder to make; a folder that holds another training, or anything else, is refused.
        observer: is told of progress in steps; when it asks to stop, a checkpoint is kept.
        rows, evaluation_rows: preference rows in memory, for `memory` sources.

    Raises:
        ModelRefused, DatasetRefused, SpecError: what cannot be trained on, or written to.
        NumericalError: training diverged; its checkpoint is removed, for going on from it would diverge again.
        Interrupted: the observer asked to stop; the same call goes on.
    """
    target = Path(out).expanduser().absolute()
    watcher = observer or NullObserver()
    sources = _resolve(spec, rows, evaluation_rows)
    key = training_key(spec, sources.base, sources.dataset, sources.evaluation)
    if (found := _finished(target, key)) is not None:
        watcher.stage_finished(STAGE, "cached", 0.0)
        return TrainResult(target, found, cached=True)
    folder = target.with_name(f".{target.name}.training")
    store = LocalArtifactStore(folder)
    started = time.monotonic()
    with _removed_when_diverged(folder), store.open_work(STAGE, key) as work:
        watcher.stage_started(STAGE, key)
        try:
            record = train_model(spec, sources, store, work, watcher)
        except NumericalError:
            shutil.rmtree(work.root, ignore_errors=True)
            raise
        try:
            os.replace(work.scratch / MODEL, target)
        except OSError as error:
            raise write_failed(target, error) from error
    shutil.rmtree(folder, ignore_errors=True)
    watcher.stage_finished(STAGE, "computed", time.monotonic() - started)
    return TrainResult(target, record, cached=False)


@contextmanager
def _removed_when_diverged(folder: Path) -> Iterator[None]:
    """Remove the work folder when training diverges, unless a training with other settings waits in it to go on."""
    try:
        yield
    except NumericalError:
        if not any((folder / "work").glob(f"*/{STAGE}-*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def train_model(
    spec: TrainSpec, sources: TrainSources, store: ArtifactStore, work: WorkArea, observer: Observer
) -> dict[str, Any]:
    """Train a model in a work area, from the last checkpoint there; the model's folder is then `work.scratch / MODEL`.

    Args:
        store: keeps the pairs as they were read.

    Returns:
        What training.json in that folder says.

    Raises:
        SaferError: as `train_reward_model`.
    """
    started = time.monotonic()
    record = _train(spec, sources, store, work, observer)
    key = training_key(spec, sources.base, sources.dataset, sources.evaluation)
    record = {"record_version": RECORD_VERSION, "key": key, **record}
    record["timing"] = {"seconds": round(time.monotonic() - started, 1), **record["timing"]}
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        (work.scratch / MODEL / RECORD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_failed(work.scratch / MODEL, error) from error
    return record


def training_key(
    spec: TrainSpec, base: ResolvedModel, dataset: ResolvedDataset, evaluation: ResolvedDataset | None = None
) -> str:
    """sha256 over everything that makes a training what it is; where inputs lie and `runtime` stay out."""
    dumped = spec.model_dump(
        mode="json", exclude={"base": True, "runtime": True, "dataset": {"source"}, "evaluation": {"source"}}
    )
    for section in (dumped["dataset"], dumped["evaluation"] or {}):
        if section.get("allow_poisoned") is False:
            del section["allow_poisoned"]  # keys of data that are not poisoned are what they were
    contents = [base.digest, dataset.digest, evaluation.digest if evaluation else None]
    return digest_bytes(canonical_json({"version": _VERSION, "spec": dumped, "contents": contents}))


def _resolve(spec: TrainSpec, rows: Rows | None, evaluation_rows: Rows | None) -> TrainSources:
    def plain(given: Rows | None, keyword: str) -> list[dict[str, Any]] | None:
        return None if given is None else plain_rows(given, keyword)

    return TrainSources(
        base=resolve_base(spec.base, spec.runtime, None),
        dataset=resolve_dataset(spec.dataset, plain(rows, "rows")),
        evaluation=resolve_dataset(spec.evaluation, plain(evaluation_rows, "evaluation_rows")) if spec.evaluation else None,
    )


def _finished(target: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished training of this key; None where the folder is free. Raises SpecError where it is taken."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        require_writable(target.parent, "the folder for the model")
        return None
    path = target / RECORD
    if path.is_file():
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and record.get("key") == key:
            return record
        raise SpecError(f"{target} holds the model of another training", "choose another --out, or remove that folder")
    raise SpecError(f"{target} exists and is not a trained model", "choose another --out")


def _train(spec: TrainSpec, sources: TrainSources, store: ArtifactStore, work: WorkArea, observer: Observer) -> dict[str, Any]:
    """Read the pairs, train, evaluate and save the model into the work area; returns the record."""
    import torch

    from safer_engine.pipeline import run_stage
    from safer_engine.stages.pairs import PairsStage

    if spec.runtime.threads is not None:
        torch.set_num_threads(spec.runtime.threads)
    ready = load_base_tokenizer(sources.base, spec.runtime)
    audit = _as_audit(spec, sources, ready, work)
    read = PairSet(run_stage(PairsStage(), audit, store, {}, observer))
    apart = _read_evaluation(audit, read, work, observer)
    began = time.monotonic()

    def told(done: int, total: int) -> bool:
        observer.progress(STAGE, done, total, "steps")
        return observer.cancelled()

    training = Training(spec, sources.base, ready, token_pairs(read.pairs))
    found = train(training, Checkpoints(work, spec.runtime.checkpoint_seconds), told)
    base, trainer, curve, settings = found.base, found.trainer, found.curve, found.trainer.settings
    seconds = time.monotonic() - began
    model = found.model.merge_and_unload() if spec.lora and spec.lora.merge else found.model
    save_model(model, base, ready, work.scratch / MODEL)
    return {
        "spec": spec.model_dump(mode="json", exclude={"runtime"}),
        "base": {"origin": sources.base.origin, "revision": sources.base.revision, "digest": sources.base.digest},
        "dataset": {"origin": sources.dataset.origin, "revision": sources.dataset.revision, "digest": sources.dataset.digest},
        "pairs": {key: read.meta[key] for key in ("n_pairs", "n_groups", "axes", "subsets", "template", "max_length")},
        "health": {**read.health, "evaluation": apart.health if apart else None},
        "model": _facts(model, base, ready, trainer),
        "settings": asdict(settings),
        "curve": [asdict(stats) for stats in curve],
        "evaluation": _evaluate(spec, apart, model, settings, ready),
        "provenance": provenance(resolve_device(spec.runtime.device)),
        "timing": {"training_seconds": round(seconds, 1), "tokens": sum(stats.tokens for stats in curve)},
    }


def _as_audit(spec: TrainSpec, sources: TrainSources, ready: BaseTokenizer, work: WorkArea) -> AuditRequest:
    """What an audit of the trained model will read: the datasets, rendered with the tokenizer that is saved with it."""
    from safer_engine.pipeline import AuditRequest

    start = work.scratch / "start"
    ready.tokenizer.save_pretrained(start)
    ready.config.save_pretrained(start)
    model = ModelSpec(path=spec.base, max_length=spec.recipe.max_length, truncation_side=spec.recipe.truncation_side)
    audit = AuditSpec(seed=spec.seed, model=model, dataset=spec.dataset, evaluation=spec.evaluation, runtime=spec.runtime)
    return AuditRequest(audit, ResolvedInputs(replace(sources.base, path=start), sources.dataset, sources.evaluation))


def _read_evaluation(audit: AuditRequest, read: PairSet, work: WorkArea, observer: Observer) -> _Evaluation | None:
    """The evaluation pairs as an audit will read them; says so when they are few. None where no set was given."""
    import pyarrow as pa

    source, spec = audit.sources.evaluation, audit.spec.evaluation
    if source is None or spec is None:
        return None
    renderer = load_renderer(audit.sources.model.path, audit.spec.model, audit.spec.runtime.trust_remote_code)
    with work.publish("eval.arrow", scratch=True) as path:
        counts, short = read_evaluation(path, EvaluationInput(source, spec, audit.spec.seed, read), renderer, lambda _, __: None)
    if short:
        observer.note(STAGE, f"warning: {short}")
    with pa.memory_map(str(work.scratch / "eval.arrow")) as file:
        return _Evaluation(pa.ipc.open_file(file).read_all(), counts)


def token_pairs(table: pa.Table) -> TokenPairs:
    """The tokens of a pair table (see `PairSet`)."""
    from safer_engine.science.rm_training import TokenPairs

    sides = {side: tuple(ids.values.to_numpy() for ids in table[f"{side}_ids"]) for side in ("chosen", "rejected")}
    return TokenPairs(tuple(table["pair_id"].to_pylist()), sides["chosen"], sides["rejected"])


def _facts(model: Any, base: BaseModel, ready: BaseTokenizer, trainer: RewardTrainer) -> dict[str, Any]:
    return {
        "architecture": type(base.model).__name__,
        "n_parameters": base.n_parameters,
        "n_trained": sum(weight.numel() for weight in trainer.trained()),
        "fresh_head": list(base.fresh),
        "pad_token": ready.tokenizer.pad_token,
        "pad_origin": ready.pad_origin,
        "stored_dtype": str(base.stored_dtype).removeprefix("torch."),
    }


def _evaluate(
    spec: TrainSpec, apart: _Evaluation | None, model: Any, settings: OptimSettings, ready: BaseTokenizer
) -> dict[str, Any] | None:
    """Scores on the evaluation pairs, if there are any."""
    import numpy as np

    from safer_engine.science.evaluation import evaluate
    from safer_engine.science.rm_training import pair_rewards

    if apart is None or apart.table.num_rows == 0:
        return None
    table = apart.table
    pad_id = ready.tokenizer.pad_token_id
    rewards = pair_rewards(model, token_pairs(table), pad_id, settings.batch_tokens, settings.bfloat16)
    scored = scored_pairs(table, np.asarray(rewards.chosen), np.asarray(rewards.rejected), lengths=True)
    return evaluate(scored, _BOOTSTRAP, spec.seed).as_json()
