import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from safer_engine.errors import NumericalError
from safer_engine.science.stats import (
    auroc,
    average_precision,
    clustered_mean,
    group_bootstrap_mean,
    group_bootstrap_ratio,
    precision_at,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("ties", [False, True])
def test_rankings_agree_with_scikit_learn(rng: np.random.Generator, ties: bool) -> None:
    for _ in range(20):
        truth = rng.random(200) < 0.2
        score = rng.integers(0, 6, 200).astype(float) if ties else rng.normal(size=200)
        assert average_precision(truth, score) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
        assert auroc(truth, score) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)


def test_rankings_do_not_depend_on_the_order_of_rows(rng: np.random.Generator) -> None:
    truth, score = rng.random(100) < 0.3, rng.integers(0, 4, 100)
    order = rng.permutation(100)
    assert average_precision(truth, score) == average_precision(truth[order], score[order])
    assert precision_at(truth, score, 0.1) == precision_at(truth[order], score[order], 0.1)


def test_precision_at_a_budget() -> None:
    truth = [True, False, True, False, False, False, False, False, False, False]
    score = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert precision_at(truth, score, 0.1) == 1
    assert precision_at(truth, score, 0.3) == pytest.approx(2 / 3)
    assert precision_at(truth, score, 0.001) == 1  # at least one row is taken
    assert precision_at(truth, score, 1) == 0.2


def test_precision_within_equal_scores_is_the_expectation() -> None:
    assert precision_at([True, False, False, False], [2, 1, 1, 1], 0.5) == pytest.approx(0.5)
    assert precision_at([False, True, False, True], [2, 1, 1, 0], 0.5) == pytest.approx(0.25)


def test_the_group_bootstrap_is_wider_than_one_that_ignores_groups(rng: np.random.Generator) -> None:
    groups = np.repeat(np.arange(50), 20)
    values = np.repeat(rng.normal(size=50), 20) + 0.01 * rng.normal(size=1000)
    clustered = group_bootstrap_mean(values, groups, 500, np.random.default_rng(0))
    alone = group_bootstrap_mean(values, np.arange(1000), 500, np.random.default_rng(0))
    assert clustered.hi is not None
    assert clustered.lo is not None
    assert alone.hi is not None
    assert alone.lo is not None
    assert clustered.hi - clustered.lo > 3 * (alone.hi - alone.lo)
    assert clustered.estimate == alone.estimate == pytest.approx(values.mean())
    assert (clustered.n, clustered.n_groups) == (1000, 50)


def test_the_group_bootstrap_covers_the_true_mean() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
        values = rng.normal(size=60)[groups] + rng.normal(size=len(groups))
        interval = group_bootstrap_mean(values, groups, 400, rng)
        assert interval.lo is not None
        assert interval.hi is not None
        covered += interval.lo <= 0 <= interval.hi
    assert 178 <= covered <= 200


def test_the_bootstrap_is_repeatable_and_takes_text_groups() -> None:
    values, groups = np.arange(12.0), np.array(list("aabbccddeeff"))
    first = group_bootstrap_mean(values, groups, 300, np.random.default_rng(3))
    again = group_bootstrap_mean(values, groups, 300, np.random.default_rng(3))
    assert first == again
    assert first.n_groups == 6


def test_one_group_has_no_interval() -> None:
    interval = group_bootstrap_mean([1.0, 3.0], ["g", "g"], 100, np.random.default_rng(0))
    assert (interval.estimate, interval.lo, interval.hi) == (2.0, None, None)
    assert clustered_mean([1.0, 3.0], ["g", "g"]).se is None


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    interval = group_bootstrap_ratio([1, 1, 8], [1, 3, 4], [0, 1, 2], 200, np.random.default_rng(0))
    assert interval.estimate == pytest.approx(10 / 8)


def test_many_resamples_of_many_groups_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safer_engine.science.stats._CHUNK_CELLS", 64)
    values = np.random.default_rng(1).normal(size=40)
    interval = group_bootstrap_mean(values, np.arange(40), 2000, np.random.default_rng(0))
    assert interval.hi is not None
    assert interval.lo is not None
    assert (interval.hi - interval.lo) / 3.92 == pytest.approx(values.std() / 40**0.5, rel=0.1)


def test_the_clustered_error_is_the_plain_one_for_groups_of_one(rng: np.random.Generator) -> None:
    values = rng.normal(size=80)
    assert clustered_mean(values, np.arange(80)).se == pytest.approx(values.std(ddof=1) / 80**0.5)


def test_the_clustered_error_of_copies_is_that_of_the_groups(rng: np.random.Generator) -> None:
    values = rng.normal(size=40)
    alone = clustered_mean(values, np.arange(40))
    copied = clustered_mean(np.repeat(values, 7), np.repeat(np.arange(40), 7))
    assert copied.se == pytest.approx(alone.se)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_bootstrap_mean([], [], 10, np.random.default_rng(0)), "non-empty"),
        (lambda: group_bootstrap_mean([1.0, np.nan], [0, 1], 10, np.random.default_rng(0)), "not finite"),
        (lambda: group_bootstrap_mean([1.0], [0, 1], 10, np.random.default_rng(0)), "groups of shape"),
        (lambda: group_bootstrap_ratio([1.0], [1.0, 2.0], [0], 10, np.random.default_rng(0)), "denominators"),
        (lambda: group_bootstrap_ratio([1.0], [0.0], [0], 10, np.random.default_rng(0)), "zero"),
        (lambda: average_precision([False, False], [1, 2]), "at least one true"),
        (lambda: average_precision([True], [1, 2]), "truths"),
        (lambda: auroc([True, True], [1, 2]), "false rows"),
        (lambda: auroc([True, False], [1, np.inf]), "not finite"),
        (lambda: precision_at([True], [1], 0.0), "share"),
    ],
)
def test_bad_arrays_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(NumericalError, match=message):
        call()
