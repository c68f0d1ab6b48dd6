"""What to do with each row: where suspicion is a probability, the edits that are worth more than they cost; else a budget.

An edit of a pair whose label is wrong with probability p gains, in units of one wrong label,

    drop: p · cost_wrong − (1 − p) · cost_lost      flip: p − (1 − p) = 2 p − 1

and what is edited is the largest set, most doubtful first, of which no more than `false_edits` is expected to have been right:
the mean of 1 − p over the set. What is left above the share of wrong labels that its subset starts from is for a person to see.

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
CONTESTED = "contested"
"""Reason of a row whose label is open to dispute: it is reviewed at most."""
MAX_BUDGET = 0.5
RANK_BUDGET = 0.04
"""Share of an axis that is dropped where suspicion is a rank and nobody gave a budget."""


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
        base: where suspicion is a probability: the share of wrong labels it starts from; None: it is a rank.
        disputed: the label is open to dispute (`science.contested`): the row is never dropped or flipped.
    """

    pair_id: str
    axis: str
    scored: bool
    suspicion: float | None
    both_orders: bool = False
    several: bool = False
    base: float | None = None
    disputed: bool = False


@dataclass(frozen=True)
class EditRules:
    """How edits are chosen.

    Attributes:
        budget: share of the scored rows of each axis, in (0, 0.5); None: by probability where there is one, else `RANK_BUDGET`.
        allow_flip: whether `flip` may be recommended.
        false_edits: largest expected share of right labels among the edited, in (0, 1).
        cost_wrong, cost_lost: of a wrong label that stays, and of a right one that is dropped; > 0.
    """

    budget: float | None = None
    allow_flip: bool = False
    false_edits: float = 0.3
    cost_wrong: float = 1.0
    cost_lost: float = 1.0


def recommend(rows: Sequence[Candidate], rules: EditRules) -> list[Action]:
    """An action per row.

    With a budget: in each axis with n scored rows the ⌊budget · n⌋ undisputed rows of highest suspicion become `drop` (`flip`
    where that is allowed and the row holds one pair); of the rest, disputed or not, the next as many become `review`. Without
    one, axes whose suspicion is a probability are edited by gain (see the module), disputed rows left out. Rows in both orders
    become `review` by rule and take no place. Everything else, rows without a suspicion among it, is kept. Equal suspicions are
    ordered by pair id.

    Raises:
        SpecError: the budget is out of range.
        NumericalError: a suspicion is not a number in [0, 1].
    """
    if rules.budget is not None:
        check_budget(rules.budget)
    actions: list[Action] = ["keep"] * len(rows)
    sizes: dict[str, int] = {}
    ranked: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if not row.scored:
            continue
        sizes[row.axis] = sizes.get(row.axis, 0) + 1
        if row.both_orders:
            actions[index] = "review"
        elif row.suspicion is not None:
            if not 0.0 <= row.suspicion <= 1.0:
                raise NumericalError(f"suspicion of {row.pair_id} is {row.suspicion}, not in [0, 1]")
            ranked.setdefault(row.axis, []).append(index)
    for axis, found in ranked.items():
        found.sort(key=lambda index: (-_suspicion(rows[index]), rows[index].pair_id))
        if rules.budget is None and all(rows[index].base is not None for index in found):
            _by_gain(rows, found, rules, actions)
        else:
            cut = budget_count(RANK_BUDGET if rules.budget is None else rules.budget, sizes[axis])
            _by_rank(rows, found, rules, actions, cut)
    return actions


def _by_rank(rows: Sequence[Candidate], found: Sequence[int], rules: EditRules, actions: list[Action], cut: int) -> None:
    """Actions of one axis, most doubtful first; `actions` is filled in."""
    removed = [index for index in found if not rows[index].disputed][:cut]
    rest = set(found) - set(removed)
    for index in removed:
        actions[index] = _removal(rows[index], rules)
    for index in [index for index in found if index in rest][:cut]:
        actions[index] = "review"


def _suspicion(row: Candidate) -> float:
    assert row.suspicion is not None
    return row.suspicion


def _removal(row: Candidate, rules: EditRules) -> Action:
    return "flip" if rules.allow_flip and not row.several else "drop"


def _by_gain(rows: Sequence[Candidate], found: Sequence[int], rules: EditRules, actions: list[Action]) -> None:
    """Actions of one axis, most doubtful first; `actions` is filled in."""
    right, n_edited = 0.0, 0
    edited: list[tuple[int, Action]] = []
    for index in found:
        if rows[index].disputed:
            continue
        p = _suspicion(rows[index])
        drop, flip = p * rules.cost_wrong - (1 - p) * rules.cost_lost, 2 * p - 1
        may_flip = _removal(rows[index], rules) == "flip" and flip >= drop
        if max(drop, flip if may_flip else drop) <= 0:
            break
        right += 1 - p
        edited.append((index, "flip" if may_flip else "drop"))
        if right <= rules.false_edits * len(edited):
            n_edited = len(edited)
    for index in found:
        base = rows[index].base
        if base is not None and _suspicion(rows[index]) > base:
            actions[index] = "review"
    for index, action in edited[:n_edited]:
        actions[index] = action


def budget_count(budget: float, n_rows: int) -> int:
    """⌊budget · n⌋, safe against 0.04 · 50 being a little under 2."""
    return math.floor(budget * n_rows + 1e-9)


def check_budget(budget: float) -> None:
    """Raise SpecError unless 0 < budget < 0.5."""
    if not 0.0 < budget < MAX_BUDGET:
        raise SpecError(f"a budget of {budget:g} is out of range", "give a share between 0 and 0.5, for example 4% or 0.04")
