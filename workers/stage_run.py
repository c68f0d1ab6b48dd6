"""One unit, computed: what happens inside a child process, apart from how it is started and watched."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from safer_engine.artifacts import ABSENT
from safer_engine.decisions import decision_digests
from safer_engine.drill import drill_key, require_axis
from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import ArtifactError, Interrupted, NumericalError, ResourceError, WorkBusy
from safer_engine.labellers.corrections import check_directions, label_files_digest, load_corrections
from safer_engine.labellers.rubric import load_rubric
from safer_engine.machine import measured, provenance, resolve_device, resolve_spec, settled_retraining
from safer_engine.pipeline import AuditRequest, content_digest, mending, run_part, run_stage, stage_key
from safer_engine.preflight import check_evaluation
from safer_engine.redteam import require_enabled
from safer_engine.refusals import refuse_early
from safer_engine.spec import AuditSpec, RuntimeSpec
from safer_engine.stage import INPUT_ROLES, opened_by
from safer_engine.store import LocalArtifactStore, ManifestDraft, StoredArtifact, WorkArea
from safer_engine.train_spec import TrainSpec
from safer_engine.training import MODEL, train_model
from service.comparison_spec import ComparisonSpec
from service.infra.settings import Settings
from service.infra.stores import OnTransfer, ServiceStore, Stores
from service.jobs.model import JobKind
from service.jobs.stage_plan import COMPARISON, DRILLING, PREPARE, TRAINING
from service.source_policy import check_audit, check_drill, check_training
from workers.comparing import compare, require_reports
from workers.drilling import DRILLED, Drilling, publish_drill
from workers.figures import figures_of, rows_of
from workers.hub_cache import hub_in_use, shrink_hub_cache
from workers.inputs import InputFinder, Names
from workers.observer import PipeObserver
from workers.order import (
    DRILL_OPENED,
    DRILL_PART,
    RETRAINING_PRECISION,
    Order,
    audit_spec,
    drill_artifact_key,
    engine_stage,
    found_artifacts,
)
from workers.plans import expect, learn, plan_audit

TRAINED = "RewardModel"
"""Artifact type of a trained reward model: the files of its folder."""
_FEWEST_TOKENS = 128
_POLL_SECONDS = 0.5
_LARGEST_SETTINGS_FILE = 1 << 20
_PRECISION: dict[str, Literal["bfloat16", "float32"]] = {"cuda": "bfloat16", "cpu": "float32"}
T = TypeVar("T")


def perform(order: Order, settings: Settings, observer: PipeObserver, names: Names) -> dict[str, Any]:
    """Compute a unit and commit what it makes.

    Returns:
        outcome, and where an artifact was committed key, content_digest, bytes, cost, figures and rows; `prepare`: inputs, plan.

    Raises:
        SaferError: see the engine; what was finished is kept in the work area.
    """
    stores = _open_stores(settings, observer.transferred)
    with ExitStack() as stack:
        stack.enter_context(hub_in_use(settings.folder / "cache"))
        finder = InputFinder(settings, stores, order.project, names, stack)
        bench = _Bench(order, settings, observer, finder, stores.project(order.project))
        if order.kind is JobKind.DRILL:
            return bench.prepare_drill() if order.stage == PREPARE else bench.drill()
        if order.kind is JobKind.COMPARE:
            return bench.prepare_comparison() if order.stage == PREPARE else bench.compare()
        if order.kind is JobKind.TRAIN_RM:
            return bench.prepare_training() if order.stage == PREPARE else bench.train()
        return bench.prepare_audit() if order.stage == PREPARE else bench.audit_stage()


def tidy(settings: Settings) -> None:
    """Bring the hub's cache on this machine under its limit."""
    from huggingface_hub.constants import HF_HUB_CACHE

    shrink_hub_cache(settings.folder / "cache", Path(HF_HUB_CACHE), settings.cache_bytes)


