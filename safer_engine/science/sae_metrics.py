"""How good an SAE is: variance unexplained, sparsity, firing rates. Streaming: memory does not grow with the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.sae import Sae


@dataclass(frozen=True)
class SaeMetrics:
    """Measures over n held-out positions.

    Attributes:
        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖² in raw units, x̄ the mean of these positions; 0 is perfect, 1 no better than the mean.
        nmse: mean of ‖x̂ − x‖² / ‖x‖² on scaled activations (arXiv 2507.00665).
        l0: mean number of positive activations per position.
        silent_share: share of latents that fired at none of these positions.
        density_S: share of positions at which each latent fires, float64.
    """

    fvu: float
    nmse: float
    l0: float
    silent_share: float
    density_S: Tensor
    n_positions: int


class MetricsAccumulator:
    """Adds up batches; sums are float64."""

    def __init__(self, sae: Sae) -> None:
        self._sae = sae
        device = sae.b_dec_D.device
        self._reference_D: Tensor | None = None
        self._sum_D = torch.zeros(sae.shape.d_in, dtype=torch.float64, device=device)
        self._fired_S = torch.zeros(sae.shape.d_sae, dtype=torch.int64, device=device)
        self._squares = self._unexplained = self._nmse = 0.0
        self._n = 0

    def add(self, x_BD: Tensor) -> None:
        """Measure raw activations [B, D] on the SAE's device."""
        if len(x_BD) == 0:
            return
        scaled = self._sae.normalise(x_BD)
        acts = self._sae.encode_normalised(scaled.x_BD)
        x_hat_BD = self._sae.decode(acts)
        self._fired_S += torch.bincount(acts.indices_BK[acts.values_BK > 0], minlength=self._sae.shape.d_sae)
        raw_BD = x_BD.double()
        self._unexplained += float((raw_BD - scaled.undo(x_hat_BD)).square().sum())
        self._nmse += _nmse_sum(scaled.x_BD.double(), x_hat_BD.double())
        if self._reference_D is None:
            self._reference_D = raw_BD.mean(0)  # sums of differences from a near point lose no digits
        moved_BD = raw_BD - self._reference_D
        self._sum_D += moved_BD.sum(0)
        self._squares += float(moved_BD.square().sum())
        self._n += len(x_BD)

    def metrics(self) -> SaeMetrics:
        """The measures. Raises NumericalError where there is no position, or no variance."""
        if self._n == 0:
            raise NumericalError("no held-out position to measure the SAE on", "audit more pairs, or raise split.held_out")
        total = self._squares - float(self._sum_D.square().sum()) / self._n
        if not (math.isfinite(total) and total > 0 and math.isfinite(self._unexplained) and math.isfinite(self._nmse)):
            raise NumericalError(f"the variance of the held-out activations is {total}", "check the reward model's weights")
        return SaeMetrics(
            fvu=self._unexplained / total,
            nmse=self._nmse / self._n,
            l0=float(self._fired_S.sum()) / self._n,
            silent_share=float((self._fired_S == 0).double().mean()),
            density_S=self._fired_S.double().cpu() / self._n,
            n_positions=self._n,
        )


@dataclass(frozen=True)
class DensityHistogram:
    """Latents by firing rate.

    Attributes:
        edges: log10 of the bins' limits, ascending, one more than counts.
        counts: latents per bin; a rate below the lowest edge counts in the first bin, one above in the last.
        silent: latents that never fired; in no bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    silent: int


def density_histogram(density_S: Tensor, lowest: float = -6.0, bins: int = 24) -> DensityHistogram:
    """Histogram of log10 firing rates between 10^lowest and 1. Silent + Σ counts = number of latents."""
    fired = density_S[density_S > 0].double().log10()
    edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
    place = torch.bucketize(fired, edges[1:-1], right=True)
    counts = torch.bincount(place, minlength=bins)
    return DensityHistogram(tuple(edges.tolist()), tuple(counts.tolist()), len(density_S) - len(fired))


def _nmse_sum(x_BD: Tensor, x_hat_BD: Tensor) -> float:
    squares_B = x_BD.square().sum(1)
    if not bool((squares_B > 0).all()):
        raise NumericalError("a scaled activation is zero: its normalised error has no value", "check the reward model's weights")
    return float(((x_hat_BD - x_BD).square().sum(1) / squares_B).sum())
