"""Every row layout: one row in, the pairs written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop
from safer_engine.science.messages import Message
from safer_engine.science.pair_formats import Layout, PreferenceRow, project, read_pairs, recognise
from safer_engine.science.row_layouts import Label
from safer_engine.science.winners import Winners

Row = dict[str, Any]
SYSTEM, ASK, ANSWER, MORE = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
)
GOOD, BAD = {"role": "assistant", "content": "Good."}, {"role": "assistant", "content": "Bad."}


def read(*rows: Row, format: str = "auto", label: Label = "safer", **columns: str) -> list[PreferenceRow]:  # noqa: A002
    return list(read_pairs(rows, recognise(rows, format, columns, label)))


def flat(pair: PreferenceRow) -> tuple[str, str, str]:
    """prompt, chosen, rejected as "u:…|a:…"."""
    parts = (
        "|".join(f"{message.role[0]}:{message.content}" for message in side) for side in (pair.prompt, pair.chosen, pair.rejected)
    )
    prompt, chosen, rejected = parts
    return prompt, chosen, rejected


PLAIN = ("u:Hi?", "a:Good.", "a:Bad.")
TALK = "s:Be kind.|u:Hi?|a:Yes.|u:And?"
HELP = {"context": [ASK], "response1": "Bad.", "response2": "Good.", "domain": "code"}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("trl", {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}, PLAIN),
        ("trl", {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ("trl", {"prompt": [SYSTEM, ASK, ANSWER, MORE], "chosen": [GOOD], "rejected": [BAD]}, (TALK, "a:Good.", "a:Bad.")),
        ("trl", {"chosen": [SYSTEM, ASK, ANSWER, MORE, GOOD], "rejected": [SYSTEM, ASK, ANSWER, MORE, BAD]},
         (TALK, "a:Good.", "a:Bad.")),
        ("trl", {"prompt": "Hi?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PLAIN),
        ("trl", {"prompt": [SYSTEM], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ("s:Be kind.|u:Hi?", "a:Good.", "a:Bad.")),
        ("trl", {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ("trl", {"chosen": "The sky is blue.", "rejected": "The sky is bleak."}, ("u:The sky is", "a:blue.", "a:bleak.")),
        ("trl", {"chosen": "Good.", "rejected": "Bad."}, ("", "a:Good.", "a:Bad.")),
        ("trl", {"prompt": "", "chosen": "Good.", "rejected": "Bad."}, ("", "a:Good.", "a:Bad.")),
        ("trl", {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "Good.", "rejected": "Bad."}, PLAIN),
        ("trl", {"chosen": [ASK, ANSWER, MORE, GOOD], "rejected": [ASK, BAD]}, ("u:Hi?", "a:Yes.|u:And?|a:Good.", "a:Bad.")),
        ("trl", {"chosen": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Good."}],
                 "rejected": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Bad."}]}, PLAIN),
        ("trl", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]}],
                 "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ("trl", {"prompt": {"role": ["user"], "content": ["Hi?"]}, "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ("trl", {"prompt": "Hi?", "chosen": '[{"role": "assistant", "content": "Good."}]',
                 "rejected": '[{"role": "assistant", "content": "Bad."}]'}, PLAIN),
        ("trl", {"prompt": "Hi?", "chosen": "[1, 2]", "rejected": "[{]"}, ("u:Hi?", "a:[1, 2]", "a:[{]")),
        ("anthropic", {"chosen": "\n\nHuman: Hi?\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Bad."}, PLAIN),
        ("anthropic", {"chosen": "Human: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant: Good.\nLine: two",
                       "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant: Bad."},
         ("u:Hi?|a:Yes.|u:And?", "a:Good.\nLine: two", "a:Bad.")),
        ("rewardbench", {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "subset": "s",
                         "chosen_model": "m", "rejected_model": "n"}, PLAIN),
        ("pku-saferlhf", {"prompt": "Hi?", "response_0": "Bad.", "response_1": "Good.", "safer_response_id": 1}, PLAIN),
        ("ultrafeedback", {"prompt": "Hi?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 8.0,
                           "score_rejected": 3}, PLAIN),
        ("helpsteer3", {**HELP, "overall_preference": 2}, PLAIN),
        ("winner", {"prompt": "Hi?", "response_a": "Bad.", "response_b": "Good.", "winner": "model_b"}, PLAIN),
        ("winner", {"response_a": [ASK, GOOD], "response_b": [ASK, BAD], "winner": "A", "score_a": 1, "score_b": 2}, PLAIN),
        ("scored", {"prompt": "Hi?", "response_a": "Bad.", "response_b": "Good.", "score_a": "1.5", "score_b": "4"}, PLAIN),
        ("scored", {"prompt": "Hi?", "responses": ["Meh.", "Good.", "Bad."], "scores": [2, 9, 1]}, PLAIN),
    ],
)  # fmt: skip
def test_a_row_of_each_layout(layout: str, row: Row, expected: tuple[str, str, str]) -> None:
    assert recognise([row], "auto", {}, "safer").name == layout
    for name in ("auto", layout):
        pairs = read(row, format=name)
        assert [flat(pair) for pair in pairs] == [expected]
        assert (pairs[0].row, pairs[0].part, pairs[0].reason, pairs[0].item) == (0, 0, None, None)


def test_rewardbench_lists_give_best_of_n_items() -> None:
    row = {
        "id": 7,
        "prompt": "Hi?",
        "chosen": ["Good."],
        "rejected": ["Bad.", "Worse.", "Worst."],
        "num_correct": 1,
        "subset": "s",
    }
    pairs = read(row)
    assert recognise([row], "auto", {}, "safer").name == "rewardbench"
    assert [flat(pair)[2] for pair in pairs] == ["a:Bad.", "a:Worse.", "a:Worst."]
    assert [(pair.id, pair.part, pair.item, pair.subset) for pair in pairs] == [("7", part, "7/1", "s") for part in (1, 2, 3)]
    several = read({**row, "chosen": ["Good.", "Fine."], "rejected": ["Bad."]})
    assert [pair.item for pair in several] == ["7/1", "7/2"]


def test_rmbench_gives_every_style_against_every_style() -> None:
    row = {"id": "x", "prompt": "Hi?", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"], "domain": "chat"}
    pairs = read(row)
    assert recognise([row], "auto", {}, "safer").name == "rmbench"
    styles = ("concise", "detailed-plain", "detailed-markdown")
    assert [pair.style for pair in pairs] == [f"{a}:{b}" for a in styles for b in styles]
    assert [pair.style for pair in read({**row, "chosen": ["c", "d"], "rejected": ["r", "s"]})] == ["0:0", "0:1", "1:0", "1:1"]
    assert [flat(pair)[1:] for pair in pairs] == [(f"a:c{i}", f"a:r{j}") for i in range(3) for j in range(3)]
    assert {(pair.subset, pair.item) for pair in pairs} == {("chat", None)}
    assert [pair.part for pair in pairs] == list(range(1, 10))


@pytest.mark.parametrize("style", ["concise", "detailed-plain", "detailed-markdown"])
def test_the_style_may_be_the_end_of_the_id(style: str) -> None:
    row = {"id": f"rmbench-chat-31-{style}", "prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
    assert read(row)[0].style == style
    assert read({**row, "style": "own"})[0].style == "own"
    assert read({**row, "id": style})[0].style is None


def test_helpsteer_annotators_are_turned_towards_the_chosen_side() -> None:
    opinions = [{"score": -2, "reasoning": "…"}, {"score": 1}]
    first, second = read(
        {**HELP, "overall_preference": -3, "individual_preference": opinions},
        {**HELP, "overall_preference": 1, "individual_preference": opinions},
    )
    assert (flat(first)[1], first.strength, first.annotators, first.subset) == ("a:Bad.", 3.0, (2, -1), "code")
    assert (flat(second)[1], second.strength, second.annotators) == ("a:Good.", 1.0, (-2, 1))


HELP2 = {"prompt": "Hi?", "response_1": "Good.", "response_2": "Bad.", "preference_strength": -2}


def test_helpsteer2_says_which_response_and_how_much() -> None:
    first, second = read(HELP2, {**HELP2, "preference_strength": 1, "individual_preference": [{"score": 1}, {"score": -1}]})
    assert (flat(first)[1], first.strength, first.annotators) == ("a:Good.", 2.0, None)
    assert (flat(second)[1], second.strength, second.annotators) == ("a:Bad.", 1.0, (1, -1))
    tie, malformed = read({**HELP2, "preference_strength": 0}, {**HELP2, "preference_strength": 9})
    assert (tie.reason, malformed.reason) == (Drop.TIE, Drop.MALFORMED)


SAYS = {"strength": 0.5, "annotators": [1, 1, -1]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Bad."},
        {"prompt": "Hi?", "chosen": ["Good."], "rejected": ["Bad.", "Worse."], "subset": "x"},
        {"prompt": "Hi?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]},
        {"prompt": "Hi?", "response_0": "Good.", "response_1": "Bad.", "safer_response_id": 0},
        {"prompt": "Hi?", "response_a": "Good.", "response_b": "Bad.", "winner": "a"},
    ],
)
def test_opinions_of_a_row_are_read_in_every_layout(row: dict[str, Any]) -> None:
    found = read({**row, **SAYS})
    assert found
    assert {(pair.strength, pair.annotators, pair.reason) for pair in found} == {(0.5, (1, 1, -1), None)}
    for bad in ({"annotators": "many"}, {"annotators": [0.5]}, {"annotators": [300]}, {"strength": "nan"}, {"strength": True}):
        assert {pair.reason for pair in read({**row, **SAYS, **bad})} == {Drop.MALFORMED}


def test_strength_of_the_preference() -> None:
    base = {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}
    assert read({**base, "margin": "0.5"})[0].strength == 0.5
    assert read({**base, "score_chosen": 8, "score_rejected": 3.5})[0].strength == 4.5
    assert read({"prompt": "p", "response_a": "x", "response_b": "y", "score_a": 1, "score_b": 3})[0].strength == 2.0
    assert read(base)[0].strength is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie"},
        {**HELP, "overall_preference": 0},
        {"prompt": "p", "response_a": "x", "response_b": "y", "score_a": 2, "score_b": 2.0},
        {"prompt": "p", "responses": ["x", "y", "z"], "scores": [1, 1, 1]},
    ],
)
def test_ties_give_no_pair(row: Row) -> None:
    (pair,) = read({**row, "id": "t"})
    assert (pair.reason, pair.id, pair.chosen) == (Drop.TIE, "t", ())


@pytest.mark.parametrize(("label", "chosen"), [("safer", "a:zero"), ("better", "a:one")])
def test_pku_label(label: Label, chosen: str) -> None:
    row = {"prompt": "p", "response_0": "zero", "response_1": "one", "safer_response_id": 0, "better_response_id": 1}
    assert flat(read(row, label=label)[0])[1] == chosen


def test_pku_without_the_asked_label_is_refused() -> None:
    row = {"prompt": "p", "response_0": "zero", "response_1": "one", "safer_response_id": 0}
    with pytest.raises(DatasetRefused, match="better_response_id"):
        read(row, label="better")


TRL: Row = {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**TRL, "chosen": None}, "NoneType"),
        ({**TRL, "chosen": 3}, "int where text or messages"),
        ({**TRL, "chosen": [GOOD]}, "one side is text"),
        ({**TRL, "chosen": [], "rejected": []}, "empty list"),
        ({**TRL, "prompt": None}, "prompt is missing"),
        ({**TRL, "prompt": {"a": 1}}, "mapping"),
        ({**TRL, "prompt": [1]}, "in place of a message"),
        ({**TRL, "prompt": [{"role": "narrator", "content": "x"}]}, "role 'narrator'"),
        ({**TRL, "prompt": [{"role": "user", "content": 1}]}, "content is int"),
        ({**TRL, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"prompt": "p", "rejected": "Bad."}, "'chosen' is missing"),
        ({**TRL, "chosen": [ASK], "rejected": [ASK, BAD]}, "ends with a turn of the user"),
        ({**TRL, "chosen": [{**GOOD, "tool_calls": [{"x": 1}]}], "rejected": [BAD]}, "tool calls"),
        ({**TRL, "group": ["a"]}, "list where a name"),
        ({**TRL, "margin": "big"}, "'big' where a number"),
        ({**TRL, "margin": float("nan")}, "nan where a number"),
        ({**TRL, "margin": True}, "bool where a number"),
        ({**TRL, "margin": 10**400}, "beyond all measure"),
        ({**TRL, "score_chosen": 1e308, "score_rejected": -1e308}, "beyond all measure"),
        ({**TRL, "annotators": [-(10**400)]}, "beyond all measure"),
        ({**TRL, "annotators": 3}, "must be a list"),
        ({**TRL, "annotators": [0.5]}, "whole numbers"),
        ({**TRL, "chosen": "half \ud83d"}, "valid Unicode"),
    ],
)  # fmt: skip
def test_malformed_rows_are_dropped_one_by_one(row: Row, words: str) -> None:
    first, second, third = read(TRL, row, TRL, format="trl")
    assert second.reason is Drop.MALFORMED
    assert words in second.detail
    assert (first.reason, third.reason, third.row) == (None, None, 2)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("pku-saferlhf", {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": -1}),
        ("pku-saferlhf", {"prompt": "p", "response_0": "a", "response_1": 5, "safer_response_id": 0}),
        ("scored", {"prompt": "p", "responses": ["a"], "scores": [1]}),
        ("scored", {"prompt": "p", "responses": "ab", "scores": [1, 2]}),
        ("scored", {"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}),
        ("scored", {"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}),
        ("scored", {"prompt": "p", "responses": ["a", "b"], "scores": [1e308, -1e308]}),
        ("helpsteer3", {**HELP, "overall_preference": "much"}),
        ("helpsteer3", {**HELP, "overall_preference": -9}),
        ("helpsteer3", {**HELP, "overall_preference": -1.5}),
        ("rmbench", {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}),
        ("rewardbench", {"prompt": "p", "chosen": ["a"] * 40, "rejected": ["b"] * 40}),
        ("anthropic", {"chosen": "no turns", "rejected": "\n\nHuman: x\n\nAssistant: y"}),
    ],
)
def test_malformed_rows_of_particular_layouts(layout: str, row: Row) -> None:
    assert [pair.reason for pair in read(row, format=layout)] == [Drop.MALFORMED]


NUMBERS = st.one_of(
    st.integers(), st.integers(min_value=10**300, max_value=10**500).flatmap(lambda n: st.sampled_from([n, -n])), st.floats(),
    st.booleans(), st.none(), st.integers().map(str), st.sampled_from(["1e999", "nan", "∞", "9" * 400, "", " 3 "]),
)  # fmt: skip
NUMBERED: list[tuple[str, Row]] = [
    ("trl", {**TRL, "margin": 0}),
    ("trl", {**TRL, "score_chosen": 0, "score_rejected": 0}),
    ("trl", {**TRL, "id": 0, "group": 0, "item": 0, "axis": 0}),
    ("pku-saferlhf", {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0}),
    ("helpsteer3", {**HELP, "overall_preference": 0}),
    ("scored", {"prompt": "p", "response_a": "x", "response_b": "y", "score_a": 0, "score_b": 0}),
    ("winner", {"prompt": "p", "response_a": "x", "response_b": "y", "winner": 0}),
]


@given(data=st.data(), annotators=st.none() | st.lists(NUMBERS, max_size=3), case=st.sampled_from(NUMBERED))
def test_any_number_gives_a_pair_or_a_reason(data: st.DataObject, annotators: Any, case: tuple[str, Row]) -> None:
    layout, shape = case
    row = {name: cell if isinstance(cell, (str, list)) else data.draw(NUMBERS, name) for name, cell in shape.items()}
    winners = Winners(numbers={"0": "a", "1": "b"})
    try:
        found = list(read_pairs([{**row, "annotators": annotators}], Layout(layout, {}, "safer", winners)))
    except DatasetRefused:  # a number that the first rows of a winner column did not have
        assert layout == "winner"
        return
    assert len(found) == 1
    assert (found[0].reason is None) == bool(found[0].chosen)
    assert found[0].strength is None or math.isfinite(found[0].strength)
    assert layout != "helpsteer3" or found[0].strength in (None, 1, 2, 3)


def test_a_text_of_brackets_is_text() -> None:
    deep = "[" * 100_000
    assert flat(read({**TRL, "chosen": deep})[0])[1] == f"a:{deep}"


def test_tool_turns_keep_their_fields() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    result = {"role": "tool", "content": "noon", "tool_call_id": "1"}
    (pair,) = read({"prompt": [ASK, call, result], "chosen": [GOOD], "rejected": [BAD]})
    assert pair.prompt[1] == Message("assistant", "", '{"tool_calls":[{"name":"clock"}]}')
    assert pair.prompt[2].as_dict() == {"role": "tool", "content": "noon", "tool_call_id": "1"}


def test_requests_hold_all_that_comes_before_the_response() -> None:
    (pair,) = read({"chosen": [ASK, ANSWER, MORE, GOOD], "rejected": [ASK, BAD]})
    (chosen_prompt, chosen), (rejected_prompt, rejected) = pair.requests
    assert [message.content for message in chosen_prompt] == ["Hi?", "Yes.", "And?"]
    assert [message.content for message in rejected_prompt] == ["Hi?"]
    assert (chosen, rejected) == ("Good.", "Bad.")


def test_columns_are_mapped_also_from_nested_cells() -> None:
    row = {"q": "Hi?", "win": "Good.", "lose": {"text": "Bad."}, "meta": {"topic": "code"}, "id": "dup", "a.b": "g"}
    (pair,) = read(row, prompt="q", chosen="win", rejected="lose.text", subset="meta.topic", group="a.b", id="")
    assert flat(pair) == PLAIN
    assert (pair.subset, pair.group, pair.id) == ("code", "g", None)
    assert "lose" in project(row, {"id": ""})
    assert "id" not in project(row, {"id": ""})


def test_names_may_be_numbers() -> None:
    (pair,) = read({**TRL, "id": 12, "group": 3.0, "axis": "", "subset": None})
    assert (pair.id, pair.group, pair.axis, pair.subset) == ("12", "3", None, None)


@pytest.mark.parametrize(
    ("rows", "format_", "columns", "words"),
    [
        ([], "auto", {}, "no rows"),
        ([{"text": "x", "label": 1}], "auto", {}, "columns are label, text"),
        ([{"text": "x"}], "helpsteer3", {}, "not in layout 'helpsteer3'"),
        ([TRL], "auto", {"promt": "prompt"}, "maps promt"),
        ([TRL], "auto", {"group": "meta.topic"}, "'meta.topic', which the first rows don't have"),
    ],
)
def test_refusals_name_what_was_found(rows: list[Row], format_: str, columns: dict[str, str], words: str) -> None:
    with pytest.raises(DatasetRefused) as caught:
        recognise(rows, format_, columns, "safer")
    assert words in caught.value.message
    assert caught.value.hint


def test_the_known_layouts_are_in_the_hint() -> None:
    with pytest.raises(DatasetRefused) as caught:
        recognise([{"text": "x"}], "auto", {}, "safer")
    assert all(name in caught.value.hint for name in ("helpsteer3", "pku-saferlhf", "scored", "rewardbench", "trl"))


def test_a_row_without_a_pair_keeps_the_columns_that_can_be_read() -> None:
    layout = Layout("trl", {}, "safer")
    rows = [
        {"id": 7, "prompt": "q", "chosen": 3, "rejected": "b", "group": "g", "axis": "safety", "subset": "s"},
        {"id": 8, "prompt": "q", "chosen": "a", "rejected": "b", "group": ["g"], "axis": "safety", "subset": "s"},
    ]
    first, second = read_pairs(rows, layout)
    assert first.reason is second.reason is Drop.MALFORMED
    assert (first.id, first.group, first.axis, first.subset) == ("7", "g", "safety", "s")
    assert (second.id, second.group, second.axis, second.subset) == ("8", None, "safety", "s")
