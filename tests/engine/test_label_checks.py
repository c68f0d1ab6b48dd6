import itertools

import numpy as np
import pytest

from safer_engine.errors import NumericalError
from safer_engine.science.label_checks import agreement, detection, wilson


def test_the_score_interval_is_wilsons() -> None:
    assert wilson(15, 20) == pytest.approx((0.53130, 0.88814), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    with pytest.raises(NumericalError):
        wilson(3, 2)


def test_balanced_accuracy_is_the_mean_of_both_shares() -> None:
    fires = [True] * 4 + [False] * 10
    judged = [True, True, True, False, *[False] * 9, True]
    found = detection(fires, judged)
    assert found is not None
    assert (found.recall, found.specificity, found.n_fires, found.n_silent) == (0.75, 0.9, 4, 10)
    assert found.score == pytest.approx(0.825)
    (a, b), (c, d) = wilson(3, 4), wilson(9, 10)
    assert found.lo == pytest.approx(0.825 - np.hypot(0.75 - a, 0.9 - c) / 2)
    assert found.hi == pytest.approx(0.825 + np.hypot(b - 0.75, d - 0.9) / 2)


def test_what_was_not_judged_does_not_count() -> None:
    found = detection([True, True, False, False], [True, None, None, False])
    assert found is not None
    assert (found.score, found.n_fires, found.n_silent) == (1.0, 1, 1)
    assert detection([True, False], [True, None]) is None
    with pytest.raises(NumericalError):
        detection([True], [])


def test_the_interval_covers_as_it_says() -> None:
    """Of 400 labels with a known balanced accuracy, about 95 in 100 intervals hold it."""
    rng = np.random.default_rng(1)
    truth = np.repeat([True, False], 20).tolist()
    held = 0
    for _ in range(400):
        judged = [bool(rng.random() < (0.6 if fires else 0.1)) for fires in truth]
        found = detection(truth, judged)
        assert found is not None
        held += found.lo <= 0.75 <= found.hi
    assert 365 <= held <= 395


def test_kappa_is_that_of_the_table() -> None:
    first, again = [1, 2, 5, 4, 3, 3, 1, 5], [1, 3, 5, 5, 3, 2, 2, 4]
    observed, left, right = np.zeros((5, 5)), np.zeros(5), np.zeros(5)
    for a, b in zip(first, again, strict=True):
        observed[a - 1, b - 1] += 1
        left[a - 1] += 1
        right[b - 1] += 1
    expected = np.outer(left, right) / 8
    weights = np.array([[(i - j) ** 2 for j in range(5)] for i in range(5)])
    found = agreement(first, again, 500, np.random.default_rng(0))
    assert found is not None
    assert found.kappa is not None
    assert found.kappa == pytest.approx(1 - (weights * observed).sum() / (weights * expected).sum())
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo < found.kappa < found.hi <= 1
    assert (found.same, found.n) == (3 / 8, 8)


def test_readings_without_spread_have_no_kappa() -> None:
    found = agreement([4, 4, 4], [4, 4, 4], 50, np.random.default_rng(0))
    assert found is not None
    assert (found.kappa, found.lo, found.same) == (None, None, 1.0)
    assert agreement([], [], 50, np.random.default_rng(0)) is None
    with pytest.raises(NumericalError):
        agreement([6], [5], 50, np.random.default_rng(0))


def test_kappa_is_nought_for_independent_readings() -> None:
    pairs = list(itertools.product(range(1, 6), range(1, 6)))
    found = agreement([a for a, _ in pairs], [b for _, b in pairs], 50, np.random.default_rng(0))
    assert found is not None
    assert found.kappa == pytest.approx(0.0)
