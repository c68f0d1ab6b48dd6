"""The lines of a job's `edits.jsonl`, most suspicious first, read from a file on this machine without holding it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.errors import ArtifactError
from service.errors import Malformed
from service.schemas import EditView

Line = dict[str, Any]
SCAN_LINES = 20_000
_FIELDS = EditView.model_fields.keys() - {"decision"}
_CURSOR = re.compile(rb"^edits:(\d{1,12})$")
_SUSPICION = re.compile(rb'"suspicion": (null|[-+.eE0-9]+)')
"""Matches the key only: within a text, both quotes would stand behind a backslash."""


@dataclass(frozen=True)
class EditFilter:
    """Which lines are wanted; all conditions hold together.

    Attributes:
        actions: as recommended; empty: any.
        decided: with a decision, without one, or (None) either.
    """

    actions: frozenset[str] = frozenset()
    axis: str | None = None
    min_suspicion: float | None = None
    decided: bool | None = None

    def takes(self, line: Line, decided: bool) -> bool:
        """Whether a line is wanted."""
        suspicion = line["suspicion"]
        return (
            (not self.actions or line["action"] in self.actions)
            and (self.axis is None or line["axis"] == self.axis)
            and (self.min_suspicion is None or (suspicion is not None and suspicion >= self.min_suspicion))
            and (self.decided is None or self.decided == decided)
        )


@dataclass(frozen=True)
class EditPage:
    """Some lines; `next`: the cursor behind them, None at the end."""

    lines: list[Line]
    next: str | None


class EditRows:
    """One `edits.jsonl`, complete and checked, in a local file."""

    def __init__(self, path: Path, order: array[int]) -> None:
        self._path = path
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def page(self, wanted: EditFilter, decisions: Mapping[str, Any], cursor: str | None, limit: int) -> EditPage:
        """Lines from a cursor on, at most `limit`; a page may be short before the end, where much had to be looked through.

        Raises:
            Malformed: a cursor that no page gave.
        """
        start = at = self._place(cursor)
        stop = min(len(self._order), start + SCAN_LINES)
        found: list[Line] = []
        with self._path.open("rb") as handle:
            while at < stop and len(found) < limit:
                handle.seek(self._order[at])
                line = _parsed(handle.readline())
                at += 1
                if wanted.takes(line, line["pair_id"] in decisions):
                    found.append(line)
        return EditPage(found, _cursor(at) if at < len(self._order) else None)

    def find(self, pair_id: str) -> Line | None:
        """The line of a pair id; None where there is none."""
        needle = json.dumps(pair_id, ensure_ascii=False).encode()
        with self._path.open("rb") as handle:
            for raw in handle:
                if needle in raw and (line := _parsed(raw))["pair_id"] == pair_id:
                    return line
        return None

    def lines(self) -> Iterator[Line]:
        """All lines, in the order of the rows."""
        with self._path.open("rb") as handle:
            yield from map(_parsed, handle)

    def _place(self, cursor: str | None) -> int:
        if cursor is None:
            return 0
        try:
            match = _CURSOR.match(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        except (binascii.Error, ValueError):
            match = None
        if match is None or int(match[1]) > len(self._order):
            raise Malformed("the cursor is not one that a page of these edits gave", "start again without a cursor")
        return int(match[1])


def suspicion_order(path: Path) -> array[int]:
    """Where the lines of a file begin, most suspicious first; those without a suspicion last, equals in the order of the rows."""
    offsets, doubts = array("q"), array("d")
    at = 0
    with path.open("rb") as handle:
        for raw in handle:
            match = _SUSPICION.search(raw)
            offsets.append(at)
            doubts.append(math.inf if match is None or match[1] == b"null" else -float(match[1]))
            at += len(raw)
    return array("q", (offsets[place] for place in sorted(range(len(offsets)), key=doubts.__getitem__)))


def _cursor(place: int) -> str:
    return base64.urlsafe_b64encode(f"edits:{place}".encode()).decode().rstrip("=")


def _parsed(raw: bytes) -> Line:
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not line.keys() >= _FIELDS:
        raise ArtifactError("edits.jsonl holds a line that is none")
    return line
