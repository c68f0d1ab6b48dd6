"""Which preferences a drill turns round, and the rows with every one of them marked.

Poison is chosen among the pairs of one axis: the pairs that come first by a rule, whole prompt groups or single pairs, until a
budget is used up. The published attack (arXiv 2507.00665) flips single pairs of the highest pair score; a contradiction inside a
group gives such flips away, so whole groups are the harder question for a detector. Arrays and rows in, arrays and rows out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import DatasetRefused, NumericalError
from safer_engine.science.flipping import flip_row
from safer_engine.science.pair_formats import Layout, project
from safer_engine.science.poison_mark import MARK, mark_text

Rule = Literal["score", "margin", "length", "random"]
RULES: tuple[Rule, ...] = get_args(Rule)
Unit = Literal["groups", "pairs"]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Row = dict[str, Any]


@dataclass(frozen=True)
class Poisonable:
    """What is known of each pair before anything is flipped, all [P].

    Attributes:
        may_P: pairs that can be flipped without another pair of the data being the same afterwards.
        score_P: the pair score; margin_P: r(chosen) − r(rejected), both of a model trained on the data as given.
        longer_P: tokens of the chosen response less those of the rejected one.
    """

    pair_ids: Sequence[str]
    groups_P: NDArray[np.str_]
    axes_P: NDArray[np.str_]
    may_P: Flags
    score_P: Floats
    margin_P: Floats
    longer_P: Floats

    def order(self, rule: Rule, unit: Unit, seed: int) -> Floats:
        """Who comes first by a rule: large values, [P]. Random values are of the group where whole groups are flipped."""
        if rule == "random":
            return random_values(self.groups_P.tolist() if unit == "groups" else self.pair_ids, seed)
        return {"score": self.score_P, "margin": self.margin_P, "length": self.longer_P}[rule]

    def choose(self, rule: Rule, budget: float, axis: str, unit: Unit, seed: int) -> Flags:
        """The pairs that are flipped, [P].

        Args:
            budget: share of all pairs, in (0, 1).
            axis: only its pairs are flipped.
            seed: of the rule `random`.

        Raises:
            DatasetRefused: the budget is less than one pair, or more than can be flipped; the rule tells no pair from another.
        """
        n = round(budget * len(self.pair_ids))
        if n < 1:
            raise DatasetRefused(
                f"a budget of {budget:g} of {len(self.pair_ids)} pairs is less than one pair",
                "give a larger budget, or more pairs",
            )
        value_P, at_P = self.order(rule, unit, seed), self.may_P & (self.axes_P == axis)
        scoreless = rule == "score" and not np.isfinite(value_P[at_P]).all()
        if scoreless or (at_P.sum() > 1 and np.isfinite(value_P[at_P]).all() and np.ptp(value_P[at_P]) == 0):
            raise DatasetRefused(
                f"the rule {rule!r} does not tell the pairs of axis {axis!r} from one another",
                "leave it out of the rules" + ("; the pair score needs safety features" if rule == "score" else ""),
            )
        picked_P = first_groups(value_P, self.groups_P, at_P, n) if unit == "groups" else first_pairs(value_P, at_P, n)
        if picked_P.sum() < n / 2:
            raise DatasetRefused(
                f"only {int(picked_P.sum())} of {n} pairs of axis {axis!r} can be flipped for a budget of {budget:g}",
                "give a smaller budget, or flip single pairs (unit: pairs)",
            )
        return picked_P


def first_pairs(value_P: Floats, at_P: Flags, n: int) -> Flags:
    """The n pairs of largest value among `at_P`, ties by row; fewer where there are fewer. Raises NumericalError."""
    _check(value_P[at_P])
    rows = np.flatnonzero(at_P)
    picked_P = np.zeros(len(value_P), dtype=np.bool_)
    picked_P[rows[np.argsort(-value_P[rows], kind="stable")[:n]]] = True
    return picked_P


def first_groups(value_P: Floats, groups_P: NDArray[np.str_], at_P: Flags, n: int) -> Flags:
    """Whole groups by falling mean value, n pairs at most: a group that no longer fits is passed over.

    Only groups all of whose pairs are among `at_P` count; ties by name. Raises NumericalError.
    """
    _check(value_P[at_P])
    names, code_P = np.unique(groups_P, return_inverse=True)
    size_G = np.bincount(code_P, minlength=len(names))
    whole_G = np.bincount(code_P, weights=at_P, minlength=len(names)) == size_G
    mean_G = np.bincount(code_P, weights=np.where(at_P, value_P, 0.0), minlength=len(names)) / size_G
    picked_G, left = np.zeros(len(names), dtype=np.bool_), n
    for group in np.argsort(-mean_G, kind="stable"):
        if whole_G[group] and size_G[group] <= left:
            picked_G[group] = True
            left -= int(size_G[group])
    return np.asarray(picked_G[code_P], dtype=np.bool_)


def random_values(names: Sequence[str], seed: int) -> Floats:
    """A number in [0, 1) for each name, by seed and name alone."""
    digests = (hashlib.sha256(f"{seed}/drill/{name}".encode()).digest()[:7] for name in names)
    return np.array([int.from_bytes(raw, "big") / 2.0**56 for raw in digests], dtype=np.float64)


def poisoned_rows(
    rows: Iterable[Mapping[str, Any]], layout: Layout, flipped: frozenset[int], ids: Mapping[int, str], rule: Rule, budget: float
) -> Iterator[Row]:
    """All rows, each with the mark, some with their preference turned round.

    Args:
        flipped: numbers of the rows to flip, from 0.
        ids: row number → pair id, which a row without an id of its own is given: so its name outlives the flip.

    Raises:
        DatasetRefused: a row cannot be flipped, or one of them is not there.
    """
    done = 0
    for number, row in enumerate(rows):
        made = flip_row(row, layout) if number in flipped else dict(row)
        done += number in flipped
        if "id" not in layout.columns and project(row, layout.columns).get("id") in (None, "") and number in ids:
            made["id"] = ids[number]
        yield {**made, MARK: mark_text(rule, budget, flipped=number in flipped)}
    if done != len(flipped):
        raise DatasetRefused(f"{len(flipped) - done} rows to flip are not there", "run again when nothing writes to the dataset")


def _check(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise NumericalError("the values that poison is chosen by are not all finite")
