"""Retraining with the recommended edits and with controls: which pairs each arm trains on, and what its models make of others.

All arms of a seed start from the same weights, take the same number of optimiser steps, and see the pairs that they share in the
same order (by hash of seed, epoch and pair id). Only rewards are kept; each model is an arm of a seed, and resumes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.artifacts import Edits, PairScores, PairSet
from safer_engine.base_trainings import BaseTrainings, facts_of
from safer_engine.edit_lines import read_edit_lines
from safer_engine.science.arms import ARMS, DROP, FLIP, KEEP, Arm, arm_edits
from safer_engine.science.crossed import Difference, crossed_mean
from safer_engine.science.outcomes import Judged, OutcomeRules, judge
from safer_engine.stage import stage_seed
from safer_engine.store import PART_SCRATCH
from safer_engine.training import token_pairs

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.science.rm_training import TokenPairs

Floats = NDArray[np.float64]
_CODES = {"drop": DROP, "flip": FLIP}
CONTRASTS: tuple[tuple[Arm, Arm], ...] = (
    ("edits", "as given"), ("edits", "random"), ("edits", "margin"), ("margin", "as given"), ("random", "as given"),
)  # fmt: skip
"""Arms that are compared, each with its reference."""


@dataclass(frozen=True)
class EditedPairs:
    """The pairs under audit and what is recommended for each: KEEP, DROP or FLIP."""

    pair_ids: tuple[str, ...]
    axes_P: NDArray[np.str_]
    edits_P: NDArray[np.int8]
    margin_P: Floats

    def of(self, arm: Arm, seed: int) -> NDArray[np.int8]:
        """What an arm does to each pair."""
        return arm_edits(arm, self.edits_P, self.axes_P, self.margin_P, self.pair_ids, seed)

    def known(self, table: pa.Table) -> pa.Table:
        """The rows of a pair table that are pairs of the audit: the base may read some that the audited model cannot."""
        names = set(self.pair_ids)
        return table.take([row for row, name in enumerate(table["pair_id"].to_pylist()) if name in names])

    @property
    def edited_axes(self) -> tuple[str, ...]:
        """Axes with an edit, sorted."""
        return tuple(np.unique(self.axes_P[self.edits_P != KEEP]).tolist())


@dataclass(frozen=True)
class Answers:
    """What the models of all arms and seeds so far say of the evaluation pairs.

    Attributes:
        right: arm → 1 where the chosen response has the higher reward, else 0, [S, N].
        groups_N, axes_N, subsets_N: of the evaluation pairs.
    """

    right: Mapping[Arm, Floats]
    groups_N: NDArray[np.str_]
    axes_N: NDArray[np.str_]
    subsets_N: NDArray[np.str_]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(axis, subset) of all pairs, sorted."""
        return sorted(set(zip(self.axes_N.tolist(), self.subsets_N.tolist(), strict=True)))

    def difference(self, contrast: tuple[Arm, Arm], axes: tuple[str, ...] | None, subset: str | None = None) -> Difference:
        """An arm's accuracy less its reference's, on axes (None: all) or one subset of theirs; subsets count alike."""
        at = np.ones(len(self.axes_N), dtype=np.bool_) if axes is None else np.isin(self.axes_N, axes)
        if subset is not None:
            at &= self.subsets_N == subset
        names = np.asarray([f"{axis}/{name}" for axis, name in zip(self.axes_N[at], self.subsets_N[at], strict=True)])
        arm, reference = contrast
        return crossed_mean(self.right[arm][:, at] - self.right[reference][:, at], self.groups_N[at], names)


def arms_of_seeds(first: int, stop: int) -> range:
    """Numbers of the arms of some seeds (see `Run.arm`)."""
    return range(first * len(ARMS), stop * len(ARMS))


