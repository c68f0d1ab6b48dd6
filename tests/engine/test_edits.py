"""What is recommended for each row: budgets, ties, rules."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_engine.errors import NumericalError, SpecError
from safer_engine.science.edits import Candidate, EditRules, budget_count, recommend


def candidates(n: int, axis: str = "safety") -> list[Candidate]:
    """Rows whose suspicion rises with their number."""
    return [Candidate(f"{axis}-{i:03d}", axis, True, i / n) for i in range(n)]


def test_the_most_doubtful_share_is_dropped_and_the_next_as_many_are_for_review() -> None:
    actions = recommend(candidates(100), EditRules(0.04))
    assert actions[96:] == ["drop"] * 4
    assert actions[92:96] == ["review"] * 4
    assert set(actions[:92]) == {"keep"}


def test_flipping_is_recommended_only_where_allowed() -> None:
    assert Counter(recommend(candidates(50), EditRules(0.1, allow_flip=True))) == {"flip": 5, "review": 5, "keep": 40}


def test_each_axis_has_its_own_budget() -> None:
    rows = [*candidates(50, "chat"), *candidates(100, "safety")]
    actions = recommend(rows, EditRules(0.04))
    assert Counter(actions[:50]) == {"drop": 2, "review": 2, "keep": 46}
    assert Counter(actions[50:]) == {"drop": 4, "review": 4, "keep": 92}


def test_rows_in_both_orders_are_for_review_and_take_no_place() -> None:
    rows = candidates(100)
    rows[99] = Candidate("both", "safety", True, 1.0, both_orders=True)
    actions = recommend(rows, EditRules(0.02))
    assert actions[99] == "review"
    assert actions[97:99] == ["drop", "drop"]
    assert actions[95:97] == ["review", "review"]


def test_rows_that_were_not_scored_or_have_no_suspicion_are_kept() -> None:
    rows = [Candidate("a", "x", False, None), Candidate("b", "x", True, None), *candidates(20, "x")]
    rows.append(Candidate("c", "x", False, 1.0, both_orders=True))
    actions = recommend(rows, EditRules(0.1))
    assert actions[0] == actions[1] == actions[-1] == "keep"
    assert actions.count("drop") == 2


def test_ties_are_broken_by_pair_id_whatever_the_order() -> None:
    rows = [Candidate(name, "x", True, 0.5) for name in ("d", "a", "c", "b")]
    assert recommend(rows, EditRules(0.25)) == ["keep", "drop", "keep", "review"]
    assert recommend(rows[::-1], EditRules(0.25)) == ["review", "keep", "drop", "keep"]


@pytest.mark.parametrize(("budget", "n", "count"), [(0.04, 50, 2), (0.04, 49, 1), (0.04, 24, 0), (0.29, 100, 29), (0.1, 3, 0)])
def test_the_budget_is_rounded_down_but_not_by_binary_fractions(budget: float, n: int, count: int) -> None:
    assert budget_count(budget, n) == count


@pytest.mark.parametrize("budget", [0.0, -0.1, 0.5, 4.0, math.nan])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(SpecError, match="out of range"):
        recommend(candidates(10), EditRules(budget))


@pytest.mark.parametrize("suspicion", [-0.1, 1.1, math.nan])
def test_a_suspicion_out_of_range_is_refused(suspicion: float) -> None:
    with pytest.raises(NumericalError, match="not in"):
        recommend([Candidate("a", "x", True, suspicion)], EditRules(0.1))


@given(
    st.lists(st.tuples(st.sampled_from(["x", "y"]), st.booleans(), st.none() | st.floats(0, 1), st.booleans()), max_size=40),
    st.floats(0.01, 0.49),
)
def test_no_axis_exceeds_its_budget_and_dropped_rows_are_the_most_doubtful(rows: list, budget: float) -> None:
    found = [Candidate(f"{i:02d}", axis, scored, value, both) for i, (axis, scored, value, both) in enumerate(rows)]
    actions = recommend(found, EditRules(budget))
    assert len(actions) == len(found)
    for axis in ("x", "y"):
        scored = [row for row in found if row.axis == axis and row.scored]
        dropped = [row.suspicion for row, action in zip(found, actions, strict=True) if row.axis == axis and action == "drop"]
        assert len(dropped) <= budget * len(scored) + 1e-6
        kept = [
            row.suspicion
            for row, action in zip(found, actions, strict=True)
            if row.axis == axis and row.scored and action == "keep" and row.suspicion is not None
        ]
        assert not dropped or not kept or min(v for v in dropped if v is not None) >= max(kept)


def test_a_row_of_several_pairs_is_dropped_where_others_are_flipped() -> None:
    rows = [*candidates(20, "x"), Candidate("many", "x", True, 1.0, several=True)]
    assert recommend(rows, EditRules(0.1, allow_flip=True))[-2:] == ["flip", "drop"]


def sure(probabilities: list[float], base: float = 0.1, **known: bool) -> list[Candidate]:
    """Rows whose suspicion is a probability."""
    return [Candidate(f"p{i:02d}", "safety", True, p, base=base, **known) for i, p in enumerate(probabilities)]


def test_a_rank_without_a_budget_has_the_usual_one() -> None:
    assert recommend(candidates(100), EditRules()) == recommend(candidates(100), EditRules(0.04))


def test_by_gain_the_largest_set_within_the_false_share_is_dropped_and_the_rest_above_the_base_is_for_review() -> None:
    rows = sure([0.05, 0.95, 0.2, 0.9, 0.6, 0.1, 0.55])
    assert recommend(rows, EditRules(false_edits=0.2)) == ["keep", "drop", "review", "drop", "drop", "keep", "review"]
    assert recommend(rows, EditRules(false_edits=0.06)) == ["keep", "drop", "review", "review", "review", "keep", "review"]
    assert recommend(rows, EditRules(false_edits=0.01)) == ["keep", "review", "review", "review", "review", "keep", "review"]


def test_no_edit_that_costs_more_than_it_gains() -> None:
    rows = sure([0.99, 0.99, 0.99, 0.45, 0.3])
    assert recommend(rows, EditRules(false_edits=0.9)) == ["drop", "drop", "drop", "review", "review"]
    assert recommend(rows, EditRules(false_edits=0.9, cost_wrong=3.0)) == ["drop", "drop", "drop", "drop", "drop"]
    assert recommend(rows, EditRules(false_edits=0.9, cost_lost=1000.0)) == ["review"] * 5


def test_by_gain_a_flip_is_chosen_where_it_is_allowed_and_worth_as_much_as_a_drop() -> None:
    rows = [*sure([0.9, 0.8]), Candidate("q", "safety", True, 0.85, several=True, base=0.1)]
    assert recommend(rows, EditRules(allow_flip=True)) == ["flip", "flip", "drop"]
    assert recommend(rows, EditRules(allow_flip=True, cost_wrong=2.0)) == ["drop", "drop", "drop"]
    assert recommend(sure([0.6, 0.6]), EditRules(allow_flip=True, cost_lost=4.0, false_edits=0.5)) == ["flip", "flip"]


def test_a_budget_that_is_given_decides_probabilities_too() -> None:
    rows = sure([0.01 * i for i in range(50)])
    assert Counter(recommend(rows, EditRules(0.1))) == {"drop": 5, "review": 5, "keep": 40}


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.01, 0.99))
def test_the_expected_share_of_right_labels_among_the_edited_is_kept(probabilities: list[float], share: float) -> None:
    actions = recommend(sure(probabilities), EditRules(false_edits=share))
    edited = [p for p, action in zip(probabilities, actions, strict=True) if action == "drop"]
    assert sum(1 - p for p in edited) <= share * len(edited) + 1e-9
    assert all(p > 0.5 for p in edited)
    kept = [p for p, action in zip(probabilities, actions, strict=True) if action == "keep"]
    assert all(p <= 0.1 for p in kept)
