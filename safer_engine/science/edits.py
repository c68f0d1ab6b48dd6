"""What to do with each row: the most doubtful ones of every axis, up to a budget.

Removal is the default: flipping is recommended only where it was asked for (published comparisons of cleaning methods find
removal the better of the two, arXiv 2509.23564).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safer_engine.errors import NumericalError, SpecError

Action = Literal["keep", "review", "drop", "flip"]
ACTIONS: tuple[Action, ...] = ("keep", "review", "drop", "flip")
BOTH_ORDERS = "both_orders"
"""Reason of a `review` by rule: the same two responses are also in the data the other way round."""
MAX_BUDGET = 0.5


@dataclass(frozen=True)
class Candidate:
    """An input row as the edits see it.

    Attributes:
        pair_id: breaks ties.
        axis: budgets are counted within it.
        scored: whether the row was audited at all.
        suspicion: in [0, 1], higher = more doubtful; None without a value.
        both_orders: the row is a matter for a person, whatever its suspicion.
        several: the row holds several pairs, so that it cannot be flipped.
    """

    pair_id: str
    axis: str
    scored: bool
    suspicion: float | None
    both_orders: bool = False
    several: bool = False


def recommend(rows: Sequence[Candidate], budget: float, *, allow_flip: bool = False) -> list[Action]:
    """An action per row.

    In each axis with n scored rows the ⌊budget · n⌋ rows of highest suspicion become `drop` (`flip` where that is allowed and
    the row holds one pair), the next as many `review`. Rows in both orders become `review` by rule and take no place of the
    budget. Everything else, rows without a suspicion among it, is kept. Equal suspicions are ordered by pair id.

    Args:
        budget: share of the scored rows of each axis, in (0, 0.5).

    Raises:
        SpecError: the budget is out of range.
        NumericalError: a suspicion is not a number in [0, 1].
    """
    check_budget(budget)
    actions: list[Action] = ["keep"] * len(rows)
    sizes: dict[str, int] = {}
    ranked: dict[str, list[tuple[float, str, int]]] = {}
    for index, row in enumerate(rows):
        if not row.scored:
            continue
        sizes[row.axis] = sizes.get(row.axis, 0) + 1
        if row.both_orders:
            actions[index] = "review"
        elif row.suspicion is not None:
            if not 0.0 <= row.suspicion <= 1.0:
                raise NumericalError(f"suspicion of {row.pair_id} is {row.suspicion}, not in [0, 1]")
            ranked.setdefault(row.axis, []).append((-row.suspicion, row.pair_id, index))
    for axis, entries in ranked.items():
        entries.sort()
        cut = budget_count(budget, sizes[axis])
        for place, (_, _, index) in enumerate(entries[: 2 * cut]):
            strongest: Action = "flip" if allow_flip and not rows[index].several else "drop"
            actions[index] = strongest if place < cut else "review"
    return actions


def budget_count(budget: float, n_rows: int) -> int:
    """⌊budget · n⌋, safe against 0.04 · 50 being a little under 2."""
    return math.floor(budget * n_rows + 1e-9)


def check_budget(budget: float) -> None:
    """Raise SpecError unless 0 < budget < 0.5."""
    if not 0.0 < budget < MAX_BUDGET:
        raise SpecError(f"a budget of {budget:g} is out of range", "give a share between 0 and 0.5, for example 4% or 0.04")