def edited_pairs(pairs: PairSet, scores: PairScores, edits: Edits) -> EditedPairs:
    """What the edits do to each usable pair; the pairs of a row share its action."""
    lines = read_edit_lines(edits.path("edits.jsonl"))
    action = dict(zip(pairs.rows["row"].to_pylist(), (line.action for line in lines), strict=True))
    table = pairs.pairs
    codes = [_CODES.get(action[row], KEEP) for row in table["row"].to_pylist()]
    return EditedPairs(
        tuple(table["pair_id"].to_pylist()),
        np.asarray(table["axis"].to_pylist(), dtype=np.str_),
        np.asarray(codes, dtype=np.int8),
        scores.scores["reward_margin"].to_numpy().astype(np.float64),
    )


@dataclass(frozen=True)
class Run:
    """All that the arms share: `seen` are the pairs under audit as the base reads them, `measured` the evaluation pairs."""

    bench: BaseTrainings
    pairs: EditedPairs
    seen: pa.Table
    measured: pa.Table
    rules: OutcomeRules

    def all(self, tell: Callable[[str], None]) -> tuple[Answers, Judged, list[pa.Table]]:
        """Train every arm of every seed, seed by seed, until the outcome is decided.

        Args:
            tell: is told what is seen on the way.

        Returns:
            Answers, outcome, and the rewards of each arm of each seed.
        """
        tables: list[pa.Table] = []
        for seed in range(self.rules.planned):
            tables += [self.arm(number) for number in arms_of_seeds(seed, seed + 1)]
            if self.rules.at(seed + 1) > 0:
                answers = self._answers(tables)
                judged = judged_of(answers, self.pairs.edited_axes, self.rules)
                if judged.decided:
                    break
                tell(f"after {seed + 1} seeds: not decided")
        return answers, judged, tables

    def arm(self, number: int, *, alone: bool = False) -> pa.Table:
        """Rewards of the evaluation pairs by an arm of a seed; published once.

        Args:
            number: seed · arms + place in `ARMS`.
            alone: whether progress is told of this arm, or of all.
        """
        import pyarrow as pa

        seed, arm = number // len(ARMS), ARMS[number % len(ARMS)]
        before, total = (0, 1) if alone else (number, self.rules.planned * len(ARMS))
        name, checkpoint = f"arm-{number}.arrow", f"{PART_SCRATCH}arm-{number}.safetensors"
        watch = self.bench.watch
        if not (self.bench.work.scratch / name).is_file():

            def told(done: int, steps: int) -> bool:
                watch.progress(before * steps + done, total * steps, "steps")
                return watch.cancelled()

            own = stage_seed(self.bench.spec.seed, "verification", f"seed {seed}")
            pairs, steps = self._trained_on(arm, own), self._steps()
            trained = self.bench.train(f"{arm}, seed {seed}", pairs, told, seed=own, steps=steps, own=checkpoint)
            found = self.bench.rewards(trained, self.measured)
            columns = {
                "arm": pa.array([arm] * self.measured.num_rows, pa.string()),
                "seed": pa.array([seed] * self.measured.num_rows, pa.int32()),
                "pair_id": self.measured["pair_id"].combine_chunks(),
                "chosen": pa.array(found.chosen, pa.float64()),
                "rejected": pa.array(found.rejected, pa.float64()),
            }
            table = pa.table(columns).replace_schema_metadata(trained.facts | {"pairs": str(len(pairs))})
            with self.bench.work.publish(name, scratch=True) as target, pa.ipc.new_file(str(target), table.schema) as writer:
                writer.write_table(table)
            self.bench.work.remove(checkpoint, scratch=True)
        return self.bench.table(name)

    def _steps(self) -> int:
        """Optimiser steps of every arm: those of the data as given."""
        recipe = self.bench.spec.recipe
        return math.ceil(int(self.seen.num_rows) / recipe.batch) * recipe.epochs

    @cached_property
    def _given(self) -> TokenPairs:
        return token_pairs(self.seen)

    def _trained_on(self, arm: Arm, seed: int) -> TokenPairs:
        """The pairs of an arm as its model is shown them: dropped ones left out, flipped ones the other way round."""
        from safer_engine.science.rm_training import TokenPairs

        code = dict(zip(self.pairs.pair_ids, self.pairs.of(arm, seed).tolist(), strict=True))
        given = self._given
        rows = [row for row, name in enumerate(given.pair_id) if code[name] != DROP]
        turned = [code[given.pair_id[row]] == FLIP for row in rows]
        sides = [(given.rejected[row], given.chosen[row]) if turn else (given.chosen[row], given.rejected[row])
                 for row, turn in zip(rows, turned, strict=True)]  # fmt: skip
        names = tuple(given.pair_id[row] for row in rows)
        return TokenPairs(names, tuple(side[0] for side in sides), tuple(side[1] for side in sides))

    def _answers(self, tables: list[pa.Table]) -> Answers:
        right: dict[Arm, list[Floats]] = {arm: [] for arm in ARMS}
        for number, table in enumerate(tables):
            won = table["chosen"].to_numpy() > table["rejected"].to_numpy()
            right[ARMS[number % len(ARMS)]].append(won.astype(np.float64))
        columns = {name: np.asarray(self.measured[name].to_pylist(), dtype=np.str_) for name in ("group", "axis", "subset")}
        stacked = {arm: np.stack(rows) for arm, rows in right.items()}
        return Answers(stacked, columns["group"], columns["axis"], columns["subset"])


