"""The mark that every row of deliberately poisoned data carries, and how it is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "safer_redteam"
"""Column of the mark in every row, and its key in a file's metadata."""
SIGN = "safer-redteam"
"""How the mark's text begins, and what the names of poisoned files hold."""
_DEEP, _START = 2, 64


def mark_text(rule: str, budget: float, *, flipped: bool) -> str:
    """What the mark of a row says: which rule poisoned the data, and what was done to this row."""
    done = "preference flipped" if flipped else "row as given"
    return f"{SIGN}: poisoned data of a drill, not for training; rule {rule}, budget {budget:g}; {done}"


def is_marked(row: Mapping[str, Any]) -> bool:
    """Whether a row carries the mark, or what is left of it: its column, also under an empty cell, or its text in any column.

    Columns of columns are looked into, also those written as a JSON object; lists (such as messages) are not.
    """
    return _marked(row, _DEEP)


def _marked(row: Mapping[str, Any], depth: int) -> bool:
    for name, cell in row.items():
        if str(name).strip().lower() == MARK:
            return True
        if isinstance(cell, str) and _marked_text(cell):
            return True
        if depth > 1 and isinstance(cell, Mapping) and _marked(cell, depth - 1):
            return True
    return False


def _marked_text(cell: str) -> bool:
    start = cell[:_START].lstrip().lower()
    return start.startswith(SIGN) or (start.startswith("{") and f'"{MARK}"' in cell)


def is_marked_name(name: str) -> bool:
    """Whether a file's name says that it holds poisoned data."""
    return SIGN in name.lower().replace("_", "-")
