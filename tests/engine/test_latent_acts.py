from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science import latent_acts
from safer_engine.science.latent_acts import (
    FlagBits,
    ShardActs,
    ShardRows,
    add_totals,
    counted_positions,
    one_side,
    summarise_shard,
)
from safer_engine.science.sae import SparseActs

BITS = FlagBits(special=1, high_norm=2, head=4, sentence_end=8)
D_SAE = 13


def identity_encode(x_BD: Tensor) -> SparseActs:
    """The four largest entries of each row as latents, negative ones too."""
    top = x_BD.float().topk(4, dim=1)
    return SparseActs(top.values, top.indices)


def make_rows(seed: int = 0, first_pair: int = 3, n_pairs: int = 6) -> ShardRows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 2 * n_pairs)
    response = np.repeat(np.arange(2 * n_pairs), lengths) + 2 * first_pair
    position = np.concatenate([np.sort(rng.choice(50, length, replace=False)) for length in lengths])
    x = torch.from_numpy(rng.normal(size=(len(response), D_SAE)).astype(np.float32))
    return ShardRows(x, response, position.astype(np.int32), rng.random(len(response)) < 0.8)


def dense(rows: ShardRows) -> np.ndarray:
    """Positive activations [B, S] of the counted positions, zero elsewhere."""
    z = identity_encode(rows.x_BD).dense(D_SAE).numpy().astype(np.float64)
    return np.where(rows.counted_B[:, None], np.maximum(z, 0), 0)


def row_sums(shard: ShardActs) -> np.ndarray:
    full = np.zeros((len(shard.positions_R), D_SAE))
    for row in range(len(full)):
        part = slice(shard.indptr_R1[row], shard.indptr_R1[row + 1])
        full[row, shard.latents_N[part]] = shard.sums_N[part]
    return full


@pytest.mark.parametrize("cells", [1, 40, 1 << 22])
def test_sums_counts_and_totals_are_those_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(latent_acts, "_BLOCK_CELLS", cells)
    rows = make_rows()
    shard, z = summarise_shard(rows, identity_encode, D_SAE), dense(rows)
    for row in range(12):
        mine = rows.response_B == row + 6
        np.testing.assert_allclose(row_sums(shard)[row], z[mine].sum(axis=0), rtol=1e-6)
        assert shard.positions_R[row] == rows.counted_B[mine].sum()
        part = slice(shard.indptr_R1[row], shard.indptr_R1[row + 1])
        assert (np.diff(shard.latents_N[part]) > 0).all()
    assert (shard.sums_N > 0).all()
    np.testing.assert_array_equal(shard.totals.firings_S, (z > 0).sum(axis=0))
    np.testing.assert_allclose(shard.totals.energy_S, (z**2).sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(shard.totals.responses_S, (row_sums(shard) > 0).sum(axis=0))
    assert shard.totals.n_positions == rows.counted_B.sum()


def test_peaks_are_the_largest_activation_and_its_first_position() -> None:
    rows = make_rows(1)
    rows = replace(rows, x_BD=(rows.x_BD * 2).round() / 2)  # many ties
    shard, z = summarise_shard(rows, identity_encode, D_SAE), dense(rows)
    assert (shard.responses_N[:-1] <= shard.responses_N[1:]).all()
    for response, latent, peak, position in zip(
        shard.responses_N, shard.latents_N, shard.peaks_N, shard.peak_positions_N, strict=True
    ):
        mine = np.flatnonzero(rows.response_B == response)
        assert peak == z[mine, latent].max()
        assert position == rows.position_B[mine[z[mine, latent].argmax()]]


def test_sides_take_apart_what_was_summed() -> None:
    shard = summarise_shard(make_rows(2), identity_encode, D_SAE)
    for side in (0, 1):
        part, expected = one_side(shard, side), row_sums(shard)[side::2]
        for pair in range(6):
            entries = slice(part.indptr[pair], part.indptr[pair + 1])
            full = np.zeros(D_SAE)
            full[part.indices[entries]] = part.sums[entries]
            np.testing.assert_array_equal(full, expected[pair])


def test_totals_of_shards_add_up() -> None:
    shards = [summarise_shard(make_rows(seed), identity_encode, D_SAE) for seed in (0, 1, 2)]
    total = add_totals([shard.totals for shard in shards])
    assert total.n_positions == sum(shard.totals.n_positions for shard in shards)
    np.testing.assert_array_equal(total.firings_S, sum(shard.totals.firings_S for shard in shards))


def test_a_shard_without_counted_positions_is_empty_rows() -> None:
    rows = make_rows()
    rows = replace(rows, counted_B=np.zeros_like(rows.counted_B))
    shard = summarise_shard(rows, identity_encode, D_SAE)
    assert len(shard.latents_N) == 0
    assert shard.positions_R.tolist() == [0] * 12
    assert shard.indptr_R1.tolist() == [0] * 13


def test_disorder_and_emptiness_are_refused() -> None:
    rows = make_rows()
    with pytest.raises(NumericalError, match="order of pairs"):
        replace(rows, response_B=rows.response_B[::-1].copy())
    with pytest.raises(NumericalError, match="no position"):
        ShardRows(rows.x_BD[:0], rows.response_B[:0], rows.position_B[:0], rows.counted_B[:0])


def test_a_non_finite_activation_is_refused() -> None:
    def broken(x_BD: Tensor) -> SparseActs:
        acts = identity_encode(x_BD)
        return SparseActs(acts.values_BK * float("inf"), acts.indices_BK)

    with pytest.raises(NumericalError, match="not finite"):
        summarise_shard(make_rows(), broken, D_SAE)


@pytest.mark.parametrize(
    ("estimator", "positions", "expected"),
    [
        ("paired_mean", "all", [1, 0, 0, 1, 1, 1]),
        ("paired_mean", "sentence_ends", [1, 0, 0, 1, 1, 1]),
        ("paper", "all", [1, 1, 1, 1, 1, 1]),
        ("paper", "sentence_ends", [0, 0, 0, 0, 0, 1]),
    ],
)
def test_which_positions_count(estimator: str, positions: str, expected: list[int]) -> None:
    flags = np.array([0, 1, 2, 4, 1 | 2 | 4, 8], dtype=np.uint8)
    assert counted_positions(flags, BITS, estimator, positions).tolist() == [bool(value) for value in expected]  # type: ignore[arg-type]
