from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safer_engine.errors import ModelRefused
from safer_engine.science.hook_place import hook_layer
from safer_engine.science.reward_model import LoadFacts, find_blocks, inspect, residual_of
from safer_engine.spec import PAPER_PRESET
from tests.helpers.tiny_model import DECODERS, ENCODERS, load_tiny, token_sequences

FACTS = LoadFacts((1.0,), "score.weight", 0, "model", 0, "eager")


@pytest.mark.parametrize("arch", [*DECODERS, *ENCODERS])
def test_blocks_head_and_reading_are_found(arch: str) -> None:
    info = load_tiny(arch).info
    assert (info.n_blocks, info.d_in, info.d_head, info.n_outputs) == (3, 32, 32, 1)
    assert info.causal is (arch in DECODERS)
    assert info.head_reads == ("last" if arch in DECODERS else "first")
    assert info.head_name.startswith("score" if arch in DECODERS else "classifier")
    assert info.rewired_after == ()
    assert (info.dtype, info.pad_origin) == ("float32", "model")


def test_modernbert_with_mean_pooling_reads_every_token() -> None:
    rm = load_tiny("modernbert")
    config: Any = rm.model.config
    config.classifier_pooling = "mean"
    try:
        mean = inspect(rm.model, rm.tokenizer, FACTS)
    finally:
        config.classifier_pooling = "cls"
    assert mean.info.head_reads == "mean"
    assert mean.head_position(np.arange(5, dtype=np.int32)) is None


def test_head_position_follows_the_librarys_rule() -> None:
    rm = load_tiny("llama")
    pad = rm.info.pad_id
    assert rm.head_position(np.array([5, 6, 7])) == 2
    assert rm.head_position(np.array([5, 6, pad, pad])) == 1
    assert rm.head_position(np.array([pad, pad])) == 0
    padless = replace(rm, info=replace(rm.info, head_pad_id=None))
    assert padless.head_position(np.array([5, 6, pad])) == 2
    assert load_tiny("bert").head_position(np.array([5, 6, 7])) == 0


def test_head_positions_of_a_batch_equal_those_of_its_sequences() -> None:
    rm = load_tiny("llama")
    pad = rm.info.pad_id
    ids_BT = torch.tensor([[5, 6, 7, pad], [5, 6, pad, pad], [5, pad, 6, 7]])
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert rm.head_positions(ids_BT, mask_BT).tolist() == [2, 1, 3]
    padless = replace(rm, info=replace(rm.info, head_pad_id=None))
    assert padless.head_positions(ids_BT, mask_BT).tolist() == [2, 1, 3]
    assert padless.head_positions(ids_BT, None).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("blocks", "layer", "depth", "expected"),
    [(16, None, 0.7, 11), (6, None, 0.7, 4), (1, None, 0.1, 1), (16, 12, 0.7, 12), (16, None, 0.75, 12), (5, None, 1.0, 5)],
)
def test_hook_layer(blocks: int, layer: int | None, depth: float, expected: int) -> None:
    assert hook_layer(blocks, layer, depth) == expected


def test_the_paper_preset_hooks_block_12_of_16() -> None:
    assert hook_layer(16, None, PAPER_PRESET["hook"]["depth"]) == 12


def test_a_layer_beyond_the_blocks_is_refused() -> None:
    with pytest.raises(ModelRefused, match="has 3 blocks"):
        hook_layer(3, 4, 0.7)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.2, -0.5, 3.0)])
def test_rewards_combine_the_heads_outputs(weights: tuple[float, ...]) -> None:
    rm = load_tiny("roberta", 3)
    rm = replace(rm, info=replace(rm.info, weights=weights))
    ids_1T = torch.from_numpy(token_sequences("roberta")[0]).long()[None]
    logits = rm.model(input_ids=ids_1T).logits[0].double()
    from safer_engine.science.hooks import rewards

    assert float(rewards(rm, ids_1T)[0]) == pytest.approx(float((logits * torch.tensor(weights).double()).sum()), abs=1e-6)


def test_weights_that_do_not_fit_the_head_are_refused() -> None:
    rm = load_tiny("bert")
    with pytest.raises(ModelRefused, match="2 reward weights"):
        inspect(rm.model, rm.tokenizer, replace(FACTS, weights=(1.0, 1.0)))


class Toy(nn.Module):
    """A model with everything `inspect` looks at, to be broken in one place."""

    def __init__(self, shared: bool = False, middle: bool = False, headless: bool = False, nan: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.score = nn.Linear(8, 1)
        self.shared, self.middle, self.headless, self.nan = shared, middle, headless, nan

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = block(block(h)) if self.shared else block(h)
        logits = self.score(h[:, 3] if self.middle else h[:, -1])
        if self.headless:
            logits = logits.tanh() + 7
        return SimpleNamespace(logits=logits * torch.nan if self.nan else logits)


def test_a_toy_is_understood() -> None:
    info = inspect(Toy(), None, FACTS).info
    assert (info.blocks_name, info.head_reads, info.causal, info.n_parameters) == ("blocks", "last", True, 320 + 144 + 9)


@pytest.mark.parametrize(
    ("broken", "message"),
    [({"shared": True}, "ran 4 times"), ({"middle": True}, "reads tokens \\[3\\]"), ({"headless": True}, "no linear layer")],
)
def test_models_of_another_build_are_refused(broken: dict[str, bool], message: str) -> None:
    with pytest.raises(ModelRefused, match=message):
        inspect(Toy(**broken), None, FACTS)


def test_a_model_with_non_finite_output_is_refused() -> None:
    with pytest.raises(ModelRefused, match="not finite"):
        inspect(Toy(nan=True), None, FACTS)


def test_non_finite_weights_are_refused_by_name() -> None:
    toy = Toy()
    with torch.no_grad():
        next(toy.blocks[1].parameters()).view(-1)[0] = torch.inf
    with pytest.raises(ModelRefused, match="1 weights of the model hold NaN or infinity, first blocks.1"):
        inspect(toy, None, FACTS)


def test_a_head_of_zeros_is_refused() -> None:
    toy = Toy()
    torch.nn.init.zeros_(toy.score.weight)
    with pytest.raises(ModelRefused, match="all zero: every reward is the same"):
        inspect(toy, None, FACTS)


def test_the_longest_outermost_list_is_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    model = nn.Module()
    model.short = nn.ModuleList([nn.Linear(2, 2)])
    model.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()])
    model.layers = nn.ModuleList([Block(), Block()])
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("layers", 2)
    with pytest.raises(ModelRefused, match="no list"):
        find_blocks(nn.Linear(2, 2))


def test_a_block_that_changes_the_stream_behind_the_hook_is_noticed() -> None:
    class Rewired(Toy):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
            h = self.blocks[0](self.embed(input_ids)) + 1
            return SimpleNamespace(logits=self.score(self.blocks[1](h)[:, -1]))

    assert inspect(Rewired(), None, FACTS).info.rewired_after == (1,)


def test_residual_of_refuses_other_shapes() -> None:
    with pytest.raises(ModelRefused):
        residual_of(torch.zeros(3, 4))
