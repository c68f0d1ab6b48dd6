"""Review tasks for Label Studio, and decisions back from what it exports.

Reviewers see two answers as A and B: which is which depends on a hash of the row, so the label is not given away, and neither
is the suspicion. What comes back is somebody's file: it is read strictly, and refused where a task is not of the audit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from safer_engine.edit_lines import EditLine, read_edit_lines
from safer_engine.errors import InputRefused
from safer_engine.spec_suspicion import PairDecision

if TYPE_CHECKING:
    from safer_engine.spec import DatasetSpec

CONFIG = """<View>
  <Header value="Conversation"/>
  <Text name="prompt" value="$prompt"/>
  <Header value="Answer A"/>
  <Text name="answer_a" value="$answer_a"/>
  <Header value="Answer B"/>
  <Text name="answer_b" value="$answer_b"/>
  <Choices name="better" toName="prompt" choice="single" required="true" showInline="true">
    <Choice value="A is better"/>
    <Choice value="B is better"/>
    <Choice value="Cannot tell"/>
  </Choices>
</View>
"""
"""Labeling configuration that the tasks and `decisions_back` are made for."""
_CHOICES = {"A is better": True, "B is better": False, "Cannot tell": None}
_MOST_BYTES = 1 << 30
_BY = 80
_HINT = "export the project from Label Studio as JSON or JSON-MIN, with the configuration that came with the tasks"


@dataclass(frozen=True)
class Tasks:
    """Review tasks, most doubtful first; `several`: rows that hold several pairs, which are left out."""

    tasks: list[dict[str, Any]]
    several: int


def review_tasks(edits: Path, dataset: DatasetSpec, actions: frozenset[str], most: int | None = None) -> Tasks:
    """Rows of an audit to be looked at, as Label Studio imports them. They hold the dataset's texts.

    Args:
        edits: edits.jsonl of the audit.
        dataset: the dataset that was audited.
        actions: recommendations to be looked at. most: so many, the most doubtful ones.

    Raises:
        InputRefused: nothing is to be looked at, or the edits cannot be read. DatasetRefused: it is not the audited dataset.
    """
    from safer_engine.edit_files import require_same_rows
    from safer_engine.science.pair_formats import read_pairs
    from safer_engine.sources.datasets import resolve_dataset

    lines = read_edit_lines(edits)
    resolved = resolve_dataset(dataset)
    surveyed = require_same_rows(lines, resolved, dataset)
    several = {entry.row for entry in surveyed.entries if entry.part}
    chosen = [row for row, line in enumerate(lines) if line.action in actions]
    asked = sorted((row for row in chosen if row not in several), key=lambda row: (-(lines[row].suspicion or 0.0), row))[:most]
    if not asked:
        raise InputRefused(f"no row of the audit is to be looked at ({', '.join(sorted(actions))})", "name other actions")
    wanted = set(asked)
    texts = {
        entry.row: ([turn.as_dict() for turn in pair.prompt], _text(pair.chosen), _text(pair.rejected))
        for entry, pair in zip(surveyed.entries, read_pairs(resolved.rows(), surveyed.layout), strict=True)
        if entry.row in wanted
    }
    return Tasks([_task(lines[row], *texts[row]) for row in asked], sum(row in several for row in chosen))


def _text(turns: Sequence[Any]) -> str:
    """An answer; of one that goes on over several turns, who says what."""
    if len(turns) == 1:
        return str(turns[0].as_dict()["content"])
    return _spoken([turn.as_dict() for turn in turns])


def _spoken(turns: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _task(line: EditLine, prompt: list[dict[str, Any]], chosen: str, rejected: str) -> dict[str, Any]:
    first, second = (chosen, rejected) if chosen_is_a(line.content_digest) else (rejected, chosen)
    data = {"prompt": _spoken(prompt), "answer_a": first, "answer_b": second, "pair_id": line.pair_id}
    return {"data": {**data, "axis": line.axis, "content_digest": line.content_digest}}


def chosen_is_a(content_digest: str) -> bool:
    """Whether answer A is the row's chosen one: a coin that every reader of the row tosses alike."""
    return hashlib.sha256(f"safer-audit label-studio {content_digest}".encode()).digest()[0] % 2 == 0


