"""The report's part on how many labels are wrong, and what an edit of the most doubtful pairs would meet."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from safer_engine.artifacts import PairScores
from safer_engine.report.columns import finite
from safer_engine.report.model_doubts import AxisDoubt, Decisions, ExpectedPrecision, SaeAdds

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of an axis that the curve is drawn at."""
SHOWN_BUDGETS = BUDGETS[:4]
"""Those that the table shows."""
_REMOVED = ("drop", "flip")


def suspicion_kind(scores: PairScores) -> str:
    """`probability`, `rank`, or `mixed` where the axes differ."""
    kinds = {doubt["kind"] for doubt in scores.meta.get("doubts", {}).values()}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "rank"


def doubtful_share(scores: PairScores) -> float | None:
    """Estimated share of wrong labels over all pairs; None unless every axis has an estimate."""
    doubts = list(scores.meta.get("doubts", {}).values())
    if not doubts or any(doubt["kind"] != "probability" for doubt in doubts):
        return None
    sizes = [sum(cell["n_pairs"] for cell in doubt["cells"].values()) for doubt in doubts]
    return float(sum(size * doubt["share"] for size, doubt in zip(sizes, doubts, strict=True)) / sum(sizes))


def axis_doubts(scores: PairScores, actions: dict[str, str]) -> list[AxisDoubt]:
    """Each axis: its kind, its estimated share of wrong labels, and the expected precision by budget.

    Args:
        actions: pair id → action.
    """
    columns = scores.scores.select(["pair_id", "axis", "suspicion"]).to_pylist()
    by_axis: dict[str, list[tuple[float, str]]] = {}
    sizes = Counter(str(row["axis"]) for row in columns)
    for row in columns:
        if row["suspicion"] is not None:
            by_axis.setdefault(str(row["axis"]), []).append((finite(row["suspicion"], "a suspicion"), row["pair_id"]))
    return [
        _axis(axis, doubt, by_axis.get(axis, []), actions, _counted(axis, sizes[axis], scores.meta))
        for axis, doubt in sorted(scores.meta.get("doubts", {}).items())
    ]


def _counted(axis: str, n: int, meta: dict[str, Any]) -> dict[str, Any]:
    """Counts of suspicious and contested pairs of an axis, and what people decided."""
    found = meta["standing"].get(axis, {"suspicious": 0, "contested": 0, "reasons": {}})
    decided = meta["decisions"]["axes"].get(axis) if meta["decisions"]["n"] else None
    return {
        "n": n,
        "n_suspicious": found["suspicious"],
        "n_contested": found["contested"],
        "contested_share": found["contested"] / n if n else None,
        "contested_by": found["reasons"],
        "decisions": None if decided is None else Decisions.model_validate(decided),
    }


def _axis(
    axis: str, doubt: dict[str, Any], pairs: list[tuple[float, str]], actions: dict[str, str], counted: dict[str, Any]
) -> AxisDoubt:
    sae = doubt.get("sae")
    adds: dict[str, Any] = {"sae": SaeAdds(**sae) if sae else None, "sae_left_out": doubt.get("sae_left_out", False), **counted}
    if doubt["kind"] != "probability":
        return AxisDoubt(axis=axis, kind=doubt["kind"], reason=doubt["reason"], doubtful_share=None, **adds)
    return AxisDoubt(
        axis=axis,
        kind=doubt["kind"],
        reason=None,
        doubtful_share=doubt["share"],
        doubtful_share_lo=doubt["lo"],
        doubtful_share_hi=doubt["hi"],
        expected_wrong=sum(p for p, name in pairs if actions.get(name) in _REMOVED),
        curve=_curve(sorted((p for p, _ in pairs), reverse=True)),
        **adds,
    )


def _curve(falling: list[float]) -> list[ExpectedPrecision]:
    sums = [0.0, *itertools.accumulate(falling)]
    if sums[-1] <= 0:
        return []
    points = []
    for budget in BUDGETS:
        n = round(budget * len(falling))
        if n:
            points.append(ExpectedPrecision(budget=budget, n=n, precision=sums[n] / n, recall=sums[n] / sums[-1]))
    return points
