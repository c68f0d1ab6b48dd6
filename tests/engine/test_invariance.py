from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.errors import ModelRefused
from safer_engine.science.batches import BatchPlan
from safer_engine.science.extraction import Reading, extract
from safer_engine.science.invariance import (
    DRIFT_LIMIT,
    Invariance,
    _status,
    measure_invariance,
    partial_forward_drift,
    require_invariance,
)
from safer_engine.science.reward_model import RewardModel
from tests.helpers.tiny_model import load_tiny, token_sequences


def sample(arch: str = "llama") -> list[tuple[Any, Any]]:
    sequences = token_sequences(arch)
    return [(sequences[index], sequences[-1 - index]) for index in range(len(sequences) // 2)]


@contextmanager
def leak(rm: RewardModel, size: float) -> Iterator[None]:
    """Fault injection: padding leaks into the embeddings, in proportion to the width of the batch."""
    embeddings = rm.model.get_input_embeddings()  # type: ignore[operator]
    direction = torch.randn(rm.info.d_in, generator=torch.Generator().manual_seed(0))
    handle = embeddings.register_forward_hook(lambda _m, _a, out: out + size * out.shape[1] * direction)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "opt", "bert", "deberta", "modernbert"])
def test_sound_models_pass(arch: str) -> None:
    found = measure_invariance(load_tiny(arch), sample(arch), BatchPlan(2000))
    assert found.status == "ok"
    assert found.max_drift < DRIFT_LIMIT["float32"]
    assert (found.changed, found.n_pairs, found.dtype) == (0, 10, "float32")
    require_invariance(found)


def test_the_margin_sd_is_that_of_the_rewards_alone() -> None:
    rm = load_tiny("llama")
    with torch.no_grad():
        margins = [
            float(
                rm.model(input_ids=torch.from_numpy(a).long()[None]).logits
                - rm.model(input_ids=torch.from_numpy(b).long()[None]).logits
            )
            for a, b in sample()
        ]
    assert measure_invariance(rm, sample(), BatchPlan(2000)).margin_sd == pytest.approx(np.std(margins, ddof=1), rel=1e-5)


def test_a_leak_is_measured_in_proportion_and_refused() -> None:
    rm = load_tiny("llama")
    with leak(rm, 1e-6):
        small = measure_invariance(rm, sample(), BatchPlan(2000))
    with leak(rm, 1e-5):
        larger = measure_invariance(rm, sample(), BatchPlan(2000))
    assert larger.batch_drift == pytest.approx(10 * small.batch_drift, rel=0.2)
    assert larger.padding_drift > 0
    with leak(rm, 1e-2):
        bad = measure_invariance(rm, sample(), BatchPlan(2000))
    assert bad.status == "refused"
    with pytest.raises(ModelRefused, match="rewards move by up to") as caught:
        require_invariance(bad)
    assert "pad token" in caught.value.hint


def test_the_longest_sequence_is_padded_too() -> None:
    rm, ids = load_tiny("llama"), token_sequences()[15]
    others = [(ids, ids[::-1].copy()), (np.roll(ids, 1), np.roll(ids, 2))]
    with leak(rm, 1e-5):
        found = measure_invariance(rm, others, BatchPlan(2000))
    assert found.padding_drift > 0
    assert found.n_unpadded == 0
    assert "not tested" not in found.sentence()


def test_no_sequence_is_padded_beyond_what_the_model_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rm, ids = load_tiny("llama"), token_sequences()[15]
    monkeypatch.setattr(rm.model.config, "max_position_embeddings", len(ids))
    with leak(rm, 1e-5):
        found = measure_invariance(rm, [(ids, ids[::-1].copy()), (np.roll(ids, 1), np.roll(ids, 2))], BatchPlan(2000))
    assert found.n_unpadded == 4
    assert found.padding_drift < 1e-12  # a sequence alone and in a batch differ by rounding on some processors
    assert "padding was not tested: every sequence is as long as the model can read" in found.sentence()


def test_identical_sides_change_no_preference() -> None:
    rm = load_tiny("llama")
    ids = token_sequences()[0]
    found = measure_invariance(rm, [(ids, ids), *sample()[:3]], BatchPlan(2000))
    assert found.changed == 0


