"""The Python interface: `safer_engine.audit(...)`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine import pipeline
from safer_engine.artifacts import Artifact, Edits, Report, SparseAutoencoder
from safer_engine.decisions import decision_digests
from safer_engine.edit_lines import FIGURES as EDIT_FIGURES
from safer_engine.errors import ArtifactError, ResourceError, SaferError, SpecError
from safer_engine.events import NullObserver, Observer
from safer_engine.given_sae import given_digest
from safer_engine.labellers.corrections import check_directions, label_files_digest, load_corrections
from safer_engine.labellers.rubric import load_rubric
from safer_engine.machine import resolve_spec
from safer_engine.out_folder import EDITS_FILE, OutFolder
from safer_engine.pipeline import AuditRequest, Found, OnArtifact
from safer_engine.planning import AuditEstimate, estimate, record_rates
from safer_engine.preflight import check_evaluation
from safer_engine.publishing import publishing, require_writable
from safer_engine.rates import rates_file
from safer_engine.refusals import refuse_early
from safer_engine.report.interim import write_stopped
from safer_engine.report.model import ReportDocument
from safer_engine.report.write import REPORT_FILES, SAE_FILES
from safer_engine.sources.corpora import resolve_corpus
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.labeller_models import resolve_labeller
from safer_engine.sources.memory import plain_rows
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedInputs
from safer_engine.sources.retraining_base import resolve_retraining_base
from safer_engine.spec import AuditSpec, MemorySource
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.stage import Stage
from safer_engine.store import ArtifactStore, LocalArtifactStore, digest_file

if TYPE_CHECKING:
    import pandas as pd

Rows = Iterable[Mapping[str, Any]]
"""Or a pandas DataFrame."""


@dataclass(frozen=True)
class AuditReport:
    """A finished audit.

    Attributes:
        artifacts: the artifact of every stage, by type.
        out: folder the report was written to, if one was asked for.
        copies: folder for a copy of the page where none was.
    """

    artifacts: Found
    out: Path | None = None
    copies: Path = field(default_factory=lambda: _cache() / "reports")

    @cached_property
    def document(self) -> ReportDocument:
        """The report as one validated value (what report.json holds)."""
        return ReportDocument.model_validate_json(self._get(Report).path("report.json").read_bytes())

    @cached_property
    def features(self) -> pd.DataFrame:
        """One row per candidate latent: salience, label, firing rate."""
        import pandas as pd

        return pd.read_parquet(self._get(Report).path("features.parquet"))

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per scored pair: margin, pair score, suspicion, signals, evidence."""
        import pandas as pd

        return pd.read_parquet(self._get(Report).path("pair_scores.parquet"))

    @cached_property
    def edits(self) -> pd.DataFrame:
        """One row per input row: status, action, suspicion. Figures and names are those of `pairs`, to the last digit."""
        import pandas as pd

        with self._get(Edits).path(EDITS_FILE).open(encoding="utf-8") as lines:
            frame = pd.DataFrame([json.loads(line) for line in lines])
        return frame.astype(dict.fromkeys(EDIT_FIGURES, "float64"))

    @property
    def html(self) -> Path:
        """The report to open in a browser; where no `out` was given, a copy of it in a folder of the store.

        Raises:
            ResourceError: the copy cannot be written.
        """
        if self.out is not None:
            return self.out / "report.html"
        report = self._get(Report)
        copy = self.copies / report.stored.manifest.content_digest[:16] / "report.html"
        if not copy.is_file() or digest_file(copy) != report.stored.manifest.files["report.html"].digest:
            with publishing(copy) as path:
                shutil.copyfile(report.path("report.html"), path)
        return copy

    def _get(self, kind: type[Artifact]) -> Artifact:
        value = self.artifacts.get(kind)
        if not isinstance(value, Artifact):
            raise ArtifactError(f"this audit has no {kind.__name__}")
        return value


