"""From raw rows to preference pairs: recognise the layout, map columns, read row by row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop
from safer_engine.science.messages import MalformedCell, Message, is_message_list, is_transcript
from safer_engine.science.row_layouts import (
    RMBENCH_STYLES,
    Label,
    NoPreference,
    Parser,
    Row,
    Sides,
    Unrated,
    is_text_list,
    parse_anthropic,
    parse_helpsteer2,
    parse_helpsteer3,
    parse_pku,
    parse_rewardbench,
    parse_rmbench,
    parse_scored,
    parse_trl,
    parse_ultrafeedback,
    parse_winner,
    with_opinions,
)
from safer_engine.science.winners import Winner, Winners, learn_winners, winner_of

SAMPLE_ROWS = 64
"""Rows that `recognise` should be shown."""

WINNER = "winner"
_PARSERS: dict[str, Parser] = {
    "helpsteer3": parse_helpsteer3,
    "helpsteer2": parse_helpsteer2,
    "pku-saferlhf": parse_pku,
    "scored": parse_scored,
    "rmbench": parse_rmbench,
    "rewardbench": parse_rewardbench,
    "ultrafeedback": parse_ultrafeedback,
    "anthropic": parse_anthropic,
    "trl": parse_trl,
}
"""How rows are read that say all in themselves."""

_NEEDED: dict[str, tuple[frozenset[str], ...]] = {
    "helpsteer3": (frozenset({"context", "response1", "response2", "overall_preference"}),),
    "helpsteer2": (frozenset({"prompt", "response_1", "response_2", "preference_strength"}),),
    "pku-saferlhf": (
        frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
    ),
    WINNER: (frozenset({"response_a", "response_b", "winner"}),),
    "scored": (
        frozenset({"prompt", "response_a", "response_b", "score_a", "score_b"}),
        frozenset({"prompt", "responses", "scores"}),
    ),
    "rmbench": (frozenset({"prompt", "chosen", "rejected"}),),
    "rewardbench": (frozenset({"prompt", "chosen", "rejected"}),),
    "ultrafeedback": (frozenset({"chosen", "rejected", "score_chosen", "score_rejected"}),),
    "anthropic": (frozenset({"chosen", "rejected"}),),
    "trl": (frozenset({"chosen", "rejected"}),),
}
"""Columns of each layout, in the order in which `auto` tries them: the more particular first."""
_FIELDS = frozenset(
    {"id", "group", "axis", "subset", "style", "item", "strength", "annotators", "margin", "individual_preference"}
    | {"model_a", "model_b"}
)
_MAPPABLE = _FIELDS.union(*(columns for choices in _NEEDED.values() for columns in choices))
_SUBSET_COLUMNS = {"rmbench": "domain", "helpsteer3": "domain"}
_STYLE_SUFFIX = re.compile(f"-({'|'.join(RMBENCH_STYLES)})$")


@dataclass(frozen=True)
class PreferenceRow:
    """One pair of a dataset, or a row that gives none.

    Attributes:
        row: index of the input row, from 0.
        part: 0 where the row holds one pair, else the pair's number in its row, from 1.
        id: the row's own id, if it has one.
        prompt: messages both sides share.
        chosen, rejected: what follows on each side; the last message is the response (role assistant).
        group, axis, subset, style: the row's columns, if given.
        item: best-of-N item; pairs of one item share the chosen response.
        strength: size of the preference, in the dataset's own units.
        annotators: individual preferences, positive for the chosen side.
        reason: why there is no pair (malformed, tie), with `detail` for people; the sides are then empty.
        raw: a dropped row's columns, from which an id can be made; None for a pair.
    """

    row: int
    part: int = 0
    id: str | None = None
    prompt: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    group: str | None = None
    axis: str | None = None
    subset: str | None = None
    style: str | None = None
    item: str | None = None
    strength: float | None = None
    annotators: tuple[int, ...] | None = None
    reason: Drop | None = None
    detail: str = ""
    raw: Mapping[str, Any] | None = None

    @property
    def requests(self) -> tuple[tuple[tuple[Message, ...], str], tuple[tuple[Message, ...], str]]:
        """(messages before the response, response) of the chosen and of the rejected side: what a `Renderer` is asked."""
        chosen, rejected = self.chosen, self.rejected
        return (self.prompt + chosen[:-1], chosen[-1].content), (self.prompt + rejected[:-1], rejected[-1].content)


@dataclass(frozen=True)
class Layout:
    """How the rows of a dataset are read.

    Attributes:
        name: one of the layout names of `DatasetSpec.format`, never `auto`.
        columns: column map, our name → theirs (a column, a dotted path, or empty for "there is none").
        label: which preference of PKU-SafeRLHF rows counts.
        winners: what the values of a winner column mean.
    """

    name: str
    columns: Mapping[str, str]
    label: Label
    winners: Winners = field(default_factory=Winners)


def recognise(
    sample: Sequence[Row],
    format: str,  # noqa: A002
    columns: Mapping[str, str],
    label: Label,
    winners: Mapping[str, Winner] | None = None,
) -> Layout:
    """Find the layout of a dataset from its first rows.

    Args:
        sample: some rows, at least one.
        format: a layout name, or `auto`.
        columns: column map (see `Layout`).
        winners: what values of the winner column mean, where they don't say it themselves.

    Raises:
        DatasetRefused: no rows, a mapped column that isn't there, columns missing for the named layout, no layout fits, or
            values of the winner column that mean nothing.
    """
    if not sample:
        raise DatasetRefused("the dataset has no rows", "check the path, and the split")
    found = sorted({str(name) for row in sample for name in row})
    _check_columns(sample, columns, found)
    layout = Layout(format, dict(columns), label)
    rows = [project(row, columns) for row in sample]
    present = {name for row in rows for name, cell in row.items() if cell is not None}
    names = _NEEDED if format == "auto" else (format,)
    for name in names:
        if any(needed <= present for needed in _NEEDED[name]) and (format != "auto" or _looks_like(name, rows, present)):
            if name == "pku-saferlhf" and f"{label}_response_id" not in present:
                raise DatasetRefused(
                    f"the rows have no {label}_response_id", f"found columns: {', '.join(found)}; set dataset.label"
                )
            return replace(layout, name=name, winners=_winners(name, rows, winners or {}))
    wanted = "; ".join(f"{name}: {', '.join(sorted(choice))}" for name in names for choice in _NEEDED[name])
    raise DatasetRefused(
        f"the rows fit no known layout: their columns are {', '.join(found)}" if format == "auto"
        else f"the rows are not in layout {format!r}: their columns are {', '.join(found)}",
        f"name the columns in dataset.columns (our name: theirs), or bring the rows into one of these. {wanted}",
    )  # fmt: skip


def _winners(name: str, rows: Sequence[Row], given: Mapping[str, Winner]) -> Winners:
    if name == WINNER:
        return learn_winners(rows, given)
    if given:
        raise DatasetRefused(
            f"dataset.winners is given, but rows of layout {name!r} have no winner column",
            "map response_a, response_b and winner in dataset.columns and set dataset.format to winner, or leave it out",
        )
    return Winners()


def project(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with our column names beside its own; a name mapped to nothing is taken away."""
    projected = {name: cell for name, cell in row.items() if columns.get(name) != ""}
    return {**projected, **{ours: _look_up(row, theirs) for ours, theirs in columns.items() if theirs}}


