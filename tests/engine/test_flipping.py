"""Flipping a row swaps its preference in its own columns: the engine then reads the sides the other way round."""

from __future__ import annotations

from typing import Any

import pytest

from safer_engine.errors import DatasetRefused
from safer_engine.science.flipping import flip_row
from safer_engine.science.pair_formats import Layout, read_pairs, recognise

HUMAN = "\n\nHuman: hi\n\nAssistant: "
MESSAGES = {
    "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}],
    "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}],
}
PKU = {"prompt": "hi", "response_0": "good", "response_1": "bad"}
HELPSTEER = {"context": "hi", "response1": "good", "response2": "bad"}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("trl", {"id": "a", "prompt": "hi", "chosen": "good", "rejected": "bad", "axis": "safety"}),
    (
        "trl",
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": MESSAGES["chosen"][1:], "rejected": MESSAGES["rejected"][1:]},
    ),
    ("trl", MESSAGES),
    ("trl", {"prompt": "hi", "chosen": "good", "rejected": "bad", "annotators": [1, 2, -1]}),
    ("anthropic", {"chosen": HUMAN + "good", "rejected": HUMAN + "bad"}),
    ("rewardbench", {"prompt": "hi", "chosen": ["good"], "rejected": ["bad"], "subset": "x"}),
    ("rewardbench", {"prompt": "hi", "chosen": "good", "rejected": ["bad"], "chosen_model": "m1", "rejected_model": "m2"}),
    ("ultrafeedback", {"prompt": "hi", **MESSAGES, "score_chosen": 8.0, "score_rejected": 2.5}),
    (
        "pku-saferlhf",
        {"prompt": "hi", "response_0": "good", "response_1": "bad", "safer_response_id": 0, "better_response_id": 1},
    ),
    ("pku-saferlhf", {"prompt": "hi", "response_0": "good", "response_1": "bad", "safer_response_id": "1"}),
    (
        "helpsteer3",
        {"context": "hi", "response1": "good", "response2": "bad", "overall_preference": -2, "individual_preference": []},
    ),
    ("helpsteer3", {"context": "hi", "response1": "good", "response2": "bad", "overall_preference": "3"}),
    ("winner", {"prompt": "hi", "response_a": "good", "response_b": "bad", "winner": "A", "annotators": [1, -1]}),
    ("winner", {"prompt": "hi", "response_a": "bad", "response_b": "good", "winner": "Model_B "}),
    ("winner", {"prompt": "hi", "response_a": "good", "response_b": "bad", "winner": 0}),
    ("winner", {"prompt": "hi", "response_a": "bad", "response_b": "good", "winner": 2.0}),
    ("winner", {"prompt": "hi", "response_a": "good", "response_b": "bad", "winner": "m 1", "model_a": "m 1", "model_b": "m 2"}),
    ("scored", {"prompt": "hi", "response_a": "good", "response_b": "bad", "score_a": 4, "score_b": 1}),
    ("scored", {"prompt": "hi", "responses": ["bad", "middle", "good"], "scores": [1, 2, 3]}),
]


def layout_of(name: str, row: dict[str, Any], columns: dict[str, str] | None = None) -> Layout:
    return recognise([row], name, columns or {}, "safer")


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_the_sides_are_read_the_other_way_round(name: str, row: dict[str, Any]) -> None:
    layout = layout_of(name, row)
    flipped = flip_row(row, layout)
    (before,), (after,) = list(read_pairs([row], layout)), list(read_pairs([flipped], layout))
    assert before.reason is after.reason is None
    assert before.chosen == after.rejected
    assert before.rejected == after.chosen
    assert before.prompt == after.prompt
    assert list(flipped) == list(row)
    assert {name: type(cell) for name, cell in flipped.items()} == {name: type(cell) for name, cell in row.items()}
    assert flip_row(flipped, layout) == row


def test_what_belongs_to_a_response_goes_with_it() -> None:
    row = ROWS[7][1] | {"chosen_model": "m1", "rejected_model": "m2", "margin": 3.0}
    flipped = flip_row(row, layout_of("ultrafeedback", row))
    assert (flipped["score_chosen"], flipped["score_rejected"]) == (2.5, 8.0)
    assert (flipped["chosen_model"], flipped["rejected_model"]) == ("m2", "m1")
    assert flipped["margin"] == 3.0


def test_only_the_label_that_was_audited_changes() -> None:
    row = ROWS[8][1]
    assert flip_row(row, Layout("pku-saferlhf", {}, "safer")) == row | {"safer_response_id": 1}
    assert flip_row(row, Layout("pku-saferlhf", {}, "better")) == row | {"better_response_id": 0}


def test_opinions_are_turned_with_the_sides() -> None:
    row = {
        "prompt": "hi",
        "chosen": "good",
        "rejected": "bad",
        "annotators": [{"score": 2, "who": "x"}, {"score": -1, "who": "y"}],
    }
    flipped = flip_row(row, layout_of("trl", row))
    assert flipped["annotators"] == [{"score": -2, "who": "x"}, {"score": 1, "who": "y"}]


def test_mapped_and_nested_columns() -> None:
    row = {"q": "hi", "answers": {"win": "good", "lose": "bad"}, "win_chosen": 1, "win_rejected": 2}
    layout = layout_of("trl", row, {"prompt": "q", "chosen": "answers.win", "rejected": "answers.lose"})
    flipped = flip_row(row, layout)
    assert flipped["answers"] == {"win": "bad", "lose": "good"}
    assert (flipped["win_chosen"], flipped["win_rejected"]) == (2, 1)
    assert row["answers"] == {"win": "good", "lose": "bad"}, "the input is not changed"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("rewardbench", {"prompt": "hi", "chosen": "good", "rejected": ["bad", "worse"]}),
        ("rmbench", {"prompt": "hi", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}),
        ("scored", {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [3, 3, 1]}),
        ("scored", {"prompt": "hi", "responses": ["a"], "scores": []}),
        ("pku-saferlhf", {"prompt": "hi", "response_0": "a", "response_1": "b", "safer_response_id": 2}),
        ("pku-saferlhf", {"prompt": "hi", "response_0": "a", "response_1": "b", "safer_response_id": True}),
        ("helpsteer3", {"context": "hi", "response1": "a", "response2": "b", "overall_preference": None}),
        ("helpsteer3", {"context": "hi", "response1": "a", "response2": "b", "overall_preference": True}),
        ("helpsteer3", {"context": "hi", "response1": "a", "response2": "b", "overall_preference": "much"}),
        ("trl", {"prompt": "hi", "chosen": "a"}),
        ("winner", {"prompt": "hi", "response_a": "a", "response_b": "b", "winner": "tie"}),
        ("winner", {"prompt": "hi", "response_a": "a", "response_b": "b", "winner": None}),
        ("winner", {"prompt": "hi", "response_a": "a", "response_b": "b", "winner": "m", "model_a": "m"}),
    ],
)
def test_a_row_that_cannot_be_flipped_is_refused_with_a_way_out(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(DatasetRefused, match="cannot be flipped") as caught:
        flip_row(row, Layout(name, {}, "safer"))
    assert "--action drop" in caught.value.hint
