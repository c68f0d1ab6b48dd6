"""The offline labeller: which of the rubric's terms stand near the focus, more often than by chance.

It reads words, not meaning: a latent that fires on a theme in words the rubric does not list is rated low, and one that
fires on a listed word in a harmless sense is rated high. Its explanations say what was counted, so that a reader can
tell. The rating is made of two figures over the latent's contexts:

    share   mean over contexts of the largest weight of a rubric term within `RADIUS` tokens of the focus, in [0, 1]
    z       (share − share at random positions) over its standard error under the random positions' share

Distinctive words are ranked by the log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008,
equations 15–22) of occurring near the focus against the background, each word counted once a window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from safer_engine.labellers.base import Candidate, Claim, Judged, Judgements, Labelling, LatentLabel, Progress, Window
from safer_engine.labellers.rubric import Rubric, TermCategory, word_at, words_of

RADIUS = 10
"""Tokens on either side of the focus that count as near."""

_RATINGS = ((5, 0.75, 3.0), (4, 0.5, 2.0), (3, 0.3, 1.0))
"""Rating, least share, least z: nearly every context, most, about half; and each more than chance would give."""

_PRIOR_WORDS = 100.0
_MAX_TERMS = 8
_MAX_KINDS = 3
_MIN_WINDOWS_WITH_TERM = 2
_MAX_WORD = 30
_ENDINGS = frozenset(("ll", "re", "ve"))
_MIN_Z = 1.96
_CLEAR_DIRECTION = 0.6
_MIN_RATING_WITH_DIRECTION = 3


@dataclass(frozen=True)
class Hit:
    """A rubric term found in a window."""

    category: TermCategory
    term: str


@dataclass(frozen=True)
class _Evidence:
    """What the contexts of one latent show."""

    share: float
    z: float
    hits: tuple[tuple[Hit, ...], ...]
    distinctive: tuple[str, ...]
    focus: Counter[str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Categories with a term in the most windows, the most frequent first."""
        categories = Counter(name for window in self.hits for name in {hit.category.name for hit in window})
        return tuple(name for name, _ in _most(categories)[:_MAX_KINDS])

    @property
    def main_focus(self) -> str | None:
        """The word or sign (empty: no text) that is the focus of more than half of the contexts."""
        return next((word for word, count in _most(self.focus) if 2 * count > self.focus.total()), None)


class TermIndex:
    """Finds a rubric's terms in a list of words."""

    def __init__(self, categories: Sequence[TermCategory]) -> None:
        self._by_start: dict[str, list[tuple[tuple[str, ...], Hit]]] = {}
        for category in categories:
            for term in category.terms:
                parts = tuple(term.split())
                self._by_start.setdefault(parts[0], []).append((parts, Hit(category, term)))

    def find(self, words: Sequence[str]) -> tuple[Hit, ...]:
        """Terms that occur, each once, in the rubric's order of first occurrence."""
        found: dict[tuple[str, str], Hit] = {}
        for at, word in enumerate(words):
            starts = [word, *(f"{word[:n]}*" for n in range(2, len(word) + 1))]
            for start in starts:
                for parts, hit in self._by_start.get(start, ()):
                    if self._matches(parts, words[at : at + len(parts)]):
                        found.setdefault((hit.category.name, hit.term), hit)
        return tuple(found.values())

    @staticmethod
    def _matches(parts: tuple[str, ...], words: Sequence[str]) -> bool:
        return len(words) == len(parts) and all(
            word.startswith(part[:-1]) if part.endswith("*") else word == part for part, word in zip(parts, words, strict=True)
        )


class LexiconLabeller:
    """Rates latents by rubric terms near the focus. See the module for what that can and cannot show."""

    def __init__(self, rubric: Rubric) -> None:
        self.rubric = rubric
        self._index = TermIndex(rubric.categories)

    @property
    def name(self) -> str:
        """See `Labeller.name`."""
        return "lexicon"

    @property
    def reads_in_order(self) -> bool:
        """See `Labeller.reads_in_order`: what is counted is the same in any order."""
        return False

    def detect(self, claims: Sequence[Claim], progress: Progress) -> Judgements:
        """See `Labeller.detect`: a window is taken for one that fires where a word that the label tells of is near its focus.

        Those are the rubric's terms of the kinds that the explanation names, and the words of the label. A label without
        either says nothing of any window.
        """
        found = []
        for done, claim in enumerate(claims):
            progress(done, len(claims))
            found.append(self._judge(claim))
        return Judgements(tuple(found))

    def _judge(self, claim: Claim) -> Judged:
        counted = [category for category in self.rubric.categories if category.name in claim.label.kinds]
        words = {word for term in claim.label.terms for word in words_of(term)}
        if not counted and not words:
            return Judged((None,) * len(claim.windows), "the label names no word to look for")
        index = TermIndex(counted)
        near = [near_words(window) for window in claim.windows]
        return Judged(tuple(bool(index.find(each)) or not words.isdisjoint(each) for each in near))

    def label(self, candidates: Sequence[Candidate], background: Sequence[Window], progress: Progress) -> Labelling:
        """See `Labeller.label`."""
        by_chance = [self._index.find(near_words(window)) for window in background]
        words = Counter(word for window in background for word in set(words_of(window.text)))
        labels = []
        for done, candidate in enumerate(candidates):
            progress(done, len(candidates))
            labels.append(self._label(candidate, by_chance, words))
        return Labelling(tuple(labels))

    def _label(self, candidate: Candidate, by_chance: Sequence[tuple[Hit, ...]], background: Counter[str]) -> LatentLabel:
        hits = tuple(self._index.find(near_words(window)) for window in candidate.windows)
        share, chance = mean_weight(hits), (sum(map(_weight, by_chance)) + 0.5) / (len(by_chance) + 1)
        spread = math.sqrt(chance * (1 - chance) / max(1, len(hits)))
        near = Counter(word for window in candidate.windows for word in set(near_words(window)))
        found = _Evidence(
            share,
            (share - chance) / spread if spread else 0.0,
            hits,
            distinctive_words(near, background),
            Counter(focus_word(window) for window in candidate.windows),
        )
        rating = _rating(found.share, found.z)
        return LatentLabel(
            candidate.latent_id,
            "labelled",
            rating=rating,
            explanation=_explanation(found, chance),
            direction=_direction(hits) if rating >= _MIN_RATING_WITH_DIRECTION else None,
            terms=_terms(found),
            kinds=found.kinds,
        )