def read_pairs(rows: Iterable[Row], layout: Layout) -> Iterator[PreferenceRow]:
    """Read rows one by one; a row that gives no pair comes out once, with its reason.

    The number of pairs of a row and their order depend on the row alone.
    """
    for index, row in enumerate(rows):
        yield from _read_row(index, project(row, layout.columns), layout)


def _read_row(index: int, row: dict[str, Any], layout: Layout) -> Iterator[PreferenceRow]:
    names = (_readable_name(row.get(name)) for name in ("id", "group", "axis", "subset"))
    own_id, group, axis, subset = names
    without = PreferenceRow(index, id=own_id, group=group, axis=axis, subset=subset, raw=row)
    try:
        own_id = _name(row.get("id"))
        group, axis, subset, style, item = (_name(row.get(name)) for name in ("group", "axis", "subset", "style", "item"))
        pairs = _sides(row, layout)
        _check_characters(pairs)
    except NoPreference:
        yield replace(without, reason=Drop.TIE)
        return
    except Unrated:
        yield replace(without, reason=Drop.UNRATED)
        return
    except MalformedCell as error:
        yield replace(without, reason=Drop.MALFORMED, detail=str(error))
        return
    except KeyError as error:
        yield replace(without, reason=Drop.MALFORMED, detail=f"the column {error} is missing")
        return
    if subset is None:
        subset = _plain_name(row.get(_SUBSET_COLUMNS.get(layout.name, "")))
    if style is None and own_id is not None and (suffix := _STYLE_SUFFIX.search(own_id)):
        style = suffix[1]
    for number, sides in enumerate(pairs, 1):
        yield PreferenceRow(
            row=index,
            part=number if len(pairs) > 1 else 0,
            id=own_id,
            prompt=sides.prompt,
            chosen=sides.chosen,
            rejected=sides.rejected,
            group=group,
            axis=axis,
            subset=subset,
            style=sides.style or style,
            item=item or _item(sides, own_id, index),
            strength=sides.strength,
            annotators=sides.annotators,
        )


