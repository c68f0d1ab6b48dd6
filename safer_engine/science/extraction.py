"""The one pass over preference pairs: rewards, head vectors and the residual stream at the covered positions.

Sequences are sorted by length and cut into batches under a token budget; positions are gathered inside the hook, so
that only what is kept leaves the device; a sequence that occurs several times is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_engine import position_flags
from safer_engine.errors import NumericalError, ResourceError
from safer_engine.science.batches import BatchPlan, IntArray, pad, plan_batches
from safer_engine.science.hooks import head_vectors, on_residual
from safer_engine.science.reward_model import RewardModel

HIGH_NORM = 10.0
"""A position's norm is high above this many times the median."""

_CPU_COST, _CUDA_COST = (8e-4, 1e11), (2.5e-4, 2e14)
"""Seconds to start one block, and products per second while it runs."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """One side of one pair, as the reward model reads it.

    Attributes:
        pair: row index of the pair; side: 0 chosen, 1 rejected.
        ids: token ids [T], unpadded.
        covered: positions whose activation is kept [T]; the position the head reads is kept in any case.
        flags: `position_flags` of each token [T], without those of norm and head, which are added here.
        keep_residual: whether the whole residual stream of the sequence is kept too.
    """

    pair: int
    side: int
    ids: IntArray
    covered: BoolArray
    flags: NDArray[np.uint8]
    keep_residual: bool = False


@dataclass(frozen=True)
class Residuals:
    """Whole residual streams, one sequence after another.

    Attributes:
        h_TD: [ΣT, d_in] in the model's dtype; covered_T: uint8, 1 where the position is also in the shard.
        pair_n, side_n, length_n: of each sequence.
    """

    h_TD: Tensor
    covered_T: Tensor
    pair_n: Tensor
    side_n: Tensor
    length_n: Tensor


@dataclass(frozen=True)
class PassCount:
    """What a pass did: sequences asked for and run (repeats once), tokens run without and with padding, batches, and how
    often a batch was halved for want of memory."""

    sequences: int = 0
    distinct: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    halved: int = 0

    def sentence(self) -> str:
        """The count in one sentence, for a person."""
        padding = 1 - self.tokens / max(1, self.padded_tokens)
        repeats, halved = self.sequences - self.distinct, f", {self.halved} halved for want of memory" if self.halved else ""
        return (
            f"read {self.sequences} sequences ({repeats} repeats), {self.tokens} tokens in {self.batches} batches, "
            f"{padding:.1%} padding{halved}"
        )

    def __add__(self, other: PassCount) -> PassCount:
        """Sum of two counts."""
        return PassCount(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ShardResult:
    """What one pass over some readings gives, in the readings' order.

    Attributes:
        rewards_R: float64 [R]; head_RH: float32 [R, d_head], the vector the head reads.
        x_BD: [B, d_in] residual stream at the kept positions in the model's dtype (empty where no hook was asked for).
        pair_B, position_B: int32; side_B, flags_B: uint8.
        residuals: of the readings that asked for them, or None.
    """

    rewards_R: Tensor
    head_RH: Tensor
    x_BD: Tensor
    pair_B: Tensor
    side_B: Tensor
    position_B: Tensor
    flags_B: Tensor
    residuals: Residuals | None
    count: PassCount


def batch_plan(rm: RewardModel, tokens: int) -> BatchPlan:
    """The plan for a model on its device: what starting its blocks costs, against what a token costs in them.

    Figures of one kind of machine, not measured on this one, so that the same input is always batched alike.
    """
    seconds, rate = _CUDA_COST if rm.device.type == "cuda" else _CPU_COST
    weights = sum(parameter.numel() for block in rm.blocks for parameter in block.parameters())
    return BatchPlan(tokens, max(8, round(len(rm.blocks) * seconds * rate / (2 * weights))))


def score(
    rm: RewardModel, sequences: Sequence[IntArray], plan: BatchPlan, pulse: Callable[[int], None] | None = None
) -> ShardResult:
    """Rewards alone (no hook): `extract` for readings that keep nothing."""
    return extract(rm, None, [_bare(index, ids) for index, ids in enumerate(sequences)], plan, pulse)


def extract(
    rm: RewardModel,
    layer: int | None,
    readings: Sequence[Reading],
    plan: BatchPlan,
    pulse: Callable[[int], None] | None = None,
) -> ShardResult:
    """Run the reward model once over some readings.

    Args:
        layer: the residual stream is read after this block; None reads rewards and head vectors only.
        pulse: called after each batch with the number of readings finished so far; may raise to stop.

    Raises:
        NumericalError: a reward or an activation is not finite.
        ResourceError: not even one sequence fits into the device's memory.
    """
    distinct = _Distinct.of(rm, readings, layer is not None)
    run = _Run(rm, layer, distinct)
    for batch in plan_batches([len(ids) for ids in distinct.ids], plan):
        run.batch(batch)
        if pulse is not None:
            pulse(sum(distinct.repeats[index] for index in run.finished))
    _check_finite(run, readings, distinct)
    return _assemble(rm, run, readings, distinct)


def norm_median(result: ShardResult) -> float:
    """Median norm ‖x‖ over the positions that are not special tokens (all positions where there are no others)."""
    ordinary_B = (result.flags_B & position_flags.SPECIAL) == 0
    x_BD = result.x_BD[ordinary_B] if bool(ordinary_B.any()) else result.x_BD
    return float(x_BD.float().norm(dim=1).median()) if len(x_BD) else 0.0


def flag_high_norms(result: ShardResult, median: float) -> ShardResult:
    """The result with `FLAG_HIGH_NORM` on positions whose norm is above `HIGH_NORM` × `median`."""
    high_B = result.x_BD.float().norm(dim=1) > HIGH_NORM * median
    return replace(result, flags_B=result.flags_B | (high_B * position_flags.HIGH_NORM).to(torch.uint8))


@dataclass(frozen=True)
class _Distinct:
    """The different sequences among readings, in order of first appearance.

    `of_reading` maps a reading to its sequence; positions are the union of what its readings keep; offset is where they
    begin in the kept activations; keep_residual says whether any reading asks for the whole stream.
    """

    ids: list[IntArray]
    positions: list[NDArray[np.intp]]
    offset: NDArray[np.int64]
    keep_residual: list[bool]
    of_reading: list[int]
    repeats: list[int]

    @classmethod
    def of(cls, rm: RewardModel, readings: Sequence[Reading], hooked: bool) -> _Distinct:
        index: dict[bytes, int] = {}
        ids: list[IntArray] = []
        covered: list[BoolArray] = []
        keep: list[bool] = []
        of_reading, repeats = [], []
        for reading in readings:
            at = index.setdefault(np.asarray(reading.ids, dtype=np.int32).tobytes(), len(ids))
            if at == len(ids):
                ids.append(reading.ids)
                covered.append(np.zeros(len(reading.ids), dtype=bool))
                keep.append(False)
                repeats.append(0)
            of_reading.append(at)
            repeats[at] += 1
            if hooked:
                covered[at] |= _kept(rm, reading)
                keep[at] |= reading.keep_residual
        positions = [np.flatnonzero(mask) for mask in covered]
        offset = np.concatenate([[0], np.cumsum([len(found) for found in positions])]).astype(np.int64)
        return cls(ids, positions, offset, keep, of_reading, repeats)


def _kept(rm: RewardModel, reading: Reading) -> BoolArray:
    head = rm.head_position(reading.ids)
    mask = np.array(reading.covered, dtype=bool)
    if head is not None:
        mask[head] = True
    return mask


@dataclass
class _Run:
    """A pass in progress: results by distinct sequence, on the CPU."""

    rm: RewardModel
    layer: int | None
    distinct: _Distinct
    head_UH: Tensor = field(init=False)
    x_BD: Tensor = field(init=False)
    streams: dict[int, Tensor] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    largest: int | None = None
    batches: int = 0
    padded: int = 0
    halved: int = 0

    def __post_init__(self) -> None:
        info = self.rm.info
        dtype = self.rm.head.weight.dtype
        self.head_UH = torch.empty(len(self.distinct.ids), info.d_head)
        self.x_BD = torch.empty(int(self.distinct.offset[-1]), info.d_in, dtype=dtype)

    def batch(self, rows: list[int]) -> None:
        """Run some sequences; halve the batch as often as memory demands, and later ones from the start."""
        longest = max(len(self.distinct.ids[row]) for row in rows)
        if self.largest is not None and len(rows) > 1 and len(rows) * longest > self.largest:
            self._halves(rows)
            return
        try:
            with torch.inference_mode():
                self._forward(rows)
            return
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ResourceError(
                    f"a sequence of {longest} tokens does not fit into the device's memory",
                    "lower model.max_length, or spread the model with runtime.device_map",
                ) from error
        self.halved += 1
        self.largest = len(rows) * longest // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._halves(rows)

    def _halves(self, rows: list[int]) -> None:
        middle = (len(rows) + 1) // 2
        self.batch(rows[:middle])
        self.batch(rows[middle:])

    def _forward(self, rows: list[int]) -> None:
        ids_BT, mask_BT = pad([self.distinct.ids[row] for row in rows], self.rm.info.pad_id)
        if self.layer is None:
            head_BH = head_vectors(self.rm, ids_BT, mask_BT)
        else:
            kept: list[tuple[Tensor, dict[int, Tensor]]] = []
            with on_residual(self.rm, self.layer, lambda h_BTD: kept.append(self._gather(rows, h_BTD))):
                head_BH = head_vectors(self.rm, ids_BT, mask_BT)
            x_BD, streams = kept[-1]
            spans = [np.arange(self.distinct.offset[row], self.distinct.offset[row + 1]) for row in rows]
            self.x_BD[torch.from_numpy(np.concatenate(spans))] = x_BD.cpu()
            self.streams.update({row: stream.cpu() for row, stream in streams.items()})
        self.head_UH[rows] = head_BH.float().cpu()
        self.finished.extend(rows)
        self.batches += 1
        self.padded += ids_BT.numel()

    def _gather(self, rows: list[int], h_BTD: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        positions = [self.distinct.positions[row] for row in rows]
        row_B = np.repeat(np.arange(len(rows)), [len(found) for found in positions])
        at_B = torch.from_numpy(np.concatenate(positions)).to(h_BTD.device)
        x_BD = h_BTD[torch.from_numpy(row_B).to(h_BTD.device), at_B]
        keep = [(index, row) for index, row in enumerate(rows) if self.distinct.keep_residual[row]]
        return x_BD, {row: h_BTD[index, : len(self.distinct.ids[row])].clone() for index, row in keep}


def _check_finite(run: _Run, readings: Sequence[Reading], distinct: _Distinct) -> None:
    good = torch.isfinite(run.head_UH).all(dim=1)
    bad = [reading.pair for reading, at in zip(readings, distinct.of_reading, strict=True) if not good[at]]
    if bad:
        raise NumericalError(
            f"the reward model gives a non-finite result for {len(bad)} sequences, first of pair {bad[0]}",
            "try model.dtype=float32 or another model.attention",
        )
    if not bool(torch.isfinite(run.x_BD).all()):
        raise NumericalError("the residual stream at the hook is not finite", "try model.dtype=float32 or another hook.layer")


def _assemble(rm: RewardModel, run: _Run, readings: Sequence[Reading], distinct: _Distinct) -> ShardResult:
    of_R = torch.tensor(distinct.of_reading, dtype=torch.long)
    head_RH = run.head_UH[of_R]
    rewards_R = rm.rewards(head_RH).detach().cpu()
    if not bool(torch.isfinite(rewards_R).all()):
        raise NumericalError("a reward is not finite", "check the reward weights and the model's head")
    kept = [_kept(rm, reading) if run.layer is not None else np.zeros(len(reading.ids), dtype=bool) for reading in readings]
    rows = [_rows_of(distinct, at, mask) for at, mask in zip(distinct.of_reading, kept, strict=True)]
    index_B = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    in_order = len(index_B) == len(run.x_BD) and bool((index_B == np.arange(len(index_B))).all())
    sizes = [len(found) for found in rows]
    return ShardResult(
        rewards_R=rewards_R,
        head_RH=head_RH,
        x_BD=run.x_BD if in_order else run.x_BD[torch.from_numpy(index_B)],
        pair_B=torch.from_numpy(np.repeat(np.array([r.pair for r in readings], dtype=np.int32), sizes)),
        side_B=torch.from_numpy(np.repeat(np.array([r.side for r in readings], dtype=np.uint8), sizes)),
        position_B=_joined([np.flatnonzero(mask) for mask in kept], np.int32),
        flags_B=_joined([_flags(rm, reading)[mask] for reading, mask in zip(readings, kept, strict=True)], np.uint8),
        residuals=_residuals(run, readings, distinct, kept),
        count=PassCount(
            len(readings), len(distinct.ids), sum(len(ids) for ids in distinct.ids), run.padded, run.batches, run.halved
        ),
    )


def _rows_of(distinct: _Distinct, at: int, mask: BoolArray) -> NDArray[np.int64]:
    """Rows of the kept activations that hold a reading's positions."""
    return np.asarray(distinct.offset[at] + np.flatnonzero(mask[distinct.positions[at]]), dtype=np.int64)


