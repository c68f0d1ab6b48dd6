"""The stream: every row once an epoch, open at any batch, in bounded memory."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.science.activation_stream import ActivationStream, Chunk, cut_chunks, exclude

SIZES = (700, 30, 411, 256, 90)


class Shards:
    """Rows that know who they are: row r of shard s is [s, r]; every third row is left out."""

    def __init__(self, rows_per_chunk: int = 64) -> None:
        self.kept = [np.arange(size) % 3 != 0 for size in SIZES]
        self.chunks = [chunk for shard in range(len(SIZES)) for chunk in cut_chunks(shard, self.kept[shard], rows_per_chunk)]
        self.loads: list[Chunk] = []

    def load(self, chunk: Chunk) -> Tensor:
        self.loads.append(chunk)
        rows = np.arange(chunk.start, chunk.stop)[self.kept[chunk.shard][chunk.start : chunk.stop]]
        return torch.tensor([[chunk.shard, row] for row in rows], dtype=torch.float32)

    @property
    def rows(self) -> set[tuple[int, int]]:
        return {(shard, row) for shard, size in enumerate(SIZES) for row in range(size) if row % 3}

    def stream(self, batch: int = 50, buffer: int = 200, seed: int = 7) -> ActivationStream:
        return ActivationStream(self.chunks, self.load, batch, buffer, seed)


def taken(stream: ActivationStream, n: int, first: int = 0) -> list[Tensor]:
    return list(itertools.islice(stream.batches(first), n))


def test_an_epoch_holds_every_kept_row_once() -> None:
    shards = Shards()
    stream = shards.stream(batch=1)
    assert stream.n_rows == len(shards.rows)
    rows = [(int(batch[0, 0]), int(batch[0, 1])) for batch in taken(stream, stream.n_rows)]
    assert len(rows) == len(set(rows))
    assert set(rows) == shards.rows


def test_batches_are_full_and_cross_epochs() -> None:
    stream = Shards().stream()
    batches = taken(stream, 2 * stream.n_rows // 50 + 1)
    assert {tuple(batch.shape) for batch in batches} == {(50, 2)}
    two_epochs = torch.cat(batches)[: 2 * stream.n_rows]
    counts = torch.unique(two_epochs, dim=0, return_counts=True)[1]
    assert counts.tolist() == [2] * stream.n_rows
    assert not torch.equal(two_epochs[: stream.n_rows], two_epochs[stream.n_rows :]), "the second epoch has another order"


@pytest.mark.parametrize("first", [0, 1, 3, 19, 20, 21, 45, 100])
def test_opening_at_a_batch_equals_skipping_to_it(first: int) -> None:
    whole = taken(Shards().stream(), first + 6)
    for ours, theirs in zip(taken(Shards().stream(), 6, first), whole[first:], strict=True):
        assert torch.equal(ours, theirs)


def test_opening_reads_only_the_window_it_needs() -> None:
    shards = Shards()
    taken(shards.stream(), 1, first=10)
    assert sum(chunk.kept for chunk in shards.loads) <= 400, "two windows at most"


def test_order_depends_on_the_seed_alone() -> None:
    one, two, other = (torch.cat(taken(Shards().stream(seed=seed), 5)) for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_batch_mixes_shards() -> None:
    batch = taken(Shards().stream(batch=100, buffer=600), 1)[0]
    assert len(set(batch[:, 0].tolist())) >= 3
    assert batch.tolist() != sorted(batch.tolist())


def test_windows_never_exceed_the_buffer() -> None:
    shards = Shards()
    stream = shards.stream(buffer=130)
    sizes = [sum(chunk.kept for chunk in window) for window in stream._windows(0)]
    assert max(sizes) <= 130
    assert sum(sizes) == stream.n_rows


def test_a_chunk_larger_than_the_buffer_makes_its_own_window() -> None:
    shards = Shards(rows_per_chunk=1000)
    stream = shards.stream(buffer=10)
    assert len(stream._windows(0)) == len(SIZES)
    assert len(taken(stream, 5)) == 5


def test_the_buffer_is_let_go_before_the_next_is_read() -> None:
    """When a window begins to be read, no batch or piece still holds the memory of the one before."""
    shards = Shards()
    stream = shards.stream()
    lengths = [len(window) for epoch in (0, 1) for window in stream._windows(epoch)]
    begins = set(itertools.accumulate(lengths, initial=0))
    held: list[int] = []

    def load(chunk: Chunk) -> Tensor:
        if len(shards.loads) in begins:
            gc.collect()
            tensors = [found for found in gc.get_objects() if type(found) is Tensor]
            rows = [found for found in tensors if found.ndim == 2 and found.shape[1] == 2]
            held.append(max((len(found.untyped_storage()) // 8 for found in rows), default=0))
        return shards.load(chunk)

    for _ in itertools.islice(dataclasses.replace(stream, load=load).batches(), 40):
        pass
    assert len(held) > 5
    assert max(held) <= 50, "at most the batch that was handed out last"


def test_sample_is_the_beginning_of_the_sequence() -> None:
    stream = Shards().stream(batch=10)
    assert torch.equal(stream.sample(300), torch.cat(taken(stream, 30)))
    assert len(stream.sample(10**6)) == stream.n_rows


def test_nothing_to_train_on_is_refused() -> None:
    empty = ActivationStream([], Shards().load, 10, 10, 0)
    with pytest.raises(NumericalError, match="no position"):
        next(empty.batches())


def test_a_shard_that_changed_is_refused() -> None:
    shards = Shards()
    stream = ActivationStream(shards.chunks, lambda chunk: shards.load(chunk)[1:], 10, 100, 0)
    with pytest.raises(ArtifactError, match="were counted"):
        next(stream.batches())


def test_exclusions_count_each_row_once() -> None:
    special = np.array([True, True, False, False, False])
    high = np.array([False, True, True, False, False])
    found = exclude(5, {"special": special, "high_norm": high})
    assert found.kept_B.tolist() == [False, False, False, True, True]
    assert found.dropped == {"special": 2, "high_norm": 1}
    assert int(found.kept_B.sum()) + sum(found.dropped.values()) == 5


def test_chunks_cover_the_kept_rows() -> None:
    kept = np.zeros(25, dtype=bool)
    kept[[0, 3, 24]] = True
    assert cut_chunks(4, kept, 10) == [Chunk(4, 0, 10, 2), Chunk(4, 20, 25, 1)]
