"""Retraining with the recommended edits and with controls: every arm of every seed, and what their models make of other pairs.

All arms of a seed start from the same weights, take the same number of optimiser steps, and see the pairs that they share in the
same order (by hash of seed, epoch and pair id). Only rewards are kept; each model is an arm of a seed, and resumes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safer_engine.base_trainings import BaseTrainings, facts_of
from safer_engine.evaluation_pairs import scored_pairs
from safer_engine.science.arms import ARMS, DROP, FLIP, Arm
from safer_engine.science.evaluation import ScoredPairs
from safer_engine.science.outcomes import Judged, OutcomeRules
from safer_engine.splits import choosing_groups
from safer_engine.stage import stage_seed
from safer_engine.store import PART_SCRATCH
from safer_engine.training import token_pairs
from safer_engine.verification_answers import PAIRS, Answers, answer_facts, answers_of, judged_facts, judged_of
from safer_engine.verification_arms import EditedPairs, SizedArm, arms_of
from safer_engine.verification_sweep import Sweep, sweep_facts

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.science.rm_training import TokenPairs


@dataclass(frozen=True)
class Seen:
    """What the models of all arms and seeds so far say of the evaluation pairs, and what follows.

    Attributes:
        answers: by unit (`verification_answers.answers_of`), at the audit's own cut.
        sweep: at the budgets; None without a sweep.
    """

    answers: dict[str, Answers]
    judged: Judged
    sweep: Sweep | None

    @property
    def decided(self) -> bool:
        """Nothing that is asked can change with another seed."""
        return self.judged.decided and (self.sweep is None or self.sweep.decided)


@dataclass(frozen=True)
class Run:
    """All that the arms share.

    Attributes:
        pairs: what is edited, by budget; None: by the audit's own cut.
        seen: the pairs under audit as the base reads them. measured: the evaluation pairs.
    """

    bench: BaseTrainings
    pairs: Mapping[float | None, EditedPairs]
    seen: pa.Table
    measured: pa.Table
    rules: OutcomeRules

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of the sweep."""
        return tuple(budget for budget in self.pairs if budget is not None)

    @property
    def arms(self) -> tuple[SizedArm, ...]:
        """Of each seed."""
        return arms_of(self.budgets)

    def all(self, tell: Callable[[str], None]) -> tuple[Seen, list[pa.Table]]:
        """Train every arm of every seed, seed by seed, until the outcome is decided.

        Args:
            tell: is told what is seen on the way.

        Returns:
            What was seen, and the rewards of each arm of each seed.
        """
        tables: list[pa.Table] = []
        for seed in range(self.rules.planned):
            tables += [self.arm(number) for number in range(seed * len(self.arms), (seed + 1) * len(self.arms))]
            if self.rules.at(seed + 1) > 0:
                seen = self.judged(tables)
                if seen.decided:
                    break
                tell(f"after {seed + 1} seeds: not decided")
        return seen, tables

    def arm(self, number: int, *, alone: bool = False) -> pa.Table:
        """Rewards of the evaluation pairs by an arm of a seed; published once.

        Args:
            number: seed · arms + place in `arms`.
            alone: whether progress is told of this arm, or of all.
        """
        import pyarrow as pa

        seed, arm = number // len(self.arms), self.arms[number % len(self.arms)]
        before, total = (0, 1) if alone else (number, self.rules.planned * len(self.arms))
        name, checkpoint = f"arm-{number}.arrow", f"{PART_SCRATCH}arm-{number}.safetensors"
        watch = self.bench.watch
        if not (self.bench.work.scratch / name).is_file():

            def told(done: int, steps: int) -> bool:
                watch.progress(before * steps + done, total * steps, "steps")
                return watch.cancelled()

            own = stage_seed(self.bench.spec.seed, "verification", f"seed {seed}")
            pairs, steps = self._trained_on(arm, own), self._steps()
            trained = self.bench.train(f"{arm.label}, seed {seed}", pairs, told, seed=own, steps=steps, own=checkpoint)
            found = self.bench.rewards(trained, self.measured)
            columns = {
                "arm": pa.array([arm.label] * self.measured.num_rows, pa.string()),
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

    def judged(self, tables: list[pa.Table]) -> Seen:
        """What follows from the arms of whole seeds."""
        scored: dict[SizedArm, list[ScoredPairs]] = {arm: [] for arm in self.arms}
        for number, table in enumerate(tables):
            rewards = (table[side].to_numpy() for side in ("chosen", "rejected"))
            scored[self.arms[number % len(self.arms)]].append(scored_pairs(self.measured, *rewards))

        def at(budget: float | None) -> dict[str, Answers]:
            given: dict[Arm, list[ScoredPairs]] = {"as given": scored[SizedArm("as given")]}
            return answers_of(given | {arm: scored[SizedArm(arm, budget)] for arm in ARMS if arm != "as given"})

        answers = at(None)
        judged = judged_of(answers[PAIRS], self.pairs[None].edited_axes, self.rules)
        if not self.budgets:
            return Seen(answers, judged, None)
        choosing = choosing_groups(self.measured["group"].to_pylist(), self.bench.spec.seed)
        swept = {budget: (self.pairs[budget], at(budget)) for budget in self.budgets}
        return Seen(answers, judged, Sweep.of(swept, choosing, self.rules))

    def _steps(self) -> int:
        """Optimiser steps of every arm: those of the data as given."""
        recipe = self.bench.spec.recipe
        return math.ceil(int(self.seen.num_rows) / recipe.batch) * recipe.epochs

    @cached_property
    def _given(self) -> TokenPairs:
        return token_pairs(self.seen)

    def _trained_on(self, sized: SizedArm, seed: int) -> TokenPairs:
        """The pairs of an arm as its model is shown them: dropped ones left out, flipped ones the other way round."""
        from safer_engine.science.rm_training import TokenPairs

        pairs = self.pairs[sized.budget]
        code = dict(zip(pairs.pair_ids, pairs.of(sized.arm, seed).tolist(), strict=True))
        given = self._given
        rows = [row for row, name in enumerate(given.pair_id) if code[name] != DROP]
        turned = [code[given.pair_id[row]] == FLIP for row in rows]
        sides = [(given.rejected[row], given.chosen[row]) if turn else (given.chosen[row], given.rejected[row])
                 for row, turn in zip(rows, turned, strict=True)]  # fmt: skip
        names = tuple(given.pair_id[row] for row in rows)
        return TokenPairs(names, tuple(side[0] for side in sides), tuple(side[1] for side in sides))


def facts(seen: Seen, tables: list[pa.Table], run: Run) -> dict[str, Any]:
    """The stage's facts: outcome, accuracy of each arm, and every difference with its interval."""
    parts = [facts_of(table) for table in tables]
    pairs = [int(part["pairs"]) for part in parts[: len(run.arms)]]
    trained = dict(zip(run.arms, pairs, strict=True))
    return {
        **judged_facts(seen.judged),
        **answer_facts(seen.answers),
        "seeds": len(tables) // len(run.arms),
        "planned": run.rules.planned,
        "edited_axes": list(run.pairs[None].edited_axes),
        "edits": run.pairs[None].counts,
        "steps": int(parts[0]["steps"]),
        "pairs": {sized.arm: count for sized, count in trained.items() if sized.budget is None},
        "tokens": sum(int(part["tokens"]) for part in parts),
        "base": {"architecture": parts[0]["architecture"], "n_parameters": int(parts[0]["n_parameters"])},
        "n_evaluated": int(run.measured.num_rows),
        "sweep": None if seen.sweep is None else sweep_facts(seen.sweep),
    }