def _flags(rm: RewardModel, reading: Reading) -> NDArray[np.uint8]:
    flags = np.array(reading.flags, dtype=np.uint8)
    head = rm.head_position(reading.ids)
    if head is not None:
        flags[head] = (flags[head] & ~np.uint8(position_flags.SPECIAL)) | position_flags.HEAD
    return flags


def _residuals(run: _Run, readings: Sequence[Reading], distinct: _Distinct, kept: list[BoolArray]) -> Residuals | None:
    chosen = [index for index, reading in enumerate(readings) if reading.keep_residual and run.layer is not None]
    if not chosen:
        return None
    streams = [run.streams[distinct.of_reading[index]] for index in chosen]
    return Residuals(
        h_TD=torch.cat(streams),
        covered_T=_joined([kept[index] for index in chosen], np.uint8),
        pair_n=torch.tensor([readings[index].pair for index in chosen], dtype=torch.int32),
        side_n=torch.tensor([readings[index].side for index in chosen], dtype=torch.uint8),
        length_n=torch.tensor([len(stream) for stream in streams], dtype=torch.int32),
    )


def _joined(parts: list[Any], dtype: Any) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype))


def _bare(index: int, ids: IntArray) -> Reading:
    length = len(ids)
    return Reading(index, 0, ids, np.zeros(length, dtype=bool), np.zeros(length, dtype=np.uint8))
