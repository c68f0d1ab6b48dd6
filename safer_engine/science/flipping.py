"""Swap the preference of a raw row, in the row's own columns.

What belongs to a response stays with it (its score, its model, its text); only which response is preferred changes. The size of
a preference (`margin`, `strength`) is left as it is: how strongly the flipped preference would hold is not known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from safer_engine.errors import DatasetRefused
from safer_engine.science.pair_formats import WINNER, Layout, project
from safer_engine.science.row_layouts import is_text_list
from safer_engine.science.winners import other_winner

_SIGNED = {"helpsteer3": "overall_preference", "helpsteer2": "preference_strength"}
_INSTEAD = "apply with --action drop, or set the action of these rows to keep in edits.jsonl"
Row = dict[str, Any]


def flip_row(row: Mapping[str, Any], layout: Layout) -> Row:
    """The row with its preference swapped; flipping twice gives the row back, but for the spelling of numbers kept as text.

    The input is not changed.

    Args:
        row: as the source yields it.
        layout: as `recognise` found it, column map included.

    Raises:
        DatasetRefused: the row holds several pairs, or its cells are not what the layout says.
    """
    flipped = copy.deepcopy(dict(row))
    try:
        if layout.name == "pku-saferlhf":
            _change(flipped, layout, f"{layout.label}_response_id", _other_response)
        elif layout.name in _SIGNED:
            _change(flipped, layout, _SIGNED[layout.name], _negated)
        elif layout.name == "scored":
            _flip_scores(flipped, layout)
        elif layout.name == WINNER:
            _set(flipped, layout, "winner", other_winner(project(row, layout.columns), layout.winners))
        else:
            _flip_sides(flipped, layout)
        _turn_annotators(flipped, layout)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetRefused(f"a row of layout {layout.name} cannot be flipped: {error}", _INSTEAD) from error
    return flipped


def _flip_sides(row: Row, layout: Layout) -> None:
    """Swap chosen and rejected, and every two columns whose names differ by just these words."""
    chosen, rejected = _get(row, layout, "chosen"), _get(row, layout, "rejected")
    if layout.name in ("rewardbench", "rmbench"):
        chosen, rejected = _as_listed(_only(chosen), rejected), _as_listed(_only(rejected), chosen)
    _set(row, layout, "chosen", rejected)
    _set(row, layout, "rejected", chosen)
    for name in list(row):
        other = name.replace("chosen", "rejected")
        if other != name and other in row and name not in _mapped(layout) and name != "chosen":
            row[name], row[other] = row[other], row[name]


def _turn_annotators(row: Row, layout: Layout) -> None:
    annotators = _find(row, layout, "annotators")
    if isinstance(annotators, list):
        _set(row, layout, "annotators", [_turned(value) for value in annotators])


def _only(cell: Any) -> Any:
    """The one response of a cell that may list several."""
    if not is_text_list(cell):
        return cell
    if len(cell) > 1:
        raise ValueError("it holds several pairs")
    return cell[0]


def _as_listed(text: Any, like: Any) -> Any:
    return [text] if is_text_list(like) else text


def _flip_scores(row: Row, layout: Layout) -> None:
    if _find(row, layout, "responses") is None:
        first, second = _get(row, layout, "score_a"), _get(row, layout, "score_b")
        _set(row, layout, "score_a", second)
        _set(row, layout, "score_b", first)
        return
    scores = list(_get(row, layout, "scores"))
    values = [float(score) for score in scores]
    if values.count(max(values)) > 1 or values.count(min(values)) > 1:
        raise ValueError("several responses share the best or the worst score")
    best, worst = values.index(max(values)), values.index(min(values))
    scores[best], scores[worst] = scores[worst], scores[best]
    _set(row, layout, "scores", scores)


def _change(row: Row, layout: Layout, name: str, change: Any) -> None:
    _set(row, layout, name, change(_get(row, layout, name)))


def _other_response(value: Any) -> Any:
    number = float(value)
    if isinstance(value, bool) or number not in (0.0, 1.0):
        raise ValueError(f"{value!r} is not 0 or 1")
    return type(value)(1 - int(number))


def _negated(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("a truth value where a number is expected")
    if isinstance(value, str):
        float(value)
        text = value.strip()
        return text[1:] if text.startswith("-") else "-" + text.removeprefix("+")
    return -value


def _turned(opinion: Any) -> Any:
    return {**opinion, "score": _negated(opinion["score"])} if isinstance(opinion, Mapping) else _negated(opinion)


def _mapped(layout: Layout) -> set[str]:
    return set(layout.columns.values()) | set(layout.columns)


def _path(row: Row, layout: Layout, name: str) -> list[str]:
    theirs = layout.columns.get(name, name)
    return [theirs] if theirs in row else theirs.split(".")


def _find(row: Row, layout: Layout, name: str) -> Any:
    cell: Any = row
    for step in _path(row, layout, name):
        cell = cell.get(step) if isinstance(cell, Mapping) else None
    return cell


def _get(row: Row, layout: Layout, name: str) -> Any:
    cell: Any = row
    for step in _path(row, layout, name):
        cell = cell[step]
    return cell


def _set(row: Row, layout: Layout, name: str, value: Any) -> None:
    *parents, last = _path(row, layout, name)
    cell: Any = row
    for step in parents:
        cell = cell[step]
    cell[last] = value