def _open_stores(settings: Settings, on_transfer: OnTransfer) -> Stores:
    if not settings.on_s3:
        return Stores(settings, on_transfer=on_transfer)
    from service.jobs.database import open_database

    return Stores(settings, open_database(settings), on_transfer)


@dataclass(frozen=True)
class _Bench:
    """Everything that computing one unit takes."""

    order: Order
    settings: Settings
    observer: PipeObserver
    finder: InputFinder
    store: ServiceStore

    def prepare_audit(self) -> dict[str, Any]:
        spec = AuditSpec.model_validate(self.order.spec)
        check_audit(spec, self.settings)
        spec = self._settled(spec)
        check_directions(load_corrections(spec.labels.corrections), load_rubric(spec.labels.rubric))
        sources = self.finder.audit(spec, {})
        sources = replace(sources, extra={"labels": label_files_digest(spec.labels), **decision_digests(spec)})
        request = AuditRequest(spec, sources)
        refuse_early(request, self.store)
        check_evaluation(request, self.store)
        pins = {"labels": sources.extra["labels"], "model.dtype": spec.model.dtype, "sae.dtype": spec.sae.dtype}
        if spec.retraining is not None:
            pins[RETRAINING_PRECISION] = spec.retraining.recipe.dtype
        for role in INPUT_ROLES:
            found = getattr(sources, role)
            if found is not None:
                pins |= _pinned(role, found.digest, found.revision)
        adapter = sources.model.adapter_path
        if adapter is not None and "snapshots" in adapter.parts:
            pins["adapter.revision"] = adapter.name
        planned = mending(lambda: plan_audit(request, self.store, self.settings), self.observer)
        return {"outcome": "computed", "inputs": pins, "plan": planned.dumped()}

    def prepare_training(self) -> dict[str, Any]:
        spec = TrainSpec.model_validate(self.order.spec)
        check_training(spec, self.settings)
        sources = self.finder.training(spec.model_copy(update={"runtime": self._runtime(spec.runtime)}), {})
        pins: dict[str, str] = {}
        for role in ("base", "dataset", "evaluation"):
            found = getattr(sources, role)
            if found is not None:
                pins |= _pinned(role, found.digest, found.revision)
        return {"outcome": "computed", "inputs": pins}

    def audit_stage(self) -> dict[str, Any]:
        stage = engine_stage(self.order.stage)
        spec = audit_spec(self.order)
        check_audit(spec, self.settings)
        spec = spec.model_copy(update={"runtime": self._runtime(spec.runtime)})
        request = AuditRequest(spec, self.finder.audit(spec, self.order.pins, opened_by(stage)))
        found = found_artifacts(stage, self.order, self.store)
        digests = {kind: content_digest(each) for kind, each in found.items()}
        self._require_key(stage_key(stage, request, self.store, digests))
        if self.order.part:
            sparing(request, lambda it: run_part(stage, self.order.part, it, self.store, found, self.observer), self._note)
            return {"outcome": "computed"}

        expected = expect(stage, spec, self.order.plan, self.settings)
        request = replace(request, planned=expected.planned if expected else {})

        def computed() -> StoredArtifact:
            return sparing(request, lambda it: run_stage(stage, it, self.store, found, self.observer), self._note)

        stored = mending(computed, self.observer)
        if self.observer.outcome == "computed":
            learn(expected, stored.manifest, spec, self.settings)
        return self._committed(stored)

    def train(self) -> dict[str, Any]:
        assert self.order.key is not None
        try:
            return self._trained(self.order.key)
        except NumericalError:
            self.store.remove_work(TRAINING, self.order.key)  # going on from its checkpoint would diverge again
            raise

    def prepare_drill(self) -> dict[str, Any]:
        spec = self._drill_spec()
        _, sources = self.finder.drill(spec, {})
        assert sources.evaluation is not None
        require_axis(spec, sources.dataset, sources.evaluation)
        pins: dict[str, str] = {}
        for role in ("base", "dataset", "evaluation"):
            found = getattr(sources, role)
            pins |= _pinned(role, found.digest, found.revision)
        return {"outcome": "computed", "inputs": pins}

    def drill(self) -> dict[str, Any]:
        assert self.order.key is not None
        key, spec = self.order.key, self._drill_spec()
        if self.order.part == DRILL_OPENED:
            return {"outcome": "computed"}
        located, sources = self.finder.drill(spec.model_copy(update={"runtime": self._runtime(spec.runtime)}), self.order.pins)
        self._require_key(drill_artifact_key(spec, self.order.pins))
        digests = {role: self.order.pins[role] for role in ("base", "dataset", "evaluation")}

        def drilling(work: WorkArea) -> Drilling:
            uses = (self.settings.folder, f"job {self.order.job_id}")
            return Drilling(spec, located, drill_key(spec, digests), digests, sources.dataset, work, *uses)

        if self.order.part:
            with self.store.open_work(DRILLING, key, shared=True) as work:
                drilling(work).seed(int(self.order.part.removeprefix(DRILL_PART)), self.observer, alone=True)
            return {"outcome": "computed"}

        def made(work: WorkArea) -> StoredArtifact:
            with measured() as measurement:
                publish_drill(drilling(work).all(self.observer), work, self.finder.names)
            facts = {"seeds": spec.seeds, "rules": list(spec.rules), "budgets": list(spec.budgets)}
            draft = ManifestDraft(1, DRILLED, facts, digests, provenance(self.settings.device), measurement.cost)
            stored: StoredArtifact = self.store.commit(DRILLING, key, work, draft)
            return stored

        return self._once(DRILLING, key, made)

    def _drill_spec(self) -> DrillSpec:
        """The spec of a drill. Raises SpecError where this worker's operator does not allow it."""
        require_enabled()
        spec = DrillSpec.model_validate(self.order.spec)
        check_drill(spec, self.settings)
        return spec

    def prepare_comparison(self) -> dict[str, Any]:
        spec = ComparisonSpec.model_validate(self.order.spec)
        require_reports(spec, self.store)
        return {"outcome": "computed", "inputs": {"a": spec.a.content, "b": spec.b.content}}

    def compare(self) -> dict[str, Any]:
        assert self.order.key is not None
        spec = ComparisonSpec.model_validate(self.order.spec)
        return self._once(COMPARISON, self.order.key, lambda work: compare(spec, self.store, work))

    def _trained(self, key: str) -> dict[str, Any]:
        return self._once(TRAINING, key, lambda work: self._train(key, work))

    def _once(self, stage: str, key: str, make: Callable[[WorkArea], StoredArtifact]) -> dict[str, Any]:
        """What is in the store, or is made now, by one process of those that want it."""
        while not self.store.has(stage, key):
            try:
                with self.store.open_work(stage, key) as work:
                    return self._committed(make(work))
            except WorkBusy as busy:
                if self.observer.cancelled():
                    raise Interrupted("stopped while waiting for another process") from busy
                time.sleep(_POLL_SECONDS)
        self.observer.outcome = "cached"
        return self._committed(self.store.read(stage, key))

    def _train(self, key: str, work: WorkArea) -> StoredArtifact:
        spec = TrainSpec.model_validate(self.order.spec)
        check_training(spec, self.settings)
        spec = spec.model_copy(update={"runtime": self._runtime(spec.runtime)})
        sources = self.finder.training(spec, self.order.pins)
        with measured() as measurement:
            record = train_model(spec, sources, LocalArtifactStore(work.scratch / "pairs"), work, self.observer)
            self._require_key(record["key"])
            publish_model(work, self.finder.names)
        draft = ManifestDraft(
            stage_version=int(record["record_version"]),
            artifact=TRAINED,
            meta={name: record[name] for name in ("model", "pairs", "evaluation")},
            provenance=provenance(spec.runtime.device),
            cost=measurement.cost,
        )
        stored: StoredArtifact = self.store.commit(TRAINING, key, work, draft)
        return stored

    def _settled(self, spec: AuditSpec) -> AuditSpec:
        """Precisions decided, for the kind of device that will compute."""
        kind = self.settings.precision_device
        runtime = self._runtime(spec.runtime)
        if kind == "cuda":
            model = spec.model.model_copy(update={"dtype": _PRECISION[kind]} if spec.model.dtype == "auto" else {})
            sae = spec.sae.model_copy(update={"dtype": _PRECISION[kind]} if spec.sae.dtype == "auto" else {})
            retraining = settled_retraining(spec.retraining, kind)
            return spec.model_copy(update={"model": model, "sae": sae, "retraining": retraining, "runtime": runtime})
        device = "cpu" if kind == "cpu" else runtime.device
        return resolve_spec(spec.model_copy(update={"runtime": runtime.model_copy(update={"device": device})}))

    def _runtime(self, asked: RuntimeSpec) -> RuntimeSpec:
        """How this machine works: its device, and no more threads than it has cores, nor processes than GPUs (or cores)."""
        import torch

        threads = min(asked.threads or torch.get_num_threads(), os.cpu_count() or 1)
        torch.set_num_threads(threads)
        device = resolve_device(self.settings.device)
        most = torch.cuda.device_count() if device.startswith("cuda") else os.cpu_count() or 1
        update = {"device": device, "threads": threads if asked.threads else None, "processes": min(asked.processes, most)}
        return asked.model_copy(update=update)

    def _note(self, message: str) -> None:
        self.observer.note(self.order.stage, message)

    def _require_key(self, key: str) -> None:
        if key != self.order.key:
            raise ArtifactError("the cache key differs between a worker and its child", "restart the worker")

    def _committed(self, stored: StoredArtifact) -> dict[str, Any]:
        manifest = stored.manifest
        outcome = "absent" if manifest.artifact == ABSENT else "cached" if self.observer.outcome == "cached" else "computed"
        return {
            "outcome": outcome,
            "key": manifest.key,
            "content_digest": manifest.content_digest,
            "bytes": sum(entry.size for entry in manifest.files.values()),
            "cost": manifest.cost.model_dump(mode="json"),
            "figures": figures_of(self.order.stage, manifest.meta),
            "rows": rows_of(stored),
        }


