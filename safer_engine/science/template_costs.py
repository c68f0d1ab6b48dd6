"""What a step of a chat template costs, so that its work can be bounded before it is done.

Templates come with models and run as code. Each rendering has a budget of units; every step pays for the values it is about to
work on: one unit for a character of text or a number, a few for an element of a list, some for the step itself. Values are
weighed in full, as if what is nested or repeated in them were written out, since that is what comparing or writing them takes.
All steps but a few need time and memory in proportion to the values they are given; those few (products, padding, replacing,
joining, formatting) pay for what comes out. So work and memory are bounded by the budget, and the same template stops at the
same step on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sized, ValuesView
from typing import Any

STEP = 16
"""Units of entering a block of statements, or of a call."""
_ELEMENT = 4
_DEEPEST = 100
_MOST_BITS = 2_000
_WIDEST = 999
_LONGEST_NUMBER = 400
_MOST_STRIPPED = 256
_VIEWS = (KeysView, ValuesView, ItemsView)
_CONVERSION = re.compile(r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class TemplateOverrun(RuntimeError):
    """A chat template asks for more work, or for larger values, than any sensible one."""


class Budget:
    """What is left for a rendering. `left` is set before each."""

    def __init__(self) -> None:
        self.left = 0

    def charge(self, units: int) -> None:
        """Pay for a step. Raises TemplateOverrun when the budget does not cover it."""
        self.left -= units
        if self.left < 0:
            raise TemplateOverrun("does not end within the work that any sensible one takes")

    def weighed(self, value: Any) -> Any:
        """Pay for a value in full; returns it."""
        kind = type(value)
        if kind is str:
            self.charge(len(value) + 1)
        elif kind is int:
            self.charge(1 + (value.bit_length() >> 6))
        elif kind is float or kind is bool or value is None:
            self.charge(1)
        else:
            self._written_out(value)
        return value

    def operands(self, args: Iterable[Any], named: Mapping[str, Any]) -> None:
        """Pay for all arguments of a call in full."""
        for value in args:
            self.weighed(value)
        for value in named.values():
            self.weighed(value)

    def sized(self, value: Any) -> Any:
        """Pay for the characters or elements of a value, not for what is in these; returns it."""
        if isinstance(value, Sized):
            self.charge(len(value) * (1 if isinstance(value, str) else _ELEMENT))
        return value

    def key(self, value: Any) -> Any:
        """Pay for a key of a mapping; returns it. Raises TypeError for one that is neither text nor a number."""
        if isinstance(value, (tuple, frozenset)):
            raise TypeError(f"a {type(value).__name__} can't be looked up in a chat template")
        return self.weighed(value)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each paid for when it is taken."""
        for item in items:
            self.charge(_ELEMENT)
            yield item

    def settled(self, result: Any) -> Any:
        """The result of a step: generators become lists, lists are paid for."""
        if isinstance(result, Iterator):
            result = list(self.counted(result))
        elif isinstance(result, list):
            self.charge(_ELEMENT * len(result))
        return result

    def _written_out(self, value: Any) -> None:
        """Pay level by level, so that neither depth nor repetition is walked before it is paid for."""
        level, depth = [value], 0
        while level:
            if depth > _DEEPEST:
                raise TemplateOverrun(f"nests values more than {_DEEPEST} deep")
            following: list[Any] = []
            for one in level:
                if isinstance(one, str):
                    self.charge(len(one) + 1)
                elif isinstance(one, Mapping):
                    self.charge(2 * _ELEMENT * (len(one) + 1))
                    following += [*one.keys(), *one.values()]
                elif isinstance(one, (list, tuple, *_VIEWS)):
                    self.charge(_ELEMENT * (len(one) + 1))
                    following += one
                elif isinstance(one, range):  # looking for something else than a number tries them all
                    self.charge(_ELEMENT * len(one))
                else:
                    self.charge(1 + (one.bit_length() >> 6 if isinstance(one, int) else 0))
            level, depth = following, depth + 1


