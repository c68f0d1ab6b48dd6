"""The sparse step against automatic differentiation of the dense form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from safer_engine.science.sae_gradients import StepSettings, Weights, step_gradients

B, D, S, K = 96, 24, 160, 6
TOPK = StepSettings(kind="topk", k=K, relu=True, loss="fvu", aux_k=12, aux_weight=1 / 32)


def random_weights(seed: int = 0, d_in: int = D, d_sae: int = S, dtype: torch.dtype = torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))
    ]
    return Weights(tensors[0] / d_in**0.5, tensors[1] * 0.1, tensors[2] / d_in**0.5, tensors[3] * 0.1)


def random_batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_loss(weights: Weights, x: Tensor, settings: StepSettings, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss as a textbook writes it: dense latents, dense decode."""
    pre = (x - weights.b_dec_D) @ weights.W_enc_SD.T + weights.b_enc_S
    if settings.kind == "topk":
        kept = torch.zeros_like(pre).scatter_(1, pre.topk(settings.k).indices, 1.0)
    else:
        flat = pre.clamp(min=0).flatten()
        kept = torch.zeros_like(flat).scatter_(0, flat.topk(settings.k * len(x)).indices, 1.0).view_as(pre)
    acts = pre * kept
    acts = acts.relu() if settings.relu else acts
    x_hat = acts @ weights.W_dec_SD + weights.b_dec_D
    if settings.loss == "fvu":
        loss = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    else:
        loss = ((x_hat - x).square().sum(1) / x.square().sum(1)).mean()
    if dead is None or not dead.any():
        return loss, torch.zeros(())
    residual = (x - x_hat).detach()
    dead_pre = pre[:, dead]
    top = dead_pre.topk(min(settings.aux_k, dead_pre.shape[1]))
    aux_acts = torch.zeros_like(dead_pre).scatter(1, top.indices, top.values)
    modelled = (aux_acts.relu() if settings.relu else aux_acts) @ weights.W_dec_SD[dead]
    return loss, (modelled - residual).square().sum() / (residual - residual.mean(0)).square().sum()


def dense_gradients(weights: Weights, x: Tensor, settings: StepSettings, dead: Tensor | None) -> tuple[Weights, Tensor, Tensor]:
    leaves = Weights(*(weight.clone().requires_grad_() for weight in weights))
    loss, aux = dense_loss(leaves, x, settings, dead)
    gradients = torch.autograd.grad(loss + settings.aux_weight * aux, list(leaves))
    return Weights(*gradients), loss.detach(), aux.detach()


def some_dead() -> Tensor:
    dead = torch.zeros(S, dtype=torch.bool)
    dead[::5] = True
    return dead


