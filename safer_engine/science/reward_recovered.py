"""How much of the rewards is left when activations are replaced by the SAE's reconstruction.

Twice: at the covered positions, and at all. Each is compared with replacing the same positions by their mean: a measure of
1 says nothing is lost, 0 that the reconstruction does no better than the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.sae import Sae

Rewards = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rewards [B] from h [B, T, D], attention mask [B, T] and input ids [B, T]: the blocks above the hook point."""

_LEAST_EFFECT = 1e-8
"""Mean-ablation that changes less than this share of the margins' variance leaves nothing to be recovered."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ResidualPair:
    """Both sequences of a pair as they are after the hooked block; index 0 is chosen, 1 rejected.

    Attributes:
        h_TD: activations of every token.
        ids_T: token ids, int64.
        covered_T: bool; positions whose activations the SAE is used on, the one the head reads among them.
    """

    h_TD: tuple[Tensor, Tensor]
    ids_T: tuple[Tensor, Tensor]
    covered_T: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recovered:
    """What is left of the rewards with some positions replaced.

    Attributes:
        correlation: of rewards with the original ones, over all sequences.
        preference_kept: share of pairs whose margin keeps its sign (a margin of 0 keeps 0 only).
        margin_variance: 1 − Σ(m̂ − m)² / Σ(m̄ − m)²; m̂ margins under the reconstruction, m̄ under mean-ablation.
        ablated_correlation, ablated_preference_kept: the same under mean-ablation.
        ablated_margin_change: Σ(m̄ − m)² / Σ(m − mean m)²: how much the positions matter at all.
    """

    correlation: float
    preference_kept: float
    margin_variance: float
    ablated_correlation: float
    ablated_preference_kept: float
    ablated_margin_change: float


@dataclass(frozen=True)
class RewardRecovered:
    """Both measures, over n pairs."""

    covered: Recovered
    all: Recovered
    n_pairs: int


@dataclass(frozen=True)
class Unmeasured:
    """Why reward recovered has no value."""

    reason: str


@dataclass(frozen=True)
class _Means:
    covered_D: Tensor
    all_D: Tensor


def reward_recovered(pairs: Callable[[], Iterable[ResidualPair]], sae: Sae, rewards: Rewards) -> RewardRecovered | Unmeasured:
    """Measure on pairs that are read twice: for the means, then pair by pair.

    Raises:
        NumericalError: a reward is not finite.
    """
    means = _means(pairs(), sae.shape.d_in)
    if means is None:
        return Unmeasured("no residual streams of held-out pairs were kept (causal.pairs, split.held_out)")
    table = np.stack([_variants(pair, sae, means, rewards) for pair in pairs()])
    if not np.isfinite(table).all():
        raise NumericalError("a reward under reconstruction is not finite", "run the reward model in float32 (model.dtype)")
    original = table[:, 0]
    if len(table) < 2 or np.ptp(original) == 0 or np.ptp(original[:, 0] - original[:, 1]) == 0:
        return Unmeasured(f"the rewards or margins of the {len(table)} held-out pairs with residual streams are all the same")
    covered = _compare(original, table[:, 1], table[:, 2])
    everywhere = _compare(original, table[:, 3], table[:, 4])
    if isinstance(covered, Unmeasured):
        return covered
    if isinstance(everywhere, Unmeasured):
        return everywhere
    return RewardRecovered(covered, everywhere, len(table))


def _means(pairs: Iterable[ResidualPair], d_in: int) -> _Means | None:
    sums = torch.zeros(2, d_in, dtype=torch.float64)
    counts = [0, 0]
    for pair in pairs:
        for h_TD, covered_T in zip(pair.h_TD, pair.covered_T, strict=True):
            sums[0] += h_TD[covered_T].double().sum(0).cpu()
            sums[1] += h_TD.double().sum(0).cpu()
            counts[0] += int(covered_T.sum())
            counts[1] += len(h_TD)
    if not all(counts):
        return None
    return _Means((sums[0] / counts[0]).float(), (sums[1] / counts[1]).float())


def _variants(pair: ResidualPair, sae: Sae, means: _Means, rewards: Rewards) -> Array:
    """Rewards [5, 2]: as they are; covered reconstructed, covered ablated; all reconstructed, all ablated."""
    columns = []
    for h_TD, ids_T, covered_T in zip(pair.h_TD, pair.ids_T, pair.covered_T, strict=True):
        h_BTD = torch.stack(list(_replaced(h_TD.float(), covered_T, sae, means)))
        ids_BT = ids_T.expand(len(h_BTD), -1)
        with torch.no_grad():
            found_B = rewards(h_BTD, torch.ones_like(ids_BT), ids_BT)
        columns.append(found_B.double().cpu().numpy())
    return np.stack(columns, axis=1)


def _replaced(h_TD: Tensor, covered_T: Tensor, sae: Sae, means: _Means) -> Iterator[Tensor]:
    device = sae.b_dec_D.device
    x_hat_TD = sae.reconstruct(h_TD.to(device)).to(h_TD.device)
    covered_T1 = covered_T[:, None]
    yield h_TD
    yield torch.where(covered_T1, x_hat_TD, h_TD)
    yield torch.where(covered_T1, means.covered_D.to(h_TD.device), h_TD)
    yield x_hat_TD
    yield means.all_D.to(h_TD.device).expand_as(h_TD)


def _compare(original_P2: Array, replaced_P2: Array, ablated_P2: Array) -> Recovered | Unmeasured:
    margin_P = original_P2[:, 0] - original_P2[:, 1]
    left_P = replaced_P2[:, 0] - replaced_P2[:, 1]
    ablated_P = ablated_P2[:, 0] - ablated_P2[:, 1]
    lost = float(((ablated_P - margin_P) ** 2).sum())
    variance = float(((margin_P - margin_P.mean()) ** 2).sum())
    if lost <= _LEAST_EFFECT * variance:
        return Unmeasured("replacing the positions by their mean changes no margin: there is nothing to recover")
    return Recovered(
        correlation=_correlation(original_P2, replaced_P2),
        preference_kept=_kept(margin_P, left_P),
        margin_variance=1 - float(((left_P - margin_P) ** 2).sum()) / lost,
        ablated_correlation=_correlation(original_P2, ablated_P2),
        ablated_preference_kept=_kept(margin_P, ablated_P),
        ablated_margin_change=lost / variance,
    )


def _kept(before_P: Array, after_P: Array) -> float:
    return float((np.sign(before_P) == np.sign(after_P)).mean())


def _correlation(a: Array, b: Array) -> float:
    """Pearson's r; 0 where one of the two is constant to rounding, since it then says nothing about the other."""
    a0, b0 = (a - a.mean()).ravel(), (b - b.mean()).ravel()
    size = math.sqrt(float(a0 @ a0) * float(b0 @ b0))
    constant = float(b0 @ b0) <= _LEAST_EFFECT**2 * float(b.ravel() @ b.ravel())
    return 0.0 if size == 0 or constant else float(a0 @ b0) / size
