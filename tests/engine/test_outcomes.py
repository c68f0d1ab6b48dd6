"""What a verification says: planted harm and benefit are found, and a null edit shows no benefit at the stated rate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from safer_engine.errors import NumericalError
from safer_engine.science.arms import ARMS, DROP, FLIP, KEEP, arm_edits, edited
from safer_engine.science.crossed import Difference, crossed_mean
from safer_engine.science.outcomes import Judged, OutcomeRules, judge

SUBSETS = np.repeat(["a", "b", "chat"], 100)
GROUPS = np.arange(300) // 2


def accuracy(rng: np.random.Generator, shift: dict[str, float], n_seeds: int, easy_G: np.ndarray) -> np.ndarray:
    """Right or wrong [S, 300] of a model of each seed: prompts differ in how hard they are, seeds in how good they are."""
    mean = 0.75 + np.array([shift.get(name, 0.0) for name in SUBSETS])
    chance = mean + easy_G[GROUPS] + 0.01 * rng.normal(size=(n_seeds, 1))
    return (rng.random((n_seeds, 300)) < np.clip(chance, 0, 1)).astype(float)


def verified(rng: np.random.Generator, shift: dict[str, float], n_seeds: int = 5, rules: OutcomeRules | None = None) -> Judged:
    easy_G = 0.15 * rng.normal(size=150)
    given, random, ours = (accuracy(rng, moved, n_seeds, easy_G) for moved in ({}, {}, shift))
    edited_axis = SUBSETS != "chat"
    against = {
        name: crossed_mean((ours - other)[:, edited_axis], GROUPS[edited_axis], SUBSETS[edited_axis])
        for name, other in (("as given", given), ("random", random))
    }
    by_subset = {name: crossed_mean((ours - given)[:, name == SUBSETS], GROUPS[name == SUBSETS]) for name in np.unique(SUBSETS)}
    return judge(against, by_subset, rules or OutcomeRules(planned=n_seeds))


def test_a_planted_benefit_and_a_planted_harm_are_found() -> None:
    rng = np.random.default_rng(0)
    assert verified(rng, {"a": 0.15, "b": 0.15}).outcome == "benefit shown"
    found = verified(rng, {"chat": -0.25})
    assert (found.outcome, found.harmed) == ("harm shown", ("chat",))
    both = verified(rng, {"a": 0.15, "b": 0.15, "chat": -0.25})
    assert (both.outcome, both.harmed) == ("harm shown", ("chat",))


def test_a_null_edit_shows_no_benefit_at_the_stated_rate() -> None:
    """Of 200 null edits each wrong outcome may come in 5 %: 17 or fewer at a chance of 0.01."""
    rng = np.random.default_rng(1)
    found = [verified(rng, {}).outcome for _ in range(200)]
    allowed = int(stats.binom.ppf(0.99, 200, 0.05))
    assert found.count("benefit shown") <= allowed
    assert found.count("harm shown") <= allowed
    assert found.count("no benefit shown") >= 200 - 2 * allowed


def test_few_seeds_can_say_harm_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    assert verified(rng, {"a": 0.3, "b": 0.3}, n_seeds=3).outcome == "inconclusive"
    assert verified(rng, {}, n_seeds=3).outcome == "inconclusive"
    assert verified(rng, {"a": -0.4}, n_seeds=3).outcome == "harm shown"
    assert verified(rng, {"a": -0.4}, n_seeds=1).outcome == "inconclusive"  # one seed: no interval


def differences(p: float, estimate: float, n_seeds: int) -> dict[str, Difference]:
    return {name: Difference(estimate, 0.0, 0.0, p, 0.01, 4.0, n_seeds, 50, 100) for name in ("as given", "random")}


def test_stopping_early_costs_a_part_of_the_level() -> None:
    rules = OutcomeRules(planned=10)
    assert [rules.at(n) for n in (4, 5, 6, 9, 10)] == [0.0, pytest.approx(0.01), 0.0, 0.0, pytest.approx(0.04)]
    assert OutcomeRules(planned=5).at(5) == 0.05
    same = differences(1.0, 0.0, 5)
    early = judge(differences(0.004, 0.1, 5), same, rules)
    assert (early.outcome, early.decided) == ("benefit shown", True)
    later = judge(differences(0.02, 0.1, 5), same, rules)
    assert (later.outcome, later.decided) == ("inconclusive", False)
    between = judge(differences(0.0, -0.1, 7), differences(0.0, -0.1, 7), rules)
    assert (between.outcome, between.decided) == ("inconclusive", False)
    last = judge(differences(0.019, 0.1, 10), differences(1.0, 0.0, 10), rules)
    assert (last.outcome, last.decided) == ("benefit shown", True)


def test_better_than_as_given_but_not_than_random_edits_is_no_benefit() -> None:
    against = differences(0.001, 0.1, 5) | {"random": differences(0.2, 0.02, 5)["random"]}
    found = judge(against, differences(1.0, 0.0, 5), OutcomeRules())
    assert found.outcome == "no benefit shown"
    assert found.p_benefit == {"as given": pytest.approx(0.002), "random": pytest.approx(0.2)}


def test_controls_edit_as_many_pairs_of_each_axis() -> None:
    rng = np.random.default_rng(4)
    axes = np.repeat(["safety", "chat"], 50)
    edits = np.zeros(100, dtype=np.int8)
    edits[rng.choice(50, 12, replace=False)] = [DROP] * 9 + [FLIP] * 3
    edits[70] = DROP
    margin = rng.normal(size=100)
    ids = [f"p{i}" for i in range(100)]
    for arm in ARMS:
        found = arm_edits(arm, edits, axes, margin, ids, seed=1)
        for axis in ("safety", "chat"):
            wanted = np.zeros(3, dtype=int) if arm == "as given" else np.bincount(edits[axes == axis], minlength=3)
            if arm == "as given":
                wanted[KEEP] = 50
            assert np.bincount(found[axes == axis], minlength=3).tolist() == wanted.tolist()
    by_margin = arm_edits("margin", edits, axes, margin, ids, seed=1)
    assert set(np.flatnonzero(by_margin[:50] == FLIP)) == set(np.argsort(margin[:50])[:3])
    assert set(np.flatnonzero(by_margin[:50] == DROP)) == set(np.argsort(margin[:50])[3:12])
    one, same, other = (arm_edits("random", edits, axes, margin, ids, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_random_edits_depend_on_ids_and_not_on_rows() -> None:
    edits = np.array([DROP, KEEP, KEEP, FLIP, KEEP], dtype=np.int8)
    ids = ["a", "b", "c", "d", "e"]
    forth = arm_edits("random", edits, np.full(5, "x"), np.zeros(5), ids, seed=3)
    back = arm_edits("random", edits[::-1].copy(), np.full(5, "x"), np.zeros(5), ids[::-1], seed=3)
    assert forth.tolist() == back[::-1].tolist()


def test_a_missing_margin_chooses_nothing() -> None:
    with pytest.raises(NumericalError):
        edited(np.array([DROP, KEEP], dtype=np.int8), np.array(["x", "x"]), np.array([0.0, np.nan]))


def test_subsets_of_two_prompts_show_no_harm_by_chance() -> None:
    """Null edits over 40 subsets of two prompts, of which some change both in every seed: harm at the stated rate at most."""
    rng = np.random.default_rng(6)
    subset, wrong = np.repeat(np.arange(40), 2), 0
    for _ in range(200):
        always = rng.choice([-1.0, 0.0, 1.0], size=80, p=[0.075, 0.85, 0.075])
        values = np.tile(always, (5, 1))
        by_subset = {str(name): crossed_mean(values[:, subset == name], np.arange(2)) for name in range(40)}
        against = {name: crossed_mean(values, np.arange(80), subset) for name in ("as given", "random")}
        wrong += judge(against, by_subset, OutcomeRules()).outcome == "harm shown"
    assert wrong <= int(stats.binom.ppf(0.99, 200, 0.05))
