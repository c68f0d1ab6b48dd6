"""A finished audit as the gate reads it: report.json, and evaluation.jsonl where it lies beside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.errors import InputRefused
from safer_engine.gate.shapes import fault_of_evaluation, is_number
from safer_engine.report.model import SCHEMA_VERSION

REPORT, EVALUATION = "report.json", "evaluation.jsonl"
_SECTIONS = (
    "schema_version", "spec", "provenance", "dataset", "reward_model", "evaluation", "sae", "features", "edits", "verification",
    "verdict",
)  # fmt: skip
MAX_REPORT, MAX_EVALUATION = 1 << 28, 1 << 32
"""Bytes that are read of either."""
_CLOSE = 1e-9
_LARGEST = 1 << 63
_SIGNS = {"accuracy_longer": 1, "accuracy_shorter": -1}


@dataclass(frozen=True)
class EvaluationPair:
    """A line of evaluation.jsonl. `longer_by`: tokens of the chosen response less those of the rejected one, where known."""

    pair_id: str
    group: str
    axis: str
    subset: str
    margin: float
    longer_by: int | None = None

    @property
    def right(self) -> bool:
        """As the report counts: equal rewards are not right."""
        return self.margin > 0

    @property
    def place(self) -> tuple[str, str, str]:
        """Group, axis and subset."""
        return self.group, self.axis, self.subset


@dataclass(frozen=True)
class Audit:
    """A finished audit. `pairs` is None where evaluation.jsonl is not at hand."""

    report: dict[str, Any]
    pairs: tuple[EvaluationPair, ...] | None

    def digest(self, name: str) -> str | None:
        """Content digest of an input: model, dataset or evaluation."""
        found = self.report["provenance"]["inputs"].get(name)
        digest = found.get("digest") if isinstance(found, dict) else None
        return digest if isinstance(digest, str) else None


def load_audit(path: Path, what: str) -> Audit:
    """Read report.json (or the folder that holds it), and evaluation.jsonl beside it where there is one.

    Args:
        what: the option that named it, for messages.

    Raises:
        InputRefused: see `read_audit`; or a file cannot be read.
    """
    raw, lines = read_files(path, what)
    return read_audit(raw, lines, f"{what} {report_at(path)}")


def report_at(path: Path) -> Path:
    """The report.json that a path names: itself, or the one in the folder."""
    return path / REPORT if path.is_dir() else path


def read_files(path: Path, what: str) -> tuple[bytes, bytes | None]:
    """The bytes of report.json, and of evaluation.jsonl beside it where there is one. Args and Raises: see `load_audit`."""
    report = report_at(path)
    evaluation = report.parent / EVALUATION
    try:
        return _read(report, MAX_REPORT), _read(evaluation, MAX_EVALUATION) if evaluation.is_file() else None
    except OSError as error:
        raise InputRefused(
            f"cannot read {what} {path}: {error.strerror}", "name a report.json, or the folder of an audit"
        ) from None


def _read(path: Path, most: int) -> bytes:
    """A file's bytes, of a device or a pipe as well; never more than that many."""
    with path.open("rb") as handle:
        raw = handle.read(most + 1)
    if len(raw) > most:
        raise InputRefused(f"{path} has more than {most:,} bytes", "give the file as the audit wrote it")
    return raw


def read_audit(report: bytes, evaluation: bytes | None, what: str) -> Audit:
    """An audit from the contents of its files.

    Raises:
        InputRefused: it is no report of a finished audit, or the evaluation pairs are not those that the report counts.
    """
    document = _json(report, what)
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise InputRefused(f"{what} is no report.json of schema version {SCHEMA_VERSION}", "audit again with this version")
    provenance = document.get("provenance")
    if missing := [name for name in _SECTIONS if name not in document]:
        raise InputRefused(f"{what} lacks {', '.join(missing)}", "give a report.json as the audit wrote it")
    if not isinstance(provenance, dict) or not all(isinstance(provenance.get(n), dict) for n in ("inputs", "not_computed")):
        raise InputRefused(f"{what} has no provenance", "give a report.json as the audit wrote it")
    if provenance.get("progress") is not None:
        raise InputRefused(f"{what} is of an audit that did not finish", "let it finish: the same `run` goes on where it stopped")
    if document["evaluation"] is None:
        return Audit(document, None)
    if fault := fault_of_evaluation(document["evaluation"]):
        raise InputRefused(f"{what} is not as an audit wrote it: {fault}", "give a report.json as the audit wrote it")
    if evaluation is None:
        return Audit(document, None)
    pairs = tuple(_pairs(evaluation, what))
    _require_same(pairs, document["evaluation"]["groups"], what)
    _require_same_lengths(pairs, document["evaluation"].get("length", []), what)
    return Audit(document, pairs)


