"""Words of the data that a reader should not have to meet in a title: blurred on a card, left out of short names.

A word is harsh when it marks a latent whose label is harmful content, or when it is a term of harm in the built-in safety rubric.
The labeller's own words (what kind of content it is) stay.
"""

from __future__ import annotations

import re
from functools import cache

from markupsafe import Markup

from safer_engine.labellers.rubric import load_rubric
from safer_engine.report.model import Feature
from safer_engine.report.text import marked, name_of

HARMFUL = "harmful_content"
_KINDS = re.compile(r"Kinds: [^.]*\.")
_QUOTED = re.compile('“[^”]*”|"[^"]*"')


def is_harsh(word: str, feature: Feature) -> bool:
    """Whether a word that marks the contexts of a feature is harsh."""
    return feature.direction == HARMFUL or _terms_of_harm().search(word) is not None


def veiled_words(text: str, feature: Feature) -> Markup:
    """A title, a tag or an explanation of a feature as HTML, its harsh words in `<span class="harsh">`.

    Harsh are the feature's own harsh terms, and terms of harm that are quoted.
    """
    parts, end = [], 0
    for start, stop in _spans(text, feature):
        if start >= end:
            word = marked(text[start:stop])
            parts += [marked(text[end:start]), Markup('<span class="harsh"><span inert>{}</span></span>').format(word)]
            end = stop
    return Markup("").join([*parts, marked(text[end:])])


def mild_name(feature: Feature, limit: int = 72) -> str:
    """The name of a feature without harsh words, for places that have no room to veil them; may be empty."""
    mild = [term for term in feature.terms if not is_harsh(term.text, feature)]
    name = name_of(feature, limit)
    if _spans(name, feature):
        name = name_of(feature.model_copy(update={"terms": mild, "explanation": None}), limit)
        kind = (feature.direction or "").replace("_", " ")
        return name if mild or not kind or len(kind) > limit else kind
    return name


def _spans(text: str, feature: Feature) -> list[tuple[int, int]]:
    """Start and end of the harsh words of a text, in order."""
    words = [term.text for term in feature.terms if term.text.strip() and is_harsh(term.text, feature)]
    found: list[tuple[int, int]] = []
    if words:
        longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        found += [match.span() for match in re.finditer(rf"(?<!\w)(?:{longest_first})(?!\w)", text, re.IGNORECASE)]
    for quote in _QUOTED.finditer(text):
        found += [match.span() for match in _terms_of_harm().finditer(text, *quote.span())]
    return sorted(span for span in set(found) if not any(a <= span[0] and span[1] <= b for a, b in _own_words(text, feature)))


def _own_words(text: str, feature: Feature) -> list[tuple[int, int]]:
    """Where a text speaks in the labeller's words: the direction before the terms, and the list of kinds."""
    kind = f"{(feature.direction or '').replace('_', ' ')}:"
    found = [match.span() for match in _KINDS.finditer(text)]
    return [*found, (0, len(kind))] if feature.direction and text.startswith(kind) else found


@cache
def _terms_of_harm() -> re.Pattern[str]:
    categories = [category for category in load_rubric("safety").categories if category.direction == HARMFUL]
    terms = sorted({term for category in categories for term in category.terms}, key=len, reverse=True)
    parts = (re.escape(term.rstrip("*")).replace(r"\ ", "[ -]") + (r"\w*" if term.endswith("*") else "") for term in terms)
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)
