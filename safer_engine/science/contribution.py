"""What the SAE adds to the suspicion of an audit: how much more held-out scores with it tell about the labels than without it.

A cross-fitted score predicts the label of a pair that it never saw. The other label would have turned the score round, so the
score tells of the label, with the density f of `science.doubt_model` fitted to the other folds,

    log2 (2 f(s) / (f(s) + f(−s))) bits,

0 for a coin, 1 for a label that is known. The SAE adds the difference of two means: with its signals, and with a dense probe in
their place.

The figure is fair where the reward model was **not** trained on these labels. A reward model holds the labels it was trained on
in its activations, the wrong ones among them; a dense probe reads more of that than a sparse code does, and so agrees better
with labels that are wrong. There the figure counts against the SAE, while the benchmark with planted flips
(docs/label-noise.md) tells the opposite; it is shown, and nothing is decided by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_expit

from safer_engine.science.doubt_model import fit_doubt
from safer_engine.science.stats import group_bootstrap_mean

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Contribution:
    """What the SAE adds on one axis.

    Attributes:
        bits: mean over pairs of what the labels are told with the SAE's signals less what they are told with the dense probe in
            their place, in bits a pair, in (−∞, 1).
        lo, hi: ends of its 95 % interval over groups; None with a single group.
        agree_with, agree_without: share of the pairs whose label is as the held-out score says, in [0, 1].
        fair: whether the reward model had not learnt these labels.
    """

    bits: float
    lo: float | None
    hi: float | None
    agree_with: float
    agree_without: float
    fair: bool


@dataclass(frozen=True)
class HeldOut:
    """How the pairs were held out: fold, cell (subset) and group of each."""

    folds_P: Ints
    cell_P: Ints
    groups_P: NDArray[Any]


def label_information(score_P: Floats, held: HeldOut) -> Floats:
    """Bits that a cross-fitted score tells about each label, float64 [P], at most 1; see the module.

    Args:
        score_P: above 0 where the evidence agrees with the label.
    """
    bits_P = np.zeros(len(score_P))
    for fold in np.unique(held.folds_P):
        here = held.folds_P == fold
        cell_P, groups_P = held.cell_P[~here], held.groups_P[~here]
        known = np.isin(held.cell_P, np.unique(cell_P)) & here
        model = fit_doubt(score_P[~here], cell_P, groups_P, resamples=0, rng=np.random.default_rng(0))
        here_P, there_P = (model.log_density(sign * score_P[known], held.cell_P[known]) for sign in (1, -1))
        bits_P[known] = 1 + log_expit(here_P - there_P) / np.log(2)
    return bits_P


def contribution(
    with_P: Floats, without_P: Floats, held: HeldOut, fair: bool, resamples: int, rng: np.random.Generator
) -> Contribution:
    """What one score tells beyond another, pair by pair, with an interval over groups.

    Args:
        with_P, without_P: scores with the SAE's signals, and with the dense probe in their place.
        fair: see `Contribution`.
    """
    gain_P = label_information(with_P, held) - label_information(without_P, held)
    found = group_bootstrap_mean(gain_P, held.groups_P, resamples, rng)
    agree = [float((score > 0).mean() + 0.5 * (score == 0).mean()) for score in (with_P, without_P)]
    return Contribution(found.estimate, found.lo, found.hi, agree[0], agree[1], fair)
