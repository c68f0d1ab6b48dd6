"""Payload and scratch files of the activations stage (layouts: `artifacts.Activations`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Activations
from safer_engine.store import PART_SCRATCH, WorkArea

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.science.extraction import ShardResult

_FLAGS = {
    "special": Activations.FLAG_SPECIAL,
    "high_norm": Activations.FLAG_HIGH_NORM,
    "head": Activations.FLAG_HEAD,
    "sentence_end": Activations.FLAG_SENTENCE_END,
}


PART_SHARDS = 8
"""Shards of one part: enough that loading the model is a small share of it."""


def shard_count(n_pairs: int, shard_pairs: int) -> int:
    """Number of shards."""
    return -(-n_pairs // shard_pairs)


def part_names(shards: int) -> tuple[str, ...]:
    """Parts in which shards can be read apart: the first alone, which settles facts of all, then `PART_SHARDS` each."""
    if shards <= PART_SHARDS:
        return ()
    bounds = [0, *range(1, shards, PART_SHARDS), shards]
    return tuple(f"shards-{first:05d}-{stop:05d}" for first, stop in pairwise(bounds))


def part_shards(part: str) -> range:
    """The shards of a part."""
    first, stop = part.split("-")[1:]
    return range(int(first), int(stop))


def shard_name(index: int) -> str:
    """Payload file of a shard."""
    return f"shard-{index:05d}.safetensors"


def shard_scratch(index: int) -> str:
    """Scratch file with a shard's rewards, head vectors and counts, its ending left out."""
    return f"{PART_SCRATCH}rewards-{index:05d}"


def publish_shard(work: WorkArea, index: int, result: ShardResult) -> None:
    """Publish a shard; its own file last, so that a shard that is there is whole."""
    from safetensors.torch import save_file

    publish_rewards(work, shard_scratch(index), result)
    if result.residuals is not None:
        r = result.residuals
        with work.publish(f"residual-{index:05d}.safetensors") as path:
            tensors = {"h": r.h_TD, "covered": r.covered_T, "pair": r.pair_n, "side": r.side_n, "length": r.length_n}
            save_file(tensors, path)
    with work.publish(shard_name(index)) as path:
        tensors = {"x": result.x_BD, "pair": result.pair_B, "side": result.side_B}
        save_file({**tensors, "position": result.position_B, "flags": result.flags_B}, path)


def publish_rewards(work: WorkArea, name: str, result: ShardResult) -> None:
    """Keep rewards and head vectors of a shard (chosen and rejected alternate) in scratch, and how many positions it has: all,
    and those with each of `_FLAGS`.
    """
    import torch
    from safetensors.torch import save_file

    counts = [len(result.flags_B), *(int(((result.flags_B & bit) != 0).sum()) for bit in _FLAGS.values())]

    tensors = {"rewards_chosen": result.rewards_R[0::2], "rewards_rejected": result.rewards_R[1::2]}
    tensors |= {"chosen": result.head_RH[0::2], "rejected": result.head_RH[1::2], "counts": torch.tensor(counts)}
    with work.publish(f"{name}.safetensors", scratch=True) as path:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def has_scratch(work: WorkArea, name: str) -> bool:
    """Whether a scratch file was published."""
    return (work.scratch / name).is_file()


def publish_facts(work: WorkArea, name: str, facts: Any) -> None:
    """Keep small facts in scratch as JSON."""
    with work.publish(name, scratch=True) as path:
        path.write_text(json.dumps(facts))


def read_facts(work: WorkArea, name: str) -> Any:
    """Facts from scratch, or None."""
    return json.loads((work.scratch / name).read_bytes()) if has_scratch(work, name) else None


def read_pass_facts(work: WorkArea) -> dict[str, Any]:
    """Facts the pass left in scratch: norm_median, and partial_forward_drift where residual streams were kept."""
    return {**(read_facts(work, "norm.json") or {}), **(read_facts(work, "partial.json") or {})}


def publish_reward_table(work: WorkArea, name: str, parts: Sequence[str], pair_ids: pa.ChunkedArray) -> None:
    """Join the shards' rewards to one table: pair, pair_id, reward_chosen, reward_rejected."""
    import numpy as np
    import pyarrow as pa

    chosen, rejected = (np.concatenate(list(_column(work, parts, f"rewards_{side}"))) for side in ("chosen", "rejected"))
    table = pa.table(
        {
            "pair": pa.array(np.arange(len(chosen)), pa.int32()),
            "pair_id": pair_ids,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
    )
    with work.publish(name) as path, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def publish_head(work: WorkArea, parts: Sequence[str], n_pairs: int, d_head: int) -> None:
    """Join the shards' head vectors to `head.safetensors`, one shard in memory at a time."""
    size = n_pairs * d_head * 4
    entries = {"chosen": [0, size], "rejected": [size, 2 * size]}
    header = {side: {"dtype": "F32", "shape": [n_pairs, d_head], "data_offsets": at} for side, at in entries.items()}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with work.publish("head.safetensors") as path, path.open("wb") as sink:
        sink.write(len(raw).to_bytes(8, "little") + raw)
        for side in entries:
            for array in _column(work, parts, side):
                sink.write(array.tobytes())


def count_positions(work: WorkArea, parts: Sequence[str]) -> dict[str, Any]:
    """n_positions and how many of them carry each flag, over the shards whose scratch files these are."""
    total, *flagged = sum(_column(work, parts, "counts")).tolist()
    return {"n_positions": total, "flags": dict(zip(_FLAGS, flagged, strict=True))}


def _column(work: WorkArea, parts: Sequence[str], name: str) -> Iterable[Any]:
    from safetensors import safe_open

    for part in parts:
        with safe_open(work.scratch / f"{part}.safetensors", framework="np") as handle:
            yield handle.get_tensor(name)
