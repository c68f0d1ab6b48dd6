"""A finished audit on disk: its report, validated, and the folder that holds its files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from safer_engine.errors import InputRefused
from safer_engine.gate.documents import EVALUATION, REPORT, read_audit, read_files, report_at
from safer_engine.report import summary
from safer_engine.report.model import ReportDocument


@dataclass(frozen=True)
class FinishedAudit:
    """A finished audit.

    Attributes:
        path: report.json.
        read: SHA-256 in hexadecimal digits and size in bytes, by name, of the files that `report` was made and checked with.
    """

    report: ReportDocument
    path: Path
    read: dict[str, tuple[str, int]]

    def beside(self, name: str, what: str) -> Path:
        """A file of the audit. Raises InputRefused where it is not there."""
        found = self.path.parent / name
        if not found.is_file():
            raise InputRefused(
                f"{what} has no {name} beside {self.path.name}",
                "give the audit's whole folder; `safer-audit download` fetches it",
            )
        return found


def finished_audit(path: Path, what: str) -> FinishedAudit:
    """Read an audit.

    Args:
        path: report.json, or the folder that holds it.
        what: the option that named it, for messages.

    Raises:
        InputRefused: it is no finished audit, or a file beside it is not of the same one or cannot be read.
    """
    files = dict(zip((REPORT, EVALUATION), read_files(path, what), strict=True))
    audit = read_audit(files[REPORT] or b"", files[EVALUATION], f"{what} {report_at(path)}")
    try:
        report = ReportDocument.model_validate(audit.report)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "its sections"
        raise InputRefused(
            f"{what} {path} is not as an audit wrote it: {place}", "give a report.json as the audit wrote it"
        ) from None
    read = {name: (hashlib.sha256(raw).hexdigest(), len(raw)) for name, raw in files.items() if raw is not None}
    return FinishedAudit(report, report_at(path), read)


def cautions_of(report: ReportDocument) -> list[str]:
    """The report's own cautions. Raises InputRefused: see `summary.cautions`."""
    return [caution.text for caution in summary.cautions(report)]
