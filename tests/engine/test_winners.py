"""Winner columns: what their values mean, and which value says the opposite."""

from __future__ import annotations

from typing import Any

import pytest

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop
from safer_engine.science.messages import MalformedCell
from safer_engine.science.pair_formats import read_pairs, recognise
from safer_engine.science.winners import Winner, Winners, learn_winners, other_winner, winner_of

NAN = float("nan")


def learn(values: list[Any], given: dict[str, Winner] | None = None) -> Winners:
    return learn_winners([{"winner": value} for value in values], given or {})


@pytest.mark.parametrize(
    ("values", "meanings"),
    [
        (["a", "B", "tie", None], ["a", "b", "tie", None]),
        (["model_a", "model_b", "tie (bothbad)", ""], ["a", "b", "tie", None]),
        (["response_a", "Response B", "both_bad", "  "], ["a", "b", "tie", None]),
        ([0, 1, 1, NAN], ["a", "b", "b", None]),
        ([1, 2, None], ["a", "b", None]),
        ([1.0, 2.0, NAN], ["a", "b", None]),
        (["1", "2", ""], ["a", "b", None]),
        (["response_0", "response_1"], ["a", "b"]),
        (["answer 1", "answer 2", "neither"], ["a", "b", "tie"]),
        ([0, 0], ["a", "a"]),
        ([2], ["b"]),
    ],
)
def test_values_that_say_it_themselves(values: list[Any], meanings: list[Winner | None]) -> None:
    winners = learn(values)
    assert [winner_of({"winner": value}, winners) for value in values] == meanings


@pytest.mark.parametrize(
    ("values", "given", "meanings"),
    [
        ([1], {"1": "b", "0": "a"}, ["b"]),
        ([0, 1, 2], {"0": "tie"}, ["tie", "a", "b"]),
        ([True, False], {"True": "a", "False": "b"}, ["a", "b"]),
        (["GPT wins", "gpt WINS", "Other"], {"gpt wins": "b", "other": "a"}, ["b", "b", "a"]),
        (["a", "b"], {"a": "b", "b": "a"}, ["b", "a"]),
        ([-1, 1, 0], {"-1": "a", "1": "b", "0": "tie"}, ["a", "b", "tie"]),
    ],
)
def test_values_whose_meaning_is_given(values: list[Any], given: dict[str, Winner], meanings: list[Winner]) -> None:
    winners = learn(values, given)
    assert [winner_of({"winner": value}, winners) for value in values] == meanings


@pytest.mark.parametrize(
    ("values", "given", "words"),
    [
        ([1, 1], {}, "numbers the responses by 1: that can mean several things"),
        ([0, 1, 2], {}, "by 0, 1, 2"),
        ([0, 2], {}, "by 0, 2"),
        ([3, 4], {}, "by 3, 4"),
        (["a", "left", "Right!"], {}, "no known meaning: 'Right!', 'left'"),
        ([True], {}, "'True'"),
        ([-1, 1], {"1": "a"}, "'-1'"),
        (["gpt"], {"GPT": "a", "gpt": "b"}, "two meanings"),
    ],
)
def test_values_that_do_not_are_refused_with_what_to_give(values: list[Any], given: dict[str, Winner], words: str) -> None:
    with pytest.raises(DatasetRefused, match=words) as caught:
        learn(values, given)
    assert "dataset.winners" in caught.value.hint or "one" in caught.value.hint


def test_the_name_of_the_winning_model() -> None:
    rows = [
        {"winner": "gpt-4", "model_a": "gpt-4", "model_b": "claude"},
        {"winner": "gpt-4", "model_a": "claude", "model_b": "gpt-4"},
        {"winner": "tie", "model_a": "claude", "model_b": "gpt-4"},
    ]
    winners = learn_winners(rows, {})
    assert [winner_of(row, winners) for row in rows] == ["a", "b", "tie"]
    assert [other_winner(row, winners) for row in rows[:2]] == ["claude", "claude"]
    with pytest.raises(MalformedCell, match="two meanings"):
        winner_of({"winner": "gpt-4", "model_a": "gpt-4", "model_b": "gpt-4"}, winners)
    with pytest.raises(MalformedCell, match="two meanings"):
        winner_of({"winner": "b", "model_a": "b", "model_b": "a"}, winners)
    with pytest.raises(MalformedCell, match="no known meaning"):
        winner_of({"winner": "llama", "model_a": "gpt-4", "model_b": "claude"}, winners)


