"""From rows of a pair table to what the reward model is run on: token ids, covered positions, flags, samples of pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_engine import position_flags
from safer_engine.science.batches import IntArray
from safer_engine.science.extraction import Reading
from safer_engine.science.positions import SideTokens, covered_positions, sentence_end_mask
from safer_engine.science.reward_model import RewardModel
from safer_engine.spec import HookSpec
from safer_engine.splits import held_out_groups

SIDES = ("chosen", "rejected")


def token_ids(table: Any, side: str) -> list[IntArray]:
    """Token ids of one side (`chosen` or `rejected`) of every row of a pair table, unpadded."""
    return [np.asarray(ids, dtype=np.int32) for ids in _lists(table, f"{side}_ids")]


def readings_of(table: Any, first_pair: int, rm: RewardModel, hook: HookSpec, keep: frozenset[int]) -> list[Reading]:
    """Both sides of every row, chosen before rejected.

    Args:
        table: a slice of `PairSet.pairs`; its first row is pair `first_pair`.
        keep: pairs whose whole residual stream is kept.

    Returns:
        2 readings a row. Special tokens are those the table marks, or the tokenizer's where it marks none. A token that
        ends a sentence is flagged whether or not only such tokens are covered.
    """
    sides = [_side_readings(table, number, first_pair, rm, hook) for number in range(2)]
    return [Reading(r.pair, r.side, r.ids, r.covered, r.flags, r.pair in keep) for both in zip(*sides, strict=True) for r in both]


def choose_by_hash(names: Sequence[str], n: int, seed: int, purpose: str) -> list[int]:
    """Indices of `n` names, the same ones whatever else is in the data: in the order of sha256(seed, purpose, name)."""
    keys = [hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest() for name in names]
    return sorted(range(len(names)), key=lambda index: (keys[index], index))[:n]


def choose_residual_pairs(pair_ids: Sequence[str], groups: Sequence[str], n: int, held_out: float, seed: int) -> frozenset[int]:
    """Pairs whose whole residual streams are kept: held-out groups first, up to half of `n`, then the others, then the
    remaining held-out ones; within each in hash order."""
    order = choose_by_hash(pair_ids, len(pair_ids), seed, "residual")
    left_out = held_out_groups(groups, held_out, seed)
    apart = [index for index in order if groups[index] in left_out]
    taken = apart[: (n + 1) // 2]
    rest = [index for index in order if groups[index] not in left_out]
    return frozenset([*taken, *rest, *apart[len(taken) :]][:n])


def _side_readings(table: Any, number: int, first_pair: int, rm: RewardModel, hook: HookSpec) -> list[Reading]:
    side = SIDES[number]
    texts = table.column(f"{side}_text").to_pylist()
    offsets = _lists(table, f"{side}_offsets")
    starts, ends = (table.column(f"{side}_{name}").to_pylist() for name in ("start", "end"))
    specials = table.column(f"{side}_special").to_pylist() if f"{side}_special" in table.column_names else [None] * len(texts)
    special_ids = np.array(sorted(rm.tokenizer.all_special_ids), dtype=np.int32)
    readings = []
    for row, ids in enumerate(token_ids(table, side)):
        tokens = SideTokens(texts[row], offsets[row], starts[row], ends[row])
        special = np.isin(ids, special_ids) if specials[row] is None else np.asarray(specials[row], dtype=bool)
        head = rm.head_position(ids)
        covered = covered_positions(tokens, hook, tokens.end - 1 if head is None else head)
        readings.append(Reading(first_pair + row, number, ids, covered, _flags(tokens, special, hook)))
    return readings


def _flags(tokens: SideTokens, special: NDArray[np.bool_], hook: HookSpec) -> NDArray[np.uint8]:
    region = (tokens.start, tokens.end) if hook.region == "response" else (0, len(special))
    ends = sentence_end_mask(tokens, region, hook.min_gap)
    return (special * position_flags.SPECIAL + ends * position_flags.SENTENCE_END).astype(np.uint8)


def _lists(table: Any, column: str) -> list[NDArray[Any]]:
    """Rows of a list column as arrays, without copying."""
    rows: list[NDArray[Any]] = []
    for chunk in table.column(column).chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        bounds = chunk.offsets.to_numpy()
        rows.extend(values[start:stop] for start, stop in pairwise(bounds))
    return rows
