"""Length bias against counts made by hand, planted preferences, and SciPy's rank correlation."""

from __future__ import annotations

import itertools
import json
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from safer_engine.errors import NumericalError
from safer_engine.science.evaluation import ScoredPairs, evaluate
from safer_engine.science.length_bias import FEWEST, LengthBias, length_bias

# (chosen is longer, right) → pairs
COUNTS = {(True, True): 30, (True, False): 10, (False, True): 12, (False, False): 18}


def made(margin: Any, longer_by: Any, groups: Any = None, strata: Any = None, resamples: int = 200, seed: int = 0) -> LengthBias:
    n = len(margin)
    names = np.arange(n) if groups is None else np.asarray(groups)
    within = np.zeros(n) if strata is None else np.asarray(strata)
    draws = np.random.default_rng(seed)
    return length_bias(np.asarray(margin, dtype=float), np.asarray(longer_by), names, within, resamples, draws)


def counted(counts: dict[tuple[bool, bool], int], size: int = 5) -> tuple[list[float], list[int]]:
    """Margins and length differences with those counts."""
    rows = [(1.0 if right else -1.0, size if longer else -size) for (longer, right), n in counts.items() for _ in range(n)]
    return [margin for margin, _ in rows], [length for _, length in rows]


def estimates(found: LengthBias) -> dict[str, float]:
    names = ("longer_chosen", "longer_preferred", "excess", "accuracy_longer", "accuracy_shorter", "gap")
    return {name: getattr(found, name).estimate for name in names}


def test_figures_are_those_counted_by_hand() -> None:
    found = made(*counted(COUNTS))
    assert estimates(found) == pytest.approx(
        {
            "longer_chosen": 40 / 70,
            "longer_preferred": (30 + 18) / 70,
            "excess": (18 - 10) / 70,
            "accuracy_longer": 30 / 40,
            "accuracy_shorter": 12 / 30,
            "gap": 30 / 40 - 12 / 30,
        }
    )
    assert found.accuracy_longer is not None
    assert found.accuracy_shorter is not None
    assert (found.accuracy_longer.n, found.accuracy_shorter.n, found.n_equal, found.reasons) == (40, 30, 0, {})


def test_pairs_of_equal_length_are_counted_and_in_no_figure() -> None:
    margin, longer_by = counted(COUNTS)
    found = made([*margin, *[-9.0] * 6], [*longer_by, *[0] * 6])
    assert found.n_equal == 6
    assert estimates(found) == estimates(made(margin, longer_by))


def test_equal_rewards_are_not_right_and_half_a_preference() -> None:
    margin, longer_by = counted(COUNTS)
    found = estimates(made([*margin, 0.0, 0.0], [*longer_by, 3, -3]))
    assert found["longer_preferred"] == pytest.approx((30 + 18 + 1) / 72)
    assert found["excess"] == pytest.approx((18 - 10) / 72)
    assert found["accuracy_longer"] == pytest.approx(30 / 41)


@pytest.mark.parametrize(("prefers", "gap"), [("longer", 1.0), ("shorter", -1.0)])
def test_a_reward_that_is_length_itself(prefers: str, gap: float) -> None:
    longer_by = np.random.default_rng(0).permutation(np.r_[1:61, -40:0])
    found = made(longer_by if prefers == "longer" else -longer_by, longer_by)
    assert found.gap is not None
    assert found.correlation is not None
    assert (found.gap.estimate, found.correlation.estimate) == pytest.approx((gap, gap))
    assert estimates(found)["longer_preferred"] == (prefers == "longer")
    assert estimates(found)["excess"] == pytest.approx((prefers == "longer") - 0.6)


def test_noise_does_not_move_the_gap_though_it_moves_the_excess() -> None:
    rng = np.random.default_rng(3)
    longer_by = np.where(rng.random(40_000) < 0.8, 7, -7)
    found = made(rng.normal(0, 1, 40_000), longer_by, resamples=100)
    assert found.gap is not None
    assert found.gap.estimate == pytest.approx(0, abs=0.03)
    assert estimates(found)["excess"] == pytest.approx(0.5 - 0.8, abs=0.02)


def test_subsets_are_compared_within_themselves() -> None:
    easy = counted({(True, True): 80, (False, True): 20})
    hard = counted({(True, True): 10, (True, False): 10, (False, True): 40, (False, False): 40})
    margin, longer_by = easy[0] + hard[0], easy[1] + hard[1]
    strata = [0] * len(easy[0]) + [1] * len(hard[0])
    found = made(margin, longer_by, strata=strata)
    assert estimates(found)["accuracy_longer"] - estimates(found)["accuracy_shorter"] == pytest.approx(0.9 - 0.6)
    assert estimates(found)["gap"] == pytest.approx(0.0)