def _sides(row: Row, layout: Layout) -> list[Sides]:
    if layout.name == WINNER:
        return with_opinions(row, parse_winner(row, winner_of(row, layout.winners)))
    return with_opinions(row, _PARSERS[layout.name](row, layout.label))


def _check_characters(pairs: Sequence[Sides]) -> None:
    """Refuse text that isn't Unicode (half of a surrogate pair): no tokenizer reads it."""
    for sides in pairs:
        for message in sides.prompt + sides.chosen + sides.rejected:
            try:
                message.content.encode()
            except UnicodeEncodeError as error:
                raise MalformedCell(f"text that is not valid Unicode: {error.reason}") from None


def _item(sides: Sides, own_id: str | None, index: int) -> str | None:
    return None if sides.item is None else f"{own_id or f'row {index}'}/{sides.item}"


def _name(cell: Any) -> str | None:
    """A cell that names something, as text; None where it is empty."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, (str, int)):
        raise MalformedCell(f"{type(cell).__name__} where a name is expected")
    return str(cell).encode(errors="replace").decode()


def _readable_name(cell: Any) -> str | None:
    """A cell as a name; None where it is none."""
    try:
        return _name(cell)
    except MalformedCell:
        return None


def _plain_name(cell: Any) -> str | None:
    return cell if isinstance(cell, str) and cell else None


def _look_up(row: Row, path: str) -> Any:
    """A column by name or by dotted path into nested mappings; None where it isn't there."""
    if path in row:
        return row[path]
    cell: Any = row
    for step in path.split("."):
        if not isinstance(cell, Mapping) or step not in cell:
            return None
        cell = cell[step]
    return cell


def _check_columns(sample: Sequence[Row], columns: Mapping[str, str], found: list[str]) -> None:
    unknown = sorted(set(columns) - _MAPPABLE)
    if unknown:
        raise DatasetRefused(
            f"dataset.columns maps {', '.join(unknown)}, which no layout has", f"known names: {', '.join(sorted(_MAPPABLE))}"
        )
    for ours, theirs in columns.items():
        if theirs and all(_look_up(row, theirs) is None for row in sample):
            raise DatasetRefused(
                f"dataset.columns maps {ours} to {theirs!r}, which the first rows don't have",
                f"found columns: {', '.join(found)}",
            )


def _looks_like(name: str, rows: Sequence[Row], present: set[str]) -> bool:
    """Whether cells are what a layout has, where its columns alone don't tell it from another."""
    cells = [(row.get("chosen"), row.get("rejected")) for row in rows]
    if name == "rmbench":
        return "num_correct" not in present and all(
            is_text_list(c) and is_text_list(r) and len(c) == len(r) > 1 for c, r in cells
        )
    if name == "rewardbench":
        listed = any(is_text_list(c) or is_text_list(r) for c, r in cells)
        return listed or {"chosen_model", "rejected_model", "subset"} <= present
    if name == "ultrafeedback":
        return any(is_message_list(c) and is_message_list(r) for c, r in cells)
    if name == "anthropic":
        return "prompt" not in present and any(is_transcript(c) and is_transcript(r) for c, r in cells)
    return True


def _same_styles(chosen: Any, rejected: Any) -> bool:
    return bool(is_text_list(chosen) and is_text_list(rejected) and len(chosen) == len(rejected) > 1)
