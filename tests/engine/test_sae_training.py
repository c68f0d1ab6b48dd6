"""Training: planted dictionaries found, exact resume, schedule, initialisation, dead latents, failures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from safer_engine.errors import ArtifactError, NumericalError, SpecError
from safer_engine.science.sae import Normalisation, scalar_scale
from safer_engine.science.sae_budget import TrainingSize, default_lr, training_size
from safer_engine.science.sae_training import (
    Batches,
    TrainingParams,
    TrainingProgress,
    TrainingState,
    geometric_median,
    initial_state,
    plan_training,
    state_from,
    train,
)
from safer_engine.spec import PAPER_PRESET, BatchTopKSpec, TopKSpec
from tests.helpers.planted import Planted, planted_dictionary, recovered_share

D, S = 16, 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(n: int = 600, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 2


def batches_of(x: Tensor, batch: int) -> Batches:
    """Batch n is a function of n alone."""

    def open_at(first: int) -> Iterator[Tensor]:
        number = first
        while True:
            rows = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(number))
            yield x[rows]
            number += 1

    return open_at


def params_for(x: Tensor, kind: str = "topk", **changes: Any) -> TrainingParams:
    spec_type = TopKSpec if kind == "topk" else BatchTopKSpec
    settings = {"d_sae": S, "k": 4, "batch": 64, "min_steps": 30, "max_steps": 30, "dead_after": 500, **changes}
    normalisation = Normalisation("scalar", scalar_scale(float(x.square().sum()), len(x), D))
    return plan_training(spec_type(**settings), normalisation, D, len(x), "cpu")


def fresh(params: TrainingParams, x: Tensor, seed: int = 0) -> TrainingState:
    return initial_state(params, x[:256], torch.Generator().manual_seed(seed))


def trained(params: TrainingParams, x: Tensor) -> tuple[TrainingState, list[TrainingProgress]]:
    state = fresh(params, x)
    return state, list(train(params, state, batches_of(x, params.batch)))


def fit_planted(kind: str, n: int = 60_000, steps: int = 900) -> tuple[Planted, TrainingState, float]:
    planted = planted_dictionary(n, seed=0)
    spec_type = TopKSpec if kind == "topk" else BatchTopKSpec
    k = round(float((planted.acts_BS > 0).float().sum(1).mean()))
    spec = spec_type(d_sae=128, k=k, batch=1024, min_steps=steps, max_steps=steps, dead_after=20_000)
    normalisation = Normalisation("scalar", scalar_scale(float(planted.x_BD.square().sum()), n, 32))
    params = plan_training(spec, normalisation, 32, n, "cpu")
    state = initial_state(params, planted.x_BD[:4096], torch.Generator().manual_seed(0))
    losses = [progress.loss for progress in train(params, state, batches_of(planted.x_BD, params.batch))]
    return planted, state, sum(losses[-20:]) / 20


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_planted_dictionary_is_found(kind: str) -> None:
    """Four times overcomplete, correlated firing, 5 % noise: at least 90 % of the atoms at cosine > 0.9."""
    planted, state, loss = fit_planted(kind)
    assert recovered_share(planted.atoms_SD, state.weights.W_dec_SD) >= 0.9
    assert loss < 0.3
    random = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    assert recovered_share(planted.atoms_SD, random) < 0.05, "the measure can fail"


@pytest.mark.full
def test_planted_dictionary_is_found_with_spare_latents_and_for_other_seeds() -> None:
    for seed in (1, 2):
        planted = planted_dictionary(100_000, seed=seed)
        spec = TopKSpec(d_sae=192, k=4, batch=1024, min_steps=1500, max_steps=1500, dead_after=20_000)
        normalisation = Normalisation("scalar", scalar_scale(float(planted.x_BD.square().sum()), 100_000, 32))
        params = plan_training(spec, normalisation, 32, 100_000, "cpu")
        state = initial_state(params, planted.x_BD[:4096], torch.Generator().manual_seed(seed))
        for _ in train(params, state, batches_of(planted.x_BD, params.batch)):
            pass
        assert recovered_share(planted.atoms_SD, state.weights.W_dec_SD) >= 0.9


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(kind: str) -> None:
    x = data()
    params = params_for(x, kind)
    whole, progress = trained(params, x)
    state = fresh(params, x)
    open_at = batches_of(x, params.batch)
    first = []
    for step in train(params, state, open_at):
        first.append(step)
        if step.step == 13:
            break
    copies = {name: tensor.clone() for name, tensor in state.tensors().items()}
    resumed = TrainingState.restore(copies, state.facts())
    second = list(train(params, resumed, open_at))
    assert [*first, *second] == progress
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    assert whole.facts() == resumed.facts()
    assert whole.sae(params.shape).threshold == resumed.sae(params.shape).threshold
    assert list(train(params, resumed, open_at)) == [], "a finished run has nothing left to do"


def test_same_seed_same_sae_other_seed_another() -> None:
    x = data()
    params = params_for(x)
    one, _ = trained(params, x)
    two, _ = trained(params, x)
    assert torch.equal(one.weights.W_dec_SD, two.weights.W_dec_SD)
    assert not torch.equal(fresh(params, x, 1).weights.W_dec_SD, fresh(params, x, 0).weights.W_dec_SD)


def test_state_of_another_kind_is_refused() -> None:
    x = data()
    state = fresh(params_for(x), x)
    with pytest.raises(ArtifactError, match="training state"):
        TrainingState.restore({"weight.W_enc_SD": torch.zeros(1)}, state.facts())
    with pytest.raises(ArtifactError, match="training state"):
        TrainingState.restore(state.tensors(), {"step": 1})


def test_initial_weights_are_tied_unit_norm_and_centred() -> None:
    x = data()
    params = params_for(x)
    weights = fresh(params, x).weights
    assert torch.equal(weights.W_enc_SD, weights.W_dec_SD)
    assert weights.W_enc_SD.data_ptr() != weights.W_dec_SD.data_ptr()
    torch.testing.assert_close(weights.W_dec_SD.norm(dim=1), torch.ones(S))
    assert float(weights.b_enc_S.abs().max()) == 0
    torch.testing.assert_close(weights.b_dec_D, geometric_median(x[:256] * params.shape.normalisation.scale))


def test_geometric_median_resists_an_outlier() -> None:
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(geometric_median(square), torch.zeros(2), atol=1e-6, rtol=0)
    line = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1e6, 0.0]])
    assert float(geometric_median(line).norm()) < 1e-3
    triangle = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 2 * math.sqrt(3)]])
    torch.testing.assert_close(geometric_median(triangle), torch.tensor([2.0, 2 / math.sqrt(3)]), atol=1e-4, rtol=0)


def test_decoder_stays_unit_norm_every_step() -> None:
    x = data()
    params = params_for(x)
    state = fresh(params, x)
    for _ in train(params, state, batches_of(x, params.batch)):
        torch.testing.assert_close(state.weights.W_dec_SD.norm(dim=1), torch.ones(S), rtol=1e-5, atol=1e-5)


def test_decoder_is_renormed_only_every_so_many_steps_where_asked() -> None:
    x = data()
    params = params_for(x, renorm_every=10, lr=1e-2)
    state = fresh(params, x)
    far = {}
    for progress in train(params, state, batches_of(x, params.batch)):
        far[progress.step] = float((state.weights.W_dec_SD.norm(dim=1) - 1).abs().max())
    assert all((deviation < 1e-5) == (step % 10 == 0) for step, deviation in far.items())


def test_adam_is_the_published_one() -> None:
    """One step by hand from Adam's formulas, with the same gradients: the sign of a gradient times the rate."""
    x = data()
    params = params_for(x, warmup=0.0, decay=0.0, lr=1e-3, renorm_every=7)
    state = fresh(params, x)
    before = state.weights.b_dec_D.clone()
    next(train(params, state, batches_of(x, params.batch)))
    step = state.weights.b_dec_D - before
    moved = state.first.b_dec_D.abs() > 1e-6
    torch.testing.assert_close(step[moved], -1e-3 * state.first.b_dec_D[moved].sign(), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(state.second.b_dec_D, (state.first.b_dec_D / 0.1) ** 2 * 0.001, rtol=1e-4, atol=1e-12)


def test_gradients_are_clipped_to_norm_one() -> None:
    x = data()
    params = dataclasses.replace(params_for(x), aux_weight=1e6, dead_after=0)
    state = fresh(params, x)
    next(train(params, state, batches_of(x, params.batch)))
    norm = math.sqrt(sum(float((first / 0.1).square().sum()) for first in state.first))
    assert norm == pytest.approx(1.0, rel=1e-4)


def test_rate_rises_and_falls() -> None:
    params = dataclasses.replace(params_for(data()), steps=100, warmup_steps=10, decay_steps=20, lr=1.0)
    rates = [params.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == pytest.approx([(100 - step) / 21 for step in range(80, 100)])
    assert min(rates) > 0


def test_dead_latents_are_counted_by_positions_and_revived() -> None:
    """With a bias that silences half of the latents, AuxK brings them back; without it they stay dead."""
    x = data(2000)
    dead_at_end = {}
    for aux_k in (0, 8):
        params = params_for(x, aux_k=aux_k, min_steps=300, max_steps=300, lr=1e-2)
        state = fresh(params, x)
        state.weights.b_enc_S[: S // 2] = -1.6
        shares = [progress.dead_share for progress in train(params, state, batches_of(x, params.batch))]
        assert shares[:8] == [0.0] * 8, "500 positions are reached after 8 batches of 64"
        assert shares[8] >= 0.5
        dead_at_end[aux_k] = int((state.since_fired_S[: S // 2] >= params.dead_after).sum())
    assert dead_at_end[0] >= S // 2 - 2
    assert dead_at_end[8] <= S // 4


def test_batch_topk_threshold_gives_the_wanted_l0() -> None:
    x = data(3000)
    params = params_for(x, "batch_topk", min_steps=300, max_steps=300)
    state, _ = trained(params, x)
    sae = state.sae(params.shape)
    assert sae.threshold is not None
    l0 = float((sae.encode(x).values_BK > 0).sum(1).float().mean())
    assert l0 == pytest.approx(params.shape.k, rel=0.15)


def test_fine_tuning_begins_where_the_sae_is() -> None:
    x = data()
    params = params_for(x)
    state, _ = trained(params, x)
    again = state_from(state.sae(params.shape))
    assert again.step == 0
    for ours, theirs in zip(again.weights, state.weights, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_non_finite_loss_raises() -> None:
    x = data()
    params = params_for(x)
    state = fresh(params, x)
    state.weights.W_dec_SD[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="step 1"):
        list(train(params, state, batches_of(x, params.batch)))


def test_plan_follows_the_spec() -> None:
    params = plan_training(TopKSpec(), Normalisation("scalar"), 384, 3_000_000, "cpu")
    assert (params.shape.d_sae, params.shape.k, params.batch, params.steps) == (3072, 32, 4096, 1465)
    assert (params.warmup_steps, params.decay_steps, params.aux_k, params.matmul) == (73, 293, 192, "float32")
    paper = plan_training(TopKSpec(**PAPER_PRESET["sae"]), Normalisation("layernorm"), 64, 100_000, "cpu")
    assert (paper.lr, paper.renorm_every, paper.aux_k, paper.loss, paper.shape.relu) == (3e-4, 10, 0, "nmse", False)
    assert (paper.batch, paper.steps) == (256, 391)
    with pytest.raises(SpecError, match="sae.k is 99, more than the SAE's 64 latents"):
        plan_training(TopKSpec(k=99), Normalisation("scalar"), 8, 1000, "cpu")
    assert plan_training(TopKSpec(), Normalisation("scalar"), 8, 1000, "cuda").matmul == "bfloat16"


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (10_000_000, TrainingSize(4096, 4883)),
        (300_000, TrainingSize(1500, 400)),
        (20_000, TrainingSize(512, 400)),
        (100, TrainingSize(100, 400)),
    ],
)
def test_small_data_get_smaller_batches_then_more_passes(n: int, expected: TrainingSize) -> None:
    assert training_size(TopKSpec(), n) == expected


def test_no_position_is_refused() -> None:
    with pytest.raises(NumericalError, match="no position"):
        training_size(TopKSpec(), 0)


def test_short_runs_get_a_higher_rate() -> None:
    assert default_lr(2**14, 40_000) == default_lr(2**14, 10**6) == 2e-4
    assert default_lr(2**14, 400) == pytest.approx(2e-3)
    assert default_lr(2**12, 10_000) == pytest.approx(8e-4)
    assert default_lr(1024, 100) == 5e-3
    assert default_lr(4, 10**6) > 5e-3, "a narrow SAE keeps its own rate"


def test_the_gradient_along_the_decoder_is_removed() -> None:
    """After one step from zero moments, what Adam remembers of the decoder's gradient is orthogonal to its rows."""
    x = data()
    params = params_for(x)
    state = fresh(params, x)
    directions = state.weights.W_dec_SD.clone()
    next(train(params, state, batches_of(x, params.batch)))
    along = (state.first.W_dec_SD * directions).sum(1).abs()
    assert float(along.max()) < 1e-6 * float(state.first.W_dec_SD.norm(dim=1).max())
