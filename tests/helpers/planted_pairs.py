"""Preference pairs with planted wrong labels, as latent activations: what the signals must find is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from safer_engine.science.pair_deltas import LatentSums
from safer_engine.science.pair_scoring import SignalInputs


@dataclass(frozen=True)
class Planted:
    """Inputs of the signals, and which pairs carry a flipped label."""

    inputs: SignalInputs
    flipped: np.ndarray
    direction: np.ndarray


def planted_pairs(
    seed: int, *, n_groups: int = 400, n_latents: int = 300, informative: int = 40, share: float = 0.1, axis: str = "safety"
) -> Planted:
    """Two pairs a group, two subsets with their own directions, whole groups flipped, margins that have learnt the noise.

    A latent fires in about a tenth of the responses; the informative ones fire more on the better response (or less, by their
    sign in the subset). The reward margin follows the *given* labels more than the true ones: a model that overfitted them.
    """
    rng = np.random.default_rng(seed)
    n_pairs = 2 * n_groups
    group = np.repeat(np.arange(n_groups), 2)
    subset = np.repeat(rng.integers(2, size=n_groups), 2)
    direction = np.zeros((2, n_latents))
    direction[:, :informative] = rng.choice([-1.0, 1.0], (2, informative))
    base = 0.1 * np.ones((n_pairs, n_latents))
    lift = 0.06 * direction[subset]
    better = (rng.random((n_pairs, n_latents)) < base + lift) * rng.exponential(1.0, (n_pairs, n_latents))
    worse = (rng.random((n_pairs, n_latents)) < base - lift) * rng.exponential(1.0, (n_pairs, n_latents))
    flipped = np.repeat(rng.random(n_groups) < share, 2)
    positions = rng.integers(5, 40, (n_pairs, 2))
    chosen = np.where(flipped[:, None], worse, better) * positions[:, :1]
    rejected = np.where(flipped[:, None], better, worse) * positions[:, 1:]
    sums = LatentSums(sparse.csr_array(chosen.astype(np.float32)), sparse.csr_array(rejected.astype(np.float32)), positions)
    truth = np.where(flipped, -1.0, 1.0)
    mixing = rng.normal(size=(n_latents, 24)) / np.sqrt(n_latents)
    dense = (chosen / positions[:, :1] - rejected / positions[:, 1:]) @ mixing
    inputs = SignalInputs(
        groups_P=np.asarray([f"{axis}-g{g}" for g in group]),
        axes_P=np.asarray([axis] * n_pairs),
        subsets_P=np.asarray([f"s{s}" for s in subset]),
        margins_P=1.0 + 0.25 * truth + rng.normal(0, 0.6, n_pairs),
        latents=sums,
        head_delta_PD=dense.astype(np.float32),
        dense_delta_PD=dense.astype(np.float32),
    )
    return Planted(inputs, flipped, direction)
