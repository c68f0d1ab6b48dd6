"""How many evaluation pairs there are, by axis and subset: from a report, from a file of preference rows, or as told."""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safer_engine.errors import DatasetRefused, InputRefused, SpecError
from safer_engine.gate.documents import Audit
from safer_engine.gate.intervals import effective_count
from safer_engine.gate.power import SliceSize

_UNNAMED = "all"
_BIG_JSON = 1 << 30


def told_sizes(texts: Iterable[str], accuracy: float, design_effect: float) -> list[SliceSize]:
    """Slices from `N`, `AXIS=N` and `AXIS/SUBSET=N`; axes and all pairs not told are added up. Raises SpecError."""
    leaves: dict[tuple[str | None, str | None], int] = {}
    for text in texts:
        place, _, number = text.rpartition("=")
        first, _, second = place.partition("/")
        where = (first or None, second or None)
        if not number.isdecimal() or int(number) < 1 or where in leaves or (second and not first):
            raise SpecError(f"cannot read --pairs {text!r}", "write 450, safety=450 or safety/refusal=200, each once")
        leaves[where] = int(number)
    counts = dict(leaves)
    for whole in {axis for axis, subset in leaves if subset is not None}:
        counts.setdefault((whole, None), sum(n for (a, s), n in leaves.items() if a == whole and s is not None))
    axes = [n for (axis, subset), n in counts.items() if axis is not None and subset is None]
    if axes:
        counts.setdefault((None, None), sum(axes))
    elif (None, None) in counts:
        counts[_UNNAMED, None] = counts[None, None]
    return [
        SliceSize(axis, subset, n, None, accuracy, design_effect)
        for (axis, subset), n in sorted(counts.items(), key=lambda item: (item[0][0] or "", item[0][1] or ""))
    ]


def report_sizes(audit: Audit, accuracy: float | None, design_effect: float | None = None) -> list[SliceSize]:
    """The slices of a report's evaluation set, with the accuracies and design effects it found unless others are expected.

    Raises:
        InputRefused: it has no evaluation set.
    """
    evaluation = audit.report["evaluation"]
    if evaluation is None:
        raise InputRefused("the report has no evaluation set to plan with", "give --dataset or --pairs")
    found = []
    for entry in evaluation["groups"]:
        share = entry["accuracy"]
        effect = design_effect or 1.0
        if design_effect is None and share.get("lo") is not None and share.get("hi") is not None and share["n_groups"] > 1:
            effect = share["n"] / effective_count(share["estimate"], share["lo"], share["hi"], share["n"], share["n_groups"])
        expected = share["estimate"] if accuracy is None else accuracy
        found.append(SliceSize(entry["axis"], entry["subset"], share["n"], share["n_groups"], expected, effect))
    return found


def dataset_sizes(path: Path, accuracy: float, design_effect: float) -> list[SliceSize]:
    """The slices of a file of preference rows (JSONL, JSON or CSV, also .gz), by its columns axis, subset and group.

    A row counts as a pair; what an audit would drop is not known here. Raises DatasetRefused.
    """
    counts: dict[tuple[str | None, str | None], int] = defaultdict(int)
    groups: dict[tuple[str | None, str | None], set[str]] = defaultdict(set)
    grouped = True
    for row in _rows(path):
        axis, subset, group = (row.get(name) for name in ("axis", "subset", "group"))
        names = str(axis or _UNNAMED), str(subset or _UNNAMED)
        grouped = grouped and group not in (None, "")
        for place in ((None, None), (names[0], None), names):
            counts[place] += 1
            groups[place].add(str(group))
    if not counts:
        raise DatasetRefused(f"{path} has no rows", "give the evaluation data")
    return [
        SliceSize(axis, subset, n, len(groups[axis, subset]) if grouped else None, accuracy, design_effect)
        for (axis, subset), n in sorted(counts.items(), key=lambda item: (item[0][0] or "", item[0][1] or ""))
    ]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
    if kinds not in ([".jsonl"], [".json"], [".csv"]):
        raise DatasetRefused(f"cannot count the rows of {path}", "give a .jsonl, .json or .csv file (also .gz), or --pairs")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as handle:
            yield from _parsed(handle, kinds[0], path)
    except (OSError, EOFError) as error:
        raise DatasetRefused(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", "check the path") from None
    except (ValueError, RecursionError, csv.Error):
        raise DatasetRefused(f"{path} cannot be read as {kinds[0][1:]}", "check the file") from None


def _parsed(handle: IO[str], kind: str, path: Path) -> Iterator[dict[str, Any]]:
    if kind == ".csv":
        yield from csv.DictReader(handle)
        return
    found = (json.loads(line) for line in handle if line.strip()) if kind == ".jsonl" else json.loads(handle.read(_BIG_JSON))
    for row in found:
        if not isinstance(row, dict):
            raise DatasetRefused(f"{path} holds something else than rows", "give one JSON object for each row")
        yield row
