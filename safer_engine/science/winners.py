"""What the values of a winner column mean: which of two responses is better, a tie, or nothing.

Words that name a side or a tie speak for themselves (`a`, `model_b`, `Response A`, `tie`). Numbers do not: 1 is the second of
(0, 1) and the first of (1, 2). Which it is follows from the other numbers in the first rows, or is said (`DatasetSpec.winners`).
A value may also be the name of the winning model, where the row names both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from safer_engine.errors import DatasetRefused
from safer_engine.science.messages import MalformedCell

Winner = Literal["a", "b", "tie"]
Row = Mapping[str, Any]

_TIES = frozenset(
    {"tie", "tied", "draw", "equal", "same", "both", "neither", "both_good", "both_bad", "bothbad", "tie (bothbad)"}
)
_NAMED = re.compile(r"(?:(?:response|answer|completion|output|model|assistant|candidate|option)[ _-]?)?([ab0-9])")
_NUMBERINGS: dict[str, dict[str, Winner]] = {
    "0": {"0": "a", "1": "b"},
    "01": {"0": "a", "1": "b"},
    "12": {"1": "a", "2": "b"},
    "2": {"1": "a", "2": "b"},
}
"""What digits mean, by all those that occur. Other sets are open: 1 alone, or three numbers."""
_LETTERS: dict[str, Winner] = {"a": "a", "b": "b"}
_OTHER: dict[Winner, Winner] = {"a": "b", "b": "a"}
_SHOWN, _LONGEST = 8, 40
_HINT = (
    "say what each value means in dataset.winners (for apply: --winner VALUE=a), for example {1: a, 2: b, 0: tie}: "
    "a where response_a is better, b where response_b is, or tie"
)


@dataclass(frozen=True)
class Winners:
    """How a winner column is read.

    Attributes:
        given: what was said about values, by value without case; it goes before all else.
        numbers: what digits mean, alone or after a word (`response_1`).
        spelling: values that were given or seen, as they are written.
    """

    given: Mapping[str, Winner] = field(default_factory=dict)
    numbers: Mapping[str, Winner] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)


def learn_winners(rows: Iterable[Row], given: Mapping[str, Winner]) -> Winners:
    """Find out how a dataset's winner column is written.

    Args:
        rows: the first ones, under our column names.
        given: meanings by value; upper and lower case are one.

    Raises:
        DatasetRefused: a value that means nothing, numbers of which several readings are possible, or a value given twice.
    """
    said: dict[str, Winner] = {}
    for value, meaning in given.items():
        if said.setdefault(value.strip().casefold(), meaning) != meaning:
            raise DatasetRefused(f"dataset.winners gives {value!r} two meanings", "upper and lower case are one")
    seen = {text: row for row in rows if (text := _readable(row.get("winner"))) is not None}
    digits = sorted({side for text in seen if text not in said and (side := _side(text)) and side.isdigit()})
    numbers = _NUMBERINGS.get("".join(digits), {})
    if digits and not numbers:
        raise DatasetRefused(
            f"the winner column numbers the responses by {', '.join(digits)}: that can mean several things", _HINT
        )
    spelling = {text: str(row["winner"]).strip() for text, row in seen.items()}
    winners = Winners(said, numbers, {value.strip().casefold(): value.strip() for value in given} | spelling)
    unknown = [spelling[text] for text, row in seen.items() if not _meanings(text, row, winners)]
    if unknown:
        shown = ", ".join(repr(value[:_LONGEST]) for value in sorted(unknown)[:_SHOWN])
        raise DatasetRefused(f"the winner column holds values of no known meaning: {shown}", _HINT)
    return winners


def winner_of(row: Row, winners: Winners) -> Winner | None:
    """Which response of a row is better; None where its winner column is empty.

    Raises:
        MalformedCell: a value of no meaning or of two.
        DatasetRefused: a number that the first rows did not have, so that what they mean is open again.
    """
    text = _text(row.get("winner"))
    if text is None:
        return None
    meanings, value = _meanings(text, row, winners), repr(str(row["winner"])[:_LONGEST])
    if not meanings and winners.numbers and (_side(text) or "").isdigit():
        known = " and ".join(winners.numbers)
        raise DatasetRefused(
            f"the winner column numbers the responses by {known} in the first rows, and later holds {value}", _HINT
        )
    if len(meanings) != 1:
        raise MalformedCell(f"winner is {value}, which has {'two meanings' if meanings else 'no known meaning'}")
    return meanings.pop()


def other_winner(row: Row, winners: Winners) -> Any:
    """The value of the winner column that says the opposite, of the same type and written in the same way.

    Raises:
        ValueError: the row states no preference, or no value is known that says the opposite.
    """
    cell, side = row.get("winner"), winner_of(row, winners)
    text = _text(cell)
    if side not in _OTHER or text is None:
        raise ValueError("its winner column names neither response")
    wanted = _OTHER[side]
    if text in winners.given:
        opposite = _like(_given_opposite(text, wanted, winners), cell)
    elif _side(text) is not None:
        opposite = _swapped(cell, wanted, winners)
    else:
        opposite = row[f"model_{wanted}"]
    if winner_of({**row, "winner": opposite}, winners) != wanted:
        raise ValueError(f"no value is known that says the opposite of {cell!r}")
    return opposite


def _readable(cell: Any) -> str | None:
    try:
        return _text(cell)
    except MalformedCell:
        return None


def _text(cell: Any) -> str | None:
    """A winner cell as it is compared; None where it is empty."""
    if isinstance(cell, float) and (math.isnan(cell) or cell.is_integer()):
        cell = None if math.isnan(cell) else int(cell)  # an empty cell of a column of numbers is NaN
    if cell is not None and not isinstance(cell, (str, int)):
        raise MalformedCell(f"{type(cell).__name__} where a winner is expected")
    return None if cell is None else str(cell).strip().casefold() or None


def _side(text: str) -> str | None:
    """The letter or digit of a text that names a response."""
    match = _NAMED.fullmatch(text)
    return match[1] if match else None


def _meanings(text: str, row: Row, winners: Winners) -> set[Winner]:
    if text in winners.given:
        return {winners.given[text]}
    found: set[Winner] = {side for side in _OTHER if row.get(f"model_{side}") == row["winner"]}
    if text in _TIES:
        found.add("tie")
    side = _side(text) or ""
    if side in _LETTERS:
        found.add(_LETTERS[side])
    if side in winners.numbers:
        found.add(winners.numbers[side])
    return found


def _given_opposite(text: str, wanted: Winner, winners: Winners) -> str:
    """The value given for the other response; of several, the one that differs in its last character only."""
    opposite = [value for value, meaning in winners.given.items() if meaning == wanted]
    if len(opposite) > 1:
        opposite = [value for value in opposite if value[:-1] == text[:-1]]
    if len(opposite) != 1:
        raise ValueError(f"dataset.winners does not say which value is the opposite of {text!r}")
    return winners.spelling[opposite[0]]


def _swapped(cell: Any, wanted: Winner, winners: Winners) -> Any:
    """A value that ends in a letter or digit of one response, with that of the other."""
    last = str(_text(cell))[-1]
    other = wanted if last in _LETTERS else next((digit for digit, side in winners.numbers.items() if side == wanted), last)
    if not isinstance(cell, str):
        return _like(other, cell)
    bare = cell.rstrip()
    return bare[:-1] + (other.upper() if bare[-1].isupper() else other) + cell[len(bare) :]


def _like(text: str, cell: Any) -> Any:
    if isinstance(cell, bool):
        return text.casefold() == "true"
    return text if isinstance(cell, str) else type(cell)(text)
