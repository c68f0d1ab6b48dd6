"""What the SAE adds: bits of planted scores against their closed form, and what is told of labels a model has learnt."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from safer_engine.science.contribution import HeldOut, contribution, label_information

Floats = NDArray[np.float64]


def held_of(n: int, cells: int = 1) -> HeldOut:
    rng = np.random.default_rng(5)
    return HeldOut(rng.integers(5, size=n), rng.integers(cells, size=n), np.arange(n) // 2)


def scores(n: int, d: float, share: float, seed: int) -> Floats:
    """Log-likelihood ratios of mirrored normals d apart; a share of the labels is turned round."""
    rng = np.random.default_rng(seed)
    score = rng.normal(d**2 / 2, d, size=n)
    return np.where(rng.random(n) < share, -score, score)


def test_bits_are_the_mutual_information_of_label_and_score() -> None:
    score, share = scores(40_000, 2.0, 0.1, seed=1), 0.1
    agrees = share + (1 - 2 * share) * expit(np.abs(score))
    expected = 1 + (agrees * np.log2(agrees) + (1 - agrees) * np.log2(1 - agrees)).mean()
    assert label_information(score, held_of(len(score))).mean() == pytest.approx(expected, abs=0.01)


def test_noise_tells_nothing() -> None:
    noise = np.random.default_rng(2).normal(size=20_000)
    bits = label_information(noise, held_of(20_000, 2))
    assert bits.mean() == pytest.approx(0, abs=0.003)
    assert (label_information(np.zeros(100), held_of(100)) == 0).all()


def test_the_better_score_adds_and_the_worse_takes_away() -> None:
    strong, weak = scores(6_000, 2.0, 0.05, seed=3), scores(6_000, 0.7, 0.05, seed=4)
    rng = np.random.default_rng(0)
    adds = contribution(strong, weak, held_of(6_000, 2), True, 300, rng)
    assert adds.lo is not None
    assert adds.hi is not None
    assert 0 < adds.lo < adds.bits < adds.hi
    assert adds.agree_with > adds.agree_without
    back = contribution(weak, strong, held_of(6_000, 2), True, 300, rng)
    assert back.bits == pytest.approx(-adds.bits)
    same = contribution(strong, strong, held_of(6_000, 2), True, 50, rng)
    assert (same.bits, same.lo, same.hi) == (0, 0, 0)


def test_a_score_that_has_learnt_the_labels_tells_more_of_them_and_finds_fewer_wrong_ones() -> None:
    rng = np.random.default_rng(6)
    wrong = rng.random(8_000) < 0.1
    honest = rng.normal(1.5, 1.5, size=8_000)
    honest = np.where(wrong, -honest, honest)
    learnt = honest + 1.5
    found = contribution(honest, learnt, held_of(8_000), False, 100, rng)
    assert found.bits < 0
    assert not found.fair
    assert (honest[wrong] < 0).mean() > (learnt[wrong] < 0).mean()


def test_a_cell_that_only_one_fold_has_is_told_nothing_of() -> None:
    score = scores(400, 2.0, 0.1, seed=7)
    held = HeldOut(np.arange(400) % 4, np.where(np.arange(400) == 0, 1, 0), np.arange(400))
    bits = label_information(score, held)
    assert bits[0] == 0
    assert (bits[1:] != 0).all()
