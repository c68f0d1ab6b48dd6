"""Parts of a report that its model leaves open, looked up with a clear error where they are not there."""

from __future__ import annotations

from typing import Any

from safer_engine.errors import InputRefused
from safer_engine.report.model import ReportDocument
from safer_engine.report.provenance import InputRecord
from safer_engine.spec_layers import preset_departures

_HINT = "give a report.json as the audit wrote it"


def missing(what: str) -> InputRefused:
    """The error that a report lacks something; `what` is its path."""
    return InputRefused(f"the report is not as an audit wrote it: it has no {what}", _HINT)


def spec_value(report: ReportDocument, *keys: str) -> Any:
    """A value of the report's spec. Raises InputRefused where it is not there."""
    found: Any = report.spec
    for depth, key in enumerate(keys, 1):
        if not isinstance(found, dict) or key not in found:
            raise missing(".".join(("spec", *keys[:depth])))
        found = found[key]
    return found


def departures(report: ReportDocument) -> list[str]:
    """What the report's spec has other than its preset, in words. Raises InputRefused where the spec is not whole."""
    spec_value(report, "preset")
    try:
        return list(preset_departures(report.spec).values())
    except (KeyError, TypeError) as error:
        raise missing(f"whole spec ({error})" if isinstance(error, KeyError) else "whole spec") from None


def input_record(report: ReportDocument, name: str) -> InputRecord:
    """An input of the audit. Raises InputRefused where the report names none."""
    for found, record in report.provenance.inputs.items():
        if found == name:
            return record
    raise missing(f"provenance.inputs.{name}")
