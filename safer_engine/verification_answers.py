"""What models of several arms and seeds answered, and how arms differ: on pairs, and as the benchmarks score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.science.arms import Arm
from safer_engine.science.crossed import Difference, cell_name, cell_names, crossed_mean, means_by_seed
from safer_engine.science.evaluation import Points, ScoredPairs, benchmark_points
from safer_engine.science.outcomes import Judged, OutcomeRules, judge

Floats = NDArray[np.float64]
PAIRS = "pairs"
CONTRASTS: tuple[tuple[Arm, Arm], ...] = (
    ("edits", "as given"), ("edits", "random"), ("edits", "margin"), ("margin", "as given"), ("random", "as given"),
)  # fmt: skip
"""Arms that are compared, each with its reference."""


@dataclass(frozen=True)
class Answers:
    """What the models of all arms and seeds so far say of the evaluation pairs, or of items made of them.

    Attributes:
        right: arm → credit of each item, in [0, 1], [S, N]; of a pair: 1 where the chosen response has the higher reward, else 0.
        groups_N, axes_N, subsets_N: of the items.
    """

    right: Mapping[Arm, Floats]
    groups_N: NDArray[np.str_]
    axes_N: NDArray[np.str_]
    subsets_N: NDArray[np.str_]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(axis, subset) of all items, sorted."""
        return sorted(set(zip(self.axes_N.tolist(), self.subsets_N.tolist(), strict=True)))

    @cached_property
    def cell_N(self) -> NDArray[np.str_]:
        """Axis and subset of each item, as one name."""
        return cell_names(self.axes_N, self.subsets_N)

    @property
    def axes(self) -> list[str]:
        """Axes of all items, sorted."""
        return sorted(set(self.axes_N.tolist()))

    def of_groups(self, groups: frozenset[str]) -> Answers:
        """The items of some groups."""
        at = np.isin(self.groups_N, sorted(groups))
        right = {arm: found[:, at] for arm, found in self.right.items()}
        return Answers(right, self.groups_N[at], self.axes_N[at], self.subsets_N[at])

    def difference(self, contrast: tuple[Arm, Arm], axes: tuple[str, ...] | None, subset: str | None = None) -> Difference:
        """An arm's accuracy less its reference's, on axes (None: all) or one subset of theirs; subsets count alike."""
        at = np.ones(len(self.axes_N), dtype=np.bool_) if axes is None else np.isin(self.axes_N, axes)
        if subset is not None:
            at &= self.subsets_N == subset
        arm, reference = contrast
        return crossed_mean(self.right[arm][:, at] - self.right[reference][:, at], self.groups_N[at], self.cell_N[at])


def answers_of(scored: Mapping[Arm, Sequence[ScoredPairs]]) -> dict[str, Answers]:
    """What models answered, by unit: `pairs`, and of best_of_n, hard, normal and easy those that the pairs have a shape for.

    Args:
        scored: by arm, the same pairs in the same order for each seed.
    """
    by_arm = {arm: [_points(pairs) for pairs in seeds] for arm, seeds in scored.items()}
    first = next(iter(by_arm.values()))[0]
    found = {}
    for name, points in first.items():
        right = {arm: np.asarray([seed[name].values for seed in seeds], dtype=np.float64) for arm, seeds in by_arm.items()}
        columns = (np.asarray(column, dtype=np.str_) for column in (points.group, points.axis, points.subset))
        found[name] = Answers(right, *columns)
    return found


def _points(pairs: ScoredPairs) -> dict[str, Points]:
    won = (pairs.margin > 0).astype(np.float64).tolist()
    return {PAIRS: Points(list(pairs.axis), list(pairs.subset), list(pairs.group), won), **benchmark_points(pairs)}


def judged_of(answers: Answers, edited_axes: tuple[str, ...], rules: OutcomeRules) -> Judged:
    """The outcome of a verification from what its models answered."""
    against = {other: answers.difference(("edits", other), edited_axes) for other in ("as given", "random")}
    by_subset = {cell_name(*cell): answers.difference(("edits", "as given"), (cell[0],), cell[1]) for cell in answers.cells}
    return judge(against, by_subset, rules)


def judged_facts(judged: Judged) -> dict[str, Any]:
    """An outcome as JSON: NaN is null."""
    document = asdict(judged)
    for name in ("p_benefit", "p_harm"):
        document[name] = {what: None if math.isnan(p) else p for what, p in document[name].items()}
    return document


def answer_facts(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """`slice_facts` of the pairs, and under `shapes` those of everything that a benchmark scores in its own way."""
    shapes = [{"name": name, **slice_facts(found)} for name, found in answers.items() if name != PAIRS]
    return {**slice_facts(answers[PAIRS]), "shapes": shapes}


def slice_facts(answers: Answers) -> dict[str, Any]:
    """Accuracy of each arm, and every difference with its interval, on all pairs, each axis and each subset.

    Subsets count alike in both, so that differences are those of the accuracies.
    """
    scopes: list[tuple[str | None, str | None]] = [(None, None), *((axis, None) for axis in answers.axes), *answers.cells]
    accuracy, effects = [], []
    for axis, subset in scopes:
        at = np.ones(len(answers.axes_N), dtype=np.bool_) if axis is None else answers.axes_N == axis
        at = at if subset is None else at & (answers.subsets_N == subset)
        scope = {"axis": axis, "subset": subset}
        for arm in answers.right:
            by_seed = means_by_seed(answers.right[arm][:, at], answers.cell_N[at])
            accuracy.append({"arm": arm, **scope, "accuracy": float(by_seed.mean()), "by_seed": by_seed.tolist()})
        for contrast in CONTRASTS:
            if all(arm in answers.right for arm in contrast):
                found = answers.difference(contrast, None if axis is None else (axis,), subset)
                effects.append({"arm": contrast[0], "reference": contrast[1], **scope, **asdict(found)})
    return {"accuracy": accuracy, "effects": effects}
