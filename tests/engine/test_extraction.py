from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.artifacts import Activations
from safer_engine.errors import Interrupted, NumericalError, ResourceError
from safer_engine.science.batches import BatchPlan, IntArray, pad, plan_batches
from safer_engine.science.extraction import (
    PassCount,
    Reading,
    ShardResult,
    batch_plan,
    extract,
    flag_high_norms,
    norm_median,
    score,
)
from safer_engine.science.reward_model import RewardModel
from tests.helpers.tiny_model import DECODERS, ENCODERS, load_tiny, token_sequences


def one_by_one(rm: RewardModel, sequences: list[IntArray]) -> np.ndarray[Any, Any]:
    """Rewards as Transformers itself gives them, without any batching."""
    with torch.no_grad():
        return np.array([float(rm.model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, 0]) for ids in sequences])


def readings(sequences: list[IntArray], seed: int = 0, keep: frozenset[int] = frozenset()) -> list[Reading]:
    rng = np.random.default_rng(seed)
    return [
        Reading(
            pair=index // 2,
            side=index % 2,
            ids=ids,
            covered=rng.random(len(ids)) < 0.4,
            flags=(rng.random(len(ids)) < 0.2).astype(np.uint8) * Activations.FLAG_SPECIAL,
            keep_residual=index // 2 in keep,
        )
        for index, ids in enumerate(sequences)
    ]


