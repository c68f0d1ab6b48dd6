"""Evaluation figures against counts made by hand and a second implementation of the style matrix."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from safer_engine.errors import NumericalError
from safer_engine.science.evaluation import STYLES, ScoredPairs, evaluate, item_credit


def scored(margins: list[float], **columns: list[str | None]) -> ScoredPairs:
    n = len(margins)
    names = [f"p{i}" for i in range(n)]
    filled = {
        "pair_id": names,
        "group": names,
        "axis": ["safety"] * n,
        "subset": ["a"] * n,
        "style": [None] * n,
        "item": [None] * n,
        **columns,
    }
    return ScoredPairs(reward_chosen=np.asarray(margins, dtype=float) + 3, reward_rejected=np.full(n, 3.0), **filled)  # type: ignore[arg-type]


def test_slices_count_a_tie_as_not_right() -> None:
    pairs = scored([1.0, -1.0, 0.0, 2.0, 3.0], axis=["safety"] * 3 + ["chat"] * 2, subset=["a", "a", "b", "c", "c"])
    found = {(score.axis, score.subset): score for score in evaluate(pairs, 200, 0).slices}
    assert list(found) == [(None, None), ("chat", None), ("chat", "c"), ("safety", None), ("safety", "a"), ("safety", "b")]
    assert found[None, None].accuracy.estimate == pytest.approx(3 / 5)
    assert found["safety", None].accuracy.estimate == pytest.approx(1 / 3)
    assert found["safety", None].margin.estimate == pytest.approx(0.0)
    assert found["safety", None].ties == 1
    assert found["chat", "c"].accuracy.estimate == 1.0
    assert found["safety", "b"].accuracy.lo is None
    assert found["safety", "b"].accuracy.n == 1


def test_intervals_are_those_of_groups_not_of_rows() -> None:
    rng = np.random.default_rng(0)
    by_group = rng.normal(0.3, 1, 60)
    pairs = scored(np.repeat(by_group, 10).tolist(), group=np.repeat([f"g{i}" for i in range(60)], 10).tolist())
    overall = evaluate(pairs, 2000, 0).slices[0].margin
    assert overall.n == 600
    assert overall.n_groups == 60
    assert overall.lo is not None
    assert overall.hi is not None
    half = 1.96 * by_group.std() / np.sqrt(60)
    assert (overall.hi - overall.lo) / 2 == pytest.approx(half, rel=0.1)


def test_an_interval_does_not_depend_on_the_other_slices() -> None:
    margins = np.random.default_rng(1).normal(0.5, 1, 50).tolist()
    alone = evaluate(scored(margins), 300, 4)
    beside = evaluate(scored([*margins, 1.0], subset=["a"] * 50 + ["b"], axis=["safety"] * 50 + ["chat"]), 300, 4)
    assert [score for score in beside.slices if score.subset == "a"] == [score for score in alone.slices if score.subset == "a"]
    assert evaluate(scored(margins), 300, 5).slices[0].accuracy != alone.slices[0].accuracy


def test_the_same_pairs_have_the_same_interval_in_every_row() -> None:
    margins = np.random.default_rng(2).normal(0.2, 1, 40).tolist()
    found = evaluate(scored(margins, subset=["a"] * 40, axis=["safety"] * 40), 300, 0).slices
    assert [(row.axis, row.subset) for row in found] == [(None, None), ("safety", None), ("safety", "a")]
    assert len({(row.accuracy, row.margin) for row in found}) == 1


@pytest.mark.parametrize(
    ("margins", "credit"), [([1, 2, 3], 1), ([1, -1, 3], 0), ([0, 1, 2], 1 / 2), ([0, 0, 0], 1 / 4), ([0, -1], 0), ([2], 1)]
)
def test_best_of_n_credit(margins: list[float], credit: float) -> None:
    assert item_credit(margins) == pytest.approx(credit)


def test_best_of_n_joins_rows_by_item_not_by_order() -> None:
    pairs = scored(
        [1.0, 2.0, -1.0, 3.0, 0.0, 5.0, 9.0],
        item=["x", "y", "x", "y", "z", "z", None],
        group=["g1", "g2", "g1", "g2", "g3", "g3", "g4"],
    )
    overall = evaluate(pairs, 200, 0).best_of_n[0]
    assert (overall.name, overall.axis, overall.subset) == ("best_of_n", None, None)
    assert overall.accuracy.estimate == pytest.approx((0 + 1 + 0.5) / 3)
    assert overall.accuracy.n == 3


def test_no_shape_no_score() -> None:
    plain = evaluate(scored([1.0, 2.0]), 200, 0)
    assert plain.best_of_n == ()
    assert plain.styles == ()
    assert plain.matrices == ()


def style_pairs(rewards_good: np.ndarray, rewards_bad: np.ndarray, crossed: bool) -> ScoredPairs:
    """Rows of RM-Bench-shaped prompts: all nine comparisons of a prompt, or only the three of like style."""
    cells = [(prompt, i, j) for prompt in range(len(rewards_good)) for i in range(3) for j in range(3) if crossed or i == j]
    styles = [f"{STYLES[i]}:{STYLES[j]}" if crossed else STYLES[i] for _, i, j in cells]
    ids = [f"prompt-{p}#{3 * i + j}" if crossed else f"prompt-{p}-{STYLES[i]}" for p, i, j in cells]
    return ScoredPairs(
        pair_id=ids,
        group=[f"g{p}" for p, _, _ in cells],
        axis=["chat"] * len(cells),
        subset=["easy" if p % 2 else "odd" for p, _, _ in cells],
        style=styles,
        item=[f"prompt-{p}" if crossed else None for p, _, _ in cells],
        reward_chosen=np.array([rewards_good[p, i] for p, i, _ in cells]),
        reward_rejected=np.array([rewards_bad[p, j] for p, _, j in cells]),
    )


@pytest.mark.parametrize("crossed", [True, False])
def test_styles_give_the_matrix_of_the_benchmark(crossed: bool) -> None:
    rng = np.random.default_rng(3)
    slope = np.array([0, 0.5, 1])
    good, bad = rng.normal(0.4, 1, (40, 3)) + slope, rng.normal(0, 1, (40, 3)) + slope
    expected = (good[:, :, None] > bad[:, None, :]).mean(axis=0)
    found = evaluate(style_pairs(good, bad, crossed), 200, 0)
    overall = found.matrices[0]
    assert overall.n_prompts == 40
    assert np.allclose(np.array(overall.accuracy, dtype=float), expected)
    whole = {score.name: score.accuracy.estimate for score in found.styles if score.axis is None}
    assert whole["hard"] == pytest.approx(expected[np.triu_indices(3, 1)].mean())
    assert whole["normal"] == pytest.approx(np.diag(expected).mean())
    assert whole["easy"] == pytest.approx(expected[np.tril_indices(3, -1)].mean())
    assert found.best_of_n == ()
    halves = {(score.name, score.subset) for score in found.styles if score.subset}
    assert halves == {(name, subset) for name in ("easy", "normal", "hard") for subset in ("easy", "odd")}


def test_equal_rewards_across_styles_are_not_right() -> None:
    flat = np.ones((4, 3))
    assert all(score.accuracy.estimate == 0 for score in evaluate(style_pairs(flat, flat, True), 200, 0).styles)


def test_missing_styles_leave_their_cells_empty() -> None:
    pairs = scored([1.0, -1.0], style=["concise", "concise"])
    found = evaluate(pairs, 200, 0)
    assert {score.name for score in found.styles} == {"normal"}
    assert found.matrices[0].accuracy == ((0.5, None, None), (None, None, None), (None, None, None))


def test_the_result_is_json() -> None:
    document = evaluate(style_pairs(np.eye(3), np.zeros((3, 3)), True), 200, 0).as_json()
    assert json.loads(json.dumps(document, allow_nan=False))["slices"][0]["accuracy"]["n"] == 27


def test_bad_input_is_refused() -> None:
    pairs = scored([1.0, 2.0])
    with pytest.raises(NumericalError, match="not finite"):
        replace(pairs, reward_chosen=np.array([1.0, np.nan]))
    with pytest.raises(NumericalError, match="length"):
        replace(pairs, axis=["safety"])
    with pytest.raises(NumericalError, match="no pairs"):
        evaluate(scored([]), 200, 0)
