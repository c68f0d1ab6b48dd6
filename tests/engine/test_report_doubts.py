"""What the report says of wrong labels: estimated shares, expected precision by budget, and why an axis has ranks only."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from safer_engine.artifacts import PairScores
from safer_engine.report.build_doubts import axis_doubts, doubtful_share, suspicion_kind
from safer_engine.report.doubt_text import estimated, expected_at, how_chosen, not_told, sae_adds
from safer_engine.report.model import EditsReport
from safer_engine.report.model_doubts import AxisDoubt, SaeAdds
from safer_engine.science.pairs import UNNAMED


class Scores(PairScores):
    """Scores in memory."""

    def __init__(self, rows: list[tuple[str, str, float | None]], doubts: dict[str, Any]) -> None:
        names, axes, suspicions = zip(*rows, strict=True)
        self._table = pa.table({"pair_id": names, "axis": axes, "suspicion": pa.array(suspicions, pa.float64())})
        self._meta = {"doubts": doubts, "decisions": {"n": 0, "axes": {}}, "standing": {}}

    @property
    def meta(self) -> dict[str, Any]:
        return self._meta

    @property
    def scores(self) -> pa.Table:  # type: ignore[override]
        return self._table


def told(share: float, n: int) -> dict[str, Any]:
    cells = {"s": {"share": share, "slope": 1.0, "n_pairs": n}}
    return {
        "kind": "probability",
        "reason": None,
        "share": share,
        "lo": share / 2,
        "hi": share * 2,
        "reach": 0.99,
        "cells": cells,
    }


RANK = {"kind": "rank", "reason": "too little is known", "share": 0.2, "lo": 0.0, "hi": 0.4, "reach": 0.95, "cells": {}}


def test_the_curve_and_the_expected_wrong_labels_are_sums_of_probabilities() -> None:
    rows = [(f"p{i}", "safety", (i + 1) / 100) for i in range(100)]
    (axis,) = axis_doubts(Scores(rows, {"safety": told(0.5, 100)}), {"p99": "drop", "p98": "flip", "p97": "review"})
    assert axis.expected_wrong == pytest.approx(1.0 + 0.99)
    assert [(point.budget, point.n) for point in axis.curve] == [(0.01, 1), (0.02, 2), (0.05, 5), (0.1, 10), (0.2, 20)]
    assert axis.curve[2].precision == pytest.approx((1.0 + 0.99 + 0.98 + 0.97 + 0.96) / 5)
    assert axis.curve[2].recall == pytest.approx(4.9 / 50.5)
    assert expected_at(axis, 0.01) == "100.0\N{NARROW NO-BREAK SPACE}%"
    assert expected_at(axis, 0.03) == "–"


def test_where_nothing_can_be_wrong_there_is_nothing_to_be_found() -> None:
    (axis,) = axis_doubts(Scores([(f"p{i}", "x", 0.0) for i in range(100)], {"x": told(1e-9, 100)}), {"p1": "drop"})
    assert axis.curve == []
    assert axis.expected_wrong == 0.0


def test_the_share_of_all_pairs_is_told_only_where_every_axis_has_one() -> None:
    rows = [("a", "x", 0.5), ("b", "y", None)]
    both = Scores(rows, {"x": told(0.1, 300), "y": told(0.2, 100)})
    assert doubtful_share(both) == pytest.approx(0.125)
    assert suspicion_kind(both) == "probability"
    mixed = Scores(rows, {"x": told(0.1, 300), "y": RANK})
    assert doubtful_share(mixed) is None
    assert suspicion_kind(mixed) == "mixed"
    assert suspicion_kind(Scores(rows, {"y": RANK})) == "rank"
    assert suspicion_kind(Scores(rows, {})) == "rank"


def test_an_axis_of_ranks_says_why_and_gives_no_figure() -> None:
    axes = axis_doubts(Scores([("a", "x", 0.5)], {"x": RANK}), {"a": "drop"})
    assert axes == [AxisDoubt(axis="x", kind="rank", reason="too little is known", doubtful_share=None, n=1, contested_share=0.0)]
    assert "too little is known" in not_told(axes[0])
    assert estimated(axes) == ""


def test_pairs_that_state_no_axis_are_called_so() -> None:
    bare, named = (AxisDoubt(axis=name, kind="rank", reason="why", doubtful_share=None) for name in (UNNAMED, "x"))
    assert not_told(bare).startswith("Suspicion within pairs without an axis is a rank, not a probability (why)")
    assert not_told(named).startswith("Suspicion within x is a rank")
    (adds,) = sae_adds([bare])
    assert adds.startswith("On pairs without an axis it cannot be told")


def test_what_decides_the_edits_is_said() -> None:
    known = AxisDoubt(
        axis="x", kind="probability", reason=None, doubtful_share=0.1, doubtful_share_lo=0.07, doubtful_share_hi=0.13
    )
    rank = AxisDoubt(axis="y", kind="rank", reason="why", doubtful_share=None)

    def edits(*axes: AxisDoubt) -> EditsReport:
        return EditsReport(
            estimator="fusion", suspicion_kind="mixed", axes=list(axes), signals={}, n_scored=0, pairs=[]
        )  # fmt: skip

    assert how_chosen(edits(known)).startswith("What is edited: the largest set")
    assert "of each axis" not in how_chosen(edits(known))
    assert "4\N{NARROW NO-BREAK SPACE}% of each axis whose suspicion is a rank" in how_chosen(edits(known, rank))
    assert how_chosen(edits(rank)).startswith("Budget: 4")
    assert estimated([known, rank]).startswith("An estimated 10")


@pytest.mark.parametrize("fair", [True, False])
def test_what_the_sae_adds_is_said_with_its_interval_and_what_follows(fair: bool) -> None:
    found = {"bits": -0.0312, "lo": -0.05, "hi": 0.0012, "agree_with": 0.7, "agree_without": 0.72, "fair": fair}
    doubt = {**told(0.1, 100), "sae": found, "sae_left_out": fair}
    (axis,) = axis_doubts(Scores([("a", "x", 0.5)], {"x": doubt}), {})
    assert axis.sae == SaeAdds(**found)
    text = " ".join(sae_adds([axis, axis]))
    assert text.count("decides nothing") == (not fair)
    assert "the SAE adds \u22120.031 [\u22120.050, +0.001] bits a pair" in text
    assert ("It adds nothing: the dense probe stands in its place." in text) == fair
    assert ("decides nothing" in text) == (not fair)
    assert sae_adds([AxisDoubt(axis="x", kind="rank", reason=None, doubtful_share=None)]) == [
        "On x it cannot be told what the SAE adds: it takes signals that were held out by group, and 30 groups at least."
    ]