@pytest.mark.parametrize("arch", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("plan", [BatchPlan(1), BatchPlan(300, 0), BatchPlan(10_000, 100_000)])
def test_rewards_are_those_of_transformers_one_by_one(arch: str, plan: BatchPlan) -> None:
    rm, sequences = load_tiny(arch), token_sequences(arch)
    found = score(rm, sequences, plan)
    np.testing.assert_allclose(found.rewards_R.numpy(), one_by_one(rm, sequences), rtol=0, atol=1e-4)
    assert found.rewards_R.dtype == torch.float64
    assert found.count.sequences == len(sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(side: str) -> None:
    rm, sequences = load_tiny("llama"), token_sequences("llama")
    before = rm.tokenizer.padding_side
    rm.tokenizer.padding_side = side
    try:
        found = score(rm, sequences, BatchPlan(500)).rewards_R.numpy()
    finally:
        rm.tokenizer.padding_side = before
    np.testing.assert_allclose(found, one_by_one(rm, sequences), rtol=0, atol=1e-4)


def test_text_that_ends_in_the_pad_token_is_read_as_transformers_reads_it() -> None:
    rm = load_tiny("llama")
    ends = [np.append(ids, [rm.info.pad_id] * (index % 3)).astype(np.int32) for index, ids in enumerate(token_sequences())]
    np.testing.assert_allclose(score(rm, ends, BatchPlan(500)).rewards_R.numpy(), one_by_one(rm, ends), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bert", "deberta"])
def test_positions_are_exactly_the_covered_ones_in_order(arch: str) -> None:
    rm, sequences = load_tiny(arch), token_sequences(arch)
    asked = readings(sequences)
    found = extract(rm, 2, asked, BatchPlan(400))
    row = 0
    for reading in asked:
        head = rm.head_position(reading.ids)
        assert head is not None
        wanted = sorted({*np.flatnonzero(reading.covered).tolist(), head})
        ids_1T = torch.from_numpy(reading.ids).long()[None]
        with torch.no_grad():
            state = rm.model(input_ids=ids_1T, output_hidden_states=True).hidden_states[2][0]
        stop = row + len(wanted)
        assert found.position_B[row:stop].tolist() == wanted
        assert set(found.pair_B[row:stop].tolist()) == {reading.pair}
        assert set(found.side_B[row:stop].tolist()) == {reading.side}
        torch.testing.assert_close(found.x_BD[row:stop], state[wanted], rtol=1e-4, atol=1e-4)
        for position, flags in zip(wanted, found.flags_B[row:stop].tolist(), strict=True):
            assert bool(flags & Activations.FLAG_HEAD) is (position == head)
            special = bool(reading.flags[position] & Activations.FLAG_SPECIAL) and position != head
            assert bool(flags & Activations.FLAG_SPECIAL) is special
        row = stop
    assert row == len(found.x_BD) == len(found.flags_B)
    assert [found.pair_B.dtype, found.side_B.dtype, found.position_B.dtype] == [torch.int32, torch.uint8, torch.int32]


def test_repeated_sequences_are_run_once_and_given_to_each() -> None:
    rm = load_tiny("llama")
    base = token_sequences()[:4]
    repeated = [base[0], base[1], base[0], base[2], base[0], base[3]]
    asked = readings(repeated, keep=frozenset({1}))
    together = extract(rm, 2, asked, BatchPlan(10_000))
    assert (together.count.sequences, together.count.distinct) == (6, 4)
    assert together.count.tokens == sum(len(ids) for ids in base)
    for index, reading in enumerate(asked):
        alone = extract(rm, 2, [reading], BatchPlan(10_000))
        mine = (together.pair_B == reading.pair) & (together.side_B == reading.side)
        assert together.position_B[mine].tolist() == alone.position_B.tolist()
        torch.testing.assert_close(together.x_BD[mine], alone.x_BD, rtol=1e-4, atol=1e-4)
        assert float(together.rewards_R[index]) == pytest.approx(float(alone.rewards_R[0]), abs=1e-5)


def test_whole_residual_streams_are_kept_for_the_pairs_that_ask() -> None:
    rm, sequences = load_tiny("llama"), token_sequences()
    asked = readings(sequences, keep=frozenset({1, 4}))
    kept = extract(rm, 2, asked, BatchPlan(300)).residuals
    assert kept is not None
    assert (kept.pair_n.tolist(), kept.side_n.tolist()) == ([1, 1, 4, 4], [0, 1, 0, 1])
    assert kept.length_n.tolist() == [len(asked[index].ids) for index in (2, 3, 8, 9)]
    start = 0
    for index in (2, 3, 8, 9):
        stop = start + len(asked[index].ids)
        with torch.no_grad():
            state = rm.model(input_ids=torch.from_numpy(asked[index].ids).long()[None], output_hidden_states=True)
        torch.testing.assert_close(kept.h_TD[start:stop], state.hidden_states[2][0], rtol=1e-4, atol=1e-4)
        wanted = asked[index].covered.copy()
        wanted[-1] = True
        assert kept.covered_T[start:stop].bool().tolist() == wanted.tolist()
        start = stop
    assert extract(rm, 2, readings(sequences), BatchPlan(300)).residuals is None


def test_rewards_are_linear_in_the_head_vectors() -> None:
    rm, sequences = load_tiny("bert"), token_sequences("bert")
    found = score(rm, sequences, BatchPlan(500))
    again = found.head_RH.double() @ rm.head.weight[0].double() + float(rm.head.bias[0])
    torch.testing.assert_close(found.rewards_R, again, rtol=0, atol=1e-12)


class Memory:
    """Fault injection: a device whose memory holds only so many tokens of a batch."""

    def __init__(self, rm: RewardModel, tokens: int) -> None:
        self.rm, self.tokens, self.seen = rm, tokens, list[int]()

    def __enter__(self) -> Memory:
        def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self.seen.append(kwargs["input_ids"].numel())
            if self.seen[-1] > self.tokens:
                raise torch.OutOfMemoryError("injected")

        self.handle = self.rm.model.register_forward_pre_hook(check, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    rm, sequences = load_tiny("llama"), token_sequences()
    whole = extract(rm, 2, readings(sequences), BatchPlan(100_000, 1_000_000))
    assert (whole.count.batches, whole.count.halved) == (1, 0)
    room = max(len(ids) for ids in sequences) * 3
    with Memory(rm, room) as memory:
        found = extract(rm, 2, readings(sequences), BatchPlan(100_000, 1_000_000))
    assert found.count.halved >= 2
    assert sum(tokens > room for tokens in memory.seen) == found.count.halved
    torch.testing.assert_close(found.rewards_R, whole.rewards_R, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.x_BD, whole.x_BD, rtol=1e-4, atol=1e-4)


def test_a_sequence_that_does_not_fit_alone_is_a_resource_error() -> None:
    rm, sequences = load_tiny("llama"), token_sequences()
    with Memory(rm, 40), pytest.raises(ResourceError, match="does not fit"):
        score(rm, sequences, BatchPlan(1000))


def test_non_finite_results_are_errors() -> None:
    rm, sequences = load_tiny("llama"), token_sequences()

    def spoil(_module: Any, _args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, 0] = torch.nan
        return changed

    handle = rm.blocks[0].register_forward_hook(spoil)
    try:
        with pytest.raises(NumericalError, match="non-finite"):
            extract(rm, 1, readings(sequences), BatchPlan(500))
    finally:
        handle.remove()


def test_the_pulse_counts_readings_and_may_stop_the_pass() -> None:
    rm, sequences = load_tiny("llama"), [*token_sequences(), *token_sequences()]
    pulses: list[int] = []
    score(rm, sequences, BatchPlan(300), pulses.append)
    assert pulses == sorted(pulses)
    assert pulses[-1] == len(sequences)

    def stop(_: int) -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        score(rm, sequences, BatchPlan(300), stop)


def shard(norms: list[float], flags: list[int]) -> ShardResult:
    x_BD = torch.zeros(len(norms), 4)
    x_BD[:, 1] = torch.tensor(norms)
    empty = torch.zeros(0)
    flags_B = torch.tensor(flags, dtype=torch.uint8)
    return ShardResult(empty, empty, x_BD, empty, empty, empty, flags_B, None, PassCount())


def test_high_norms_are_judged_by_the_median_of_ordinary_positions() -> None:
    special = Activations.FLAG_SPECIAL
    result = shard([1.0, 2.0, 3.0, 500.0, 600.0, 20.0, 20.1], [0, 0, 0, special, special, 0, 8])
    median = norm_median(shard([1.0, 2.0, 3.0, 500.0, 600.0], [0, 0, 0, special, special]))
    assert median == 2.0
    high = flag_high_norms(result, median).flags_B & Activations.FLAG_HIGH_NORM
    assert high.bool().tolist() == [False, False, False, True, True, False, True]
    assert int(flag_high_norms(result, median).flags_B[6]) == Activations.FLAG_HIGH_NORM | Activations.FLAG_SENTENCE_END
    assert norm_median(shard([5.0], [special])) == 5.0
    assert result.flags_B.tolist() == [0, 0, 0, special, special, 0, 8]


def test_counts_add_up_and_speak() -> None:
    count = PassCount(4, 3, 90, 100, 2, 0) + PassCount(2, 2, 10, 25, 1, 1)
    assert count == PassCount(6, 5, 100, 125, 3, 1)
    assert count.sentence() == "read 6 sequences (1 repeats), 100 tokens in 3 batches, 20.0% padding, 1 halved for want of memory"


def cost(lengths: list[int], batches: list[list[int]], overhead: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + overhead for rows in batches)


@pytest.mark.parametrize("seed", range(5))
def test_batches_are_the_cheapest_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=9).tolist()
    plan = BatchPlan(tokens=int(rng.integers(30, 120)), overhead=int(rng.integers(0, 30)))
    batches = plan_batches(lengths, plan)
    assert sorted(index for rows in batches for index in rows) == list(range(9))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= plan.tokens for rows in batches)
    order = sorted(range(9), key=lambda index: -lengths[index])
    best = None
    for n_cuts in range(9):
        for cuts in combinations(range(1, 9), n_cuts):
            edges = [0, *cuts, 9]
            split = [order[a:b] for a, b in pairwise(edges)]
            if all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= plan.tokens for rows in split):
                value = cost(lengths, split, plan.overhead)
                best = value if best is None else min(best, value)
    assert cost(lengths, batches, plan.overhead) == best


def test_small_models_take_larger_batches() -> None:
    small, one_block = load_tiny("llama"), load_tiny("bert")
    assert batch_plan(small, 77).tokens == 77
    assert batch_plan(small, 77).overhead > 1000
    shallow = replace(one_block, blocks=one_block.blocks[:1])
    assert batch_plan(shallow, 77).overhead == pytest.approx(batch_plan(one_block, 77).overhead, abs=1)


def test_no_sequences_make_no_batches() -> None:
    assert plan_batches([], BatchPlan()) == []
    assert len(extract(load_tiny("llama"), 1, [], BatchPlan()).x_BD) == 0


def test_padding_and_masks() -> None:
    a, b = np.array([1, 2, 3], dtype=np.int32), np.array([4], dtype=np.int32)
    ids_BT, mask_BT = pad([a, b], 9)
    assert ids_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask_BT is not None
    assert mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad([a, a], 9)[1] is None
    wide, mask = pad([b], 9, extra=2)
    assert (wide.tolist(), mask.tolist() if mask is not None else None) == ([[4, 9, 9]], [[1, 0, 0]])


def test_a_reading_is_not_changed_by_the_pass() -> None:
    rm, sequences = load_tiny("llama"), token_sequences()[:2]
    asked = readings(sequences)
    before = [replace(reading, covered=reading.covered.copy(), flags=reading.flags.copy()) for reading in asked]
    extract(rm, 1, asked, BatchPlan())
    for now, then in zip(asked, before, strict=True):
        np.testing.assert_array_equal(now.covered, then.covered)
        np.testing.assert_array_equal(now.flags, then.flags)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_gpu_gives_what_the_cpu_gives(arch: str) -> None:
    rm, sequences = load_tiny(arch), token_sequences(arch)
    here = extract(rm, 2, readings(sequences), BatchPlan(500))
    rm.model.to("cuda")
    try:
        there = extract(rm, 2, readings(sequences), BatchPlan(500))
    finally:
        rm.model.to("cpu")
    torch.testing.assert_close(there.rewards_R, here.rewards_R, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.x_BD, here.x_BD, rtol=1e-3, atol=1e-3)
    assert torch.equal(there.position_B, here.position_B)
