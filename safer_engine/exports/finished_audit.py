"""A finished audit on disk: its report, validated, and the folder that holds its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from safer_engine.errors import InputRefused
from safer_engine.gate.documents import REPORT, load_audit
from safer_engine.report import summary
from safer_engine.report.model import ReportDocument


@dataclass(frozen=True)
class FinishedAudit:
    """`path` is report.json."""

    report: ReportDocument
    path: Path

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
    audit = load_audit(path, what)
    try:
        report = ReportDocument.model_validate(audit.report)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "its sections"
        raise InputRefused(
            f"{what} {path} is not as an audit wrote it: {place}", "give a report.json as the audit wrote it"
        ) from None
    return FinishedAudit(report, path / REPORT if path.is_dir() else path)


def cautions_of(report: ReportDocument) -> list[str]:
    """The report's own cautions. Raises InputRefused: they read the spec, which the model of a report leaves open."""
    try:
        return [caution.text for caution in summary.cautions(report)]
    except (KeyError, TypeError, AttributeError):
        raise InputRefused("the report's spec is not as an audit wrote it", "give a report.json as the audit wrote it") from None
