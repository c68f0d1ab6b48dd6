"""A report of an audit that is not finished, written where the finished one will be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.artifacts import Absent
from safer_engine.pipeline import STAGES, AuditRequest, Found, OnArtifact, plan
from safer_engine.report.build import ReportRequest
from safer_engine.report.model import ReportDocument
from safer_engine.report.write import utc_now, write_report
from safer_engine.stage import Stage
from safer_engine.store import ArtifactStore


def interim_reports(request: AuditRequest, store: ArtifactStore, out: Path) -> OnArtifact:
    """A callback for `pipeline.run` that writes a report whenever there is something new and something still to wait for.

    Where the next stage is cached, or is the report itself, nothing is written: a finished audit run again costs nothing.
    """

    def write(stage: Stage, found: Found) -> None:
        if isinstance(found[stage.produces], Absent) or not _must_wait(stage, request, store):
            return
        write_interim(request, found, out)

    return write


def _must_wait(stage: Stage, request: AuditRequest, store: ArtifactStore) -> bool:
    names = [each.name for each in STAGES]
    following = names.index(stage.name) + 1
    return following < len(names) - 1 and plan(request, store)[following].state == "compute"


def write_interim(request: AuditRequest, found: Found, out: Path) -> ReportDocument:
    """Write the files of what is finished into `out`, each replaced atomically.

    Raises:
        ArtifactError, NumericalError, ResourceError: see `write_report`.
    """
    out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def publish(name: str) -> Iterator[Path]:
        temporary = out / f".{name}.{os.getpid()}"
        try:
            yield temporary
            os.replace(temporary, out / name)
        finally:
            temporary.unlink(missing_ok=True)

    return write_report(ReportRequest(request.spec, request.sources, found, utc_now()), publish)
