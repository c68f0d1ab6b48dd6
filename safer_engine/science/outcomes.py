"""What a verification shows: computed from differences between arms by rules that are fixed beforehand, never set by hand.

Benefit: on the edited axes (each subset counts alike) the edits are better than the data as given **and** better than as many
random edits, both after Holm (1979): editing at random changes a training too. Harm: on some subset, edited or not, the edits are
worse than the data as given, after Holm over all subsets. Harm is said first: a gain elsewhere does not make up for it.

Seeds are looked at twice at most. At `least_seeds` the tests are held at a fifth of the level, at the end at the other four
fifths, so whoever stops early is wrong no more often than the level in all (Bonferroni over the two looks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safer_engine.science.crossed import Difference
from safer_engine.science.multiple_testing import holm

Outcome = Literal["benefit shown", "no benefit shown", "harm shown", "inconclusive"]
_EARLY = 0.2


@dataclass(frozen=True)
class OutcomeRules:
    """The rules of a verification.

    Attributes:
        level: chance of a wrong `benefit shown` or `harm shown`, each, at most.
        least_seeds: fewer can show harm and nothing else.
        planned: seeds of the whole verification.
        early_stop: whether to look at `least_seeds` at all.
    """

    level: float = 0.05
    least_seeds: int = 5
    planned: int = 5
    early_stop: bool = True

    def at(self, n_seeds: int) -> float:
        """Level of the tests once so many seeds are done: 0 between the two looks."""
        twice = self.early_stop and self.planned > self.least_seeds
        if n_seeds >= self.planned:
            return (1 - _EARLY) * self.level if twice else self.level
        return _EARLY * self.level if twice and n_seeds == self.least_seeds else 0.0


@dataclass(frozen=True)
class Judged:
    """An outcome and what it rests on.

    Attributes:
        harmed: subsets on which harm is shown.
        level: of the tests, at this look.
        p_benefit, p_harm: adjusted p-values by control and by subset; NaN where there is none.
        decided: no further seed can change the outcome by the rules: stop.
    """

    outcome: Outcome
    harmed: tuple[str, ...]
    level: float
    p_benefit: dict[str, float]
    p_harm: dict[str, float]
    decided: bool


def judge(against: Mapping[str, Difference], by_subset: Mapping[str, Difference], rules: OutcomeRules) -> Judged:
    """The outcome of a verification.

    Args:
        against: edits less each of `as given` and `random`, on the edited axes.
        by_subset: edits less as given, on every subset.
    """
    n_seeds = min(found.n_seeds for found in (*against.values(), *by_subset.values()))
    level = rules.at(n_seeds)
    p_benefit, p_harm = _adjusted(against, 1), _adjusted(by_subset, -1)
    harmed = tuple(name for name, p in p_harm.items() if p <= level > 0)
    benefit = level > 0 and bool(p_benefit) and all(p <= level for p in p_benefit.values())
    if harmed:
        outcome: Outcome = "harm shown"
    elif n_seeds < rules.least_seeds:
        outcome = "inconclusive"
    elif benefit:
        outcome = "benefit shown"
    else:
        outcome = "no benefit shown" if n_seeds >= rules.planned else "inconclusive"
    decided = n_seeds >= rules.planned or bool(harmed) or outcome == "benefit shown"
    return Judged(outcome, harmed, level, p_benefit, p_harm, decided)


def _adjusted(found: Mapping[str, Difference], sign: int) -> dict[str, float]:
    """Holm over the two-sided p-values; 1 for a difference of the other sign, NaN without an interval."""
    raw = [np.nan if one.p is None else one.p if sign * one.estimate > 0 else 1.0 for one in found.values()]
    return dict(zip(found, holm(np.asarray(raw, dtype=np.float64)).tolist(), strict=True))
