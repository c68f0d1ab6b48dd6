"""A report of an audit that is not finished, written where the finished one will be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.artifacts import Absent, EvaluationSet
from safer_engine.errors import ResourceError, SaferError
from safer_engine.events import NullObserver, Observer
from safer_engine.out_folder import OUT_FILES, OutFolder
from safer_engine.pipeline import STAGES, AuditRequest, Found, OnArtifact, plan
from safer_engine.report.build import ReportRequest, Stopped
from safer_engine.report.model import ReportDocument
from safer_engine.report.write import utc_now, write_report
from safer_engine.stage import Stage
from safer_engine.store import ArtifactStore


def interim_reports(request: AuditRequest, store: ArtifactStore, out: Path, observer: Observer | None = None) -> OnArtifact:
    """A callback for `pipeline.run` that writes a report whenever there is something new and something still to wait for.

    Where the next stage is cached, or is the report itself, nothing is written: a finished audit run again costs nothing.
    Where `out` cannot be written, a note says so, once, and the audit goes on: what it computes is in the store.
    """
    watcher, said = observer or NullObserver(), set[str]()
    folder = OutFolder(out, lambda message: watcher.note("report", message))

    def write(stage: Stage, found: Found) -> None:
        if _says_nothing(stage, found) or not _must_wait(stage, request, store):
            return
        try:
            write_interim(request, found, folder)
        except ResourceError as error:
            if str(error) not in said:
                watcher.note(stage.name, f"no interim report: {error}; the audit goes on")
            said.add(str(error))

    return write


def _says_nothing(stage: Stage, found: Found) -> bool:
    """Whether a stage is switched off: that there are no evaluation pairs, and why, is something to read."""
    return isinstance(found[stage.produces], Absent) and stage.produces is not EvaluationSet


def _must_wait(stage: Stage, request: AuditRequest, store: ArtifactStore) -> bool:
    following = [each.name for each in STAGES].index(stage.name) + 1
    if following >= len(STAGES) - 1 or (STAGES[following].produces is EvaluationSet and request.sources.evaluation is None):
        return False
    return plan(request, store)[following].state == "compute"


def write_interim(request: AuditRequest, found: Found, out: OutFolder, stopped: Stopped | None = None) -> ReportDocument:
    """Write the files of what is finished into `out`, each replaced atomically.

    Files that only a later report will have are removed where an older audit wrote them (see `OutFolder`).

    Raises:
        ArtifactError, NumericalError, ResourceError: see `write_report`. ResourceError: `out` cannot be written.
    """
    written: set[str] = set()

    @contextmanager
    def publish(name: str) -> Iterator[Path]:
        with out.publish(name) as temporary:
            yield temporary
        written.add(name)

    document = write_report(ReportRequest(request.spec, request.sources, found, utc_now(), stopped), publish)
    for name in OUT_FILES:
        if name not in written:
            out.withdraw(name)
    return document


def write_stopped(request: AuditRequest, found: Found, out: OutFolder, error: SaferError) -> None:
    """Say in the interim report that stands in `out` that the audit stopped, and why; where none stands, do nothing.

    Raises:
        ArtifactError, NumericalError, ResourceError: see `write_report`. OSError, ValueError: `out` cannot be read or written.
    """
    path = out.root / "report.json"
    if not path.is_file() or json.loads(path.read_bytes())["provenance"]["progress"] is None:
        return
    stage = next((stage.name for stage in STAGES if stage.produces not in found), STAGES[-1].name)
    sentence = error.message if error.message.endswith((".", "!", "?")) else f"{error.message}."
    write_interim(request, found, out, Stopped(stage, f"{sentence} {error.hint}".strip()))
