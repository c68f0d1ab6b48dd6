"""From scores to probabilities: planted shares are found, probabilities are what they say, and what cannot be told is said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import check_grad

from safer_engine.errors import NumericalError
from safer_engine.science import doubt_model as module
from safer_engine.science.doubt_model import DoubtModel, fit_doubt, recalibrate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    score: Floats
    cell: NDArray[np.int64]
    wrong: NDArray[np.bool_]

    @property
    def n(self) -> int:
        return len(self.score)


def planted(n: int, shares: tuple[float, ...], strengths: tuple[float, ...], seed: int) -> Planted:
    """Mirrored normals: right labels score N(d²/2, d²), the log-likelihood ratio of classes d apart, wrong ones its mirror."""
    rng = np.random.default_rng(seed)
    cell = np.arange(n) % len(shares)
    d = np.asarray(strengths)[cell]
    wrong = rng.random(n) < np.asarray(shares)[cell]
    score = rng.normal(d**2 / 2, d)
    return Planted(np.where(wrong, -score, score), cell, wrong)


def fit(data: Planted, resamples: int = 0) -> DoubtModel:
    return fit_doubt(data.score, data.cell, np.arange(data.n), resamples=resamples, rng=np.random.default_rng(0))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25])
def test_a_planted_share_is_found_and_probabilities_are_bayes(share: float) -> None:
    data = planted(40_000, (share,), (2.5,), seed=1)
    model = fit(data, 40)
    assert model.share == pytest.approx(share, abs=0.01)
    assert model.slope_C[0] == pytest.approx(1.0, abs=0.08)  # scores are log-likelihood ratios already
    assert model.identified
    bayes = share / (share + (1 - share) * np.exp(data.score))
    assert np.abs(model.probability(data.score, data.cell) - bayes).mean() < 0.01


def test_probabilities_are_calibrated_in_each_cell() -> None:
    data = planted(60_000, (0.05, 0.2), (3.0, 1.5), seed=2)
    model = fit(data)
    p = model.probability(data.score, data.cell)
    assert model.share_C == pytest.approx([0.05, 0.2], abs=0.03)
    for cell in (0, 1):
        for lo, hi in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
            rows = (data.cell == cell) & (p >= lo) & (p < hi)
            if rows.sum() > 300:
                assert data.wrong[rows].mean() == pytest.approx(p[rows].mean(), abs=0.05)


def test_a_pair_without_evidence_has_the_share_of_its_cell() -> None:
    model = DoubtModel(0.1, None, None, np.array([0.05, 0.2]), np.array([0.5, 1.0]), np.array([1.0, 1.0]), 1.0, 0.99)
    assert model.probability(np.zeros(2), np.array([0, 1])) == pytest.approx([0.05, 0.2])
    p = model.probability(np.array([-1e6, -1.0, 0.0, 1.0, 1e6]), np.zeros(5, dtype=np.int64))
    assert (np.diff(p) < 0).all()
    assert np.isfinite(p).all()
    assert p[1] == pytest.approx(0.05 / (0.05 + 0.95 * np.exp(-1.0)))


def test_a_small_cell_takes_after_its_axis() -> None:
    big = planted(20_000, (0.1,), (2.5,), seed=3)
    few = planted(12, (0.1,), (2.5,), seed=4)
    both = Planted(np.r_[big.score, few.score], np.r_[big.cell, few.cell + 1], np.r_[big.wrong, few.wrong])
    model = fit(both)
    assert model.share_C[1] == pytest.approx(model.share_C[0], rel=0.5)
    assert model.share_C[0] == pytest.approx(0.1, abs=0.015)


def test_scores_without_strong_evidence_do_not_tell_the_share() -> None:
    assert not fit(planted(5_000, (0.1,), (0.4,), seed=5), 40).identified
    noise = np.random.default_rng(6).normal(size=5_000)
    assert not fit(Planted(noise, np.zeros(5_000, dtype=np.int64), np.zeros(5_000, dtype=bool)), 40).identified


def test_the_interval_covers_the_share_with_groups_of_several_pairs() -> None:
    covered = 0
    for seed in range(30):
        rng = np.random.default_rng(100 + seed)
        groups = np.repeat(np.arange(300), 3)
        wrong = np.repeat(rng.random(300) < 0.1, 3)
        d = 2.5
        shared = np.repeat(rng.normal(size=300), 3)
        score = d**2 / 2 + d * (0.7 * shared + np.sqrt(1 - 0.49) * rng.normal(size=900))
        model = fit_doubt(
            np.where(wrong, -score, score), np.zeros(900, dtype=np.int64), groups, resamples=100, rng=rng
        )  # fmt: skip
        assert model.lo is not None
        assert model.hi is not None
        assert 0 < model.lo < model.share < model.hi < 0.5
        covered += model.lo <= 0.1 <= model.hi
    assert covered >= 24  # of 30; a nominal 95 % gives fewer once in 10,000


def test_the_gradient_is_that_of_the_loss() -> None:
    data = planted(500, (0.1, 0.2), (2.0, 1.0), seed=7)
    bins = module._Bins.of(data.score, data.cell, 2)
    counts = bins.counts(np.ones(data.n))
    rng = np.random.default_rng(8)
    for _ in range(5):
        at = rng.normal(size=10) * 0.5
        error = check_grad(lambda v: module._loss(v, bins, counts)[0], lambda v: module._loss(v, bins, counts)[1], at)
        assert error < 1e-3 * np.linalg.norm(module._loss(at, bins, counts)[1])


def test_pairs_with_a_score_of_zero_count_for_nothing() -> None:
    data = planted(5_000, (0.1,), (2.5,), seed=9)
    padded = Planted(np.r_[data.score, np.zeros(5_000)], np.zeros(10_000, dtype=np.int64), np.r_[data.wrong, data.wrong])
    assert fit(padded).share == pytest.approx(fit(data).share)
    assert fit(padded).probability(np.zeros(1), np.zeros(1, dtype=np.int64)) == pytest.approx(fit(data).share)


@pytest.mark.parametrize("ratio", [0.6, 1.3])
def test_wrong_labels_that_a_model_has_half_learnt_are_found(ratio: float) -> None:
    rng = np.random.default_rng(12)
    wrong = rng.random(3_000) < 0.1
    score = np.where(wrong, -3.0 * ratio, 3.0) + 1.3 * rng.normal(size=3_000)
    model = fit_doubt(score, np.zeros(3_000, dtype=np.int64), np.arange(3_000), resamples=40, rng=rng)
    assert model.identified
    assert model.share == pytest.approx(wrong.mean(), abs=0.01)
    assert model.ratio == pytest.approx(ratio, rel=0.1)
    p = model.probability(score, np.zeros(3_000, dtype=np.int64))
    assert p.sum() == pytest.approx(wrong.sum(), rel=0.1)
    assert ((p - wrong) ** 2).mean() < 0.02


def test_decisions_recalibrate_probabilities_that_were_too_sure() -> None:
    rng = np.random.default_rng(10)
    truth = rng.beta(1, 4, size=4_000)
    wrong = rng.random(4_000) < truth
    told = 1 / (1 + np.exp(-(1.0 + 2.0 * np.log(truth / (1 - truth)))))
    chosen = rng.permutation(4_000)[:150]
    found = recalibrate(told[chosen], wrong[chosen])
    assert found.n == 150
    before = ((told - truth) ** 2).mean()
    assert ((found.apply(told) - truth) ** 2).mean() < before / 2
    assert (np.diff(found.apply(np.sort(told))) >= 0).all()
    assert recalibrate(np.array([]), np.array([], dtype=bool)).apply(told) == pytest.approx(told)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError):
        fit_doubt(np.array([1.0, np.nan]), np.zeros(2, dtype=np.int64), np.arange(2), rng=np.random.default_rng(0))


def test_that_no_label_contradicts_strong_evidence_does_not_prove_that_none_is_wrong() -> None:
    rng = np.random.default_rng(11)
    model = fit_doubt(np.full(60, 8.0) + rng.random(60), np.zeros(60, dtype=np.int64), np.arange(60), resamples=50, rng=rng)
    assert 0 < model.share < 0.03
    assert model.hi is not None
    assert 0.03 < model.hi < 0.12  # of 60 without one: 6.0 % (Clopper and Pearson), and half a pair more
    few = fit_doubt(np.full(10, 8.0) + rng.random(10), np.zeros(10, dtype=np.int64), np.arange(10), resamples=50, rng=rng)
    assert few.hi is not None
    assert few.hi > 0.25
    assert not few.identified


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "score",
    [np.ones(40), np.r_[np.ones(39), -1.0], np.r_[np.ones(20), np.full(20, 2.0)] * 1e-9, np.r_[np.ones(200), 1e6]],
    ids=["all alike", "one against", "tiny", "one huge"],
)
@pytest.mark.parametrize("n_cells", [1, 2, 40])
def test_scores_without_spread_leave_no_figure_undefined(score: Floats, n_cells: int) -> None:
    """The likelihood has no maximum where all scores of a cell are one and the same: the spread ends at its bound."""
    cell = np.arange(len(score)) % n_cells
    model = fit_doubt(score, cell, np.arange(len(score)), resamples=5, rng=np.random.default_rng(0))
    assert 0 < model.share <= 0.5
    assert model.lo is not None
    assert model.hi is not None
    assert model.lo <= model.share <= model.hi
    assert np.isfinite(model.probability(score, cell)).all()
