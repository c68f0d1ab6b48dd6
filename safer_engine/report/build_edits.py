"""The report's section about suspicious pairs and recommended edits."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from safer_engine.artifacts import Edits, PairScores, PairSet
from safer_engine.report.build_doubts import axis_doubts, doubtful_share, suspicion_kind
from safer_engine.report.columns import clipped, finite, maybe_finite, scalars, tally
from safer_engine.report.model import AxisEdits, EditsReport, Evidence, SuspiciousPair
from safer_engine.spec import ReportSpec

_SIGNAL = "signal_"
_EVIDENCE = 8
_REMOVED = ("drop", "flip")
_URGENCY = {"flip": 0, "drop": 0, "review": 1}


def edits_section(pairs: PairSet, scores: PairScores, edits: Edits | None, shown: ReportSpec) -> EditsReport:
    """Suspicion, what is recommended for it, and the most suspicious pairs."""
    lines = _lines(edits)
    actions = _actions(pairs, lines)
    rows = [row for row in scores.scores.to_pylist() if maybe_finite(row["suspicion"], "a suspicion") is not None]
    ranked = sorted(rows, key=lambda row: _order(row, actions))
    removed = [row for row in ranked if actions.get(row["pair_id"]) in _REMOVED]
    not_scored = tally(line["reason"] for line in lines if line["status"] == "not_scored")
    return EditsReport(
        estimator=scores.meta["estimator"],
        suspicion_kind=suspicion_kind(scores),
        axes=axis_doubts(scores, actions),
        doubtful_share=doubtful_share(scores),
        signals=_weights(scores.meta["signals"]),
        left_out={name: str(reason) for name, reason in scores.meta.get("left_out", {}).items()},
        budget=None if edits is None else edits.meta.get("budget"),
        actions=None if edits is None else tally(line["action"] for line in lines),
        not_scored=None if edits is None else not_scored,
        by_axis=_by_axis(lines),
        n_scored=len(ranked),
        n_removed=None if edits is None else len(removed),
        n_removed_undoubted=None if edits is None else sum(_undoubted(_signals(row)) for row in removed),
        pairs=_shown_pairs(pairs, ranked[: shown.pairs], actions, shown.text),
    )


def _lines(edits: Edits | None) -> list[dict[str, Any]]:
    if edits is None:
        return []
    with edits.path("edits.jsonl").open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle if line.strip()]


def _actions(pairs: PairSet, lines: list[dict[str, Any]]) -> dict[str, str]:
    """Action of each pair: that of the input row it came from (a row may give several pairs)."""
    by_name = {line["pair_id"]: line["action"] for line in lines if line["status"] == "scored"}
    rows = pairs.rows
    names = dict(zip(rows.column("row").to_pylist(), rows.column("pair_id").to_pylist(), strict=True))
    found = {}
    for pair_id, row in zip(pairs.pairs.column("pair_id").to_pylist(), pairs.pairs.column("row").to_pylist(), strict=True):
        action = by_name.get(pair_id) or by_name.get(names.get(row, ""))
        if action is not None:
            found[pair_id] = action
    return found


def _order(row: dict[str, Any], actions: dict[str, str]) -> tuple[int, float, str]:
    suspicion = finite(row["suspicion"], f"the suspicion of {row['pair_id']}")
    return (_URGENCY.get(actions.get(row["pair_id"], "keep"), 2), -suspicion, row["pair_id"])


def _weights(signals: dict[str, Any]) -> dict[str, Any]:
    """Weight of each signal that was used."""
    return scalars({name: part["weight"] for name, part in signals.items() if part.get("used", True)})


def _by_axis(lines: list[dict[str, Any]]) -> list[AxisEdits]:
    slices: dict[tuple[str, str | None], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        axis, subset = str(line.get("axis") or "all"), line.get("subset")
        slices[(axis, None)].append(line)
        if subset:
            slices[(axis, str(subset))].append(line)
    return [
        AxisEdits(
            axis=axis,
            subset=subset,
            n=len(part),
            not_scored=sum(line["status"] == "not_scored" for line in part),
            actions=tally(line["action"] for line in part),
        )
        for (axis, subset), part in sorted(slices.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    ]


def _shown_pairs(pairs: PairSet, rows: list[dict[str, Any]], actions: dict[str, str], text: bool) -> list[SuspiciousPair]:
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array([row["pair_id"] for row in rows], pa.string())
    table = pairs.pairs.filter(pc.is_in(pairs.pairs.column("pair_id"), value_set=wanted))
    columns = table.select(["pair_id", "prompt", "chosen", "rejected", "annotators", "both_orders"]).to_pylist()
    known = {row["pair_id"]: row for row in columns}
    return [_pair(row, known[row["pair_id"]], actions.get(row["pair_id"]), text) for row in rows]


def _signals(row: dict[str, Any]) -> dict[str, float | None]:
    return {name.removeprefix(_SIGNAL): maybe_finite(value, name) for name, value in row.items() if name.startswith(_SIGNAL)}


def _undoubted(signals: dict[str, float | None]) -> bool:
    """Whether no signal speaks against the label."""
    return not any(value is not None and value > 0 for value in signals.values())


def _pair(row: dict[str, Any], source: dict[str, Any], action: str | None, text: bool) -> SuspiciousPair:
    signals = _signals(row)
    evidence = sorted(row["evidence"] or [], key=lambda part: -abs(part["contribution"]))[:_EVIDENCE]
    texts = {side: clipped(source[side]) for side in ("prompt", "chosen", "rejected")} if text else {}
    return SuspiciousPair(
        pair_id=row["pair_id"],
        group=row["group"],
        axis=row["axis"],
        subset=row["subset"],
        action=action,
        suspicion=finite(row["suspicion"], "a suspicion"),
        suspicion_kind=row["suspicion_kind"],
        status=row["status"],
        disputed_by=list(row["disputed_by"] or []),
        reward_margin=finite(row["reward_margin"], "a reward margin"),
        pair_score=maybe_finite(row["pair_score"], "a pair score"),
        signals=signals,
        evidence=[Evidence(latent_id=e["latent_id"], contribution=finite(e["contribution"], "evidence")) for e in evidence],
        annotators=source["annotators"],
        both_orders=bool(source["both_orders"]),
        undoubted=_undoubted(signals),
        **texts,
    )
