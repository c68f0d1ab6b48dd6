"""The lines of `edits.jsonl`: one per input row, in order (docs/formats.md lists the fields)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_engine.errors import ArtifactError, InputRefused
from safer_engine.science.edits import ACTIONS, BOTH_ORDERS, CONTESTED, Action, Candidate, EditRules, recommend

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.spec import EditSpec

FIELDS = (
    "pair_id", "content_digest", "group", "axis", "status", "reason", "action", "suspicion", "suspicion_kind", "signals",
    "pair_score", "reward_margin", "evidence",
)  # fmt: skip
"""Fields of a line, in order; all are always there."""
FIGURES = ("suspicion", "pair_score", "reward_margin")
"""Fields that hold a number or null."""
SCORED = "scored"
NOT_SCORED = "not_scored"


@dataclass(frozen=True)
class EditLine:
    """What `apply` needs of a line."""

    pair_id: str
    content_digest: str
    axis: str
    scored: bool
    action: Action
    suspicion: float | None
    both_orders: bool
    disputed: bool = False

    def candidate(self, *, several: bool = False) -> Candidate:
        """The line as a row to recommend an action for; `several`: the row holds several pairs."""
        return Candidate(self.pair_id, self.axis, self.scored, self.suspicion, self.both_orders, several, disputed=self.disputed)


def edit_lines(rows: pa.Table, pairs: pa.Table, scores: pa.Table, spec: EditSpec) -> list[dict[str, Any]]:
    """The lines as JSON values.

    A row that gave several pairs takes the figures of its most doubtful pair.

    Args:
        rows: `PairSet.rows`.
        pairs: `PairSet.pairs` (pair_id, row, both_orders are read).
        scores: `PairScores.scores`.

    Raises:
        ArtifactError: a scored row has no scored pair.
    """
    worst = _worst_pairs(pairs, scores)
    lines = [_line(row, worst) for row in rows.to_pylist()]
    both_orders = _rows_in_both_orders(pairs)
    several = _rows_of_several(rows, pairs)
    candidates = [
        Candidate(
            line["pair_id"],
            line["axis"],
            line["status"] == SCORED,
            line["suspicion"],
            row in both_orders,
            row in several,
            worst[row]["suspicion_base"] if row in worst else None,
            bool(worst[row]["disputed_by"]) if row in worst else False,
        )
        for row, line in zip(rows["row"].to_pylist(), lines, strict=True)
    ]
    actions = recommend(candidates, EditRules(**spec.model_dump()))
    for line, candidate, action in zip(lines, candidates, actions, strict=True):
        line["action"] = action
        if candidate.both_orders and candidate.scored:
            line["reason"] = BOTH_ORDERS
        elif candidate.disputed and candidate.scored:
            line["reason"] = CONTESTED
    return lines


def read_edit_lines(path: Path) -> list[EditLine]:
    """The lines of a file. Raises InputRefused, naming the line, for anything that is not a line of `edits.jsonl`."""
    lines = []
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                if raw.strip():
                    lines.append(_parse(raw, f"{path.name}:{number}"))
    except OSError as error:
        raise InputRefused(f"cannot read {path}: {error.strerror or error}", "give the edits.jsonl of an audit") from error
    if not lines:
        raise InputRefused(f"{path} has no lines", "give the edits.jsonl of an audit")
    return lines


def _worst_pairs(pairs: pa.Table, scores: pa.Table) -> dict[int, dict[str, Any]]:
    row_of = dict(zip(pairs["pair_id"].to_pylist(), pairs["row"].to_pylist(), strict=True))
    worst: dict[int, dict[str, Any]] = {}
    for score in _records(scores):
        row = row_of.get(score["pair_id"])
        if row is None:
            raise ArtifactError(f"pair {score['pair_id']} has a score but is not in the pair set")
        if row not in worst or _doubt(score) < _doubt(worst[row]):
            worst[row] = score
    return worst


def _records(scores: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in scores.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


def _doubt(score: dict[str, Any]) -> tuple[float, str]:
    suspicion = score["suspicion"]
    return (1.0 if suspicion is None else -float(suspicion), str(score["pair_id"]))


def _rows_in_both_orders(pairs: pa.Table) -> set[int]:
    return {row for row, both in zip(pairs["row"].to_pylist(), pairs["both_orders"].to_pylist(), strict=True) if both}


def _rows_of_several(rows: pa.Table, pairs: pa.Table) -> set[int]:
    """Rows that hold several pairs, used or not: their pairs' ids are not the row's own."""
    own = dict(zip(rows["row"].to_pylist(), rows["pair_id"].to_pylist(), strict=True))
    named = zip(pairs["row"].to_pylist(), pairs["pair_id"].to_pylist(), strict=True)
    return {row for row, pair_id in named if row in own and own[row] != pair_id}


def _line(row: dict[str, Any], worst: dict[int, dict[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = dict.fromkeys(FIELDS)
    line |= {name: row[name] for name in ("pair_id", "content_digest", "group", "axis", "status", "reason")}
    line |= {"action": "keep", "signals": {}, "evidence": []}
    if row["status"] != SCORED:
        return line
    score = worst.get(row["row"])
    if score is None:
        raise ArtifactError(f"row {row['row']} counts as scored but no pair of it has a score")
    line |= {name: score[name] for name in ("suspicion", "suspicion_kind", "pair_score", "reward_margin", "evidence")}
    line["signals"] = {name.removeprefix("signal_"): score[name] for name in score if name.startswith("signal_")}
    if line["suspicion"] is None:
        line["suspicion_kind"] = None
    return line


def _parse(raw: bytes, where: str) -> EditLine:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise InputRefused(f"{where} is not JSON: {error}", _HINT) from error
    missing = [name for name in FIELDS if not isinstance(value, dict) or name not in value]
    if missing:
        raise InputRefused(f"{where} lacks {', '.join(missing)}", _HINT)
    if value["action"] not in ACTIONS:
        raise InputRefused(f"{where}: action {value['action']!r} is not one of {', '.join(ACTIONS)}", _HINT)
    if value["status"] not in (SCORED, NOT_SCORED):
        raise InputRefused(f"{where}: status {value['status']!r} is not {SCORED} or {NOT_SCORED}", _HINT)
    suspicion = value["suspicion"]
    if suspicion is not None and not (type(suspicion) in (int, float) and 0 <= suspicion <= 1):
        raise InputRefused(f"{where}: suspicion {suspicion!r} is neither null nor in [0, 1]", _HINT)
    return EditLine(
        pair_id=str(value["pair_id"]),
        content_digest=str(value["content_digest"]),
        axis=str(value["axis"]),
        scored=value["status"] == SCORED,
        action=value["action"],
        suspicion=None if suspicion is None else float(suspicion),
        both_orders=value["status"] == SCORED and value["reason"] == BOTH_ORDERS,
        disputed=value["status"] == SCORED and value["reason"] == CONTESTED,
    )


_HINT = "only `action` may be changed by hand; keep one line per input row, in order"
