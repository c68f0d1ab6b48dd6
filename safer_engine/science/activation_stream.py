"""Training batches from activation shards: shuffled, in bounded memory, and open at any place.

The rows of an epoch are one fixed sequence. Shards are cut into chunks; the chunks of an epoch are put in random order
and taken into windows of at most `buffer` rows; the rows of a window are permuted. Batches are consecutive pieces of the
sequence, going on from one epoch into the next. A row's place depends on the seed, the epoch and the window alone, so
batch n can be opened without having drawn the batches before it, and only one window is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_engine.errors import ArtifactError, NumericalError

CHUNK_ROWS = 1024
"""Rows per chunk: small enough to mix shards well, large enough to be read at once."""


@dataclass(frozen=True)
class Chunk:
    """A run of rows of one shard.

    Attributes:
        start, stop: its rows in the shard, excluded ones included.
        kept: how many of them are trained on.
    """

    shard: int
    start: int
    stop: int
    kept: int


LoadChunk = Callable[[Chunk], Tensor]
"""Gives the kept rows of a chunk, [kept, D], in the shard's dtype."""


@dataclass(frozen=True)
class Exclusions:
    """Which rows of a shard are trained on, and why the others are not.

    Attributes:
        kept_B: bool.
        dropped: rows left out by reason; a row counts once, under the first reason that holds.
    """

    kept_B: NDArray[np.bool_]
    dropped: dict[str, int]


def exclude(n_rows: int, reasons: dict[str, NDArray[np.bool_]]) -> Exclusions:
    """Leave out the rows that any reason names. kept + Σ dropped = n_rows."""
    kept_B = np.ones(n_rows, dtype=np.bool_)
    dropped = {}
    for reason, holds_B in reasons.items():
        dropped[reason] = int((kept_B & holds_B).sum())
        kept_B &= ~holds_B
    return Exclusions(kept_B, dropped)


def cut_chunks(shard: int, kept_B: NDArray[np.bool_], rows: int = CHUNK_ROWS) -> list[Chunk]:
    """The chunks of a shard that have something to train on."""
    starts = range(0, len(kept_B), rows)
    chunks = (Chunk(shard, start, min(start + rows, len(kept_B)), int(kept_B[start : start + rows].sum())) for start in starts)
    return [chunk for chunk in chunks if chunk.kept]


@dataclass(frozen=True)
class ActivationStream:
    """The endless shuffled sequence of training rows.

    Attributes:
        chunks: all that is trained on, in any fixed order.
        load: reads one chunk.
        batch: rows per batch.
        buffer: rows held in memory at most (a single larger chunk makes its own window).
        seed: decides all orders.
    """

    chunks: Sequence[Chunk]
    load: LoadChunk
    batch: int
    buffer: int
    seed: int

    @property
    def n_rows(self) -> int:
        """Rows in one epoch."""
        return sum(chunk.kept for chunk in self.chunks)

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches [batch, D] from the `first`-th on, without end. Raises NumericalError where there is no row at all."""
        if self.n_rows == 0:
            raise NumericalError("no position is left to train on", "audit more pairs, or widen hook.positions")
        pending: list[Tensor] = []
        missing = self.batch
        for piece_BD in self._pieces(first * self.batch):
            rest_BD = piece_BD
            while len(rest_BD) >= missing:
                pending.append(rest_BD[:missing])
                rest_BD = rest_BD[missing:]
                full_BD = torch.cat(pending)
                pending, missing = [], self.batch
                yield full_BD
            if len(rest_BD):
                pending.append(rest_BD.clone())
                missing -= len(rest_BD)
            del piece_BD, rest_BD  # or this window would still be held while the next one is read

    def sample(self, n_rows: int) -> Tensor:
        """The first n rows of the sequence, at most one epoch: a random sample of the training rows."""
        wanted = min(n_rows, self.n_rows)
        found: list[Tensor] = []
        for piece_BD in self._pieces(0):
            found.append(piece_BD[:wanted].clone())
            wanted -= len(found[-1])
            if wanted == 0:
                return torch.cat(found)
        raise AssertionError("the sequence has no end")

    def _pieces(self, place: int) -> Iterator[Tensor]:
        epoch, skip = divmod(place, self.n_rows)
        while True:
            for number, window in enumerate(self._windows(epoch)):
                size = sum(chunk.kept for chunk in window)
                if skip >= size:
                    skip -= size
                    continue
                yield self._shuffled(window, epoch, number, skip)
                skip = 0
            epoch += 1

    def _windows(self, epoch: int) -> list[list[Chunk]]:
        order = torch.randperm(len(self.chunks), generator=_generator(self.seed, epoch, "chunks")).tolist()
        windows: list[list[Chunk]] = []
        room = 0
        for index in order:
            chunk = self.chunks[index]
            if not windows or chunk.kept > room:
                windows.append([])
                room = self.buffer
            windows[-1].append(chunk)
            room -= chunk.kept
        return windows

    def _shuffled(self, window: list[Chunk], epoch: int, number: int, skip: int) -> Tensor:
        size = sum(chunk.kept for chunk in window)
        order_B = torch.randperm(size, generator=_generator(self.seed, epoch, f"rows {number}"))
        target_B = torch.empty_like(order_B)
        target_B[order_B] = torch.arange(size)
        rows_BD: Tensor | None = None
        filled = 0
        for chunk in window:
            loaded = self.load(chunk)
            if len(loaded) != chunk.kept:
                raise ArtifactError(f"shard {chunk.shard} has {len(loaded)} rows to train on where {chunk.kept} were counted")
            if rows_BD is None:
                rows_BD = torch.empty(size, loaded.shape[1], dtype=loaded.dtype, device=loaded.device)
            rows_BD[target_B[filled : filled + chunk.kept]] = loaded
            filled += chunk.kept
        if rows_BD is None:
            raise AssertionError("a window has at least one chunk")
        return rows_BD[skip:]


def _generator(seed: int, epoch: int, what: str) -> torch.Generator:
    raw = hashlib.sha256(f"{seed}/{epoch}/{what}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(raw[:8], "big") >> 1)
    return generator
