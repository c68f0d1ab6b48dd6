"""Rewards of a table of pairs, nothing else of the model: kept part by part as they are read.

Imported when a stage runs, for it brings torch along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safer_engine import activation_files as files
from safer_engine.science.extraction import PassCount, batch_plan, score
from safer_engine.science.readings import token_ids
from safer_engine.science.reward_model import RewardModel
from safer_engine.stage import StageContext


@dataclass(frozen=True)
class RewardParts:
    """Names of the scratch files that hold the rewards, in the order of the pairs, and what this run read for them."""

    names: tuple[str, ...]
    count: PassCount


def read_rewards(ctx: StageContext, rm: RewardModel, table: Any, prefix: str) -> RewardParts:
    """Read the rewards of both sides of every pair; parts that are there already are not read again.

    Args:
        table: pairs with chosen_ids and rejected_ids (see `PairSet`).
        prefix: of the scratch files' names.

    Raises:
        NumericalError, ResourceError, Interrupted: see `safer_engine.science.extraction`.
    """
    size, total = ctx.runtime.shard_pairs, table.num_rows
    plan, count = batch_plan(rm, ctx.runtime.batch_tokens), PassCount()
    names = []
    for index in range(-(-total // size)):
        rows, before = table.slice(index * size, size), index * size
        names.append(f"{prefix}-{index:05d}")
        if not files.has_scratch(ctx.work, f"{names[-1]}.safetensors"):
            both = zip(token_ids(rows, "chosen"), token_ids(rows, "rejected"), strict=True)

            def pulse(readings: int, before: int = before) -> None:
                ctx.progress(before + readings // 2, total, "pairs")

            result = score(rm, [ids for pair in both for ids in pair], plan, pulse)
            files.publish_rewards(ctx.work, names[-1], result)
            count += result.count
        ctx.progress(before + rows.num_rows, total, "pairs")
    return RewardParts(tuple(names), count)
