"""Two models on the same pairs: planted changes, second implementations, and intervals that cover."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from safer_engine.errors import NumericalError
from safer_engine.science.comparison import (
    PairMargins,
    Scales,
    changed_pairs,
    compare_pairs,
    margin_scale,
    margin_scales,
    moved_by,
    rank_correlation,
    share,
)


def rows(a: list[float], b: list[float], per_group: int = 1, **more: object) -> list[PairMargins]:
    return [
        PairMargins(f"p{i:04d}", f"g{i // per_group}", "safety", "refusal", x, y, **more)  # type: ignore[arg-type]
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def drawn(n: int, seed: int, rho: float = 0.6, per_group: int = 1) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    shared = np.repeat(rng.standard_normal(n // per_group), per_group) * 0.7
    a = shared + rng.standard_normal(n) * 0.7 + 0.8
    b = rho * (a - 0.8) + math.sqrt(1 - rho**2) * rng.standard_normal(n) + 0.5
    return a.tolist(), b.tolist()


def test_a_model_against_itself_is_exactly_zero() -> None:
    a, _ = drawn(300, 0, per_group=3)
    pairs = rows(a, a, 3, longer_a=1, longer_b=1)
    pairs = [replace(pair, longer_a=1 - 2 * (i % 2), longer_b=1 - 2 * (i % 2)) for i, pair in enumerate(pairs)]
    scales = margin_scales(pairs)
    found = compare_pairs(pairs, scales)
    assert found.accuracy_change.estimate == found.margin_change.estimate == found.changed.estimate == found.lost.estimate == 0.0
    assert (found.margin_change.lo, found.margin_change.hi) == (0.0, 0.0)
    assert found.right_to_wrong == found.wrong_to_right == 0
    assert found.rank_correlation is not None
    assert (found.rank_correlation.estimate, found.rank_correlation.lo) == (pytest.approx(1), pytest.approx(1))
    assert found.length_gap_change is not None
    assert found.length_gap_change.estimate == 0.0
    assert changed_pairs(pairs, scales) == []


def test_a_scale_is_not_a_change_and_what_is_planted_is_found() -> None:
    a, _ = drawn(400, 1)
    same = rows(a, [40 * x for x in a])
    found = compare_pairs(same, margin_scales(same))
    assert found.margin_change.estimate == pytest.approx(0, abs=1e-12)
    assert found.changed.estimate == 0
    planted = [place for place, x in enumerate(a) if x > 0][:30]
    b = [-3 * x if place in planted else 3 * x for place, x in enumerate(a)]
    pairs = rows(a, b)
    scales = margin_scales(pairs)
    found = compare_pairs(pairs, scales)
    assert found.right_to_wrong == 30
    assert found.wrong_to_right == 0
    assert found.accuracy_change.estimate == pytest.approx(-30 / 400)
    assert found.accuracy_change.hi is not None
    assert found.accuracy_change.hi < 0
    assert found.changed.estimate == found.lost.estimate == pytest.approx(30 / 400)
    assert found.both_right + found.both_wrong + 30 == 400
    listed = changed_pairs(pairs, scales)
    assert {pair.pair_id for pair in listed} == {f"p{place:04d}" for place in planted}
    sizes = [abs(moved_by(pair, scales)) for pair in listed]
    assert sizes == sorted(sizes, reverse=True)


def test_a_tie_is_a_preference_of_its_own() -> None:
    pairs = rows([1.0, 0.0, 0.0, -1.0], [0.0, -1.0, 0.0, -1.0])
    assert [pair.changed for pair in pairs] == [True, True, False, False]
    found = compare_pairs(pairs, Scales(1, 1))
    assert (found.right_to_wrong, found.both_wrong) == (1, 3)


def test_the_scale_is_the_root_mean_square_and_degenerate_margins_are_refused() -> None:
    assert margin_scale([3.0, -4.0]) == pytest.approx(math.sqrt(12.5))
    assert margin_scale([3e200, -4e200]) == pytest.approx(math.sqrt(12.5) * 1e200)
    for bad in ([], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(NumericalError):
            margin_scale(bad)
    with pytest.raises(NumericalError):
        compare_pairs([], Scales(1, 1))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_rank_correlation_is_scipys(rounded: bool) -> None:
    a, b = drawn(200, 2)
    if rounded:
        a, b = [round(x) for x in a], [round(y) for y in b]
    found = rank_correlation(a, b, [str(i) for i in range(200)])
    assert found is not None
    assert found.estimate == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation([1.0] * 5, a[:5], list("abcde")) is None
    alone = rank_correlation(a, b, ["g"] * 200)
    assert alone is not None
    assert alone.lo is None


def test_intervals_cover_the_truth_also_where_pairs_go_together() -> None:
    """Simulated 300 times, 4 pairs a group: nominally 95 % of the intervals hold the truth; 300 draws tell 91 % from it."""
    per_group, n, times = 4, 240, 300
    a, b = drawn(400_000, 99, per_group=per_group)
    a_all, b_all = np.array(a), np.array(b)
    truth = {
        "accuracy": float(((b_all > 0).astype(float) - (a_all > 0)).mean()),
        "changed": float(((b_all > 0) != (a_all > 0)).mean()),
        "rank": float(stats.spearmanr(a_all, b_all).statistic),
    }
    held = dict.fromkeys(truth, 0)
    for seed in range(times):
        pairs = rows(*drawn(n, 1000 + seed, per_group=per_group), per_group=per_group)
        made = compare_pairs(pairs, margin_scales(pairs))
        for name, figure in (("accuracy", made.accuracy_change), ("changed", made.changed), ("rank", made.rank_correlation)):
            assert figure is not None
            assert figure.lo is not None
            assert figure.hi is not None
            held[name] += figure.lo <= truth[name] <= figure.hi
    assert all(0.91 <= count / times <= 0.99 for count in held.values()), held


def test_copies_of_a_pair_are_worth_one() -> None:
    hits = [place % 5 == 0 for place in range(60)]
    single = share(hits, [str(place) for place in range(60)])
    copied = share([hit for hit in hits for _ in range(4)], [str(place) for place in range(60) for _ in range(4)])
    assert (copied.lo, copied.hi) == (pytest.approx(single.lo, rel=0.02), pytest.approx(single.hi, rel=0.02))
    none = share([False] * 40, [str(place) for place in range(40)])
    assert none.estimate == 0
    assert none.lo == pytest.approx(0, abs=1e-12)
    assert none.hi is not None
    assert 0.05 < none.hi < 0.12


def test_the_length_gap_moves_where_b_follows_length() -> None:
    n = 400
    longer = [1 if place % 2 else -1 for place in range(n)]
    a = [1.0] * n
    b = [1.0 if sign > 0 or place % 4 == 0 else -1.0 for place, sign in enumerate(longer)]
    pairs = [replace(pair, longer_a=sign, longer_b=sign) for pair, sign in zip(rows(a, b), longer, strict=True)]
    found = compare_pairs(pairs, margin_scales(pairs)).length_gap_change
    assert found is not None
    assert found.estimate == pytest.approx(0.5)
    assert found.lo is not None
    assert found.lo > 0.3
    assert compare_pairs(rows(a, b), Scales(1, 1)).length_gap_change is None
