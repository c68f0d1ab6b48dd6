"""Rows handed over by the caller of the Python interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safer_engine.errors import DatasetRefused
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.store import canonical_json, digest_bytes


def resolve_memory(rows: Sequence[dict[str, Any]] | None) -> ResolvedDataset:
    """Fingerprint rows given in memory by their canonical JSON.

    Raises:
        DatasetRefused: no rows were given, or they hold values that JSON has no word for.
    """
    if rows is None:
        raise DatasetRefused("the dataset source is `memory`, but no rows were given", "pass rows, or name a file")
    kept = list(rows)
    for number, row in enumerate(kept, 1):
        if not isinstance(row, dict):
            raise DatasetRefused(f"row {number} is a {type(row).__name__}", "rows must be dicts of columns")
    try:
        digest = digest_bytes(canonical_json(kept))
    except (TypeError, ValueError) as error:
        raise DatasetRefused(
            f"the rows hold a value that JSON has no word for: {error}", "use text, numbers, lists, dicts and None"
        ) from error
    return ResolvedDataset(digest, "memory", lambda: (dict(row) for row in kept))