def sparing(request: AuditRequest, work: Callable[[AuditRequest], T], note: Callable[[str], None]) -> T:
    """Do some work; when the GPU's memory does not suffice, again from where it stopped, with half the tokens at once.

    Raises:
        ResourceError: even the smallest batches do not fit. And whatever else the work raises.
    """
    while True:
        runtime = request.spec.runtime
        try:
            return work(request)
        except (ResourceError, RuntimeError) as error:
            if not _out_of_gpu_memory(error, runtime.device):
                raise
            if runtime.batch_tokens // 2 < _FEWEST_TOKENS:
                hint = "use a larger GPU, several of them (runtime.device_map), or bfloat16"
                raise ResourceError("the GPU's memory does not suffice, however small the batches", hint) from error
        less = runtime.model_copy(update={"batch_tokens": runtime.batch_tokens // 2})
        note(f"out of GPU memory: going on with {less.batch_tokens} tokens at once")
        _free_gpu_memory()
        request = replace(request, spec=request.spec.model_copy(update={"runtime": less}))


def publish_model(work: WorkArea, names: Names) -> None:
    """Publish the files of a trained model's folder; paths of this machine in its settings become names."""
    for path in sorted((work.scratch / MODEL).iterdir()):
        if not path.is_file():
            raise ArtifactError(f"the trained model has a folder {path.name!r}", "report this base model to the operator")
        with work.publish(path.name) as target:
            if path.suffix == ".json" and path.stat().st_size <= _LARGEST_SETTINGS_FILE:
                target.write_text(names(path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(path, target)


def _pinned(role: str, digest: str, revision: str | None) -> dict[str, str]:
    return {role: digest} | ({f"{role}.revision": revision} if revision else {})


def _out_of_gpu_memory(error: Exception, device: str) -> bool:
    if not device.startswith("cuda"):
        return False
    torch = sys.modules.get("torch")
    return isinstance(error, ResourceError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _free_gpu_memory() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
