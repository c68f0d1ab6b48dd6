"""The gate's statistics against scipy, a second implementation, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from safer_engine.errors import NumericalError
from safer_engine.gate.intervals import (
    apart_spread,
    effective_count,
    paired_difference,
    share_spread,
    stretched_spread,
    student_quantile,
    wilson_spread,
)
from safer_engine.science.stats import clustered_mean, group_bootstrap_mean


@pytest.mark.parametrize("tail", [0.4, 0.1, 0.025, 0.001, 1e-5])
@pytest.mark.parametrize("degrees", [1, 2, 5, 23, 400, 1e5, 1e7])
def test_student_quantile_is_scipys(tail: float, degrees: float) -> None:
    assert student_quantile(tail, degrees) == pytest.approx(scipy_stats.t.isf(tail, degrees), rel=1e-6)


@pytest.mark.parametrize(("tail", "degrees"), [(0.0, 5), (0.5, 5), (0.025, 0.5)])
def test_no_quantile_out_of_range(tail: float, degrees: float) -> None:
    with pytest.raises(NumericalError):
        student_quantile(tail, degrees)


def test_wilson_is_scipys() -> None:
    found = wilson_spread(405 / 450, 450, 1e9)(0.025)
    theirs = scipy_stats.binomtest(405, 450).proportion_ci(0.95, method="wilson")
    assert (found.lo, found.hi) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert (found.hi - found.lo) / 2 == pytest.approx(0.028, abs=5e-4)  # 450 pairs at 0.90: ± 2.8 points


def test_a_share_is_worth_its_groups() -> None:
    assert effective_count(1.0, 1.0, 1.0, 60, 20) == 20
    assert share_spread(1.0, 1.0, 1.0, 60, 20)(0.025).lo < 0.85
    se = (0.9 * 0.1 / 150) ** 0.5
    assert effective_count(0.9, 0.9 - 1.959964 * se, 0.9 + 1.959964 * se, 450, 200) == pytest.approx(150, rel=1e-5)
    assert effective_count(0.9, 0.899, 0.901, 450, 200) == 450


def test_stretching_to_the_reports_own_tail_changes_nothing() -> None:
    found = stretched_spread(2.0, 1.0, 4.0, 1e9)(0.025)
    assert (found.lo, found.hi) == pytest.approx((1.0, 4.0))
    assert stretched_spread(2.0, 1.0, 4.0, 1e9)(0.001).lo < 1.0


def test_the_difference_of_two_estimates_adds_variances() -> None:
    one, two = stretched_spread(3.0, 2.0, 4.0, 1e9), stretched_spread(1.0, 0.0, 2.0, 1e9)
    found = apart_spread(3.0, one, 1.0, two)(0.025)
    assert (found.lo, found.hi) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))


@pytest.mark.parametrize("per_group", [1, 3])
def test_paired_margins_have_the_clustered_standard_error(per_group: int) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=90)
    groups = [f"g{i // per_group}" for i in range(90)]
    found, theirs = paired_difference(values.tolist(), groups, shares=False), clustered_mean(values, groups)
    assert theirs.se is not None
    assert found.spread is not None
    half = scipy_stats.t.isf(0.025, theirs.n_groups - 1) * theirs.se
    bounds = found.spread(0.025)
    assert (found.mean, found.n, found.n_groups) == pytest.approx((theirs.mean, 90, theirs.n_groups))
    assert (bounds.lo, bounds.hi) == pytest.approx((theirs.mean - half, theirs.mean + half))


def test_paired_shares_are_agresti_and_mins_for_single_pairs() -> None:
    only_new, only_old, n = 7, 15, 200
    values = [1.0] * only_new + [-1.0] * only_old + [0.0] * (n - only_new - only_old)
    found = paired_difference(values, [str(i) for i in range(n)], shares=True)
    a, b = only_new + 0.5, only_old + 0.5
    centre = (a - b) / (n + 2)
    se = ((a + b - (a - b) ** 2 / (n + 2)) ** 0.5) / (n + 2)
    assert found.spread is not None
    bounds = found.spread(0.025)
    half = scipy_stats.t.isf(0.025, n - 1) * se
    assert (bounds.lo, bounds.hi) == pytest.approx((centre - half, centre + half), abs=2e-4)


def test_no_disagreement_is_no_certainty() -> None:
    few = paired_difference([0.0] * 20, [str(i) for i in range(20)], shares=True)
    many = paired_difference([0.0] * 2000, [str(i) for i in range(2000)], shares=True)
    assert few.spread is not None
    assert many.spread is not None
    assert few.spread(0.025).lo < -0.05
    assert -0.002 < many.spread(0.025).lo < 0


def test_one_group_has_no_interval() -> None:
    assert paired_difference([1.0, 0.0], ["g", "g"], shares=True).spread is None
    with pytest.raises(NumericalError):
        paired_difference([], [], shares=True)
    with pytest.raises(NumericalError):
        paired_difference([float("nan")], ["g"], shares=True)


def test_coverage_of_paired_shares_in_clusters() -> None:
    """1 500 draws of 60 groups of 3 pairs, disagreements alike within groups: the 95 % interval covers at least 94 %."""
    rng = np.random.default_rng(11)
    rates = (0.04, 0.09)  # only new right, only old right
    truth, covered, draws, groups = rates[0] - rates[1], 0, 1500, [f"g{i // 3}" for i in range(180)]
    for _ in range(draws):
        shared = rng.random((60, 1)) < 0.5  # half of the groups have one outcome for all their pairs
        u = np.where(shared, rng.random((60, 1)), rng.random((60, 3)))
        values = np.where(u < rates[0], 1.0, np.where(u < sum(rates), -1.0, 0.0)).ravel()
        spread = paired_difference(values.tolist(), groups, shares=True).spread
        assert spread is not None
        bounds = spread(0.025)
        covered += bounds.lo <= truth <= bounds.hi
    assert 0.94 <= covered / draws <= 0.995


def test_coverage_of_shares_near_one() -> None:
    """800 draws of 40 groups of 2 pairs that are right together, at 0.96: the bootstrap alone covers less."""
    rng = np.random.default_rng(5)
    groups, draws = [f"g{i // 2}" for i in range(80)], 800
    ours = theirs = 0
    for _ in range(draws):
        values = np.repeat(rng.random(40) < 0.96, 2)
        found = group_bootstrap_mean(values, groups, 200, rng)
        assert found.lo is not None
        assert found.hi is not None
        bounds = share_spread(found.estimate, found.lo, found.hi, found.n, found.n_groups)(0.025)
        ours += bounds.lo <= 0.96 <= bounds.hi
        theirs += found.lo <= 0.96 <= found.hi
    assert ours / draws >= 0.95
    assert theirs < ours
