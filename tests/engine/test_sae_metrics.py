"""Measures of an SAE against one-shot formulas and closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.sae import Normalisation, Sae, SaeShape
from safer_engine.science.sae_metrics import MetricsAccumulator, SaeMetrics, density_histogram

D, S, K = 8, 24, 3


def make_sae(normalisation: Normalisation, relu: bool = True) -> Sae:
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(S, D, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    shape = SaeShape("topk", D, S, K, relu, normalisation)
    return Sae(shape, directions.T.contiguous(), torch.zeros(S), directions, 0.2 * torch.randn(D, generator=generator))


def measure(sae: Sae, x: Tensor, pieces: int = 1) -> SaeMetrics:
    found = MetricsAccumulator(sae)
    for part in x.tensor_split(pieces):
        found.add(part)
    return found.metrics()


@pytest.mark.parametrize("normalisation", [Normalisation("scalar", 0.3), Normalisation("layernorm")])
@pytest.mark.parametrize("pieces", [1, 7])
def test_equal_to_the_formulas_in_one_go(normalisation: Normalisation, pieces: int) -> None:
    x = 4 * torch.randn(200, D, generator=torch.Generator().manual_seed(0)) + 100
    sae = make_sae(normalisation)
    found = measure(sae, x, pieces)
    raw, x_hat = x.double(), sae.reconstruct(x).double()
    fvu = (raw - x_hat).square().sum() / (raw - raw.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-6)
    scaled = sae.normalise(x)
    scaled_hat = sae.decode(sae.encode(x)).double()
    nmse = ((scaled_hat - scaled.x_BD.double()).square().sum(1) / scaled.x_BD.double().square().sum(1)).mean()
    assert found.nmse == pytest.approx(float(nmse), rel=1e-6)
    dense = sae.encode(x).dense(S) > 0
    assert found.l0 == pytest.approx(float(dense.sum(1).double().mean()))
    torch.testing.assert_close(found.density_S, dense.double().mean(0))
    assert found.silent_share == float((~dense.any(0)).double().mean())
    assert found.n_positions == 200


def test_closed_forms() -> None:
    """A perfect SAE has FVU 0; one that always says the mean has FVU 1."""
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1)).double().float()
    both_ways = torch.cat([torch.eye(D), -torch.eye(D)])
    shape = SaeShape("topk", D, 2 * D, D, True, Normalisation("scalar"))
    perfect = Sae(shape, both_ways.T.contiguous(), torch.zeros(2 * D), both_ways, torch.zeros(D))
    found = measure(perfect, x)
    assert found.fvu < 1e-12
    assert found.nmse < 1e-12
    assert found.l0 == D
    mute = dataclasses.replace(perfect, b_enc_S=torch.full((2 * D,), -1e3), b_dec_D=x.mean(0))
    nothing = measure(mute, x)
    assert nothing.fvu == pytest.approx(1.0, rel=1e-6)
    assert (nothing.l0, nothing.silent_share) == (0.0, 1.0)


def test_negative_values_do_not_count_as_firing() -> None:
    x = torch.randn(100, D, generator=torch.Generator().manual_seed(3))
    sae = dataclasses.replace(make_sae(Normalisation("scalar"), relu=False), b_enc_S=torch.full((S,), -1e3))
    found = measure(sae, x)
    assert (found.l0, found.silent_share) == (0.0, 1.0)
    assert found.fvu > 100, "but they take part in the reconstruction"


def test_far_mean_does_not_cost_digits() -> None:
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(4)) + 3000
    sae = make_sae(Normalisation("scalar"))
    mute = dataclasses.replace(sae, b_enc_S=torch.full((S,), -1e6), b_dec_D=x.double().mean(0).float())
    assert measure(mute, x, 3).fvu == pytest.approx(1.0, rel=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    sae = make_sae(Normalisation("scalar"))
    with pytest.raises(NumericalError, match="no held-out"):
        measure(sae, torch.zeros(0, D))
    with pytest.raises(NumericalError, match="variance"):
        measure(sae, torch.ones(5, D))
    with pytest.raises(NumericalError, match="zero"):
        measure(sae, torch.cat([torch.zeros(1, D), torch.ones(5, D)]))


def test_histogram_counts_every_latent_once() -> None:
    rates = torch.tensor([0.0, 1e-9, 1e-6, 0.5e-3, 1.0, 1.0, 0.0])
    found = density_histogram(rates, lowest=-6, bins=6)
    assert found.edges == (-6, -5, -4, -3, -2, -1, 0)
    assert found.counts == (2, 0, 1, 0, 0, 2)
    assert found.silent == 2
    assert sum(found.counts) + found.silent == len(rates)