def combined(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Pay for `left operator right`, for + - * ** %. Raises TemplateOverrun."""
    if operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.charge(_ELEMENT * (len(left) + len(right)))
        return
    if operator == "*":
        _multiplied(budget, left, right)
        return
    budget.weighed(left)
    budget.weighed(right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > _MOST_BITS:
        raise TemplateOverrun("makes numbers that are too large")
    if operator == "%" and isinstance(left, str):
        percent_formatted(budget, left, right)


def _multiplied(budget: Budget, left: Any, right: Any) -> None:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            budget.charge(1 + len(many) * max(times, 0) * (1 if isinstance(many, str) else _ELEMENT))
            return
    budget.weighed(left)
    budget.weighed(right)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_BITS:
        raise TemplateOverrun("makes numbers that are too large")


def percent_formatted(budget: Budget, text: str, values: Any) -> None:
    """Pay for `text % values`. Raises TemplateOverrun for wide fields, ValueError for keys in brackets of their own."""
    place, fields = text.find("%"), 0
    while place >= 0:
        place, fields = place + 1, fields + 1
        if text[place : place + 1] == "(":
            end = text.find(")", place)
            if end < 0 or "(" in text[place + 1 : end]:
                raise ValueError("incomplete format key")
            place = end + 1
        found = _CONVERSION.match(text, place)
        assert found is not None
        for width in found.groups():
            if width and (width == "*" or len(width) > len(str(_WIDEST))):
                raise TemplateOverrun("formats a field that is too wide")
        place = text.find("%", found.end() + (text[found.end() : found.end() + 1] == "%"))
    for _field in range(fields if isinstance(values, Mapping) else min(fields, 1)):
        budget.weighed(values)
    budget.charge(_WIDEST * fields)


def field_width(spec: str) -> None:
    """Raise TemplateOverrun for a format specification with a wide field."""
    if re.search(rf"\d{{{len(str(_WIDEST)) + 1},}}", spec):
        raise TemplateOverrun("formats a field that is too wide")


def padded(budget: Budget, width: Any = 80, *_: Any) -> None:
    """Pay for text that is filled up to a width."""
    budget.charge(width if isinstance(width, int) and width > 0 else 0)


def replaced(budget: Budget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    """Pay for text in which every `old` becomes `new`."""
    budget.charge(str(text).count(str(old)) * len(str(new)))


def joined(budget: Budget, separator: Any, items: Any) -> None:
    """Pay for the separators between items; the items themselves are paid for as operands."""
    budget.charge(len(str(separator)) * (len(items) if isinstance(items, Sized) else 0))


def stripped(budget: Budget, characters: Any = None, *_: Any) -> None:
    """Refuse a long list of characters to strip, each of which is looked for at every place."""
    if isinstance(characters, str) and len(characters) > _MOST_STRIPPED:
        raise TemplateOverrun("strips too many kinds of characters")


def ordered(budget: Budget, items: Any, *_: Any, **__: Any) -> None:
    """Pay for a sort beyond the one pass that is paid for: as many again as its comparisons take."""
    if isinstance(items, Sized):
        for _pass in range(math.ceil(math.log2(len(items) + 1))):
            budget.weighed(items)


def _indented(budget: Budget, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    step = len(width) if isinstance(width, str) else max(int(width), 0)
    budget.charge((str(text).count("\n") + 1) * step)


def _as_json(budget: Budget, value: Any, ensure_ascii: Any = False, indent: Any = None, *more: Any, **named: Any) -> None:
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    before = budget.left
    budget.weighed(value)
    separators = sum(len(str(part)) for part in (*more, *named.values()))
    budget.charge((before - budget.left) * (max(step, 0) * _DEEPEST // 10 + separators))


def _cut_into(budget: Budget, items: Any, *more: Any, **named: Any) -> None:
    for count in (*more, *named.values()):  # how many, and what fills up the rest
        budget.charge(_ELEMENT * count if isinstance(count, int) and count > 0 else 0)


def looked_up(budget: Budget, items: Any, more: Iterable[Any]) -> None:
    """Pay for paths like `a.b` or `a,b` that are followed in each of the items."""
    steps = sum(path.count(".") + path.count(",") for path in more if isinstance(path, str))
    budget.charge(_ELEMENT * steps * (len(items) if isinstance(items, Sized) else 0))


def _as_number(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        raise TemplateOverrun("reads a number that is too long")


def _rounded(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if abs(int(precision)) > _WIDEST:
        raise TemplateOverrun("rounds to too many digits")


def _summed(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise TypeError("a chat template can add up numbers only")


def _percent_filter(budget: Budget, text: Any, *values: Any, **named: Any) -> None:
    percent_formatted(budget, str(text), named or values)


Check = Callable[..., None]
CONSTANT_FILTERS = frozenset({"attr", "count", "d", "default", "first", "last", "length"})
"""Filters that do the same for any value."""
SHALLOW_FILTERS = frozenset({"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
"""Filters that go over the elements, and into none but by a filter or test that pays for itself."""
FILTER_CHECKS: dict[str, Check] = {
    "batch": _cut_into,
    "center": lambda budget, text, *more, **named: padded(budget, *more, **named),
    "dictsort": ordered,
    "float": _as_number,
    "format": _percent_filter,
    "groupby": ordered,
    "indent": _indented,
    "int": _as_number,
    "join": lambda budget, items, d="", *_, **__: joined(budget, d, items),
    "replace": replaced,
    "round": _rounded,
    "slice": _cut_into,
    "sort": ordered,
    "sum": _summed,
    "tojson": _as_json,
    "trim": lambda budget, text, chars=None: stripped(budget, chars),
    "unique": ordered,
}
"""What a filter takes beside its operands."""
PLAIN_FILTERS = frozenset(
    {"abs", "capitalize", "e", "escape", "filesizeformat", "forceescape", "lower", "max", "min", "safe", "string", "title"}
    | {"truncate", "upper", "urlencode", "wordcount"}
)
"""Filters that take no more than their operands."""
SHALLOW_TESTS = frozenset(
    {"boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer", "iterable", "mapping", "none", "number"}
    | {"sameas", "sequence", "string", "test", "true", "undefined"}
)
"""Tests that look at what a value is, not at all of it."""
TEXT_CHECKS: dict[str, Check] = {
    "center": lambda budget, text, *more: padded(budget, *more),
    "expandtabs": lambda budget, text, tabsize=8: budget.charge(text.count("\t") * max(int(tabsize), 0)),
    "join": joined,
    "ljust": lambda budget, text, *more: padded(budget, *more),
    "lstrip": lambda budget, text, *more: stripped(budget, *more),
    "replace": replaced,
    "rjust": lambda budget, text, *more: padded(budget, *more),
    "rstrip": lambda budget, text, *more: stripped(budget, *more),
    "strip": lambda budget, text, *more: stripped(budget, *more),
    "zfill": lambda budget, text, *more: padded(budget, *more),
}
"""What a method of text takes beside its operands."""
TEXT_METHODS = frozenset(TEXT_CHECKS) | {
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lower", "partition", "removeprefix",
    "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "split", "splitlines", "startswith", "swapcase", "title", "upper",
}  # fmt: skip
LIST_METHODS = frozenset({"copy", "count", "index"})
DICT_METHODS = frozenset({"copy", "get", "items", "keys", "values"})
