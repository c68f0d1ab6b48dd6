"""Counterparts of latents in another SAE: known by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safer_engine.errors import NumericalError
from safer_engine.science.seed_stability import MIN_COSINE, Counterparts, ScopeDiscoveries, counterparts, crowding, found_again
from tests.helpers.planted import spread_atoms

ALIVE = np.ones(64, dtype=np.bool_)


def atoms() -> torch.Tensor:
    return spread_atoms(64, 24, torch.Generator().manual_seed(0))


def test_a_shuffled_dictionary_is_found_again_whatever_its_lengths() -> None:
    own, order = atoms(), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    found = counterparts(own[10:30], 3.0 * own[order], ALIVE)
    assert order[torch.from_numpy(found.match_F)].tolist() == list(range(10, 30))
    np.testing.assert_allclose(found.cosine_F, 1, atol=1e-6)


def test_blocks_give_what_one_product_gives() -> None:
    rows = torch.randn(2500, 24, generator=torch.Generator().manual_seed(2))
    found = counterparts(rows, atoms(), ALIVE)
    cosine = (rows / rows.norm(dim=1, keepdim=True)) @ atoms().T
    assert found.match_F.tolist() == cosine.argmax(dim=1).tolist()
    np.testing.assert_allclose(found.cosine_F, cosine.max(dim=1).values.numpy(), atol=1e-6)


def test_a_latent_that_never_fires_is_no_counterpart() -> None:
    alive = ALIVE.copy()
    alive[5] = False
    found = counterparts(atoms()[5:6], atoms(), alive)
    assert found.match_F[0] != 5
    assert found.cosine_F[0] < MIN_COSINE
    with pytest.raises(NumericalError, match="no latent of the second SAE fires"):
        counterparts(atoms(), atoms(), np.zeros(64, dtype=np.bool_))


def test_a_direction_that_is_not_finite_is_an_error() -> None:
    rows = atoms()
    rows[3, 2] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        counterparts(rows, atoms(), ALIVE)


def test_random_directions_crowd_where_the_dictionary_is_narrow() -> None:
    wide = crowding(atoms(), ALIVE, torch.Generator().manual_seed(0), n=1500)
    narrow = atoms()
    narrow[:, 3:] *= 0.05  # nearly all in three dimensions
    crowded = crowding(narrow, ALIVE, torch.Generator().manual_seed(0), n=1500)
    assert len(wide) == len(crowded) == 1500
    assert wide.mean() < 0.65
    assert crowded.mean() > 0.9


def test_found_again_needs_nearness_a_discovery_and_the_sign() -> None:
    matched = Counterparts(np.array([0, 0, 0, 1, 2]), np.array([0.9, 0.69, 0.7, 0.9, 0.9]))
    other = ScopeDiscoveries(
        np.array([True, True, True, False]), np.array([True, True, False, False]), np.array([0.2, -0.3, 0.4, 0.5])
    )
    found = found_again(np.array([0.5, 0.5, 0.5, 0.5, 0.5]), matched, other)
    assert found.found_F.tolist() == [True, False, True, False, False]  # far; near enough; other sign; no discovery
    np.testing.assert_allclose(found.by_chance_F, [1 / 3, 0, 1 / 3, 1 / 3, 1 / 3])
    turned = found_again(np.array([-0.5, -0.5, -0.5, -0.5, -0.5]), matched, other)
    assert turned.found_F.tolist() == [False, False, False, True, False]


def test_by_chance_is_what_counterparts_drawn_at_random_give() -> None:
    rng = np.random.default_rng(0)
    tested, salience = rng.random(400) < 0.8, rng.normal(size=400)
    other = ScopeDiscoveries(tested, tested & (rng.random(400) < 0.4), salience)
    own, cosine = rng.normal(size=150), rng.uniform(0.4, 1, 150)
    expected = found_again(own, Counterparts(np.zeros(150, dtype=np.int64), cosine), other).by_chance_F.mean()
    drawn = [
        found_again(own, Counterparts(rng.choice(np.flatnonzero(tested), 150), cosine), other).found_F.mean() for _ in range(2000)
    ]
    assert abs(np.mean(drawn) - expected) < 4 * np.std(drawn) / np.sqrt(2000)
