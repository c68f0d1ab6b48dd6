"""The null benchmark plants what it says: single latents anywhere, or whole blocks whose latents really fire together."""

from __future__ import annotations

import numpy as np

from benchmarks.null import BLOCK, Data, generated, planted_latents, sides_of


def sums(data: Data) -> np.ndarray:
    """Sums of the chosen side, pairs × latents."""
    side = sides_of(data.acts)[0]
    dense = np.zeros((len(data.groups_P), data.acts.d_sae))
    dense[np.repeat(np.arange(len(dense)), np.diff(side.indptr)), side.indices] = side.sums
    return dense


def test_planted_blocks_are_whole_and_their_latents_fire_together() -> None:
    data = generated(300, 40 * BLOCK, 0)
    chosen_S = planted_latents(data.acts.d_sae, np.random.default_rng(0), blocks=True)
    by_block = chosen_S.reshape(-1, BLOCK)
    assert by_block.any(axis=1).sum() == 2
    assert (by_block.any(axis=1) == by_block.all(axis=1)).all()
    fires = sums(data) > 0
    often = fires.mean(axis=0) > 0.05
    correlation = np.corrcoef(fires[:, often].T)
    block_S = np.nonzero(often)[0] // BLOCK
    same = (block_S[:, None] == block_S) & ~np.eye(len(block_S), dtype=bool)
    assert correlation[same].mean() > 0.1
    assert abs(correlation[block_S[:, None] != block_S].mean()) < 0.02


def test_single_latents_are_spread_over_blocks() -> None:
    chosen_S = planted_latents(40 * BLOCK, np.random.default_rng(0), blocks=False)
    assert 15 < chosen_S.sum() < 50
    assert chosen_S.reshape(-1, BLOCK).all(axis=1).sum() == 0
    assert chosen_S.reshape(-1, BLOCK).any(axis=1).sum() > 10
