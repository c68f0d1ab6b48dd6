"""Rows handed over by the caller of the Python interface."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safer_engine.errors import DatasetRefused, SpecError
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


def plain_rows(rows: Any, keyword: str) -> list[dict[str, Any]]:
    """Rows of a caller as a list of dicts: from an iterable of mappings, or a pandas DataFrame, whose missing values are None.

    Args:
        keyword: its name in messages, such as `rows`.

    Raises:
        SpecError: it is neither.
    """
    pandas = sys.modules.get("pandas")  # who has a DataFrame has imported it
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        return [{str(name): _plain(value, pandas) for name, value in row.items()} for row in rows.to_dict("records")]
    hint = f"give {keyword} as dicts of columns or a DataFrame; a file goes to dataset=… or evaluation=…"
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise SpecError(f"{keyword} is a {type(rows).__name__}, not an iterable of rows", hint)
    made = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise SpecError(f"row {number} of {keyword} is a {type(row).__name__}, not a dict", hint)
        made.append(dict(row))
    return made


def _plain(value: Any, pandas: Any) -> Any:
    """A cell as JSON has it: missing is None, arrays are lists, numbers of numpy are Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(inner, pandas) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, pandas) for inner in value]
    missing = value is pandas.NA or value is pandas.NaT or (isinstance(value, float) and math.isnan(value))
    return None if missing else value
