"""Local files that a spec names, on their way to a service: found, uploaded, and named by their digest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cli.output import size
from safer_engine.errors import SpecError
from service.client import UPLOAD, TransferObserver, files_below, read_files

if TYPE_CHECKING:
    from service.client import AuditClient

Document = dict[str, Any]
_MODELS: tuple[tuple[str, ...], ...] = (("model", "path"), ("base",), ("labels", "labeller", "path"), ("retraining", "base"))
_ADAPTERS: tuple[tuple[str, ...], ...] = (("model", "adapter"),)
_DATASETS = (("dataset", "source"), ("evaluation", "source"), ("sae", "pretrain", "corpus"))


@dataclass(frozen=True)
class LocalInput:
    """A place of a spec that names something on this machine.

    Attributes:
        where: keys from the top of the spec to the value.
        kind: `model` or `dataset`, as the service asks.
        files: what is sent.
    """

    where: tuple[str, ...]
    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def root(self) -> Path:
        """The folder that names are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


def local_inputs(document: Document) -> list[LocalInput]:
    """The models and datasets of a spec that are on this machine. Other names are left for the service to find.

    Raises:
        SaferError: one cannot be sent, or would be refused after it was sent.
    """
    return list(_found(document))


def bare_names(document: Document) -> list[str]:
    """Models named by one word that is no folder here: rare on a hub, where names are `org/name`, and likely a slip."""
    values = (_value(document, where) for where in (*_MODELS, *_ADAPTERS))
    words = [value for value in values if isinstance(value, str) and "/" not in value and not value.startswith(UPLOAD)]
    return [word for word in words if not Path(word).exists()]


def _found(document: Document) -> Iterator[LocalInput]:
    from safer_engine.sources.models import files_to_send

    for where in (*_MODELS, *_ADAPTERS):
        value = _value(document, where)
        path = _local(value, must=isinstance(value, str) and (value.startswith((".", "~")) or value.count("/") > 1))
        if path is not None and path.is_dir():
            yield LocalInput(where, path, "model", tuple(files_to_send(path, adapter=where in _ADAPTERS)))
    for where in _DATASETS:
        source = _value(document, where)
        if not isinstance(source, dict) or source.get("kind") != "local":
            continue
        path = _local(source.get("path"), must=True)
        if path is not None:
            yield LocalInput((*where, "path"), path, "dataset", tuple(files_below(path) if path.is_dir() else [path]))


def with_rubric(document: Document) -> Document:
    """The spec with its rubric file read into it, where it names one of this machine. Raises SpecError where it is no rubric."""
    from safer_engine.labellers.rubric import built_in_rubrics, is_text, rubric_text

    given = _value(document, ("labels", "rubric"))
    if not isinstance(given, str) or is_text(given) or given in built_in_rubrics():
        return document
    path = _local(given, must=False)
    if path is None or not path.is_file():
        return document
    return _with(document, ("labels", "rubric"), rubric_text(path))


def with_corrections(document: Document) -> Document:
    """The spec with its file of corrections read into it: a service takes the entries, no file. Raises SpecError."""
    given = _value(document, ("labels", "corrections"))
    if not isinstance(given, str):
        return document
    from safer_engine.labellers.corrections import load_corrections

    entries: Any = [entry.model_dump(mode="json") for entry in load_corrections(given)]
    return _with(document, ("labels", "corrections"), entries)


def with_decisions(document: Document) -> Document:
    """The spec with its file of decisions read into it, without who decided: a service takes the entries. Raises SpecError."""
    given = _value(document, ("suspicion", "decisions"))
    if not isinstance(given, str):
        return document
    from safer_engine.decisions import load_decisions

    entries: Any = [entry.model_dump(mode="json", exclude={"by"}) for entry in load_decisions(given)]
    return _with(document, ("suspicion", "decisions"), entries)


def send_inputs(client: AuditClient, document: Document, inputs: list[LocalInput], shown: Console | None) -> Document:
    """Upload what the service does not have yet; the spec with their names in place of paths."""
    for found in inputs:
        with showing_transfer(shown, found.path.resolve().name) as observer:
            files = read_files(found.root, found.files, observer)
            upload = client.upload(files, found.kind, observer)
        assert upload.name is not None
        document = _with(document, found.where, upload.name)
    return document


def _local(value: object, *, must: bool) -> Path | None:
    """The path, if it is one of this machine; None for names of the service (`upload:…`, `s3://…`, its own folders)."""
    if not isinstance(value, str) or value.startswith((UPLOAD, "s3://")):
        return None
    path = Path(value).expanduser()
    if path.exists():
        return path
    if must and not path.is_absolute():
        raise SpecError(
            f"{value} does not exist on this machine", "check the path; what the service has is upload:…, s3://… or /…"
        )
    return None


def _value(document: Document, where: tuple[str, ...]) -> Any:
    value: Any = document
    for key in where:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _with(document: Document, where: tuple[str, ...], value: Any) -> Document:
    key, *rest = where
    return {**document, key: _with(document[key], tuple(rest), value) if rest else value}


@contextmanager
def showing_transfer(shown: Console | None, name: str) -> Iterator[TransferObserver]:
    """Shows transfers of something so named during the block; `shown`: None shows nothing."""
    if shown is None:
        yield TransferObserver()
    elif not shown.is_terminal:
        yield TransferLines(shown, name)
    else:
        with transfer_progress(shown) as progress:
            yield TransferBars(progress, name)


def transfer_progress(shown: Console) -> Progress:
    """Bars that count bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=shown, transient=False)


class TransferBars(TransferObserver):
    """A bar for each phase of a transfer."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """A new bar."""
        self._task = self._progress.add_task(f"{what} {self._name}", total=total)

    def advance(self, count: int) -> None:
        """Move it."""
        if self._task is not None:
            self._progress.advance(self._task, count)


class TransferLines(TransferObserver):
    """A line for each phase and each tenth of it, where there is no terminal."""

    def __init__(self, shown: Console, name: str) -> None:
        self._shown = shown
        self._name = name
        self._total = self._done = self._tenths = 0
        self._what = ""
        self._lock = Lock()

    def begin(self, what: str, total: int) -> None:
        """A line."""
        self._what, self._total, self._done, self._tenths = what, total, 0, 0
        self._shown.print(f"{what} {self._name}: {size(total)}", markup=False)

    def advance(self, count: int) -> None:
        """A line at each tenth of what takes long."""
        with self._lock:
            self._done += count
            tenths = 10 * self._done // max(1, self._total)
            if tenths > self._tenths and self._total > 1 << 26:
                self._tenths = tenths
                self._shown.print(f"{self._what} {self._name}: {10 * tenths} %", markup=False)
