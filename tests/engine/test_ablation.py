"""Ablation of latents with planted effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.science.ablation import Edit, direct_attribution, edited, reward_changes, sequence_of
from safer_engine.science.causal_stats import (
    against_controls,
    agreement,
    nearest_controls,
    rank_correlation,
)
from safer_engine.science.hooks import residual, rewards, upper_blocks
from safer_engine.science.sae import Normalisation, Sae, SaeShape
from tests.helpers.tiny_model import DECODERS, ENCODERS, load_tiny, token_sequences

SCALINGS = [Normalisation("scalar", 0.5), Normalisation("layernorm")]


def planted(d_in: int, normalisation: Normalisation, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(3 * d_in, d_in, generator=generator), dim=1)
    shape = SaeShape("topk", d_in, 3 * d_in, 4, True, normalisation)
    return Sae(shape, directions.T.contiguous(), torch.zeros(3 * d_in), directions, torch.zeros(d_in))


@pytest.mark.parametrize("normalisation", SCALINGS, ids=lambda n: n.kind)
def test_a_linear_head_gives_the_planted_effect(normalisation: Normalisation) -> None:
    """The head reads Σ_p w · x_p, so that ablating i changes it by −Σ_p c_p z_{p,i} w · d_i, worked out here by hand."""
    generator = torch.Generator().manual_seed(1)
    h_TD, reads_D = torch.randn(9, 6, generator=generator), torch.randn(6, generator=generator)
    covered_T = torch.arange(9) >= 3
    sae = planted(6, normalisation)
    head = lambda h, _mask, _ids: h.double().sum(1) @ reads_D.double()  # noqa: E731
    stream = sequence_of(sae, h_TD, torch.arange(9), covered_T)
    latents = [*sorted(stream.latents), *sorted(set(range(18)) - stream.latents)[:1]]
    found = reward_changes([stream], sae, [[Edit((i,), factor) for factor in (0.0, 2.0) for i in latents]], head, 64)[0]
    mean_T1, std_T1 = h_TD.mean(1, keepdim=True), h_TD.std(1, keepdim=True) + 1e-6
    scaled_TD = h_TD * 0.5 if normalisation.kind == "scalar" else (h_TD - mean_T1) / std_T1
    c_T = torch.full((9,), 2.0) if normalisation.kind == "scalar" else std_T1[:, 0]
    z_TS = scaled_TD @ sae.W_enc_DS
    z_TS = torch.where(z_TS >= z_TS.topk(4, dim=1).values[:, -1:], z_TS, 0).clamp(min=0) * covered_T[:, None]
    known_S = -((c_T[:, None] * z_TS).sum(0) * (sae.W_dec_SD @ reads_D)).double()
    torch.testing.assert_close(found.change_E[: len(latents)], known_S[latents], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.change_E[len(latents) :], -known_S[latents], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(direct_attribution(stream, sae, head), known_S, rtol=1e-4, atol=1e-5)
    assert found.change_E[len(latents) - 1] == 0
    offset = reward_changes([stream], sae, [[Edit((latents[-1],), 0.0, 0.3)]], head, 64)[0].change_E
    by_hand = 0.3 * float(c_T[covered_T].sum()) * float(sae.W_dec_SD[latents[-1]] @ reads_D)
    assert float(offset[0]) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("arch", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("normalisation", SCALINGS, ids=lambda n: n.kind)
def test_upper_blocks_alone_are_the_whole_model_with_the_edit_in_it(arch: str, normalisation: Normalisation) -> None:
    rm = load_tiny(arch)
    ids_T = torch.from_numpy(token_sequences(arch)[0].astype("int64"))
    layer = max(1, rm.info.n_blocks - 1)
    with torch.no_grad():
        h_TD = residual(rm, layer, ids_T[None])[0]
        whole = float(rewards(rm, ids_T[None])[0])
    sae = planted(rm.info.d_in, normalisation)
    above = upper_blocks(rm, layer)
    stream = sequence_of(sae, h_TD, ids_T, torch.arange(len(ids_T)) >= len(ids_T) // 2)
    latents = sorted(stream.latents)[:3]
    found = reward_changes([stream], sae, [[Edit((i,)) for i in latents]], above, 10_000)[0]
    assert found.reward == pytest.approx(whole, abs=1e-5)
    for latent, change in zip(latents, found.change_E.tolist(), strict=True):
        assert change == pytest.approx(_full(rm, layer, ids_T, edited(stream, sae, Edit((latent,)))) - whole, abs=1e-4)


def _full(rm: object, layer: int, ids_T: Tensor, h_TD: Tensor) -> float:
    from safer_engine.science.hooks import replace_residual
    from safer_engine.science.reward_model import RewardModel

    assert isinstance(rm, RewardModel)
    with torch.no_grad(), replace_residual(rm, layer, h_TD[None]):
        return float(rewards(rm, ids_T[None])[0])


def test_small_batches_change_nothing_and_silent_latents_are_not_run() -> None:
    sae = planted(6, SCALINGS[0])
    h_TD = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    stream = sequence_of(sae, h_TD, torch.arange(8), torch.ones(8, dtype=torch.bool))
    head = lambda h, _mask, _ids: (h.double() ** 3).sum((1, 2))  # noqa: E731
    edits = [Edit((i,)) for i in range(18)]
    one, many = (reward_changes([stream], sae, [edits], head, tokens)[0] for tokens in (1, 10_000))
    torch.testing.assert_close(one.change_E, many.change_E, rtol=1e-12, atol=1e-12)
    assert many.runs == 1 + len(stream.latents) < 19
    assert one.runs == 2 * len(stream.latents)


def test_sequences_share_batches_and_keep_their_own_effects() -> None:
    sae = planted(6, SCALINGS[0])
    generator = torch.Generator().manual_seed(3)
    lengths = (8, 5, 8, 8, 5)
    streams = [
        sequence_of(sae, torch.randn(n, 6, generator=generator), torch.arange(n), torch.ones(n, dtype=torch.bool))
        for n in lengths
    ]
    seen: list[tuple[int, ...]] = []

    def head(h_BTD: Tensor, _mask: Tensor, ids_BT: Tensor) -> Tensor:
        seen.append(tuple(ids_BT.shape))
        return (h_BTD.double() ** 3).sum((1, 2))

    edits = [[Edit((i,)) for i in range(number, 18)] + [Edit((0, 1, 2), 2.0)] for number in range(5)]
    together = reward_changes(streams, sae, edits, head, 160)
    assert all(rows * length <= 160 for rows, length in seen)
    assert len(seen) < 2 * len(streams)
    for stream, own, found in zip(streams, edits, together, strict=True):
        alone = reward_changes([stream], sae, [own], head, 10_000)[0]
        torch.testing.assert_close(found.change_E, alone.change_E, rtol=1e-12, atol=1e-12)
        assert found.reward == alone.reward


def test_a_planted_effect_stands_out_of_its_controls() -> None:
    rng = np.random.default_rng(0)
    rate, energy = rng.uniform(0.01, 0.2, 600), rng.uniform(1, 50, 600)
    first = rng.normal(size=600) * 0.01
    features = list(range(30))
    first[0] = 1.0
    near = nearest_controls(rate, energy, features, list(range(30, 600)), 40)
    assert near.shape == (30, 40)
    assert near.min() >= 30
    agreed = agreement(2 * first[:40], first[:40])
    assert agreed.rho == pytest.approx(1)
    assert agreed.slope == pytest.approx(2)
    null = against_controls(2 * first[:30], near, first, agreed)
    assert (null.pooled, null.reason) == (1200, "")
    assert null.adjusted_F[0] <= 0.05
    assert (null.adjusted_F[1:] <= 0.05).sum() == 0
    assert null.p_F[0] == pytest.approx(1 / 1201)


def test_too_few_controls_or_no_agreement_give_no_p() -> None:
    first = np.random.default_rng(1).normal(size=50)
    near = nearest_controls(np.ones(50), np.ones(50), [0, 1], list(range(2, 50)), 32)
    few = against_controls(first[:2], near, first, agreement(first, first))
    assert np.isnan(few.p_F).all()
    assert "fewer than 1000" in few.reason
    many = np.tile(near, (16, 1))
    unlike = against_controls(first[:32], many, first, agreement(np.random.default_rng(2).normal(size=50), first))
    assert np.isnan(unlike.p_F).all()
    assert "do not agree" in unlike.reason


def test_rank_correlation_and_its_interval() -> None:
    a = np.arange(20.0)
    found = rank_correlation(a, a**3, 200, np.random.default_rng(0))
    assert found is not None
    assert found.rho == pytest.approx(1)
    assert found.lo == pytest.approx(1)
    assert rank_correlation(a, np.ones(20), 200, np.random.default_rng(0)) is None
