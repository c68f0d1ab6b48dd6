"""Differences between retrained arms: known values, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from safer_engine.errors import NumericalError
from safer_engine.science.crossed import Difference, crossed_mean


def world(rng: np.random.Generator, sizes: tuple[float, float, float], n_seeds: int, n_groups: int) -> np.ndarray:
    """Differences [S, 2G] of mean 0: effects of seed, of group (two items each) and of both together."""
    seed, group, both = sizes
    found = (
        seed * rng.normal(size=(n_seeds, 1))
        + group * rng.normal(size=(1, n_groups))
        + both * rng.normal(size=(n_seeds, n_groups))
    )
    return np.repeat(found, 2, axis=1)


def test_one_difference_a_seed_is_a_t_test() -> None:
    """Without any difference between groups the seeds alone are left: Student's interval."""
    per_seed = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    found = crossed_mean(np.repeat(per_seed[:, None], 8, axis=1), np.arange(8))
    expected = stats.ttest_1samp(per_seed, 0)
    assert found.estimate == pytest.approx(per_seed.mean())
    assert found.p == pytest.approx(expected.pvalue)
    assert found.df == pytest.approx(4)
    interval = expected.confidence_interval()
    assert (found.lo, found.hi) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_the_same_answers_in_every_seed_leave_the_groups() -> None:
    values = np.tile(np.array([1.0, 0.0, 0.0, -1.0, 1.0, 0.0]), (3, 1))
    found = crossed_mean(values, np.arange(6))
    assert found.p == pytest.approx(2 * stats.t.sf(found.estimate / (values[0].std(ddof=1) / np.sqrt(6)), 2))
    assert found.se == pytest.approx(values[0].std(ddof=1) / np.sqrt(6))


@pytest.mark.parametrize("sizes", [(0.0, 0.0, 1.0), (0.05, 0.0, 1.0), (0.0, 0.5, 1.0), (0.2, 0.3, 0.5), (0.3, 0.0, 0.1)])
@pytest.mark.parametrize("n_seeds", [2, 4, 5])
def test_intervals_cover(sizes: tuple[float, float, float], n_seeds: int) -> None:
    """95 % intervals hold the truth in at least 95 % less three standard errors of 400 runs."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        found = crossed_mean(world(rng, sizes, n_seeds, 60), np.repeat(np.arange(60), 2))
        assert found.lo is not None
        assert found.hi is not None
        covered.append(found.lo <= 0 <= found.hi)
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


def test_intervals_over_prompts_alone_would_not_cover() -> None:
    """Why seeds must be part of it: with an effect of the seed, means over seeds taken as the data cover far too rarely."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        values = world(rng, (0.2, 0.3, 0.5), 5, 60).mean(axis=0, keepdims=True)[0, ::2]
        interval = stats.ttest_1samp(values, 0).confidence_interval()
        covered.append(interval.low <= 0 <= interval.high)
    assert np.mean(covered) < 0.75


def test_subsets_count_alike() -> None:
    values = np.array([[1.0] * 10 + [0.0] * 90, [1.0] * 10 + [0.0] * 90])
    strata = np.array(["small"] * 10 + ["large"] * 90)
    assert crossed_mean(values, np.arange(100), strata).estimate == pytest.approx(0.5)
    assert crossed_mean(values, np.arange(100)).estimate == pytest.approx(0.1)
    assert crossed_mean(values, np.arange(100), strata).se == 0.0  # nothing varies within a subset or between seeds


def test_one_seed_or_one_group_tells_no_spread() -> None:
    for values, groups in ((np.ones((1, 4)), np.arange(4)), (np.ones((4, 3)), np.zeros(3))):
        found = crossed_mean(values, groups)
        assert (found.estimate, found.lo, found.hi, found.p) == (1.0, None, None, None)


def test_no_difference_at_all_is_no_difference() -> None:
    found = crossed_mean(np.zeros((5, 6)), np.arange(6))
    assert found == Difference(0.0, 0.0, 0.0, 1.0, 0.0, None, 5, 6, 6)


def test_what_is_no_difference_is_refused() -> None:
    with pytest.raises(NumericalError):
        crossed_mean(np.array([[0.0, np.nan]]), np.arange(2))
    with pytest.raises(ValueError, match="no difference"):
        crossed_mean(np.zeros((2, 0)), np.zeros(0))


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_intervals_cover_over_small_subsets(n_groups: int) -> None:
    """Prompts that answer otherwise in every seed, in subsets of one to three: the mean of a subset takes up part of that."""
    rng = np.random.default_rng(5)
    strata, covered = np.repeat(np.arange(20), n_groups), []
    for _ in range(300):
        found = crossed_mean(steady(rng, 5, len(strata)), np.arange(len(strata)), strata)
        assert found.lo is not None
        assert found.hi is not None
        covered.append(found.lo <= 0 <= found.hi)
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300)


def steady(rng: np.random.Generator, n_seeds: int, n_groups: int) -> np.ndarray:
    """Differences [S, G] of expectation 0: most of what changes does so in every seed."""
    always = rng.choice([-1.0, 0.0, 1.0], size=n_groups, p=[0.075, 0.85, 0.075])
    noise = rng.choice([-1.0, 0.0, 1.0], size=(n_seeds, n_groups), p=[0.03, 0.94, 0.03])
    return np.where(always != 0, always, noise)


@pytest.mark.parametrize("n_groups", [2, 6, 40])
def test_groups_that_all_changed_alike_are_counted(n_groups: int) -> None:
    """Nothing varies, which is no proof with two prompts: the exact sign test, and an interval that agrees with it."""
    found = crossed_mean(np.full((5, 2 * n_groups), -1.0), np.repeat(np.arange(n_groups), 2))
    assert found.p == pytest.approx(2.0 ** (1 - n_groups))
    assert found.lo == -1.0
    assert found.hi is not None
    least = stats.binomtest(n_groups, n_groups).proportion_ci().low
    assert found.hi == pytest.approx(-(2 * least - 1))
    assert (found.hi < 0) == (found.p < 0.05)


def test_no_change_at_all_is_no_evidence_and_rounding_is_no_change() -> None:
    still = crossed_mean(np.zeros((5, 8)), np.arange(8))
    assert (still.lo, still.hi, still.p) == (0.0, 0.0, 1.0)
    third = crossed_mean(np.full((3, 6), 0.1) + np.array([[0.0], [1e-17], [-1e-17]]), np.arange(6), np.array(list("aabbcc")))
    assert third.p == pytest.approx(2.0**-5)