def audit(
    spec: AuditSpec | Mapping[str, Any] | None = None,
    /,
    *,
    rows: Rows | None = None,
    evaluation_rows: Rows | None = None,
    store: ArtifactStore | Path | str | None = None,
    out: Path | str | None = None,
    observer: Observer | None = None,
    **document: Any,
) -> AuditReport:
    """Audit a reward model on a preference dataset.

    Args:
        spec: an `AuditSpec`, or a mapping like audit.yaml; or give its sections as keywords:
            `audit(model="…", dataset="…", sae={"k": 16})`. Paths may be `pathlib.Path`s.
        rows: preference rows in memory, dicts or a pandas DataFrame, in place of `dataset`, which may then say how they are
            read, but name no other source; `evaluation_rows` likewise.
        store: artifact store, or the folder of a local one; default as for the command line.
        out: folder for the report's files.
        observer: is told of stages, progress and notes.

    Raises:
        SaferError: see `safer_engine.errors`; nothing that was computed is lost.
    """
    if out is not None and not str(out):
        raise SpecError("out is empty", "name a folder, or leave it out")
    built = _spec_of(spec, document, rows, evaluation_rows)
    request = prepare(built, rows, evaluation_rows)
    kept = store if isinstance(store, ArtifactStore) else LocalArtifactStore(store or default_store())
    folder = Path(out) if out is not None else None
    return run_request(request, kept, folder, observer, expected=estimate(request, kept))


def run_request(
    request: AuditRequest,
    store: ArtifactStore,
    out: Path | None,
    observer: Observer | None = None,
    on_artifact: OnArtifact | None = None,
    expected: AuditEstimate | None = None,
) -> AuditReport:
    """Run a prepared audit and export its files to `out`, if given; an interim report there says where an audit stopped.

    Args:
        expected: what it would take. The report shows it beside what it took, and the next estimate is made from the rates.

    Raises:
        SpecError: `out` or the store's folder cannot be made or written, or `out` holds files that no audit wrote; nothing was
            computed then.
        DatasetRefused: the evaluation set cannot be read; nothing was computed then.
        SaferError: see `pipeline.run`.
    """
    watcher = observer or NullObserver()
    folder = None if out is None else OutFolder(out, lambda message: watcher.note("report", message))
    _make_ready(request, store, folder)
    if expected is not None:
        request = replace(request, planned=expected.planned)
    so_far: Found = {}

    def keep(stage: Stage, artifacts: Found) -> None:
        so_far.update(artifacts)
        if on_artifact is not None:
            on_artifact(stage, artifacts)

    try:
        found = pipeline.mending(lambda: _computed(request, store, watcher, keep), watcher)
    except SaferError as error:
        if folder is not None:
            with suppress(SaferError, OSError, ValueError, LookupError, TypeError):  # the audit's own error is what counts
                write_stopped(request, so_far, folder, error)
        raise
    if expected is not None:
        manifests = [value.stored.manifest for value in found.values() if isinstance(value, Artifact)]
        record_rates(rates_file(store), expected, manifests, request.spec)
    if folder is not None:
        export(found, folder)
    copies = {"copies": store.root / "reports"} if isinstance(store, LocalArtifactStore) else {}
    return AuditReport(found, out, **copies)


def _computed(request: AuditRequest, store: ArtifactStore, observer: Observer, keep: OnArtifact) -> Found:
    """All artifacts, those that a reader is given looked through: damage is found while there is still a way to mend it."""
    found = pipeline.run(request, store, observer, keep)
    for artifact, name, _ in _exported(found):
        if artifact is not None:
            artifact.path(name)
    return found


def _make_ready(request: AuditRequest, store: ArtifactStore, out: OutFolder | None) -> None:
    """What can be refused before anything is computed, and the number of threads. Raises SpecError, InputRefused."""
    if out is not None:
        out.check(request.spec)
        require_writable(out.root, "the report's folder")
    if isinstance(store, LocalArtifactStore):
        require_writable(store.root, "the artifact store's folder")
    if request.spec.runtime.threads is not None:
        import torch

        torch.set_num_threads(request.spec.runtime.threads)
    refuse_early(request, store)
    check_evaluation(request, store)