@pytest.mark.parametrize(("kind", "relu"), [("topk", True), ("batch_topk", True), ("topk", False)])
@pytest.mark.parametrize("loss", ["fvu", "nmse"])
@pytest.mark.parametrize("with_dead", [True, False])
def test_gradients_equal_dense_autograd(kind: str, relu: bool, loss: str, with_dead: bool) -> None:
    settings = dataclasses.replace(TOPK, kind=kind, loss=loss, relu=relu)
    dead = some_dead() if with_dead else None
    weights, x = random_weights(), random_batch()
    expected, expected_loss, expected_aux = dense_gradients(weights, x, settings, dead)
    outcome = step_gradients(weights, x, settings, dead)
    torch.testing.assert_close(outcome.loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(outcome.aux_loss, expected_aux.to(outcome.aux_loss), rtol=1e-12, atol=0)
    for ours, theirs in zip(outcome.gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_float32_gradients_are_within_1e_5_of_float64() -> None:
    exact, _, _ = dense_gradients(random_weights(), random_batch(), TOPK, some_dead())
    weights = Weights(*(weight.float() for weight in random_weights()))
    outcome = step_gradients(weights, random_batch().float(), TOPK, some_dead())
    for ours, theirs in zip(outcome.gradients, exact, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_negative_values_take_part_without_relu() -> None:
    """More latents than can be positive: top-k then keeps negative values, and they get gradients."""
    settings = dataclasses.replace(TOPK, relu=False, aux_k=0, k=S)
    weights, x = random_weights(), random_batch()
    outcome = step_gradients(weights, x, settings)
    expected, _, _ = dense_gradients(weights, x, settings, None)
    for ours, theirs in zip(outcome.gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    pre = (x - weights.b_dec_D) @ weights.W_enc_SD.T + weights.b_enc_S
    assert float(outcome.l0) == pytest.approx(float((pre > 0).sum(1).double().mean())), "only positives are counted"


def test_aux_loss_reaches_the_encoder_of_dead_latents() -> None:
    dead = some_dead()
    weights, x = random_weights(), random_batch()
    with_aux = step_gradients(weights, x, TOPK, dead).gradients
    without = step_gradients(weights, x, TOPK, None).gradients
    change = (with_aux.W_enc_SD - without.W_enc_SD).abs().sum(1)
    assert float(change[dead].sum()) > 0
    assert float(change[~dead].max()) == 0
    assert float((with_aux.W_dec_SD - without.W_dec_SD).abs().sum(1)[dead].sum()) > 0


def test_aux_loss_is_decoded_without_the_bias() -> None:
    """With dead directions of zero the modelled residual is zero, whatever the bias: the loss is Σr² / Σ(r − r̄)²."""
    weights, x, dead = random_weights(), random_batch(), some_dead()
    silent = Weights(weights.W_enc_SD, weights.b_enc_S, weights.W_dec_SD * ~dead[:, None], weights.b_dec_D * 50)
    outcome = step_gradients(silent, x, TOPK, dead)
    _, expected = dense_loss(silent, x, TOPK, dead)
    assert float(outcome.aux_loss) == pytest.approx(float(expected), rel=1e-12)


def test_bfloat16_chooses_and_float32_computes() -> None:
    """Values at the chosen latents are those of float32, although the choice is coarse."""
    weights = Weights(*(weight.float() for weight in random_weights()))
    x = random_batch().float()
    fine = step_gradients(weights, x, TOPK)
    coarse = step_gradients(weights, x, dataclasses.replace(TOPK, matmul=torch.bfloat16))
    pre = (x - weights.b_dec_D) @ weights.W_enc_SD.T + weights.b_enc_S
    assert float((pre - coarse.smallest).abs().min()) < 1e-6, "the value is that of float32, not the rounded one"
    assert float(coarse.loss) == pytest.approx(float(fine.loss), rel=1e-2)
    both = fine.fired_S & coarse.fired_S
    assert float(both.sum()) >= 0.98 * float(fine.fired_S.sum())


def test_fired_and_smallest() -> None:
    weights, x = random_weights(), random_batch()
    outcome = step_gradients(weights, x, TOPK)
    pre = (x - weights.b_dec_D) @ weights.W_enc_SD.T + weights.b_enc_S
    top = pre.topk(K)
    fired = torch.zeros(S, dtype=torch.bool)
    fired[top.indices[top.values > 0]] = True
    assert torch.equal(outcome.fired_S, fired)
    assert float(outcome.smallest) == pytest.approx(float(top.values[top.values > 0].min()), rel=1e-12)
    assert float(outcome.l0) == K


@pytest.mark.parametrize("guess", [None, 1e-3, 0.4, 1e3])
def test_batch_topk_does_not_depend_on_the_guess(guess: float | None) -> None:
    settings = dataclasses.replace(TOPK, kind="batch_topk")
    weights, x = random_weights(), random_batch()
    expected, expected_loss, _ = dense_gradients(weights, x, settings, None)
    outcome = step_gradients(weights, x, settings, None, guess)
    assert float(outcome.loss) == pytest.approx(float(expected_loss), rel=1e-12)
    torch.testing.assert_close(outcome.gradients.W_enc_SD, expected.W_enc_SD, rtol=1e-9, atol=1e-13)


def test_blocks_of_rows_do_not_change_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = random_weights(), random_batch()
    whole = step_gradients(weights, x, TOPK)
    monkeypatch.setattr("safer_engine.science.sae_gradients.block_rows", lambda n_columns, device: 7)
    parts = step_gradients(weights, x, TOPK)
    for ours, theirs in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
