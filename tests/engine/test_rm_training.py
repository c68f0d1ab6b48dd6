"""The Bradley–Terry trainer: loss, schedule, batches, learning, exact resumption."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from safer_engine.errors import NumericalError, SpecError
from safer_engine.science.rm_training import (
    OptimSettings,
    RewardTrainer,
    TokenPairs,
    bradley_terry_loss,
    epoch_batches,
    forward_rewards,
    init_head,
    micro_batches,
    pair_rewards,
    rate_factor,
    silence_dropout,
)
from tests.helpers.tiny_model import build_reward_model

SETTINGS = OptimSettings(
    epochs=2,
    batch=8,
    lr=3e-3,
    weight_decay=0.01,
    schedule="linear",
    warmup=0.1,
    clip=1.0,
    centring=0.0,
    seed=0,
    batch_tokens=256,
    bfloat16=False,
)
GOOD = 40
"""A token that only chosen sides contain."""


def planted_pairs(n: int, seed: int = 0) -> TokenPairs:
    rng = np.random.default_rng(seed)

    def side(good: bool) -> NDArray[np.int32]:
        ids = rng.integers(41, 90, size=rng.integers(5, 24)).astype(np.int32)
        if good:
            ids[rng.integers(len(ids))] = GOOD
        return ids

    chosen, rejected = zip(*((side(True), side(False)) for _ in range(n)), strict=True)
    return TokenPairs(tuple(f"p{i}" for i in range(n)), chosen, rejected)


@pytest.fixture(scope="module", params=["llama", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra: dict[str, Any] = {"hidden_dropout_prob": 0.1} if request.param == "bert" else {"attention_dropout": 0.1}
    return build_reward_model(tmp_path_factory.mktemp(request.param), request.param, width=16, blocks=2, **extra)


def load(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_loss_has_its_closed_form() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    expected = [math.log(1 + math.exp(-margin)) for margin in (1.0, -3.0, 0.0)]
    assert torch.allclose(bradley_terry_loss(chosen, rejected), torch.tensor(expected))
    centred = bradley_terry_loss(chosen, rejected, centring=0.1) - torch.tensor(expected)
    assert torch.allclose(centred, torch.tensor([0.1, 0.1, 0.1]))


def test_rate_rises_linearly_and_falls_to_nearly_zero() -> None:
    linear = [rate_factor(step, 100, 0.1, "linear") for step in range(100)]
    assert linear[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert linear[10] == 1.0
    assert all(earlier > later for earlier, later in pairwise(linear[10:]))
    assert linear[-1] == pytest.approx(1 / 90)
    cosine = [rate_factor(step, 100, 0.0, "cosine") for step in range(100)]
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 1e-3


def test_an_epoch_visits_every_pair_once_whatever_the_row_order() -> None:
    pairs = planted_pairs(300)
    batches = epoch_batches(pairs, 8, seed=1, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    assert len(batches) == math.ceil(300 / 8)
    mirrored = TokenPairs(pairs.pair_id[::-1], pairs.chosen[::-1], pairs.rejected[::-1])
    by_id = [{pairs.pair_id[row] for row in batch} for batch in batches]
    assert [{mirrored.pair_id[row] for row in batch} for batch in epoch_batches(mirrored, 8, seed=1, epoch=0)] == by_id
    assert epoch_batches(pairs, 8, seed=1, epoch=1) != batches
    assert epoch_batches(pairs, 8, seed=2, epoch=0) != batches


def test_batches_hold_pairs_of_like_length() -> None:
    pairs = planted_pairs(1024)
    spread = [np.ptp([pairs.length(row) for row in batch]) for batch in epoch_batches(pairs, 8, seed=0, epoch=0)]
    shuffled = [np.ptp([pairs.length(row) for row in range(at, at + 8)]) for at in range(0, 1024, 8)]
    assert np.mean(spread) < 0.25 * np.mean(shuffled)


def test_micro_batches_respect_the_token_budget() -> None:
    lengths = [5, 9, 100, 7, 7, 3, 60, 12]
    runs = micro_batches(range(8), lengths, 64)
    assert sorted(row for run in runs for row in run) == list(range(8))
    for run in runs:
        assert len(run) == 1 or 2 * len(run) * max(lengths[row] for row in run) <= 64
    assert [2] in runs
    assert [6] in runs


def test_unequal_or_repeated_ids_are_refused() -> None:
    side = (np.array([1], dtype=np.int32),)
    with pytest.raises(ValueError, match="unique"):
        TokenPairs(("a", "a"), side * 2, side * 2)


def test_it_learns_a_planted_preference(folder: Path) -> None:
    model, pairs, unseen = load(folder), planted_pairs(160), planted_pairs(100, seed=9)
    silence_dropout(model)
    before = pair_rewards(model, unseen, 0, 512, False)
    trainer = RewardTrainer(model, pairs, replace(SETTINGS, epochs=6, lr=1e-2), pad_id=0)
    curve = [trainer.step() for _ in range(trainer.n_steps)]
    after = pair_rewards(model, unseen, 0, 512, False)
    assert (before.margin > 0).mean() < 0.8
    assert (after.margin > 0).mean() > 0.9
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert curve[-1].epoch == 6.0
    assert curve[0].tokens == sum(len(pairs.chosen[row]) + len(pairs.rejected[row]) for row in epoch_batches(pairs, 8, 0, 0)[0])


def test_restored_training_equals_uninterrupted_training_bit_for_bit(folder: Path) -> None:
    pairs = planted_pairs(44)
    whole = load(folder)
    trainer = RewardTrainer(whole, pairs, SETTINGS, pad_id=0)
    expected = [trainer.step() for _ in range(trainer.n_steps)]
    first = RewardTrainer(load(folder), pairs, SETTINGS, pad_id=0)
    for _ in range(7):
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    torch.manual_seed(123)
    second_model = load(folder)
    second = RewardTrainer(second_model, pairs, SETTINGS, pad_id=0)
    second.restore(saved)
    assert [second.step() for _ in range(second.n_steps - 7)] == expected[7:]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(second_model)[name]), name


def test_splitting_a_batch_into_passes_leaves_the_update_unchanged(folder: Path) -> None:
    found = []
    for budget in (60, 100_000):
        model = load(folder)
        silence_dropout(model)
        trainer = RewardTrainer(model, planted_pairs(16), replace(SETTINGS, batch_tokens=budget), pad_id=0)
        found.append((trainer.step(), pair_rewards(model, planted_pairs(16), 0, 300, False).margin))
    (narrow, narrow_margins), (wide, wide_margins) = found
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-5)
    assert narrow.grad_norm == pytest.approx(wide.grad_norm, rel=1e-4)
    assert narrow_margins == pytest.approx(wide_margins, abs=1e-3)


def test_the_callers_random_state_is_left_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    RewardTrainer(load(folder), planted_pairs(8), SETTINGS, pad_id=0).step()
    torch.manual_seed(7)
    trainer = RewardTrainer(load(folder), planted_pairs(8), SETTINGS, pad_id=0)
    torch.manual_seed(7)
    trainer.step()
    assert torch.equal(torch.rand(3), expected)


def test_silenced_dropout_makes_training_mode_repeatable(folder: Path) -> None:
    model = load(folder)
    model.train()
    sides = list(planted_pairs(6).chosen)
    with torch.no_grad():
        assert not torch.equal(forward_rewards(model, sides, 0, False), forward_rewards(model, sides, 0, False))
        silence_dropout(model)
        assert torch.equal(forward_rewards(model, sides, 0, False), forward_rewards(model, sides, 0, False))


def test_rewards_equal_one_by_one_forward_passes(folder: Path) -> None:
    model, pairs = load(folder), planted_pairs(20)
    batched = pair_rewards(model, pairs, 0, 300, False)
    with torch.no_grad():
        alone = [float(model(input_ids=torch.from_numpy(side).long()[None]).logits[0, 0]) for side in pairs.rejected]
    assert np.abs(batched.rejected - alone).max() < 1e-4
    assert batched.margin == pytest.approx(batched.chosen - batched.rejected)


def test_a_fresh_head_follows_its_seed() -> None:
    heads = []
    for seed in (1, 1, 2):
        model = torch.nn.Linear(8, 1)
        init_head(model, ["weight", "bias"], 0.02, torch.Generator().manual_seed(seed))
        assert float(model.bias.detach().abs().max()) == 0.0
        heads.append(model.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0 < float(heads[0].std()) < 0.05


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    model, pairs = load(folder), planted_pairs(20)
    exact, rough = pair_rewards(model, pairs, 0, 300, False), pair_rewards(model, pairs, 0, 300, True)
    gap = np.abs(exact.chosen - rough.chosen)
    assert 0 < gap.max() < 0.2 * np.std(np.r_[exact.chosen, exact.rejected])


def test_divergence_is_an_error(folder: Path) -> None:
    model = load(folder)
    trainer = RewardTrainer(model, planted_pairs(16), SETTINGS, pad_id=0)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(NumericalError, match="diverged at step 0"):
        trainer.step()
    with pytest.raises(NumericalError, match="not finite"):
        pair_rewards(model, planted_pairs(4), 0, 300, False)


def test_nothing_to_train_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="nothing to train"):
        RewardTrainer(load(folder), TokenPairs((), (), ()), SETTINGS, pad_id=0)
    model = load(folder)
    model.requires_grad_(False)
    with pytest.raises(SpecError, match="nothing to train"):
        RewardTrainer(model, planted_pairs(4), SETTINGS, pad_id=0)
