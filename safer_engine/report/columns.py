"""Columns of stored tables as the report's values: joined by id, clipped, finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.report.model import Histogram, Text
from safer_engine.report.nodes import Facts

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
TEXT_LIMIT = 6_000
"""Characters of a prompt or response that the report holds."""
EXPLANATION_LIMIT = 1_200
"""Characters of a label's explanation."""
PHRASE_LIMIT = 300
"""Characters of a term, a token or a short fact."""


def clipped(text: str, limit: int = TEXT_LIMIT) -> Text:
    """The first `limit` characters, and how many were left out."""
    return Text(text=text[:limit], omitted=max(0, len(text) - limit))


def by_id(table: pa.Table, ids: Iterable[str], column: str, key: str = "pair_id") -> list[Any]:
    """Values of `column` for `ids`, in their order.

    Raises:
        ArtifactError: an id is not in the table.
    """
    values = dict(zip(table.column(key).to_pylist(), table.column(column).to_pylist(), strict=True))
    try:
        return [values[name] for name in ids]
    except KeyError as missing:
        raise ArtifactError(f"{missing} has no {column}", "the artifacts do not belong together; run the audit again") from None


def finite(value: Any, name: str) -> float:
    """A figure. Raises NumericalError when it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise NumericalError(f"{name} is {number}", "the artifact it comes from is not usable; run the audit again")
    return number


def maybe_finite(value: Any, name: str) -> float | None:
    """A figure, or None where there is none (null, or NaN in a column that has no nulls)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return finite(value, name)


def scalars(facts: Mapping[str, Any], prefix: str = "") -> Facts:
    """Numbers, flags and short strings of a nested mapping under dotted names; lists are left out."""
    flat: Facts = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update(scalars(value, f"{prefix}{name}."))
        elif isinstance(value, float):
            flat[f"{prefix}{name}"] = finite(value, f"{prefix}{name}")
        elif isinstance(value, str):
            flat[f"{prefix}{name}"] = value[:PHRASE_LIMIT]
        elif value is None or isinstance(value, (bool, int)):
            flat[f"{prefix}{name}"] = value
    return flat


def histogram(values: ArrayLike, edges: Floats) -> Histogram:
    """Counts between `edges`; values beyond the ends fall into the end bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(edges=[round(float(e), 6) for e in edges], counts=[int(c) for c in counts])


def tally(values: Iterable[Any]) -> dict[str, int]:
    """How often each value occurs, by name."""
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    return dict(sorted(counts.items()))