def test_margins_without_spread_make_any_drift_infinite() -> None:
    rm = load_tiny("llama")
    a, b = token_sequences()[0], token_sequences()[15]
    with leak(rm, 1e-3):
        found = measure_invariance(rm, [(a, b), (a, b)], BatchPlan(2000))
    assert (found.margin_sd, found.batch_drift, found.status) == (0.0, float("inf"), "refused")


def test_one_pair_is_too_few() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        measure_invariance(load_tiny("llama"), sample()[:1], BatchPlan())


@pytest.mark.parametrize(
    ("dtype", "drift", "changed", "status"),
    [
        ("float32", 0.9e-3, 0, "ok"),
        ("float32", 0.9e-3, 9, "ok"),
        ("float32", 1.1e-3, 0, "warning"),
        ("float32", 4.9e-3, 0, "warning"),
        ("float32", 5.1e-3, 0, "refused"),
        ("bfloat16", 4.9e-2, 0, "ok"),
        ("bfloat16", 5.1e-2, 0, "warning"),
        ("bfloat16", 0.01, 1, "warning"),
        ("bfloat16", 0.01, 2, "warning"),
        ("bfloat16", 0.01, 3, "refused"),
        ("bfloat16", 0.26, 0, "refused"),
    ],
)
def test_limits(dtype: str, drift: float, changed: int, status: str) -> None:
    assert _status(dtype, drift, changed, 32) == status


def test_the_sentence_names_the_figures() -> None:
    found = Invariance("ok", "float32", 32, 1.5, 1e-6, 2e-6, 1e-7, 0)
    assert found.sentence() == (
        "rewards move by up to 2e-06 SD of the margins with batching and padding (float32, 32 pairs, 0 preferences changed)"
    )


def kept_readings(arch: str) -> list[Reading]:
    return [
        Reading(i // 2, i % 2, ids, np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.uint8), keep_residual=True)
        for i, ids in enumerate(token_sequences(arch)[:4])
    ]


@pytest.mark.parametrize("arch", ["llama", "deberta"])
def test_the_partial_pass_agrees_with_the_whole(arch: str) -> None:
    rm, readings = load_tiny(arch), kept_readings(arch)
    result = extract(rm, 2, readings, BatchPlan(1000))
    assert partial_forward_drift(rm, 2, result, readings) < 1e-5
    assert partial_forward_drift(rm, 2, replace(result, residuals=None), readings) == 0.0


def test_upper_blocks_that_see_more_than_the_stream_are_noticed() -> None:
    rm, readings = load_tiny("llama"), kept_readings("llama")
    seen: list[Tensor] = []
    below = rm.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    above = rm.blocks[2].register_forward_hook(lambda _m, _a, out: out + (seen.pop() if seen else 0.0))
    try:
        result = extract(rm, 2, readings, BatchPlan(1000))
        assert partial_forward_drift(rm, 2, result, readings) > 0.1
    finally:
        below.remove()
        above.remove()


def test_a_model_that_rewards_everything_alike_is_refused() -> None:
    rm = load_tiny("llama")
    handle = rm.head.register_forward_pre_hook(lambda _m, args: (torch.ones_like(args[0]),))
    read = rm.blocks[-1].register_forward_hook(lambda _m, _a, out: torch.ones_like(out))
    try:
        found = measure_invariance(rm, sample(), BatchPlan(2000))
    finally:
        handle.remove()
        read.remove()
    with pytest.raises(ModelRefused, match="every reward is the same"):
        require_invariance(found)


@pytest.mark.parametrize("first_call", [0, 20])
def test_rewards_that_are_not_finite_refuse_the_model(first_call: int) -> None:
    """Whether they appear in the sequences alone, or only where sequences share a batch."""
    rm = load_tiny("llama")
    calls = iter(range(10_000))
    handle = rm.blocks[-1].register_forward_hook(lambda _m, _a, out: out * torch.nan if next(calls) >= first_call else out)
    try:
        with pytest.raises(ModelRefused, match="finite"):
            measure_invariance(rm, sample(), BatchPlan(2000))
    finally:
        handle.remove()