class _Lax(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Data(_Lax):
    content_digest: str


class _Value(_Lax):
    choices: list[str] = []


class _Result(_Lax):
    from_name: str = ""
    type: str = ""
    value: _Value = _Value()


class _Annotation(_Lax):
    result: list[_Result] = []
    was_cancelled: bool = False
    completed_by: int | str | dict[str, Any] | None = None


class _Task(_Lax):
    data: _Data
    annotations: list[_Annotation]


class _Flat(_Lax):
    """A line of JSON-MIN: one annotation."""

    content_digest: str
    better: str | None = None
    annotator: int | str | None = None


@dataclass(frozen=True)
class Decided:
    """Decisions, one a row.

    Attributes:
        open: rows that nobody could tell, or that reviewers disagree on (`disagreed` of them).
        skipped: annotations without an answer.
    """

    decisions: list[PairDecision]
    disagreed: int
    skipped: int

    @property
    def open(self) -> int:
        """Decisions that leave the label open."""
        return sum(one.wrong is None for one in self.decisions)


def decisions_back(export: Path, edits: Path) -> Decided:
    """Decisions from a project's export, JSON or JSON-MIN.

    Where several people looked at a row, it is decided where all who could tell say the same; else it is left open, and counted.

    Raises:
        InputRefused: it is no such export, an answer is none of the configuration's, or a task is not of this audit.
    """
    known = {line.content_digest for line in read_edit_lines(edits)}
    answers: dict[str, list[tuple[bool | None, str]]] = {}
    skipped = 0
    for digest, choice, by in _annotations(export):
        if digest not in known:
            raise InputRefused(
                f"a task of {export.name} is no row of this audit", "give the edits.jsonl that the tasks were made of"
            )
        if choice is None:
            skipped += 1
            continue
        if choice not in _CHOICES:
            raise InputRefused(f"{export.name}: {choice[:40]!r} is none of the answers {', '.join(_CHOICES)}", _HINT)
        a_better = _CHOICES[choice]
        wrong = None if a_better is None else a_better != chosen_is_a(digest)
        answers.setdefault(digest, []).append((wrong, by))
    if not answers:
        raise InputRefused(f"{export.name} holds no answer", _HINT)
    told = {digest: {wrong for wrong, _ in found if wrong is not None} for digest, found in answers.items()}
    decisions = [
        PairDecision(
            content_digest=digest,
            wrong=next(iter(told[digest])) if len(told[digest]) == 1 else None,
            by=", ".join(Counter(by for _, by in found if by))[:_BY],
        )
        for digest, found in sorted(answers.items())
    ]
    return Decided(decisions, sum(len(each) > 1 for each in told.values()), skipped)


def _annotations(export: Path) -> Iterator[tuple[str, str | None, str]]:
    """Row, answer (None: skipped) and who, of each annotation."""
    for task in _read(export):
        if isinstance(task, _Flat):
            yield task.content_digest, task.better or None, str(task.annotator or "")
            continue
        for each in task.annotations:
            chosen = [one.value.choices for one in each.result if (one.from_name, one.type) == ("better", "choices")]
            if len(chosen) > 1 or (chosen and len(chosen[0]) > 1):
                raise InputRefused(f"{export.name}: an annotation has two answers", _HINT)
            answer = chosen[0][0] if chosen and chosen[0] and not each.was_cancelled else None
            yield task.data.content_digest, answer, _who(each.completed_by)


def _who(by: int | str | dict[str, Any] | None) -> str:
    return str(by.get("email") or by.get("id") or "") if isinstance(by, dict) else str(by or "")


def _read(export: Path) -> list[_Task] | list[_Flat]:
    try:
        if export.stat().st_size > _MOST_BYTES:
            raise InputRefused(f"{export} has more than {_MOST_BYTES:,} bytes", "export fewer tasks at a time")
        found = json.loads(export.read_bytes())
        if not isinstance(found, list):
            raise InputRefused(f"{export.name} is no list of tasks", _HINT)
        if all(isinstance(task, dict) and "annotations" in task for task in found):
            return TypeAdapter(list[_Task]).validate_python(found)
        return TypeAdapter(list[_Flat]).validate_python(found)
    except OSError as error:
        raise InputRefused(f"cannot read {export}: {error.strerror}", "name the file that Label Studio exported") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        raise InputRefused(f"{export.name} is not as Label Studio writes it: {place}", _HINT) from None
    except (ValueError, RecursionError):
        raise InputRefused(f"{export.name} is no JSON", _HINT) from None