def near_words(window: Window) -> list[str]:
    """Words within `RADIUS` tokens of the focus; a word cut by the edge counts as far as it reaches in."""
    low, high = max(0, window.focus - RADIUS), window.focus + RADIUS + 1
    return words_of("".join(window.tokens[low:high]))


def focus_word(window: Window) -> str:
    """The word that the focus is part of; the token itself where it is no part of a word."""
    before, token = "".join(window.tokens[: window.focus]), window.tokens[window.focus]
    start = len(before) + len(token) - len(token.lstrip())
    return word_at(window.text, start, len(before) + len(token.rstrip())) or token.strip()


def mean_weight(hits: Sequence[tuple[Hit, ...]]) -> float:
    """Mean over windows of the largest weight of a term found in it, in [0, 1]; 0 without windows."""
    return sum(map(_weight, hits)) / len(hits) if hits else 0.0


def distinctive_words(near: Counter[str], background: Counter[str]) -> tuple[str, ...]:
    """Words that stand out near the focus, the most distinctive first.

    Args:
        near: number of the latent's windows with the word near the focus.
        background: number of background windows with the word.

    Source: Monroe, Colaresi & Quinn 2008: z of δ = log odds(near) − log odds(background), prior counts in proportion to
    both together, `_PRIOR_WORDS` in all. Words in fewer than two windows, with z below 1.96, longer than 30 characters, single
    letters and endings of contractions (“t” of “don’t”, cut by a window or a tokenizer) are left out.
    """
    n_near, n_far = near.total(), background.total()
    scores = {}
    for word, count in near.items():
        if count < _MIN_WINDOWS_WITH_TERM or len(word) > _MAX_WORD or _is_piece(word):
            continue
        prior = _PRIOR_WORDS * (count + background[word]) / (n_near + n_far)
        a, b = count + prior, background[word] + prior
        delta = _log_odds(a, n_near + _PRIOR_WORDS) - _log_odds(b, n_far + _PRIOR_WORDS)
        z = delta / math.sqrt(1 / a + 1 / b)
        if z >= _MIN_Z:
            scores[word] = z
    return tuple(sorted(scores, key=lambda word: (-scores[word], word))[:_MAX_TERMS])


def _is_piece(word: str) -> bool:
    return word in _ENDINGS or (len(word) == 1 and word.isascii())


def _log_odds(count: float, total: float) -> float:
    return math.log(count / max(total - count, 0.5))


def _weight(hits: tuple[Hit, ...]) -> float:
    return max((hit.category.weight for hit in hits), default=0.0)


def _rating(share: float, z: float) -> int:
    for rating, least_share, least_z in _RATINGS:
        if share >= least_share and z >= least_z:
            return rating
    return 2 if share > 0 and z > 0 else 1


def _direction(hits: Sequence[tuple[Hit, ...]]) -> str | None:
    """The direction that most of the windows with terms speak for; None where no direction clearly leads."""
    votes: dict[str, float] = {}
    for window in hits:
        weights: dict[str, float] = {}
        for hit in window:
            if hit.category.direction is not None:
                name = hit.category.direction
                weights[name] = max(weights.get(name, 0.0), hit.category.weight)
        for name, weight in weights.items():
            votes[name] = votes.get(name, 0.0) + weight / len(weights)
    if not votes:
        return None
    name, most = max(votes.items(), key=lambda item: (item[1], item[0]))
    return name if most >= _CLEAR_DIRECTION * sum(votes.values()) else None


def _terms(found: _Evidence) -> tuple[str, ...]:
    """Words that mark the contexts: the main focus, if it is a word, then the distinctive ones."""
    focus = found.main_focus
    first = [focus] if focus and words_of(focus) and not _is_piece(focus) else []
    return tuple(dict.fromkeys([*first, *found.distinctive]))[:_MAX_TERMS]


def _explanation(found: _Evidence, chance: float) -> str:
    """What was counted, in words."""
    n = len(found.hits)
    with_terms = sum(1 for window in found.hits if window)
    parts = [f"Rubric terms near the focus in {with_terms} of {n} contexts (weighted {found.share:.0%}, by chance {chance:.0%})."]
    categories = Counter(name for window in found.hits for name in {hit.category.name for hit in window})
    if categories:
        listed = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in _most(categories)[:3])
        parts.append(f"Kinds: {listed}.")
    if found.distinctive:
        parts.append(f"Distinctive words: {', '.join(found.distinctive)}.")
    focus = found.main_focus
    if focus is not None:
        what = f"“{focus[:40]}”" if focus else "a token without a word (a line break, or one that the tokenizer adds)"
        parts.append(f"The focus is {what} in {found.focus[focus]} of {n}.")
    return " ".join(parts)


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
