"""What is ablated, and against what: features that are like all others are verified no more often than chance allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import binom

from safer_engine.causal_tables import Choice, choose
from safer_engine.science.causal_stats import Agreement, against_controls
from safer_engine.spec_causal import CausalSpec

N, FEATURES = 512, 32


@dataclass(frozen=True)
class Found:
    """What `choose` reads of an attribution."""

    margin_S: NDArray[np.float64]
    fired_S: NDArray[np.float64]


def chosen(rng: np.random.Generator, effect_S: NDArray[np.float64], attributed: int = 8) -> Choice:
    """Features that have nothing to do with their effects."""
    rank = np.full(N, -1)
    rank[rng.permutation(N)[:FEATURES]] = np.arange(1, FEATURES + 1)
    latents = pa.table(
        {
            "latent_id": np.arange(N), "candidate": rank > 0,
            "rank": pa.array([int(r) if r > 0 else None for r in rank], pa.int32()),
            "firing_rate": rng.uniform(0.001, 0.2, N), "energy": rng.lognormal(size=N),
        }
    )  # fmt: skip
    spec = CausalSpec(features=FEATURES, attributed=attributed)
    return choose(latents, None, Found(effect_S, np.ones(N)), spec)  # type: ignore[arg-type]


def test_features_like_all_others_are_verified_no_more_often_than_chance() -> None:
    wrong, runs = 0, 200
    small = []
    for run in range(runs):
        rng = np.random.default_rng(run)
        effect_S = rng.standard_t(3, size=N) * rng.lognormal(sigma=0.5, size=N)
        choice = chosen(rng, effect_S)
        tested = list(choice.roles)[: choice.n_tested]
        null = against_controls(effect_S[tested], choice.near_FC, effect_S, Agreement(1.0, 1.0, 100))
        assert not null.reason
        wrong += bool((null.adjusted_F <= 0.05).any())
        small += (null.p_F <= 0.05).tolist()
    assert wrong <= binom.ppf(0.99, runs, 0.05)
    assert np.mean(small) < 0.058


def test_a_large_effect_is_found_among_them() -> None:
    rng = np.random.default_rng(0)
    effect_S = rng.standard_normal(N)
    first = chosen(np.random.default_rng(0), effect_S)
    planted = next(iter(first.roles))
    effect_S[planted] = 40.0
    choice = chosen(np.random.default_rng(0), effect_S)
    tested = list(choice.roles)[: choice.n_tested]
    null = against_controls(effect_S[tested], choice.near_FC, effect_S, Agreement(1.0, 1.0, 100))
    assert null.adjusted_F[tested.index(planted)] <= 0.05


def test_the_largest_attributions_are_controls_and_ablated_once() -> None:
    rng = np.random.default_rng(1)
    effect_S = rng.standard_normal(N)
    choice = chosen(rng, effect_S)
    largest = [latent for latent, role in choice.roles.items() if role == "attribution"]
    assert len(largest) == 8
    tested = set(list(choice.roles)[: choice.n_tested])
    assert len(tested) == FEATURES == len(choice.near_FC)
    by_size = [int(i) for i in np.argsort(-np.abs(effect_S)) if int(i) not in tested]
    assert largest == by_size[:8]
    assert set(largest) & set(choice.near_FC.ravel().tolist())
    assert not tested & set(choice.near_FC.ravel().tolist())
    assert len(set(choice.single)) == len(choice.single)
    assert len(choice.controls) == CausalSpec().controls