def judged_of(answers: Answers, edited_axes: tuple[str, ...], rules: OutcomeRules) -> Judged:
    """The outcome of a verification from what its models answered."""
    against = {other: answers.difference(("edits", other), edited_axes) for other in ("as given", "random")}
    by_subset = {f"{axis}/{subset}": answers.difference(("edits", "as given"), (axis,), subset) for axis, subset in answers.cells}
    return judge(against, by_subset, rules)


def facts(answers: Answers, judged: Judged, tables: list[pa.Table], run: Run) -> dict[str, Any]:
    """The stage's facts: outcome, accuracy of each arm, and every difference with its interval."""
    parts = [facts_of(table) for table in tables]
    counts = {name: int((run.pairs.edits_P == code).sum()) for name, code in (("drop", DROP), ("flip", FLIP))}
    return {
        **judged_facts(judged),
        **slice_facts(answers),
        "seeds": len(tables) // len(ARMS),
        "planned": run.rules.planned,
        "edited_axes": list(run.pairs.edited_axes),
        "edits": counts,
        "steps": int(parts[0]["steps"]),
        "pairs": {arm: int(part["pairs"]) for arm, part in zip(ARMS, parts, strict=False)},
        "tokens": sum(int(part["tokens"]) for part in parts),
        "base": {"architecture": parts[0]["architecture"], "n_parameters": int(parts[0]["n_parameters"])},
        "n_evaluated": len(answers.axes_N),
    }


def judged_facts(judged: Judged) -> dict[str, Any]:
    """An outcome as JSON: NaN is null."""
    document = asdict(judged)
    for name in ("p_benefit", "p_harm"):
        document[name] = {what: None if math.isnan(p) else p for what, p in document[name].items()}
    return document


def slice_facts(answers: Answers) -> dict[str, Any]:
    """Accuracy of each arm, and every difference with its interval, on all pairs, each axis and each subset."""
    scopes: list[tuple[str | None, str | None]] = [(None, None)]
    scopes += [(axis, None) for axis in sorted({axis for axis, _ in answers.cells})] + list(answers.cells)
    accuracy, effects = [], []
    for axis, subset in scopes:
        at = np.ones(len(answers.axes_N), dtype=np.bool_) if axis is None else answers.axes_N == axis
        at = at if subset is None else at & (answers.subsets_N == subset)
        scope = {"axis": axis, "subset": subset}
        for arm in answers.right:
            by_seed = answers.right[arm][:, at].mean(axis=1)
            accuracy.append({"arm": arm, **scope, "accuracy": float(by_seed.mean()), "by_seed": by_seed.tolist()})
        for contrast in CONTRASTS:
            if all(arm in answers.right for arm in contrast):
                found = answers.difference(contrast, None if axis is None else (axis,), subset)
                effects.append({"arm": contrast[0], "reference": contrast[1], **scope, **asdict(found)})
    return {"accuracy": accuracy, "effects": effects}
