"""The course of the activations stage: invariance first, then shard after shard, each kept as soon as it is read.

Imported when the stage runs, for it brings torch along.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from safer_engine import activation_files as files
from safer_engine.science.batches import BatchPlan
from safer_engine.science.extraction import (
    PassCount,
    ShardResult,
    batch_plan,
    extract,
    flag_high_norms,
    norm_median,
)
from safer_engine.science.invariance import measure_invariance, partial_forward_drift, require_invariance
from safer_engine.science.readings import choose_by_hash, choose_residual_pairs, readings_of, token_ids
from safer_engine.science.reward_model import RewardModel
from safer_engine.stage import StageContext

_INVARIANCE_PAIRS = (8, 32)
"""Least and most pairs in the sample of the invariance measurement; one in twenty between them."""


@dataclass
class ActivationPass:
    """One run of the stage over one reward model.

    Attributes:
        layer: hook point. total: pairs to read; done: pairs read so far.
    """

    ctx: StageContext
    rm: RewardModel
    layer: int
    total: int
    done: int = 0
    count: PassCount = field(default_factory=PassCount)

    def invariance(self, table: Any) -> dict[str, Any]:
        """Measure how rewards move with batching, once; a model that moves too far is refused.

        Raises:
            ModelRefused: see `safer_engine.science.invariance`.
        """
        known = files.read_facts(self.ctx.work, "invariance.json")
        if known is not None:
            return dict(known)
        least, most = _INVARIANCE_PAIRS
        wanted = min(most, max(least, table.num_rows // 20), table.num_rows)
        chosen = choose_by_hash(table.column("pair_id").to_pylist(), wanted, self.ctx.base_seed, "invariance")
        sample = table.select(["chosen_ids", "rejected_ids"]).take(chosen)
        found = measure_invariance(
            self.rm, list(zip(token_ids(sample, "chosen"), token_ids(sample, "rejected"), strict=True)), self._plan()
        )
        if found.status != "ok":
            self.ctx.note(found.sentence())
        require_invariance(found)
        facts = asdict(found)
        files.publish_facts(self.ctx.work, "invariance.json", facts)
        return facts

    def pairs(self, table: Any, part: range | None = None) -> list[str]:
        """Read the audited pairs into shards, or some of them. Returns the names of the scratch files with their rewards."""
        size = self._shard_pairs()
        shards = range(files.shard_count(table.num_rows, size))
        shards = shards if part is None else shards[part.start : part.stop]
        keep = self._with_residuals(table)
        self.total = sum(table.slice(index * size, size).num_rows for index in shards)
        with _Writer() as writer:
            for index in shards:
                if not self._is_read(index, joining=part is None):
                    result = self._shard(table, index, keep)
                    writer.submit(files.publish_shard, self.ctx.work, index, result)
                    self.count += result.count
                self._advance(table.slice(index * size, size).num_rows)
        return [files.shard_scratch(index) for index in shards]

    def _is_read(self, index: int, *, joining: bool) -> bool:
        """Whether a shard is there; where all are joined, with the scratch file that a part leaves to the joining."""
        there = self.ctx.work.has(files.shard_name(index))
        return there and (not joining or files.has_scratch(self.ctx.work, f"{files.shard_scratch(index)}.safetensors"))

    def _shard_pairs(self) -> int:
        """Pairs per shard: once a shard is there, as it was then, whatever `runtime` says now."""
        facts = files.read_facts(self.ctx.work, "layout.json")
        if facts is None:
            facts = {"shard_pairs": self.ctx.runtime.shard_pairs}
            files.publish_facts(self.ctx.work, "layout.json", facts)
        return int(facts["shard_pairs"])

    def _with_residuals(self, table: Any) -> frozenset[int]:
        """The pairs whose whole residual streams are kept; chosen once, since it takes all pairs' names."""
        known = files.read_facts(self.ctx.work, "residual.json")
        if known is None:
            chosen = choose_residual_pairs(
                table.column("pair_id").to_pylist(),
                table.column("group").to_pylist(),
                min(self.ctx.spec.causal.pairs, table.num_rows),
                self.ctx.spec.split.held_out,
                self.ctx.base_seed,
            )
            known = sorted(chosen)
            files.publish_facts(self.ctx.work, "residual.json", known)
        return frozenset(known)

    def _shard(self, table: Any, index: int, keep: frozenset[int]) -> ShardResult:
        """One shard, its high norms flagged. What is measured once is measured on the same shard, however they are shared."""
        size = self._shard_pairs()
        readings = readings_of(table.slice(index * size, size), index * size, self.rm, self.ctx.spec.hook, keep)
        result = extract(self.rm, self.layer, readings, self._plan(), self._pulse)
        if keep and index == min(keep) // size and not files.has_scratch(self.ctx.work, "partial.json"):
            drift = partial_forward_drift(self.rm, self.layer, result, readings)
            files.publish_facts(self.ctx.work, "partial.json", {"partial_forward_drift": drift})
        return flag_high_norms(result, self._norm_median(table, index, result))

    def _norm_median(self, table: Any, index: int, result: ShardResult) -> float:
        """High norms are judged by the median of the first shard, whatever the batching or the order of shards."""
        facts = files.read_facts(self.ctx.work, "norm.json")
        if facts is None:
            if index:
                rows = table.slice(0, self._shard_pairs())
                readings = readings_of(rows, 0, self.rm, self.ctx.spec.hook, frozenset())
                result = extract(self.rm, self.layer, readings, self._plan(), self._pulse)
            facts = {"norm_median": norm_median(result)}
            files.publish_facts(self.ctx.work, "norm.json", facts)
        return float(facts["norm_median"])

    def _pulse(self, readings: int) -> None:
        self.ctx.progress(self.done + readings // 2, self.total, "pairs")

    def _advance(self, pairs: int) -> None:
        self.done += pairs
        self.ctx.progress(self.done, self.total, "pairs")

    def _plan(self) -> BatchPlan:
        return batch_plan(self.rm, self.ctx.runtime.batch_tokens)


class _Writer:
    """Writes one thing at a time beside the computation; an error in writing is raised at the next call or at the end."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._pool.shutdown()

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        self._settle()
        self._pending = self._pool.submit(write, *args)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