def test_numbers_that_come_later_are_refused_rather_than_misread() -> None:
    """First rows with 0 and 1 only, then a 2: 0 may be the tie after all."""
    with pytest.raises(DatasetRefused, match="by 0 and 1 in the first rows, and later holds '2'"):
        winner_of({"winner": 2}, learn([0, 1]))
    with pytest.raises(MalformedCell, match="no known meaning"):
        winner_of({"winner": "?"}, learn([0, 1]))
    with pytest.raises(MalformedCell, match="list where a winner"):
        winner_of({"winner": [1]}, learn([0, 1, [1]]))


@pytest.mark.parametrize(
    ("values", "given", "cell", "opposite"),
    [
        (["A"], {}, "A", "B"),
        (["model_b"], {}, "Model_B", "Model_A"),
        (["Response b "], {}, "Response b ", "Response a "),
        ([0, 1], {}, 1, 0),
        ([1, 2], {}, 1, 2),
        ([1.0, 2.0], {}, 2.0, 1.0),
        (["response_1", "response_2"], {}, "response_1", "response_2"),
        ([True, False], {"true": "a", "false": "b"}, True, False),
        (["GPT wins", "Claude wins"], {"gpt wins": "b", "claude wins": "a"}, "GPT wins", "Claude wins"),
        (["x1"], {"x1": "a", "x2": "b", "y2": "b"}, "x1", "x2"),
        ([-1], {"-1": "a", "1": "b", "0": "tie"}, -1, 1),
    ],
)
def test_the_opposite_is_written_in_the_same_way(values: list[Any], given: dict[str, Winner], cell: Any, opposite: Any) -> None:
    winners = learn(values, given)
    found = other_winner({"winner": cell}, winners)
    assert (found, type(found)) == (opposite, type(cell))
    assert other_winner({"winner": found}, winners) == cell


@pytest.mark.parametrize(
    ("given", "cell", "words"),
    [
        ({}, "tie", "names neither"),
        ({}, None, "names neither"),
        ({"good": "a"}, "good", "does not say which value is the opposite"),
        ({"good": "a", "bad": "b", "worse": "b"}, "good", "does not say"),
        ({"a": "b"}, "b", "two meanings|no value is known"),
    ],
)
def test_where_nothing_says_the_opposite_there_is_no_flip(given: dict[str, Winner], cell: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        other_winner({"winner": cell}, learn([], given))


def test_ties_and_empty_cells_are_counted_apart() -> None:
    base = {"prompt": "Hi?", "response_a": "x", "response_b": "y"}
    rows = [{**base, "winner": value} for value in ("a", "b", "tie", None, "odd")]
    layout = recognise(rows[:4], "auto", {}, "safer")
    pairs = list(read_pairs(rows, layout))
    assert layout.name == "winner"
    assert [pair.reason for pair in pairs] == [None, None, Drop.TIE, Drop.UNRATED, Drop.MALFORMED]
    assert [pair.chosen[-1].content for pair in pairs[:2]] == ["x", "y"]


def test_mapped_columns_and_given_meanings() -> None:
    rows = [{"q": "Hi?", "first": "x", "second": "y", "human": {"choice": choice}} for choice in (1, 1)]
    columns = {"prompt": "q", "response_a": "first", "response_b": "second", "winner": "human.choice"}
    with pytest.raises(DatasetRefused, match="several things"):
        recognise(rows, "auto", columns, "safer")
    layout = recognise(rows, "auto", columns, "safer", {"1": "b", "0": "a"})
    assert [pair.chosen[-1].content for pair in read_pairs(rows, layout)] == ["y", "y"]
    trl = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    with pytest.raises(DatasetRefused, match="have no winner column"):
        recognise(trl, "auto", {}, "safer", {"1": "a"})


def test_a_missing_prompt_is_malformed_where_the_responses_are_text() -> None:
    rows = [{"prompt": prompt, "response_a": "x", "response_b": "y", "winner": "a"} for prompt in ("p", None)]
    assert [pair.reason for pair in read_pairs(rows, recognise(rows, "auto", {}, "safer"))] == [None, Drop.MALFORMED]
