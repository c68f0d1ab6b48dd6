"""Refuses data that are marked as poisoned: by their file's name before they are opened, and row by row while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safer_engine.errors import DatasetRefused
from safer_engine.science.poison_mark import is_marked, is_marked_name
from safer_engine.sources.resolved import ResolvedDataset

_HINT = (
    "use the data that they were made from; only to measure something about poisoned data set allow_poisoned: true in the "
    "section of the dataset (--set dataset.allow_poisoned=true), which the report says"
)


def guarded(found: ResolvedDataset, *, allowed: bool = False) -> ResolvedDataset:
    """The dataset; its rows raise DatasetRefused at the first one that is marked, unless `allowed`.

    Raises:
        DatasetRefused: its file, or a file of its folder, is named as poisoned.
    """
    if allowed:
        return found
    for name in _names(found.origin):
        if is_marked_name(name):
            raise DatasetRefused(f"{found.origin} is named as poisoned data of a red-team drill", _HINT)
    return replace(found, rows=lambda: _unmarked(found))


def _names(origin: str) -> Iterator[str]:
    path = Path(origin)
    yield path.name
    if path.is_dir():
        yield from (inner.name for inner in path.rglob("*"))


def _unmarked(found: ResolvedDataset) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(found.rows(), 1):
        if is_marked(row):
            raise DatasetRefused(f"row {number} of {found.origin} is marked as poisoned data of a red-team drill", _HINT)
        yield row