def test_subsets_are_weighted_by_what_they_can_tell() -> None:
    first, second = {(True, True): 10, (True, False): 10, (False, True): 5, (False, False): 15}, COUNTS
    (margin, longer_by), (margins, lengths) = counted(first), counted(second)
    found = made(margin + margins, longer_by + lengths, strata=[0] * 40 + [1] * 70)
    weights = 20 * 20 / 40, 40 * 30 / 70
    expected = (weights[0] * (0.5 - 0.25) + weights[1] * (0.75 - 0.4)) / sum(weights)
    assert estimates(found)["gap"] == pytest.approx(expected)


def test_the_correlation_is_that_of_scipy() -> None:
    rng = np.random.default_rng(5)
    longer_by = rng.integers(-6, 7, 400)
    margin = np.round(0.1 * longer_by + rng.normal(size=400), 1)
    found = made(margin, longer_by)
    apart = longer_by != 0
    assert found.correlation is not None
    assert found.correlation.estimate == pytest.approx(spearmanr(margin[apart], longer_by[apart]).statistic)
    assert found.correlation.n == apart.sum()


def test_the_interval_covers_the_gap_as_often_as_it_says() -> None:
    held = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        longer = np.repeat(rng.random(80) < 0.5, 3)
        easy = np.repeat(rng.normal(0, 0.7, 80), 3)
        margin = easy + rng.normal(0, 1, 240) + np.where(longer, 0.6, 0.2)
        found = made(margin, np.where(longer, 1, -1), groups=np.repeat(np.arange(80), 3), resamples=300, seed=seed).gap
        assert found is not None
        assert found.lo is not None
        assert found.hi is not None
        spread = NormalDist(0, (0.7**2 + 1) ** 0.5)
        truth = spread.cdf(0.6) - spread.cdf(0.2)
        held += found.lo <= truth <= found.hi
    assert 0.88 <= held / 150 <= 0.99


def test_what_cannot_be_told_is_null_with_its_reason() -> None:
    long_only = made([1.0, -1.0] * 20, [4] * 40)
    assert long_only.accuracy_shorter is None
    assert long_only.gap is None
    assert long_only.correlation is None
    assert "in no pair is the chosen response the shorter one" in long_only.reasons["accuracy_shorter"]
    assert long_only.longer_chosen is not None
    assert long_only.longer_chosen.estimate == 1.0

    few = made(*counted({(True, True): 50, (False, True): FEWEST - 1}))
    assert few.gap is None
    assert f"50 pairs whose chosen response is the longer one and {FEWEST - 1}" in few.reasons["gap"]
    assert few.accuracy_shorter is not None

    apart = made(*counted({(True, True): 50, (False, True): 50}), strata=[0] * 50 + [1] * 50)
    assert apart.gap is None

    equal = made([1.0, 2.0], [0, 0])
    assert (equal.n_equal, equal.longer_chosen, equal.gap) == (2, None, None)
    assert set(equal.reasons) == {name for name, value in vars(equal).items() if value is None}


def test_one_group_gives_no_interval() -> None:
    found = made(*counted(COUNTS), groups=["g"] * 70)
    assert found.gap is not None
    assert (found.gap.lo, found.gap.hi, found.gap.n_groups) == (None, None, 1)


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        made([float("nan"), 1.0], [1, 2])
    with pytest.raises(NumericalError, match="differ in length"):
        made([1.0, 1.0], [1, 2, 3], groups=[1, 2])


def test_the_evaluation_gives_it_for_every_slice() -> None:
    n = 120
    rng = np.random.default_rng(1)
    longer_by = rng.choice([-4, -1, 0, 2, 9], n)
    columns = {
        "pair_id": [str(i) for i in range(n)],
        "group": [str(i // 2) for i in range(n)],
        "axis": ["chat"] * 60 + ["safety"] * 60,
        "subset": list(itertools.islice(itertools.cycle("ab"), n)),
    }
    pairs = ScoredPairs(
        **columns,
        style=[None] * n,
        item=[None] * n,
        reward_chosen=rng.normal(size=n),
        reward_rejected=np.zeros(n),
        longer_by=longer_by,
    )
    found = evaluate(pairs, 100, 0)
    assert [(part.axis, part.subset) for part in found.length] == [(part.axis, part.subset) for part in found.slices]
    for part, slice_ in zip(found.length, found.slices, strict=True):
        bias = part.bias
        assert bias.longer_chosen is not None
        assert bias.longer_chosen.n + bias.n_equal == slice_.accuracy.n
    assert found.as_json()["length"][0]["bias"]["n_equal"] == int((longer_by == 0).sum())
    json.dumps(found.as_json(), allow_nan=False)
    assert evaluate(pairs, 100, 0) == found
