"""What a drill flips, that no row of it is without a mark, and the arithmetic of harm and detection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safer_engine.errors import DatasetRefused, NumericalError
from safer_engine.science.crossed import crossed_mean
from safer_engine.science.flipping import flip_row
from safer_engine.science.pair_formats import recognise
from safer_engine.science.poison import RULES, Poisonable, Rule, first_groups, poisoned_rows
from safer_engine.science.poison_harm import accuracy, find, harm
from safer_engine.science.poison_mark import MARK, is_marked

N = 200
RNG = np.random.default_rng(0)
PAIRS = Poisonable(
    pair_ids=tuple(f"p{i}" for i in range(N)),
    groups_P=np.asarray([f"g{i // 2}" for i in range(N)]),
    axes_P=np.asarray(["safety" if i % 4 < 2 else "chat" for i in range(N)]),
    may_P=np.arange(N) != 0,
    score_P=RNG.normal(size=N),
    margin_P=RNG.normal(size=N),
    longer_P=RNG.integers(-50, 50, N).astype(float),
)
SAFETY = PAIRS.axes_P == "safety"
OWN = {"score": PAIRS.score_P, "margin": PAIRS.margin_P, "length": PAIRS.longer_P}


@pytest.mark.parametrize("rule", ["score", "margin", "length"])
@pytest.mark.parametrize(("budget", "n"), [(0.005, 1), (0.01, 2), (0.025, 5), (0.05, 10)])
def test_single_pairs_are_those_of_largest_value(rule: Rule, budget: float, n: int) -> None:
    picked = PAIRS.choose(rule, budget, "safety", "pairs", 0)
    others = OWN[rule][SAFETY & PAIRS.may_P & ~picked]
    assert picked.sum() == n
    assert (picked <= (SAFETY & PAIRS.may_P)).all()
    assert OWN[rule][picked].min() >= others.max()


@pytest.mark.parametrize("rule", RULES)
def test_whole_groups_of_the_axis_and_never_more_than_the_budget(rule: Rule) -> None:
    for budget in (0.01, 0.025, 0.05):
        picked = PAIRS.choose(rule, budget, "safety", "groups", 0)
        assert round(budget * N) - 1 <= picked.sum() <= round(budget * N)
        groups = set(PAIRS.groups_P[picked])
        assert picked.sum() == np.isin(PAIRS.groups_P, list(groups)).sum() == 2 * len(groups)
        assert not picked[~SAFETY].any()
        assert not picked[0]
        assert not picked[1]  # its group holds a pair that may not be flipped


def test_random_differs_by_seed_and_takes_each_pair_alike() -> None:
    picks = np.stack([PAIRS.choose("random", 0.05, "safety", "groups", seed) for seed in range(400)])
    assert (picks[7] == PAIRS.choose("random", 0.05, "safety", "groups", 7)).all()
    assert len({row.tobytes() for row in picks}) > 390
    free = SAFETY & (PAIRS.groups_P != "g0")
    rate = picks[:, free].mean(axis=0)
    assert abs(rate - 10 / free.sum()).max() < 0.06  # 4 standard errors of a share of 0.1 in 400 draws


def test_a_group_that_does_not_fit_is_passed_over() -> None:
    groups = np.asarray(["a", "a", "a", "b", "b", "c"])
    values = np.asarray([3.0, 3, 3, 2, 2, 1])
    assert first_groups(values, groups, np.ones(6, dtype=bool), 3).tolist() == [True] * 3 + [False] * 3
    assert first_groups(values, groups, np.ones(6, dtype=bool), 2).tolist() == [False] * 3 + [True] * 2 + [False]
    assert first_groups(values, groups, np.ones(6, dtype=bool), 1).tolist() == [False] * 5 + [True]


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(DatasetRefused, match="less than one pair"):
        PAIRS.choose("random", 0.001, "safety", "pairs", 0)
    with pytest.raises(DatasetRefused, match="only 0 of 10 pairs of axis 'none'"):
        PAIRS.choose("random", 0.05, "none", "pairs", 0)
    flat = Poisonable(**{**vars(PAIRS), "score_P": np.zeros(N)})
    with pytest.raises(DatasetRefused, match="does not tell the pairs of axis 'safety' from"):
        flat.choose("score", 0.05, "safety", "groups", 0)
    none = Poisonable(**{**vars(PAIRS), "score_P": np.full(N, np.nan)})  # an audit without safety features
    with pytest.raises(DatasetRefused, match="does not tell"):
        none.choose("score", 0.05, "safety", "groups", 0)
    broken = Poisonable(**{**vars(PAIRS), "margin_P": np.full(N, np.nan)})
    with pytest.raises(NumericalError):
        broken.choose("margin", 0.05, "safety", "pairs", 0)


def test_every_row_is_marked_and_only_the_named_are_flipped() -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    rows[3]["id"] = "own"
    layout = recognise(rows, "auto", {}, "safer")
    made = list(poisoned_rows(rows, layout, frozenset({3, 5}), {3: "x", 4: "named"}, "random", 0.1))
    assert all(is_marked(row) for row in made)
    assert [("preference flipped" in row[MARK], "rule random, budget 0.1" in row[MARK]) for row in made] == [
        (i in (3, 5), True) for i in range(20)
    ]
    for i, row in enumerate(made):
        sides = (row["chosen"], row["rejected"])
        assert sides == ((f"no {i}", f"yes {i}") if i in (3, 5) else (f"yes {i}", f"no {i}"))
    assert (made[3]["id"], made[4]["id"], "id" in made[6]) == ("own", "named", False)
    assert MARK not in rows[3]
    assert {key: made[5][key] for key in rows[5]} == flip_row(rows[5], layout)
    with pytest.raises(DatasetRefused, match="1 rows to flip are not there"):
        list(poisoned_rows(rows, layout, frozenset({20}), {}, "random", 0.1))


def test_harm_of_the_axis_of_the_rest_and_between_them() -> None:
    axes = np.asarray(["safety"] * 60 + ["chat"] * 30 + ["code"] * 30)
    subsets = np.asarray(["a"] * 20 + ["b"] * 40 + ["x"] * 60)
    groups = np.asarray([f"g{i}" for i in range(120)])
    change = np.random.default_rng(1).integers(-1, 2, (4, 120)).astype(float)
    found = harm(change, groups, axes, subsets, "safety")
    mean = change.mean(axis=0)
    own, rest = (mean[:20].mean() + mean[20:60].mean()) / 2, (mean[60:90].mean() + mean[90:].mean()) / 2
    assert found.axis.estimate == pytest.approx(own)
    assert found.rest is not None
    assert found.apart is not None
    assert found.rest.estimate == pytest.approx(rest)
    assert found.apart.estimate == pytest.approx(own - rest)
    lone = harm(change[:, :60], groups[:60], axes[:60], subsets[:60], "safety")
    assert (lone.rest, lone.apart) == (None, None)
    assert lone.axis == crossed_mean(change[:, :60], groups[:60], subsets[:60]) == found.axis
    with pytest.raises(NumericalError):
        harm(change, groups, axes, subsets, "none")


def test_accuracies_without_and_with_poison_differ_by_the_harm() -> None:
    axes = np.asarray(["safety"] * 60 + ["chat"] * 30)
    subsets = np.asarray(["a"] * 20 + ["b"] * 40 + ["x"] * 10 + ["y"] * 20)
    groups = np.asarray([f"g{i}" for i in range(90)])
    clean, poisoned = (np.random.default_rng(seed).integers(0, 2, (3, 90)).astype(float) for seed in (1, 2))
    before, after = (accuracy(right, axes, subsets, "safety") for right in (clean, poisoned))
    found = harm(poisoned - clean, groups, axes, subsets, "safety")
    assert before[0] != pytest.approx(clean[:, :60].mean(), abs=1e-3)  # pairs do not count alike
    assert before[1] is not None
    assert after[1] is not None
    assert found.rest is not None
    assert after[0] - before[0] == pytest.approx(found.axis.estimate)
    assert after[1] - before[1] == pytest.approx(found.rest.estimate)
    assert accuracy(clean[:, :60], axes[:60], subsets[:60], "safety") == (pytest.approx(before[0]), None)
    with pytest.raises(NumericalError):
        accuracy(clean, axes, subsets, "none")


def test_a_perfect_a_reversed_and_a_random_detector() -> None:
    truth = np.arange(1000) < 50
    perfect = find(truth, truth.astype(float), (0.025, 0.05, 0.1))
    assert (perfect.average_precision, perfect.auroc, perfect.at_number, perfect.share) == (1, 1, 1, 0.05)
    assert perfect.at == {0.025: (pytest.approx(0.5), 1), 0.05: (1, 1), 0.1: (1, 0.5)}
    reverse = find(truth, -truth.astype(float), (0.1,))
    assert (reverse.auroc, reverse.at[0.1], reverse.at_number) == (0, (0, 0), 0)
    blind = [find(truth, np.random.default_rng(seed).normal(size=1000), (0.1,)) for seed in range(200)]
    assert np.mean([one.at[0.1][0] for one in blind]) == pytest.approx(0.1, abs=0.01)
    assert np.mean([one.at[0.1][1] for one in blind]) == pytest.approx(0.05, abs=0.01)
    assert find(truth, np.zeros(1000), (0.1,)).at[0.1] == (pytest.approx(0.1), pytest.approx(0.05))
    with pytest.raises(NumericalError):
        find(np.zeros(10, dtype=bool), np.zeros(10), (0.1,))