def prepare(spec: AuditSpec, rows: Rows | None = None, evaluation_rows: Rows | None = None) -> AuditRequest:
    """Resolve a spec and find and fingerprint its inputs.

    Raises:
        SpecError, ModelRefused, DatasetRefused.
    """
    given, given_evaluation = _as_dicts(rows, "rows"), _as_dicts(evaluation_rows, "evaluation_rows")
    resolved = resolve_spec(spec)
    check_directions(load_corrections(resolved.labels.corrections), load_rubric(resolved.labels.rubric))
    sources = ResolvedInputs(
        model=resolve_model(resolved.model, resolved.runtime, _cache()),
        dataset=resolve_dataset(resolved.dataset, given),
        evaluation=resolve_dataset(resolved.evaluation, given_evaluation) if resolved.evaluation else None,
        corpus=resolve_corpus(resolved.sae.pretrain.corpus) if resolved.sae.pretrain else None,
        extra={"labels": label_files_digest(resolved.labels), **decision_digests(resolved), **given_digest(resolved)},
        labeller=resolve_labeller(resolved.labels.labeller, _cache()),
        base=resolve_retraining_base(resolved.retraining, resolved.runtime, _cache()),
    )
    return AuditRequest(resolved, sources)


def export(found: Found, out: OutFolder) -> None:
    """Copy the files a person or a script reads into `out`, each replaced atomically; one that this audit lacks is removed.

    Files that a person made or changed there are kept (see `OutFolder`).

    Raises:
        ResourceError: a file cannot be written; all that was computed is in the store.
    """
    try:
        for artifact, name, target in _exported(found):
            if artifact is not None:
                out.copy(target, artifact.path(name), artifact.stored.manifest.files[name].digest)
            else:
                out.withdraw(target)
    except ResourceError as error:
        raise ResourceError(error.message, f"{error.hint}; the audit is finished and kept: {_ELSEWHERE}") from error


def _exported(found: Found) -> Iterator[tuple[Artifact | None, str, str]]:
    """Every file that may lie in `out`: the artifact that has it, if one does, its name there, and its name in `out`."""
    wanted: list[tuple[type[Artifact], str, str]] = [(Report, name, name) for name in REPORT_FILES]
    wanted += [(Edits, EDITS_FILE, EDITS_FILE)]
    wanted += [(SparseAutoencoder, name, f"sae/{name}") for name in SAE_FILES]
    for kind, name, target in wanted:
        artifact = found.get(kind)
        yield artifact if isinstance(artifact, Artifact) and artifact.has(name) else None, name, target


_ELSEWHERE = "run again, here or with another --out, and only the files are written"


_IN_MEMORY = (("dataset", "rows"), ("evaluation", "evaluation_rows"))
_MEMORY = {"kind": "memory"}


def default_store() -> Path:
    """Where artifacts are kept when nobody says otherwise."""
    return _cache() / "store"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "safer-audit"


def _spec_of(
    spec: AuditSpec | Mapping[str, Any] | None, document: dict[str, Any], rows: Rows | None, evaluation_rows: Rows | None
) -> AuditSpec:
    given = {"rows": rows, "evaluation_rows": evaluation_rows}
    if isinstance(spec, AuditSpec):
        if document:
            raise SpecError("give a complete AuditSpec, or sections as keywords, not both")
        for section, keyword in _IN_MEMORY:
            source = getattr(getattr(spec, section), "source", None)
            if given[keyword] is not None and not isinstance(source, MemorySource):
                raise _two_sources(section, keyword)
        return spec
    if not isinstance(spec, Mapping) and spec is not None:
        raise SpecError(f"the spec is a {type(spec).__name__}", "give an AuditSpec, a mapping, or sections as keywords")
    layers = [Layer("argument", _paths_as_text(dict(spec or {}))), Layer("keyword", _paths_as_text(document))]
    for section, keyword in _IN_MEMORY:
        values = [layer.document[section] for layer in layers if layer.document.get(section) is not None]
        if any(not isinstance(value, (str, dict)) for value in values):
            raise SpecError(f"{section} is to be a path, a hub id or a section", f"give rows in memory as {keyword}=…")
        if given[keyword] is not None:
            if any(isinstance(value, str) or value.get("source") not in (None, _MEMORY) for value in values):
                raise _two_sources(section, keyword)
            layers.append(Layer(keyword, {section: {"source": _MEMORY}}))
    return build_spec(layers).spec


def _two_sources(section: str, keyword: str) -> SpecError:
    return SpecError(
        f"both {keyword} and the source of {section} are given", f"leave one of them out; {keyword} are rows in memory"
    )


def _paths_as_text(value: Any) -> Any:
    """The same document with `pathlib.Path`s as text."""
    if isinstance(value, Mapping):
        return {key: _paths_as_text(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_dicts(rows: Rows | None, keyword: str) -> list[dict[str, Any]] | None:
    return None if rows is None else plain_rows(rows, keyword)
