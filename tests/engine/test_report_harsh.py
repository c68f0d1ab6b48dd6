"""Harsh words: which they are, and that titles keep the labeller's own words."""

from __future__ import annotations

import re

import pytest

from safer_engine.report.harsh import is_harsh, mild_name, veiled_words
from safer_engine.report.model import Feature, Text

HARSH = re.compile(r'<span class="harsh"><span inert>(.*?)</span></span>')


def feature(*terms: str, direction: str | None = "harmful_content", explanation: str = "") -> Feature:
    return Feature(
        latent_id=7,
        rank=1,
        safety_feature=True,
        fires_on="chosen",
        salience=0.5,
        firing_rate=0.1,
        responses=9,
        status="labelled",
        explanation=Text(text=explanation) if explanation else None,
        direction=direction,
        terms=[Text(text=term) for term in terms],
    )


LONG = "Rubric terms near the focus in 9 of 10 contexts (weighted 90%, by chance 3%). Kinds: violence 8, sexual 2. "


def test_all_words_of_harmful_content_are_veiled_and_the_kind_is_not() -> None:
    shown = veiled_words("harmful content: kitchen, killing", feature("kitchen", "killing"))
    assert HARSH.findall(shown) == ["kitchen", "killing"]
    assert shown.startswith("harmful content: <span")


def test_an_explanation_keeps_its_figures_and_kinds() -> None:
    text = LONG + "Distinctive words: violence, stab. The focus is “stab” in 6 of 10."
    shown = veiled_words(text, feature("stab", "violence"))
    assert HARSH.findall(shown) == ["violence", "stab", "stab"]
    assert "Kinds: violence 8, sexual 2." in shown


@pytest.mark.parametrize(("word", "harsh"), [("raped", True), ("self-harming", True), ("neo nazis", True), ("sorry", False)])
def test_terms_of_harm_are_harsh_whatever_the_direction(word: str, harsh: bool) -> None:
    one = feature(word, direction="safe_behaviour")
    assert is_harsh(word, one) is harsh
    assert HARSH.findall(veiled_words(f"safe behaviour: {word}", one)) == ([word] if harsh else [])


def test_quoted_terms_of_harm_are_veiled_in_an_answer_without_terms() -> None:
    shown = veiled_words("Fires on violence, such as “how to murder him”.", feature(direction=None))
    assert HARSH.findall(shown) == ["murder"]
    assert "Fires on violence" in shown


def test_what_is_veiled_is_escaped_like_the_rest() -> None:
    assert "<b>" not in veiled_words("harmful content: <b>", feature("<b>"))


@pytest.mark.parametrize(
    ("terms", "direction", "name"),
    [
        (("knife", "stab"), "harmful_content", "harmful content"),
        (("sorry", "kill"), "safe_behaviour", "safe behaviour: sorry"),
        (("sorry", "can't"), "safe_behaviour", "safe behaviour: sorry, can't"),
        (("sex",), None, ""),
    ],
)
def test_short_names_leave_them_out(terms: tuple[str, ...], direction: str | None, name: str) -> None:
    assert mild_name(feature(*terms, direction=direction, explanation=LONG * 2)) == name
