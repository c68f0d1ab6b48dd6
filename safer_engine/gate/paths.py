"""Paths to facts of report.json: `evaluation.groups[axis=safety].accuracy`, `features[safety_feature=true,salience<0]`.

A step is a key. Square brackets choose items of a list by their fields: `=`, `!=`, `<`, `<=`, `>`, `>=` against a number, `true`,
`false`, `null`, or a text, in which `*` stands for any characters. A text with other than plain characters goes in double quotes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

_KEY = re.compile(r'[A-Za-z_][\w-]*|"(?:[^"\\]|\\.)*"')
_CONDITION = re.compile(r'\s*([A-Za-z_]\w*)\s*(<=|>=|!=|=|<|>)\s*("(?:[^"\\]|\\.)*"|[^,\]"]*?)\s*(?=[,\]])')
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
SLICES = frozenset(
    {"groups", "length", "best_of_n", "styles", "style_matrices", "on_audited_pairs", "retrained", "margins", "by_axis"}
)
"""Lists of slices of the data: there an `axis` or `subset` that is not mentioned must be null, the whole."""

Value = bool | float | str | None


@dataclass(frozen=True)
class Condition:
    """What a field of an item must be."""

    field: str
    sign: str
    value: Value

    def holds(self, item: dict[str, Any]) -> bool:
        """Whether an item meets it. A field that is missing or null meets only `= null`, and `!=` of anything else."""
        found = item.get(self.field)
        if self.sign in ("=", "!="):
            return self._equal(found) == (self.sign == "=")
        if isinstance(found, bool) or not isinstance(found, int | float) or not isinstance(self.value, float):
            return False
        low, high = (found, self.value) if self.sign[0] == "<" else (self.value, found)
        return low < high or (len(self.sign) == 2 and low == high)

    def _equal(self, found: object) -> bool:
        if isinstance(self.value, str) and isinstance(found, str):
            return fnmatchcase(found, self.value)
        return found == self.value and isinstance(found, bool) == isinstance(self.value, bool)


@dataclass(frozen=True)
class Step:
    """A key, and for a list the conditions on its items (None: no brackets)."""

    key: str
    conditions: tuple[Condition, ...] | None

    def chooses(self, item: object) -> bool:
        """Whether an item of the list is meant."""
        if not isinstance(item, dict):
            return not self.conditions
        named = {condition.field for condition in self.conditions or ()}
        if self.key in SLICES and any(item.get(name) is not None for name in ("axis", "subset") if name not in named):
            return False
        return all(condition.holds(item) for condition in self.conditions or ())


def parse_path(text: str) -> tuple[Step, ...]:
    """The steps of a path. Raises ValueError, which says what is wrong and where."""
    steps: list[Step] = []
    place = 0
    while True:
        found = _KEY.match(text, place)
        if found is None:
            raise ValueError(
                f"{text!r} has no key at character {place + 1}: write a path like evaluation.groups[axis=safety].accuracy"
            )
        place = found.end()
        conditions = None
        if text[place : place + 1] == "[":
            conditions, place = _conditions(text, place + 1)
        steps.append(Step(_plain(found.group()), conditions))
        if place == len(text):
            return tuple(steps)
        if text[place] != ".":
            raise ValueError(f"{text!r} has {text[place]!r} at character {place + 1}, where a dot or the end should be")
        place += 1


def _conditions(text: str, place: int) -> tuple[tuple[Condition, ...], int]:
    found: list[Condition] = []
    if text[place : place + 1] == "]":
        return (), place + 1
    while True:
        match = _CONDITION.match(text, place)
        if match is None:
            raise ValueError(f"{text!r} has no condition like axis=safety at character {place + 1}")
        field, sign, raw = match.groups()
        value = _value(raw)
        if sign not in ("=", "!=") and not isinstance(value, float):
            raise ValueError(f"{text!r}: {field}{sign} needs a number")
        found.append(Condition(field, sign, value))
        place = match.end() + 1
        if text[match.end()] == "]":
            return tuple(found), place


def _value(raw: str) -> Value:
    if raw in _WORDS:
        return _WORDS[raw]
    if _NUMBER.fullmatch(raw):
        return float(raw)
    return _plain(raw)


def _plain(raw: str) -> str:
    if not raw.startswith('"'):
        return raw
    try:
        return str(json.loads(raw))
    except json.JSONDecodeError as error:
        raise ValueError(f"{raw} is not a text in quotes: {error.msg}") from None
