"""What decisions say of probabilities: planted truths, few decisions, chosen pairs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit

from safer_engine.errors import NumericalError
from safer_engine.science.recalibration import Share, learn_from, recalibrated_share, reliability

Planted = tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]


def planted(n: int, intercept: float, slope: float, seed: int = 0) -> Planted:
    """Probabilities told, truths drawn from expit(intercept + slope · logit), groups of two."""
    rng = np.random.default_rng(seed)
    told = expit(rng.normal(-1.0, 2.0, n))
    return told, rng.random(n) < expit(intercept + slope * logit(told)), np.arange(n) // 2


def test_probabilities_that_are_too_sure_are_recalibrated_and_the_brier_score_falls() -> None:
    told, wrong, groups = planted(400, -0.5, 0.4)
    found = learn_from(told, wrong, groups, 0)
    assert found.used
    assert found.before is not None
    assert found.after is not None
    assert found.after.brier.value < found.before.brier.value
    assert found.before.ece.value > 2 * found.before.ece_chance
    assert found.intercept == pytest.approx(-0.5, abs=0.3)
    assert found.slope == pytest.approx(0.4, abs=0.15)
    assert (found.n, found.n_wrong, found.n_groups) == (400, int(wrong.sum()), 200)


def test_choosing_pairs_by_their_probability_alone_does_no_harm() -> None:
    told, wrong, groups = planted(2000, -0.5, 0.5, seed=1)
    rng = np.random.default_rng(5)
    seen = rng.random(len(told)) < np.where(told > np.quantile(told, 0.8), 0.9, 0.05)
    found = learn_from(told[seen], wrong[seen], groups[seen], 0)
    assert found.map.apply(np.array([0.1, 0.5, 0.9])) == pytest.approx(
        expit(-0.5 + 0.5 * logit(np.array([0.1, 0.5, 0.9]))), abs=0.07
    )


@pytest.mark.parametrize(
    ("n_wrong", "n_right", "said"), [(5, 6, "fewer than 20"), (3, 40, "of one kind"), (40, 3, "of one kind")]
)
def test_too_few_decisions_change_nothing_and_say_so(n_wrong: int, n_right: int, said: str) -> None:
    wrong = np.array([True] * n_wrong + [False] * n_right)
    found = learn_from(np.linspace(0.1, 0.9, len(wrong)), wrong, np.arange(len(wrong)), 0)
    assert not found.used
    assert found.before is None
    assert said in (found.reason or "")
    assert found.map.apply(np.array([0.3])) == pytest.approx(0.3)


def test_decisions_on_few_groups_change_nothing() -> None:
    wrong = np.arange(40) % 2 == 0
    found = learn_from(np.linspace(0.1, 0.9, 40), wrong, np.arange(40) % 4, 0)
    assert (found.used, found.reason) == (False, "decisions on 4 groups, fewer than 10")


def test_without_a_decision_nothing_is_checked() -> None:
    nothing = learn_from(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0), 0)
    assert (nothing.n, nothing.used, nothing.before) == (0, False, None)


def test_a_probability_of_one_is_an_error() -> None:
    with pytest.raises(NumericalError):
        learn_from(np.array([0.5, 1.0]), np.array([True, False]), np.arange(2), 0)


def test_brier_and_calibration_error_in_closed_form() -> None:
    told = np.array([0.2] * 10 + [0.8] * 10)
    wrong = np.array([True] * 4 + [False] * 6 + [True] * 8 + [False] * 2)
    found = reliability(told, wrong, np.arange(20), 0)
    assert found.brier.value == pytest.approx((4 * 0.64 + 6 * 0.04 + 8 * 0.04 + 2 * 0.64) / 20)
    # bins of five: the four of the first kind hold 4 and 0 wrong (told 0.2), 5 and 3 (told 0.8)
    assert found.ece.value == pytest.approx((5 * abs(0.8 - 0.2) + 5 * 0.2 + 5 * 0.2 + 5 * abs(0.6 - 0.8)) / 20)
    assert found.brier.lo < found.brier.value < found.brier.hi
    assert 0 < found.ece_chance < 0.3


def test_right_probabilities_are_within_what_chance_makes() -> None:
    told, wrong, groups = planted(2000, 0.0, 1.0, seed=3)
    found = reliability(told, wrong, groups, 0)
    assert found.ece.value < 2 * found.ece_chance


def test_the_share_follows_the_map_and_its_interval_is_no_narrower_than_the_model_s() -> None:
    told, wrong, groups = planted(2000, -0.7, 1.0, seed=2)
    truth = float(expit(-0.7 + logit(told)).mean())
    model = Share(float(told.mean()), float(told.mean()) - 0.02, float(told.mean()) + 0.02)
    seen = slice(0, 300)
    share = recalibrated_share(told, model, (told[seen], wrong[seen], groups[seen]), np.random.default_rng(0))
    assert share.value == pytest.approx(truth, abs=0.05)
    assert share.lo < truth < share.hi
    assert logit(share.hi) - logit(share.lo) >= logit(model.hi) - logit(model.lo)