def _json(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except (ValueError, RecursionError):
        raise InputRefused(f"{what} is not valid JSON with finite numbers", "give a report.json as the audit wrote it") from None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST:
        raise ValueError(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _pairs(raw: bytes, what: str) -> Iterable[EvaluationPair]:
    seen: set[str] = set()
    for number, line in enumerate(raw.splitlines(), 1):
        row = _json(line, f"line {number} of {EVALUATION} beside {what}")
        names = ("pair_id", "group", "axis", "subset")
        whole = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)
        longer_by = row.get("longer_by", 0) if whole else None
        if not whole or not is_number(row.get("margin")) or not is_number(longer_by) or isinstance(longer_by, float):
            raise InputRefused(
                f"line {number} of {EVALUATION} beside {what} is no evaluation pair", "give the file as the audit wrote it"
            )
        if row["pair_id"] in seen:
            raise InputRefused(
                f"line {number} of {EVALUATION} beside {what} repeats a pair_id", "give the file as the audit wrote it"
            )
        seen.add(row["pair_id"])
        yield EvaluationPair(**{name: row[name] for name in names}, margin=float(row["margin"]), longer_by=row.get("longer_by"))


def _require_same(pairs: tuple[EvaluationPair, ...], groups: list[Any], what: str) -> None:
    """The report's own counts and accuracies must follow from the pairs: a file of another audit would be judged in its place."""
    for entry in groups:
        of_slice = in_slice(pairs, entry["axis"], entry["subset"])
        right, accuracy = sum(pair.right for pair in of_slice), entry["accuracy"]
        if len(of_slice) != accuracy["n"] or abs(right - accuracy["estimate"] * len(of_slice)) > _CLOSE * max(1, len(of_slice)):
            raise _other_audit(what, "accuracies")


def _other_audit(what: str, differ: str) -> InputRefused:
    return InputRefused(
        f"{EVALUATION} beside {what} is not of the same audit: its {differ} are others",
        "keep the files of an audit together, or move the other evaluation.jsonl away",
    )


def _require_same_lengths(pairs: tuple[EvaluationPair, ...], lengths: list[Any], what: str) -> None:
    """The same of the accuracies by length, where the pairs have theirs."""
    if any(pair.longer_by is None for pair in pairs):
        return
    for entry in lengths:
        of_slice = in_slice(pairs, entry["axis"], entry["subset"])
        signs = {name: sign for name, sign in _SIGNS.items() if entry.get(name) is not None}
        told = [(entry[name]["n"], entry[name]["estimate"] * entry[name]["n"]) for name in signs]
        found = [[pair for pair in of_slice if (pair.longer_by or 0) * sign > 0] for sign in signs.values()]
        own = [(len(kind), sum(pair.right for pair in kind)) for kind in found]
        if entry["n_equal"] + sum(map(len, found)) != len(of_slice) or any(
            n != m or abs(right - other) > _CLOSE * max(1, n) for (n, right), (m, other) in zip(own, told, strict=True)
        ):
            raise _other_audit(what, "lengths")


def in_slice(pairs: Iterable[EvaluationPair], axis: str | None, subset: str | None) -> list[EvaluationPair]:
    """The pairs of a slice; None stands for all axes, and for the whole axis."""
    return [pair for pair in pairs if axis in (None, pair.axis) and subset in (None, pair.subset)]
