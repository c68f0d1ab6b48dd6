"""The arms of a verification: which pairs each of them edits, at the audit's own cut and at the budgets of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from safer_engine.artifacts import Edits, PairScores, PairSet
from safer_engine.edit_lines import edit_lines, read_edit_lines
from safer_engine.science.arms import ARMS, DROP, FLIP, KEEP, Arm, arm_edits

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.spec import EditSpec

_CODES = {"drop": DROP, "flip": FLIP}


@dataclass(frozen=True)
class SizedArm:
    """An arm at a budget: a share of the rows of each axis; None: at the audit's own cut."""

    arm: Arm
    budget: float | None = None

    @property
    def label(self) -> str:
        """As it stands in tables and messages."""
        return self.arm if self.budget is None else f"{self.arm} at {100 * self.budget:g} %"


def arms_of(budgets: Sequence[float]) -> tuple[SizedArm, ...]:
    """All arms of a seed: those of the audit's own cut, then those of each budget, which share `as given`."""
    swept = (SizedArm(arm, budget) for budget in budgets for arm in ARMS if arm != "as given")
    return (*(SizedArm(arm) for arm in ARMS), *swept)


@dataclass(frozen=True)
class EditedPairs:
    """The pairs under audit and what is recommended for each: KEEP, DROP or FLIP."""

    pair_ids: tuple[str, ...]
    axes_P: NDArray[np.str_]
    edits_P: NDArray[np.int8]
    margin_P: NDArray[np.float64]

    def of(self, arm: Arm, seed: int) -> NDArray[np.int8]:
        """What an arm does to each pair."""
        return arm_edits(arm, self.edits_P, self.axes_P, self.margin_P, self.pair_ids, seed)

    def known(self, table: pa.Table) -> pa.Table:
        """The rows of a pair table that are pairs of the audit: the base may read some that the audited model cannot."""
        names = set(self.pair_ids)
        return table.take([row for row, name in enumerate(table["pair_id"].to_pylist()) if name in names])

    def read_by(self, table: pa.Table) -> EditedPairs:
        """Those that a pair table has: a pair that the base cannot read is in no arm, so that no arm may spend an edit on it."""
        names = set(table["pair_id"].to_pylist())
        at = np.asarray([name in names for name in self.pair_ids], dtype=np.bool_)
        kept = tuple(name for name in self.pair_ids if name in names)
        return EditedPairs(kept, self.axes_P[at], self.edits_P[at], self.margin_P[at])

    @property
    def edited_axes(self) -> tuple[str, ...]:
        """Axes with an edit, sorted."""
        return tuple(np.unique(self.axes_P[self.edits_P != KEEP]).tolist())

    @property
    def counts(self) -> dict[str, int]:
        """Pairs dropped and flipped."""
        return {name: int((self.edits_P == code).sum()) for name, code in _CODES.items()}


def edited_pairs(pairs: PairSet, scores: PairScores, edits: Edits) -> EditedPairs:
    """What the edits do to each usable pair; the pairs of a row share its action."""
    return _edited(pairs, scores, [line.action for line in read_edit_lines(edits.path("edits.jsonl"))])


def edited_at(pairs: PairSet, scores: PairScores, spec: EditSpec, budget: float) -> EditedPairs:
    """The same for the edits that a budget would have recommended."""
    lines = edit_lines(pairs.rows, pairs.pairs, scores.scores, spec.model_copy(update={"budget": budget}))
    return _edited(pairs, scores, [line["action"] for line in lines])


def _edited(pairs: PairSet, scores: PairScores, actions: Sequence[str]) -> EditedPairs:
    action = dict(zip(pairs.rows["row"].to_pylist(), actions, strict=True))
    table = pairs.pairs
    codes = [_CODES.get(action[row], KEEP) for row in table["row"].to_pylist()]
    return EditedPairs(
        tuple(table["pair_id"].to_pylist()),
        np.asarray(table["axis"].to_pylist(), dtype=np.str_),
        np.asarray(codes, dtype=np.int8),
        scores.scores["reward_margin"].to_numpy().astype(np.float64),
    )
