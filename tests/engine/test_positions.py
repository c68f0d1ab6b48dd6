"""Covered positions, against positions counted by hand and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_engine.science.positions import SENTENCE_ENDS, SideTokens, covered_positions, sentence_end_mask
from safer_engine.spec import HookSpec


def side_of(tokens: list[str], start: int = 0, special: tuple[int, ...] = ()) -> SideTokens:
    """A side made of tokens written one after another; those in `special` stand for no text."""
    text, spans = "", []
    for index, token in enumerate(tokens):
        piece = "" if index in special else token
        spans += [len(text), len(text) + len(piece)]
        text += piece
    return SideTokens(text, spans, start, len(tokens))


TALK = side_of(["<s>", "Hi", ",", " you", ".", " So", "?", "\n\n", " a", ";", " b", "!", " c", "…", "</s>"], 5, special=(0, 14))


@pytest.mark.parametrize(
    ("min_gap", "expected"),
    [(1, [2, 4, 6, 7, 9, 11]), (2, [2, 4, 6, 9, 11]), (3, [2, 6, 9]), (5, [2, 7]), (100, [2])],
)
def test_sentence_ends_keep_their_distance(min_gap: int, expected: list[int]) -> None:
    assert np.flatnonzero(sentence_end_mask(TALK, (0, 15), min_gap)).tolist() == expected


def test_the_gap_is_counted_within_the_region() -> None:
    assert np.flatnonzero(sentence_end_mask(TALK, (5, 15), 5)).tolist() == [6, 11]


@pytest.mark.parametrize(
    ("hook", "head", "expected"),
    [
        (HookSpec(), 14, list(range(5, 15))),
        (HookSpec(region="text"), 14, list(range(15))),
        (HookSpec(positions="sentence_ends", min_gap=3), 14, [6, 9, 14]),
        (HookSpec(positions="sentence_ends", region="text", min_gap=5), 14, [2, 7, 14]),
        (HookSpec(), 0, [0, *range(5, 15)]),
        (HookSpec(positions="sentence_ends", min_gap=3), 0, [0, 6, 9]),
    ],
)  # fmt: skip
def test_covered_positions(hook: HookSpec, head: int, expected: list[int]) -> None:
    assert np.flatnonzero(covered_positions(TALK, hook, head)).tolist() == expected


def test_offsets_may_be_flat_or_in_rows() -> None:
    rows = SideTokens(TALK.text, np.array(TALK.offsets).reshape(-1, 2), TALK.start, TALK.end)
    hook = HookSpec(positions="sentence_ends", region="text")
    assert np.array_equal(covered_positions(rows, hook, 14), covered_positions(TALK, hook, 14))


@pytest.mark.parametrize("head", [-1, 15])
def test_a_head_outside_the_sequence_is_an_error(head: int) -> None:
    with pytest.raises(IndexError, match="head position"):
        covered_positions(TALK, HookSpec(), head)


def test_a_text_without_tokens_of_its_own() -> None:
    bare = SideTokens("", [0, 0], 0, 1)
    assert covered_positions(bare, HookSpec(positions="sentence_ends"), 0).tolist() == [True]


@given(
    tokens=st.lists(st.sampled_from(["a", " b.", "\n", "🙌", "é,", "x?y", "...", ""]), min_size=1, max_size=40),
    min_gap=st.integers(1, 6),
    start=st.integers(0, 39),
)
def test_agrees_with_a_plain_loop(tokens: list[str], min_gap: int, start: int) -> None:
    expected, last = [], -min_gap
    for index, token in enumerate(tokens):
        if index >= start and token and token[-1] in SENTENCE_ENDS and index - last >= min_gap:
            expected.append(index)
            last = index
    mask = sentence_end_mask(side_of(tokens, start), (start, len(tokens)), min_gap)
    assert np.flatnonzero(mask).tolist() == expected
