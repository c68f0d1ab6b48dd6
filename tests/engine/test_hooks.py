from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safer_engine.errors import ModelRefused
from safer_engine.science.batches import pad
from safer_engine.science.hooks import (
    check_layer,
    head_vectors,
    on_residual,
    replace_residual,
    residual,
    rewards,
    rewards_from_residual,
)
from safer_engine.science.reward_model import RewardModel
from tests.helpers.tiny_model import DECODERS, ENCODERS, load_tiny, token_sequences

ALL = [*DECODERS, *ENCODERS]


def batch(arch: str) -> tuple[RewardModel, Tensor, Tensor]:
    rm = load_tiny(arch)
    ids_BT, mask_BT = pad(token_sequences(arch)[:6], rm.info.pad_id)
    assert mask_BT is not None
    return rm, ids_BT, mask_BT


def hidden_states(rm: RewardModel, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = rm.model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("arch", ALL)
def test_the_upper_blocks_alone_give_the_rewards_of_the_whole(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    with torch.no_grad():
        whole = rewards(rm, ids_BT, mask_BT)
        for layer in range(1, rm.info.n_blocks + 1):
            h_BTD = residual(rm, layer, ids_BT, mask_BT)
            assert torch.equal(rewards_from_residual(rm, layer, h_BTD, mask_BT, ids_BT), whole)


@pytest.mark.parametrize("arch", ALL)
def test_the_residual_is_the_librarys_hidden_state(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    with torch.no_grad():
        states = hidden_states(rm, ids_BT, mask_BT)
        for layer in range(1, rm.info.n_blocks):
            mine = residual(rm, layer, ids_BT, mask_BT)
            torch.testing.assert_close(mine[mask_BT.bool()], states[layer][mask_BT.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "bert", "deberta"])
def test_stopping_early_runs_no_block_above(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    ran: list[int] = []
    inner = [next(block.children()) for block in rm.blocks]
    handles = [module.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, module in enumerate(inner)]
    try:
        residual(rm, 2, ids_BT, mask_BT)
        assert ran == [0, 1]
        ran.clear()
        rewards_from_residual(rm, 2, torch.zeros(*ids_BT.shape, rm.info.d_in), mask_BT, ids_BT)
        assert ran == [2]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bert", "deberta"])
def test_the_partial_pass_has_the_right_gradient(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    h_BTD = residual(rm, 2, ids_BT, mask_BT).detach().requires_grad_()
    total = rewards_from_residual(rm, 2, h_BTD, mask_BT, ids_BT).sum()
    (gradient,) = torch.autograd.grad(total, h_BTD)
    assert not gradient[~mask_BT.bool()].any()
    direction = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        up, down = (rewards_from_residual(rm, 2, h_BTD + sign * step * direction, mask_BT, ids_BT).sum() for sign in (1, -1))
    expected = float((gradient.double() * direction.double()).sum())
    assert float(up - down) / (2 * step) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_replacing_the_residual_equals_running_on_from_it() -> None:
    rm, ids_BT, mask_BT = batch("llama")
    other = torch.randn(*ids_BT.shape, rm.info.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with replace_residual(rm, 2, other):
            replaced = rewards(rm, ids_BT, mask_BT)
        assert torch.equal(replaced, rewards_from_residual(rm, 2, other, mask_BT, ids_BT))
        assert not torch.allclose(replaced, rewards(rm, ids_BT, mask_BT))


def test_a_replacement_of_another_shape_is_an_error() -> None:
    rm, ids_BT, mask_BT = batch("llama")
    with pytest.raises(ValueError, match="cannot replace"), replace_residual(rm, 1, torch.zeros(1, 2, 3)):
        rewards(rm, ids_BT, mask_BT)


@pytest.mark.parametrize("arch", ["llama", "deberta"])
def test_everything_is_undone_after_an_error(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    hooks = [len(block._forward_hooks) for block in rm.blocks]
    with torch.no_grad():
        before = rewards(rm, ids_BT, mask_BT)

        def fail(_: Tensor) -> None:
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError), on_residual(rm, 3, fail):
            rewards_from_residual(rm, 2, torch.zeros(*ids_BT.shape, rm.info.d_in), mask_BT, ids_BT)
        assert torch.equal(rewards(rm, ids_BT, mask_BT), before)
    assert not any("forward" in block.__dict__ for block in rm.blocks)
    assert [len(block._forward_hooks) for block in rm.blocks] == hooks
    assert not rm.head._forward_pre_hooks


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox", "gemma2"])
def test_left_padding_moves_no_reward_of_models_with_relative_positions(arch: str) -> None:
    rm = load_tiny(arch)
    sequences = token_sequences(arch)[:6]
    width = max(len(ids) for ids in sequences)
    ids_BT = torch.full((len(sequences), width), rm.info.pad_id)
    mask_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_BT[row, width - len(ids) :] = torch.from_numpy(ids)
        mask_BT[row, width - len(ids) :] = 1
    with torch.no_grad():
        right = rewards(rm, *pad(sequences, rm.info.pad_id))
        torch.testing.assert_close(rewards(rm, ids_BT, mask_BT), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_head_vectors_are_what_the_head_turns_into_logits(arch: str) -> None:
    rm, ids_BT, mask_BT = batch(arch)
    with torch.no_grad():
        logits = rm.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0]
        torch.testing.assert_close(rm.head(head_vectors(rm, ids_BT, mask_BT))[:, 0], logits, rtol=1e-5, atol=1e-5)


def test_hook_points_that_are_not_there_are_refused() -> None:
    rm = load_tiny("llama")
    for layer in (0, 4):
        with pytest.raises(ModelRefused, match="no block"):
            check_layer(rm, layer)
    rewired = replace(rm, info=replace(rm.info, rewired_after=(2,)))
    with pytest.raises(ModelRefused, match="alters the residual stream"):
        check_layer(rewired, 2)
