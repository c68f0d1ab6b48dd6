"""Reward recovered, on a reward model small enough to know the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.reward_recovered import ResidualPair, RewardRecovered, Unmeasured, reward_recovered
from safer_engine.science.sae import Normalisation, Sae, SaeShape

D, N_PAIRS = 6, 40
READS = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, 3.0])


def identity_sae(gain: float = 1.0) -> Sae:
    """Reconstructs x exactly times `gain`: a latent for each direction and its opposite."""
    both_ways = torch.cat([torch.eye(D), -torch.eye(D)])
    shape = SaeShape("topk", D, 2 * D, D, True, Normalisation("scalar"))
    return Sae(shape, both_ways.T.contiguous(), torch.zeros(2 * D), both_ways * gain, torch.zeros(D))


def sequences() -> list[ResidualPair]:
    """Pairs of sequences; the head reads the last token, which is covered, and the first tokens are not."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(N_PAIRS):
        sides = []
        for _ in range(2):
            length = int(torch.randint(3, 9, (), generator=generator))
            h = torch.randn(length, D, generator=generator)
            covered = torch.arange(length) >= length - 2
            sides.append((h, torch.arange(length), covered))
        pairs.append(ResidualPair(*((sides[0][part], sides[1][part]) for part in range(3))))
    return pairs


def last_token(h_BTD: Tensor, mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """A head that reads the last token only."""
    assert mask_BT.shape == ids_BT.shape == h_BTD.shape[:2]
    return h_BTD[:, -1].double() @ READS.double()


def mean_token(h_BTD: Tensor, mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """A head that reads the mean of all tokens."""
    return h_BTD.double().mean(1) @ READS.double()


def measured(sae: Sae, head: object = last_token) -> RewardRecovered:
    found = reward_recovered(sequences, sae, head)  # type: ignore[arg-type]
    assert isinstance(found, RewardRecovered)
    return found


def margins(gain: float) -> np.ndarray:
    return np.array([gain * float((pair.h_TD[0][-1] - pair.h_TD[1][-1]) @ READS) for pair in sequences()])


def test_a_perfect_sae_recovers_everything() -> None:
    found = measured(identity_sae())
    for part in (found.covered, found.all):
        assert part.correlation == pytest.approx(1)
        assert part.preference_kept == 1
        assert part.margin_variance == pytest.approx(1)
    assert found.n_pairs == N_PAIRS


def test_half_the_size_recovers_three_quarters_of_the_variance() -> None:
    """m̂ = m/2 and the ablated margin is 0: 1 − Σ(m/2)² / Σm² = 3/4; order and signs are kept."""
    found = measured(identity_sae(0.5)).covered
    assert found.margin_variance == pytest.approx(0.75, rel=1e-5)
    assert (found.preference_kept, found.correlation) == (1.0, pytest.approx(1.0))
    spread = margins(1.0)
    assert found.ablated_margin_change == pytest.approx(
        float((spread**2).sum() / ((spread - spread.mean()) ** 2).sum()), rel=1e-5
    )


def test_the_mean_recovers_nothing() -> None:
    covered = torch.cat([h[c] for pair in sequences() for h, c in zip(pair.h_TD, pair.covered_T, strict=True)])
    mute = dataclasses.replace(identity_sae(), b_enc_S=torch.full((2 * D,), -1e3), b_dec_D=covered.mean(0))
    found = measured(mute).covered
    assert found.margin_variance == pytest.approx(0, abs=1e-5)
    assert found.correlation == 0
    assert found.preference_kept == found.ablated_preference_kept == 0, "a margin of zero keeps no preference"


def test_reversed_reconstruction_is_worse_than_the_mean() -> None:
    found = measured(identity_sae(-1.0)).covered
    assert found.margin_variance == pytest.approx(-3, rel=1e-5)
    assert (found.preference_kept, found.correlation) == (0.0, pytest.approx(-1.0))


def test_covered_and_all_replace_different_positions() -> None:
    """A head that reads every token: the covered measure leaves what is not covered untouched."""
    found = measured(identity_sae(0.5), mean_token)
    assert found.covered.margin_variance != pytest.approx(found.all.margin_variance, abs=1e-3)
    assert found.all.correlation == pytest.approx(1.0)
    assert found.covered.correlation < 1.0
    assert found.all.margin_variance == pytest.approx(0.75, rel=1e-5)


def test_why_it_could_not_be_measured() -> None:
    nothing = reward_recovered(lambda: iter(()), identity_sae(), last_token)
    assert isinstance(nothing, Unmeasured)
    assert "residual" in nothing.reason
    flat = reward_recovered(sequences, identity_sae(), lambda h, mask, ids: torch.zeros(len(h)))
    assert isinstance(flat, Unmeasured)
    assert "all the same" in flat.reason
    untouched = reward_recovered(sequences, identity_sae(), first_id)
    assert isinstance(untouched, Unmeasured)
    assert "nothing to recover" in untouched.reason


def first_id(h_BTD: Tensor, mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Rewards that do not depend on the activations at all, but on the length."""
    return mask_BT.sum(1).double()


def test_non_finite_rewards_raise() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        reward_recovered(sequences, identity_sae(), lambda h, mask, ids: h[:, -1, 0] / 0)


def test_pairs_are_streamed() -> None:
    """The pairs are opened twice and read one at a time."""
    opened = []

    def open_pairs() -> Iterator[ResidualPair]:
        opened.append(True)
        yield from sequences()

    assert isinstance(reward_recovered(open_pairs, identity_sae(), last_token), RewardRecovered)
    assert len(opened) == 2
