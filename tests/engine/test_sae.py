"""Encoding, decoding, scaling and the file form of an SAE, against dense textbook forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.science.sae import Normalisation, Sae, SaeShape, SparseActs, normalise, scalar_scale
from safer_engine.science.topk import above, batch_top_k, block_rows, joined, largest, top_k

D, S, K, B = 12, 64, 5, 40


def make_sae(seed: int = 0, threshold: float | None = None, **changes: Any) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    kind = "topk" if threshold is None else "batch_topk"
    shape = dataclasses.replace(SaeShape(kind, D, S, K, True, Normalisation("scalar", 0.7)), **changes)
    draw = [torch.randn(*size, generator=generator) for size in ((D, S), (S,), (S, D), (D,))]
    return Sae(shape, draw[0] / D**0.5, 0.1 * draw[1], draw[2] / D**0.5, draw[3], threshold)


def positions(seed: int = 1, n: int = B) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def dense_acts(sae: Sae, x: Tensor) -> Tensor:
    """Activations as the formula says, in float64."""
    scaled = sae.normalise(x).x_BD.double()
    pre = (scaled - sae.b_dec_D.double()) @ sae.W_enc_DS.double() + sae.b_enc_S.double()
    if sae.threshold is not None:
        return pre * (pre > sae.threshold)
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(sae.shape.k).indices, 1.0)
    return (pre * kept).clamp(min=0) if sae.shape.relu else pre * kept


@pytest.mark.parametrize("sae", [make_sae(), make_sae(relu=False), make_sae(threshold=0.8), make_sae(relu=False, k=S)])
def test_encode_and_decode_equal_the_dense_formula(sae: Sae) -> None:
    x = positions()
    acts = sae.encode(x)
    expected = dense_acts(sae, x)
    torch.testing.assert_close(acts.dense(S).double(), expected, rtol=1e-5, atol=1e-6)
    decoded = expected @ sae.W_dec_SD.double() + sae.b_dec_D.double()
    torch.testing.assert_close(sae.decode(acts).double(), decoded, rtol=1e-5, atol=1e-5)
    scale = sae.shape.normalisation.scale
    torch.testing.assert_close(sae.reconstruct(x).double(), decoded / scale, rtol=1e-5, atol=1e-5)


def test_negative_values_reconstruct_but_are_no_activations() -> None:
    sae = make_sae(relu=False, k=S)
    acts = sae.encode(positions())
    assert bool((acts.values_BK < 0).any())
    assert float(acts.positive_BK.min()) == 0
    assert torch.equal(acts.positive_BK, torch.where(acts.values_BK > 0, acts.values_BK, 0.0))


def test_threshold_makes_positions_independent_of_their_batch() -> None:
    sae = make_sae(threshold=0.8)
    x = positions()
    together = sae.encode(x).dense(S)
    alone = torch.cat([sae.encode(x[row : row + 1]).dense(S) for row in range(B)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert len({int(n) for n in (together > 0).sum(1)}) > 1, "L0 varies"


def test_rows_without_any_activation() -> None:
    sae = make_sae(threshold=1e6)
    acts = sae.encode(positions())
    assert acts.values_BK.shape == (B, 0)
    torch.testing.assert_close(sae.decode(acts), sae.b_dec_D.expand(B, D))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for sae in (make_sae(), make_sae(threshold=0.8)):
        whole = sae.encode(positions()).dense(S)
        with monkeypatch.context() as patch:
            patch.setattr("safer_engine.science.sae.block_rows", lambda n_columns, device: 3)
            torch.testing.assert_close(sae.encode(positions()).dense(S), whole, rtol=1e-5, atol=1e-6)


def test_layernorm_is_per_position_with_unbiased_deviation() -> None:
    x = positions()
    scaled = normalise(x, Normalisation("layernorm", eps=1e-6))
    expected = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, unbiased=True) + 1e-6)
    torch.testing.assert_close(scaled.x_BD, expected)
    torch.testing.assert_close(scaled.undo(scaled.x_BD), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.scale_B1, x.std(1, keepdim=True) + 1e-6)


def test_scalar_scale_gives_mean_square_d_in() -> None:
    x = positions(n=500)
    scale = scalar_scale(float(x.double().square().sum()), len(x), D)
    scaled = normalise(x, Normalisation("scalar", scale))
    assert float(scaled.x_BD.square().sum(1).mean()) == pytest.approx(D, rel=1e-5)
    torch.testing.assert_close(scaled.undo(scaled.x_BD), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("total", "n"), [(0.0, 3), (float("nan"), 3), (1.0, 0)])
def test_scalar_scale_refuses_what_has_no_size(total: float, n: int) -> None:
    with pytest.raises(NumericalError):
        scalar_scale(total, n, D)


def test_non_finite_input_raises() -> None:
    x = positions()
    for value in ("inf", "-inf", "nan"):
        x[3, 4] = float(value)
        with pytest.raises(NumericalError, match="not finite"):
            make_sae().encode(x)


def test_bfloat16_input_is_computed_in_float32() -> None:
    acts = make_sae().encode(positions().bfloat16())
    assert acts.values_BK.dtype == torch.float32
    torch.testing.assert_close(acts.dense(S), make_sae().encode(positions().bfloat16().float()).dense(S))


@pytest.mark.parametrize("sae", [make_sae(), make_sae(threshold=0.8)])
def test_folded_weights_compute_the_same(sae: Sae) -> None:
    folded = sae.folded()
    assert folded.shape.normalisation.scale == 1.0
    x = positions()
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.encode(x).dense(S), sae.encode(x).dense(S), rtol=1e-5, atol=1e-5)


def test_layernorm_cannot_be_folded() -> None:
    with pytest.raises(ArtifactError, match="LayerNorm"):
        make_sae(normalisation=Normalisation("layernorm")).folded()


@pytest.mark.parametrize("sae", [make_sae(), make_sae(threshold=0.8), make_sae(normalisation=Normalisation("layernorm"))])
def test_tensors_and_facts_restore_the_sae(sae: Sae) -> None:
    back = Sae.restore(sae.tensors(), sae.facts())
    assert back.shape == sae.shape
    x = positions()
    assert torch.equal(back.reconstruct(x), sae.reconstruct(x))
    assert sorted(sae.tensors()) == sorted(["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if sae.threshold else [])])


def test_restore_refuses_what_does_not_fit() -> None:
    sae = make_sae()
    with pytest.raises(ArtifactError, match="W_enc_DS"):
        Sae.restore({**sae.tensors(), "W_enc": torch.zeros(3, 3)}, sae.facts())
    with pytest.raises(ArtifactError, match="not an SAE"):
        Sae.restore({"W_enc": torch.zeros(3)}, sae.facts())
    with pytest.raises(ArtifactError, match="not an SAE"):
        Sae.restore(sae.tensors(), {**sae.facts(), "colour": "red"})
    with pytest.raises(ArtifactError, match="threshold"):
        Sae.restore({**sae.tensors(), "threshold": torch.tensor(1.0)}, sae.facts())
    with pytest.raises(ArtifactError, match="k = 99"):
        Sae.restore(sae.tensors(), {**sae.facts(), "k": 99})
    with pytest.raises(NumericalError):
        Sae.restore({**sae.tensors(), "b_dec": torch.full((D,), float("nan"))}, sae.facts())


def test_dense_adds_nothing_for_padding() -> None:
    acts = SparseActs(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[0, 0], [0, 2]]))
    assert acts.dense(3).tolist() == [[2.0, 0.0, 0.0], [1.0, 0.0, 3.0]]


@pytest.mark.parametrize(("width", "k"), [(4096, 32), (2048, 200), (1024, 128), (1000, 7), (512, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_is_exact(width: int, k: int, dtype: torch.dtype) -> None:
    pre = torch.randn(33, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    found = top_k(pre, k)
    assert torch.equal(found.values_BK.sort(1, descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, found.columns_BK), found.values_BK)
    assert all(len(set(row)) == k for row in found.columns_BK.tolist())


def test_top_k_with_all_the_largest_in_one_group() -> None:
    pre = torch.zeros(2, 2048)
    pre[:, 5::256] = torch.arange(1.0, 9.0)
    assert sorted(top_k(pre, 8).columns_BK[0].tolist()) == list(range(5, 2048, 256))


def test_batch_top_k_is_exact() -> None:
    pre = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    found = batch_top_k(pre, 64 * 4)
    flat = torch.zeros(64 * 96).scatter_(0, pre.flatten().topk(64 * 4).indices, 1.0).view_as(pre).bool()
    dense = torch.zeros_like(flat)
    dense[found.rows_N, found.columns_N] = True
    assert torch.equal(dense, flat)
    assert torch.equal(found.values_N, pre[found.rows_N, found.columns_N])


def test_batch_top_k_takes_only_positive_entries() -> None:
    pre = -torch.ones(4, 10)
    pre[1, 3] = 2.0
    found = batch_top_k(pre, 20)
    assert (found.rows_N.tolist(), found.columns_N.tolist()) == ([1], [3])
    assert found.offsets_B1.tolist() == [0, 0, 1, 1, 1]
    assert len(batch_top_k(-torch.ones(4, 10), 20).columns_N) == 0


def test_batch_top_k_with_ties_takes_exactly_as_many() -> None:
    assert len(batch_top_k(torch.ones(8, 100), 24).columns_N) == 24


def test_batch_top_k_refuses_infinity() -> None:
    with pytest.raises(NumericalError):
        batch_top_k(torch.full((2, 3), float("inf")), 2)
    with pytest.raises(NumericalError):
        batch_top_k(torch.full((2, 3), float("nan")), 2)


def test_above_lists_entries_row_by_row() -> None:
    found = above(torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 2.0]]), 1.5)
    assert found.values_N.tolist() == [3.0, 5.0, 2.0]
    assert found.rows_N.tolist() == [0, 2, 2]
    assert found.columns_N.tolist() == [1, 0, 1]


@pytest.mark.parametrize("width", [96, 2048])
def test_batch_top_k_of_wide_and_narrow_rows(width: int) -> None:
    pre = torch.randn(32, width, generator=torch.Generator().manual_seed(3))
    found = batch_top_k(pre, 192)
    assert found.rows_N.tolist() == sorted(found.rows_N.tolist())
    assert torch.equal(pre[found.rows_N, found.columns_N], found.values_N)
    assert torch.equal(found.values_N.sort().values, pre.flatten().topk(192).values.sort().values)
    assert len(set(zip(found.rows_N.tolist(), found.columns_N.tolist(), strict=True))) == 192


def test_blocks_joined_are_the_whole() -> None:
    pre = torch.randn(32, 96, generator=torch.Generator().manual_seed(3))
    whole, parts = above(pre, 1.2), joined([above(block, 1.2) for block in pre.split(5)])
    for name in ("values_N", "columns_N", "offsets_B1", "rows_N"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert largest(whole, 10**6) is whole
    some = largest(whole, 7)
    assert torch.equal(some.values_N.sort().values, whole.values_N.sort().values[-7:])
    assert torch.equal(pre[some.rows_N, some.columns_N], some.values_N)


def test_blocks_have_a_sensible_size() -> None:
    assert block_rows(3072, torch.device("cpu")) == 682
    assert block_rows(10**6, torch.device("cpu")) == 256
    assert block_rows(16384, torch.device("cuda")) == 4096
