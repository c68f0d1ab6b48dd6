"""A report of an audit that is not finished, written beside where the finished one will be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_engine.pipeline import AuditRequest, Found
from safer_engine.report.build import ReportRequest
from safer_engine.report.model import ReportDocument
from safer_engine.report.write import utc_now, write_report


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
