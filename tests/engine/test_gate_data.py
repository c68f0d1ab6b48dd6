"""The data of the gate's benchmark: nothing leaks from training to evaluation, and each damage does what it is called."""

from __future__ import annotations

from collections import Counter

from benchmarks.flip_groups import Row
from benchmarks.gate_data import (
    OTHER_REFUSALS,
    REFUSALS,
    flip_safety,
    keep_first,
    over_refuse,
    prefer_longer,
    split_pairs,
    with_answers,
)


def side(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def row(number: int) -> Row:
    axis = "safety" if number % 2 else "chat"
    group = f"g{number // 4 * 2 + number % 2}"
    texts = (side("short"), side("quite a bit longer"))
    chosen, rejected = texts if number % 3 else texts[::-1]
    return {
        "id": f"p{number}", "group": group, "axis": axis, "subset": f"{axis}-mix", "prompt": side(f"prompt {group}"),
        "chosen": chosen, "rejected": rejected,
    }  # fmt: skip


ROWS = [row(number) for number in range(800)]


def turned(before: list[Row], after: list[Row]) -> list[Row]:
    return [old for old, new in zip(before, after, strict=True) if old != new]


def test_no_group_is_in_both_parts() -> None:
    split = split_pairs(ROWS, ("safety-mix", "chat-mix"), 200, 300)
    assert (len(split.training), len(split.evaluation)) == (200, 300)
    assert not {one["group"] for one in split.training} & {one["group"] for one in split.evaluation}
    assert {one["subset"] for one in split_pairs(ROWS, ("chat-mix",), 50, 50).training} == {"chat-mix"}
    many = [{**one, "group": "g"} for one in ROWS]
    assert len(split_pairs(many, ("safety-mix", "chat-mix"), 200, 300).training) == 3


def test_answers_win_over_refusals_of_their_own_part() -> None:
    made = with_answers(ROWS, 0.5, REFUSALS)
    added = made[len(ROWS) :]
    assert made[: len(ROWS)] == ROWS
    assert 60 < len(added) < 140
    assert len({one["group"] for one in added}) == len(added)
    assert {(one["axis"], one["subset"]) for one in added} == {("chat", "over-refusal")}
    assert {one["rejected"][0]["content"] for one in added} == set(REFUSALS)
    assert not set(REFUSALS) & set(OTHER_REFUSALS)


def test_damages_do_what_they_are_called() -> None:
    flipped = turned(ROWS, flip_safety(0.2)(ROWS, 1))
    assert {one["axis"] for one in flipped} == {"safety"}
    assert len({one["group"] for one in flipped}) == round(0.2 * 200)
    assert keep_first(0.1)(ROWS, 1) == ROWS[:80]
    refusing = over_refuse(0.5)(ROWS, 1)
    refused = [one for one in refusing if one["chosen"][0]["content"] in REFUSALS]
    assert {one["axis"] for one in refused} == {"chat"}
    assert 120 < len(refused) < 280
    assert Counter(one["id"] for one in refusing) == Counter(one["id"] for one in ROWS)
    longer = prefer_longer(1.0)(ROWS, 1)
    assert all(len(one["chosen"][0]["content"]) > len(one["rejected"][0]["content"]) for one in longer)
    assert len(turned(ROWS, longer)) == sum(bool(number % 3) for number in range(800))
