"""From the names in a spec to files on this machine, and back: no path of a worker leaves it.

The spec keeps its names (`upload:<digest>`, a hub id, an address); the files are found for the engine beside it, checked
against what `prepare` recorded, and every text that leaves the worker has paths replaced by names again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import DatasetRefused, InputRefused, ModelRefused
from safer_engine.sources.corpora import resolve_corpus
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.labeller_models import resolve_labeller
from safer_engine.sources.models import resolve_base, resolve_model
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec, DatasetSource, DatasetSpec, HubSource, LocalSource, ModelSpec, RuntimeSpec
from safer_engine.spec_labels import Labeller, LocalLmLabeller
from safer_engine.stage import INPUT_ROLES
from safer_engine.train_spec import TrainSpec
from safer_engine.training import TrainSources
from service.errors import SourceNotAllowed
from service.infra.input_cache import InputCache
from service.infra.local_service_store import store_folder
from service.infra.settings import Settings
from service.infra.stores import Stores
from service.infra.upload_files import UploadFiles
from service.source_policy import S3
from service.upload_names import UPLOAD, named_upload
from workers.order import pinned_inputs, source_name

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHANGED = "what it names has changed since the job began; submit the job again"


class Names:
    """What is called how: paths of this machine → what specs call them."""

    def __init__(self, folder: Path) -> None:
        self._names = {str(folder): "…"}

    def add(self, path: Path, name: str) -> None:
        """Remember what a path stands for."""
        self._names[str(path)] = name
        self._names[str(path.resolve())] = name

    def __call__(self, text: str) -> str:
        """The text with names in place of paths."""
        for path in sorted(self._names, key=len, reverse=True):
            text = text.replace(path, self._names[path])
        return text


def names_of(settings: Settings) -> Names:
    """Names for the folders of a worker: its own, and that of the artifacts where they are in a folder."""
    names = Names(settings.folder)
    if not settings.on_s3:
        names.add(store_folder(settings), "…")
    return names


class InputFinder:
    """Finds the inputs of one job; what it finds stays on this machine until the stack closes."""

    def __init__(self, settings: Settings, stores: Stores, project: str, names: Names, stack: ExitStack) -> None:
        self.names = names
        self._settings = settings
        self._stack = stack
        self._uploads = UploadFiles(stores, project)
        self._cache = InputCache(settings.folder / "cache" / "inputs", settings.cache_bytes)
        self._from_cache, self._took_from_cache = True, False
        self._digests = settings.folder / "cache" / "fingerprints"

    def audit(self, spec: AuditSpec, pins: Mapping[str, str], roles: Sequence[str] = INPUT_ROLES) -> ResolvedInputs:
        """The inputs of an audit, opened where their role is asked for.

        Args:
            pins: what `prepare` recorded; empty while it runs.

        Raises:
            InputRefused: it cannot be found or read, or is not what `prepare` found.
            NotFound: an upload is gone.
        """
        pretrain = spec.sae.pretrain
        model = self._model(spec.model, spec.runtime, pins) if "model" in roles else None
        sets: dict[str, ResolvedDataset] = {}
        for role, section in (("dataset", spec.dataset), ("evaluation", spec.evaluation)):
            if role in roles and section is not None:
                sets[role] = self._dataset(role, section, pins)
        if "corpus" in roles and pretrain is not None:
            sets["corpus"] = self._corpus(pretrain.corpus, pins)
        labeller = self._labeller(spec.labels.labeller, pins) if "labeller" in roles else None
        base = self._retraining_base(spec, pins) if "base" in roles else None
        models = {"model": model, "labeller": labeller, "base": base}
        digests = {role: found.digest for role, found in (sets | models).items() if found is not None}
        recorded = pinned_inputs(spec, {"labels": "", **digests, **pins})
        return ResolvedInputs(
            model=model or recorded.model,
            dataset=sets.get("dataset", recorded.dataset),
            evaluation=sets.get("evaluation", recorded.evaluation),
            corpus=sets.get("corpus", recorded.corpus),
            extra=recorded.extra,
            labeller=labeller or recorded.labeller,
            base=base or recorded.base,
        )

    def training(self, spec: TrainSpec, pins: Mapping[str, str]) -> TrainSources:
        """The inputs of a training. Raises as `audit`."""
        base = self._base(spec.base, spec.runtime, pins)
        evaluation = self._dataset("evaluation", spec.evaluation, pins) if spec.evaluation else None
        return TrainSources(base, self._dataset("dataset", spec.dataset, pins), evaluation)

    def drill(self, spec: DrillSpec, pins: Mapping[str, str]) -> tuple[DrillSpec, TrainSources]:
        """The inputs of a drill, and its spec as this machine opens them. Raises as `audit`."""
        sources = self.training(TrainSpec(base=spec.base, dataset=spec.dataset, evaluation=spec.evaluation), pins)
        sets = {
            role: section.model_copy(update={"source": self._source(section.source, role, pins)})
            for role, section in (("dataset", spec.dataset), ("evaluation", spec.evaluation))
        }
        return spec.model_copy(update={"base": self._locate(spec.base, "base", pins), **sets}), sources

    def _ask_the_hub(self, refusal: InputRefused) -> None:
        """Do without the hub's cache from now on, where a part of a model in it may be why it was refused. Raises the refusal."""
        if not self._took_from_cache:
            raise refusal
        self._from_cache = self._took_from_cache = False

    def _base(self, named: str, runtime: RuntimeSpec, pins: Mapping[str, str]) -> ResolvedModel:
        try:
            return self._resolved_base(named, runtime, pins)
        except InputRefused as refusal:
            self._ask_the_hub(refusal)
            return self._resolved_base(named, runtime, pins)

    def _resolved_base(self, named: str, runtime: RuntimeSpec, pins: Mapping[str, str]) -> ResolvedModel:
        found = resolve_base(self._locate(named, "base", pins), runtime, self._digests)
        return self._checked_model(found, "base", named, pins)

    def _retraining_base(self, spec: AuditSpec, pins: Mapping[str, str]) -> ResolvedModel | None:
        return None if spec.retraining is None else self._base(spec.retraining.base, spec.runtime, pins)

    def _model(self, spec: ModelSpec, runtime: RuntimeSpec, pins: Mapping[str, str]) -> ResolvedModel:
        try:
            return self._resolved_model(spec, runtime, pins)
        except InputRefused as refusal:
            self._ask_the_hub(refusal)
            return self._resolved_model(spec, runtime, pins)

    def _resolved_model(self, spec: ModelSpec, runtime: RuntimeSpec, pins: Mapping[str, str]) -> ResolvedModel:
        paths = {"path": self._locate(spec.path, "model", pins)}
        if spec.adapter is not None:
            paths["adapter"] = self._locate(spec.adapter, "adapter", pins)
        found = resolve_model(spec.model_copy(update=paths), runtime, self._digests)
        return self._checked_model(found, "model", spec.path, pins)

    def _labeller(self, spec: Labeller, pins: Mapping[str, str]) -> ResolvedModel | None:
        if not isinstance(spec, LocalLmLabeller):
            return None
        located = spec.model_copy(update={"path": self._locate(spec.path, "labeller", pins)})
        found = resolve_labeller(located, self._digests)
        return None if found is None else self._checked_model(found, "labeller", spec.path, pins)

    def _checked_model(self, found: ResolvedModel, role: str, origin: str, pins: Mapping[str, str]) -> ResolvedModel:
        self.names.add(found.path, origin)
        if pins.get(role, found.digest) != found.digest:
            raise ModelRefused(f"{origin} is not the model that this job began with", _CHANGED)
        return replace(found, origin=origin, revision=pins.get(f"{role}.revision", found.revision))

    def _dataset(self, role: str, spec: DatasetSpec, pins: Mapping[str, str]) -> ResolvedDataset:
        located = self._source(spec.source, role, pins)
        return self._checked_dataset(resolve_dataset(spec.model_copy(update={"source": located})), role, spec.source, pins)

    def _corpus(self, source: DatasetSource, pins: Mapping[str, str]) -> ResolvedDataset:
        return self._checked_dataset(resolve_corpus(self._source(source, "corpus", pins)), "corpus", source, pins)

    def _checked_dataset(
        self, found: ResolvedDataset, role: str, source: DatasetSource, pins: Mapping[str, str]
    ) -> ResolvedDataset:
        origin = source_name(source)
        if pins.get(role, found.digest) != found.digest:
            raise DatasetRefused(f"{origin} is not the dataset that this job began with", _CHANGED)
        return replace(found, origin=origin)

    def _source(self, source: DatasetSource, role: str, pins: Mapping[str, str]) -> DatasetSource:
        if isinstance(source, HubSource):
            return source.model_copy(update={"revision": pins.get(f"{role}.revision", source.revision)})
        assert isinstance(source, LocalSource), source
        path = Path(self._locate(source.path, role, pins))
        return source.model_copy(update={"path": str(_only_file(path))})

    def _locate(self, name: str, role: str, pins: Mapping[str, str]) -> str:
        """What the engine is to open for a name: a path, or a hub id at the commit that was pinned."""
        if name.startswith(UPLOAD):
            digest = named_upload(name)
            if digest is None:
                raise InputRefused(f"{name[:80]!r} is no upload", "write upload:<digest>, as the upload was answered")
            path = self._stack.enter_context(self._uploads.on_disk(digest, self._cache))
        elif name.startswith(S3):
            path = fetched(name, self._settings, self._cache, self._stack)
        elif name.startswith("/"):
            path = self._below_a_prefix(name)
        else:
            return self._from_hub(name, pins.get(f"{role}.revision"))
        self.names.add(path, name)
        return str(path)

    def _below_a_prefix(self, name: str) -> Path:
        """A path of this machine, if it leads into an allowed folder, links followed. Raises SourceNotAllowed."""
        path = Path(name).resolve()
        allowed = [Path(prefix).resolve() for prefix in self._settings.allowed_sources if prefix.startswith("/")]
        if not any(path.is_relative_to(prefix) for prefix in allowed):
            raise SourceNotAllowed(f"{name} leads out of the allowed folders", "ask the operator (SAFER_ALLOWED_SOURCES)")
        return path

    def _from_hub(self, name: str, commit: str | None) -> str:
        """A hub model at its pinned commit: its folder where this machine has it already, so that the hub is not asked again."""
        if commit is None or not _COMMIT.fullmatch(commit):
            return name
        bare = name.partition("@")[0]
        if not self._from_cache:
            return f"{bare}@{commit}"
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(bare, revision=commit, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
            return f"{bare}@{commit}"
        self._took_from_cache = True
        self.names.add(path, name)
        return str(path)


def fetched(address: str, settings: Settings, cache: InputCache, stack: ExitStack) -> Path:
    """What lies at an `s3://` address. Raises as `fetch_s3`."""
    from workers.s3_inputs import fetch_s3

    return fetch_s3(address, settings, cache, stack)


def _only_file(path: Path) -> Path:
    """A folder's file, where it holds just one."""
    if path.is_file():
        return path
    files = [each for each in path.rglob("*") if each.is_file()]
    return files[0] if len(files) == 1 else path
