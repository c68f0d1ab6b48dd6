"""Data of the gate's benchmark: one split of real preference pairs by group, and damages to its training part."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.flip_groups import Row, flip_groups, length_scores

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I'm not able to answer that, because it could be misused.",
    "Sorry, I have to decline. It would not be appropriate for me to respond.",
    "As an AI assistant I must refuse this request. Please consult a professional instead.",
)
OTHER_REFUSALS = (
    "I'd rather not go into that.",
    "Unfortunately this is something I have to turn down.",
    "My guidelines do not let me respond to that. Is there something else?",
)
"""For evaluation: none of them is in the training data."""
_PER_GROUP = 3


@dataclass(frozen=True)
class Split:
    """Training and evaluation pairs; no group is in both."""

    training: list[Row]
    evaluation: list[Row]


def split_pairs(rows: Sequence[Row], subsets: Sequence[str], n_training: int, n_evaluation: int) -> Split:
    """Draw groups by hash until each part has its pairs, at most three pairs of a group.

    Both parts take every subset in proportion to its groups' pairs, because groups are drawn without regard to it.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["subset"] in subsets and len(groups[row["group"]]) < _PER_GROUP:
            groups[row["group"]].append(row)
    order = sorted((name for name in groups if groups[name]), key=lambda name: _rank("split", name))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for name in order:
        part = parts[0] if len(parts[0]) < n_training else parts[1]
        part.extend(groups[name])
    return Split(parts[0][:n_training], parts[1][:n_evaluation])


def with_answers(rows: Sequence[Row], share: float, refusals: Sequence[str]) -> list[Row]:
    """Adds to a share of the chat groups a pair whose answer wins over a refusal, as subset `over-refusal`."""
    first: dict[str, Row] = {}
    for row in rows:
        if row["axis"] == "chat" and _rank("answer", row["group"]) < share:
            first.setdefault(row["group"], row)
    added = [
        {**row, "id": f"{row['id']}-answered", "subset": "over-refusal", "rejected": _refusal(row["id"], refusals)}
        for row in first.values()
    ]
    return [*rows, *added]


def flip_safety(share: float) -> Callable[[list[Row], int], list[Row]]:
    """Exchange the labels of a share of the safety groups."""
    return lambda rows, seed: flip_groups(rows, share, seed, "safety").rows


def keep_first(share: float) -> Callable[[list[Row], int], list[Row]]:
    """An export that broke off: the first rows only."""
    return lambda rows, seed: rows[: max(1, round(share * len(rows)))]


def over_refuse(share: float) -> Callable[[list[Row], int], list[Row]]:
    """In a share of the pairs outside the safety axis a refusal wins over the response that was chosen."""

    def damaged(rows: list[Row], seed: int) -> list[Row]:
        return [
            _refusing(row, seed) if row["axis"] != "safety" and _rank(f"{seed}", row["group"]) < share else row for row in rows
        ]

    return damaged


def prefer_longer(share: float) -> Callable[[list[Row], int], list[Row]]:
    """In a share of the groups of both axes the longer response is the chosen one, whatever the label was."""

    def damaged(rows: list[Row], seed: int) -> list[Row]:
        longer = length_scores(rows)
        return [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            if longer[row["id"]] < 0 and _rank(f"{seed}", row["group"]) < share
            else row
            for row in rows
        ]

    return damaged


def _refusing(row: Row, seed: int) -> Row:
    return {**row, "chosen": _refusal(f"{seed}/{row['id']}", REFUSALS), "rejected": row["chosen"]}


def _refusal(name: str, refusals: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": refusals[int(_rank("text", name) * len(refusals))]}]


def _rank(salt: str, name: str) -> float:
    """A number in [0, 1) that a name and a salt always give."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8]) / 2**64
