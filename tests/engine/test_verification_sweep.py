"""A sweep of budgets: chosen on one half, judged on the other, so that the luck of the choice is not taken for a gain."""

from __future__ import annotations

import numpy as np
import pytest

from safer_engine.science.arms import ARMS, DROP
from safer_engine.science.outcomes import OutcomeRules
from safer_engine.splits import choosing_groups
from safer_engine.verification_answers import PAIRS, Answers
from safer_engine.verification_arms import EditedPairs, arms_of
from safer_engine.verification_sweep import Sweep, Swept, sweep_facts

N, SEEDS = 240, 5
BUDGETS = (0.02, 0.04, 0.06, 0.08, 0.1)
GROUPS = np.asarray([f"g{i // 2}" for i in range(N)])
AXES = np.asarray(["safety" if i % 4 < 2 else "chat" for i in range(N)])
SUBSETS = np.asarray(["all"] * N)


def swept(rng: np.random.Generator, gains: dict[float, float], edited: str = "safety") -> Swept:
    """Models that are right three times in four, with what the edits of each budget add on the edited axis."""
    easy = rng.uniform(0.5, 1.0, N)
    given = (rng.random((SEEDS, N)) < easy).astype(np.float64)
    found = {}
    for budget in BUDGETS:
        better = easy + gains.get(budget, 0.0) * (edited == AXES)
        right = {
            arm: given
            if arm == "as given"
            else (rng.random((SEEDS, N)) < (better if arm == "edits" else easy)).astype(np.float64)
            for arm in ARMS
        }
        codes = np.full(10, DROP, dtype=np.int8)
        pairs = EditedPairs(tuple(f"p{i}" for i in range(10)), np.asarray([edited] * 10), codes, np.zeros(10))
        found[budget] = (pairs, {PAIRS: Answers(right, GROUPS, AXES, SUBSETS)})
    return found


def test_a_planted_gain_is_found_at_its_budget_and_shown_on_the_other_half() -> None:
    sweep = Sweep.of(swept(np.random.default_rng(1), {0.06: 0.25}), choosing_groups(GROUPS.tolist(), 0), OutcomeRules())
    assert sweep.chosen == 0.06
    assert sweep.axes == ("safety",)
    assert sweep.judged is not None
    assert (sweep.judged.outcome, sweep.decided) == ("benefit shown", True)
    assert sweep.n_choosing + sweep.n_judging == N
    shown = sweep.against["as given"]
    assert shown.lo is not None
    assert 0.1 < shown.lo < shown.estimate < 0.4
    facts = sweep_facts(sweep)
    assert [row["budget"] for row in facts["budgets"]] == list(BUDGETS)
    assert facts["budgets"][0]["edits"] == {"drop": 10, "flip": 0}


def test_the_best_of_five_budgets_that_change_nothing_is_no_benefit() -> None:
    """On the half it was chosen by it looks like a gain in most runs; on the other it does not."""
    seen, looked = [], []
    rules = OutcomeRules()
    for run in range(60):
        choosing = choosing_groups(GROUPS.tolist(), run)
        sweep = Sweep.of(swept(np.random.default_rng(run), {}), choosing, rules)
        assert sweep.judged is not None
        assert sweep.chosen is not None
        seen.append(sweep.judged.outcome)
        own = sweep.swept[sweep.chosen][1][PAIRS].of_groups(choosing)
        looked.append(own.difference(("edits", "as given"), sweep.axes).estimate)
    assert seen.count("benefit shown") <= 6  # at 5 % more than 6 of 60 have a chance of 3 %
    assert np.mean(np.asarray(looked) > 0) > 0.75


def test_two_budgets_alike_are_the_smaller_one() -> None:
    found = swept(np.random.default_rng(0), {})
    same = dict.fromkeys(BUDGETS, found[0.02])
    assert Sweep.of(same, choosing_groups(GROUPS.tolist(), 0), OutcomeRules()).chosen == 0.02


def test_without_an_edited_axis_in_both_halves_nothing_is_chosen() -> None:
    safety = frozenset(GROUPS[AXES == "safety"].tolist())
    sweep = Sweep.of(swept(np.random.default_rng(0), {}), safety, OutcomeRules())
    assert (sweep.chosen, sweep.judged, sweep.decided, sweep.against) == (None, None, True, {})


@pytest.mark.parametrize("budgets", [(), (0.04,), (0.02, 0.1)])
def test_arms_of_a_seed(budgets: tuple[float, ...]) -> None:
    arms = arms_of(budgets)
    assert [one.arm for one in arms[:4]] == list(ARMS)
    assert all(one.budget is None for one in arms[:4])
    assert [one.budget for one in arms[4:]] == [budget for budget in budgets for _ in range(3)]
    assert len({one.label for one in arms}) == len(arms) == 4 + 3 * len(budgets)
