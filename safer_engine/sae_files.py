"""Files of the SAE stage: activation shards in chunks, the training checkpoint, the payload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safer_engine.artifacts import Activations
from safer_engine.errors import ArtifactError
from safer_engine.store import WorkArea

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from safer_engine.science.activation_stream import Chunk, Exclusions
    from safer_engine.science.reward_recovered import ResidualPair
    from safer_engine.science.sae import Sae
    from safer_engine.science.sae_training import TrainingState


@dataclass(frozen=True)
class ChunkList:
    """The rows of one purpose.

    Attributes:
        dropped: rows left out by reason; n_rows + Σ dropped = all rows of all shards.
        sum_of_squares: Σ‖x‖² of the rows, float64.
    """

    chunks: list[Chunk]
    dropped: dict[str, int]
    n_rows: int
    sum_of_squares: float


@dataclass(frozen=True)
class ShardRows:
    """Rows of the activation shards, read piece by piece.

    Attributes:
        held_out_P: bool; whether a pair's group is kept from training.
    """

    activations: Activations
    held_out_P: NDArray[np.bool_]

    @cached_property
    def names(self) -> list[str]:
        """Shards in order."""
        return self.activations.names("shard-")

    def training(self) -> ChunkList:
        """All rows to train on."""
        return self._list(wants_held_out=False)

    def held_out(self) -> ChunkList:
        """The rows of held-out groups, of the same kind as those trained on."""
        return self._list(wants_held_out=True)

    def load(self, chunk: Chunk) -> torch.Tensor:
        """The rows of a training chunk: [kept, D]."""
        return self._load(chunk, wants_held_out=False)

    def load_held_out(self, chunk: Chunk) -> torch.Tensor:
        """The rows of a held-out chunk: [kept, D]."""
        return self._load(chunk, wants_held_out=True)

    def _load(self, chunk: Chunk, wants_held_out: bool) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        with safe_open(self.activations.path(self.names[chunk.shard]), framework="pt") as handle:
            flags, pair, x_BD = (handle.get_slice(name)[chunk.start : chunk.stop] for name in ("flags", "pair", "x"))
        kept_B = self._exclude(flags.numpy(), pair.numpy(), wants_held_out).kept_B
        found: torch.Tensor = x_BD[torch.from_numpy(kept_B)]
        return found

    def _list(self, wants_held_out: bool) -> ChunkList:
        from safetensors import safe_open

        from safer_engine.science.activation_stream import cut_chunks

        chunks: list[Chunk] = []
        dropped: dict[str, int] = {}
        squares = 0.0
        for shard, name in enumerate(self.names):
            with safe_open(self.activations.path(name), framework="np") as handle:
                found = self._exclude(handle.get_tensor("flags"), handle.get_tensor("pair"), wants_held_out)
            dropped = {reason: dropped.get(reason, 0) + count for reason, count in found.dropped.items()}
            added = cut_chunks(shard, found.kept_B)
            squares += sum(float(self._load(chunk, wants_held_out).double().square().sum()) for chunk in added)
            chunks += added
        return ChunkList(chunks, dropped, sum(chunk.kept for chunk in chunks), squares)

    def _exclude(self, flags_B: NDArray[np.uint8], pair_B: NDArray[np.int32], wants_held_out: bool) -> Exclusions:
        from safer_engine.science.activation_stream import exclude

        held_out_B = self.held_out_P[pair_B]
        apart = {"not_held_out": ~held_out_B} if wants_held_out else {"held_out": held_out_B}
        special_B = (flags_B & Activations.FLAG_SPECIAL) != 0
        return exclude(len(flags_B), {**apart, "special": special_B, "high_norm": (flags_B & Activations.FLAG_HIGH_NORM) != 0})


@dataclass(frozen=True)
class ResidualRows:
    """Full-sequence residual streams of held-out pairs.

    Attributes:
        ids: token ids of a pair's side (0 chosen, 1 rejected).
    """

    activations: Activations
    held_out_P: NDArray[np.bool_]
    ids: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]

    def __call__(self) -> Iterator[ResidualPair]:
        """The pairs, one file and one pair in memory at a time. Raises ArtifactError where streams and tokens disagree."""
        for name in self.activations.names("residual-"):
            for _, pair in self.of(name):
                yield pair

    def of(self, name: str) -> Iterator[tuple[int, ResidualPair]]:
        """The pairs of one file, ascending, each with its row index."""
        from safetensors import safe_open

        with safe_open(self.activations.path(name), framework="pt") as handle:
            pair_n, side_n, length_n = (handle.get_tensor(part).tolist() for part in ("pair", "side", "length"))
            start_n = [sum(length_n[:index]) for index in range(len(length_n))]
            place = {key: index for index, key in enumerate(zip(pair_n, side_n, strict=True))}
            for pair in sorted(set(pair_n)):
                if self.held_out_P[pair]:
                    spans = [(start_n[place[pair, s]], length_n[place[pair, s]]) for s in (0, 1)]
                    yield pair, self._pair(handle, pair, spans)

    def _pair(self, handle: Any, pair: int, spans: list[tuple[int, int]]) -> ResidualPair:
        import torch

        from safer_engine.science.reward_recovered import ResidualPair

        h, covered = ([handle.get_slice(name)[start : start + n] for start, n in spans] for name in ("h", "covered"))
        ids = [torch.from_numpy(self.ids[side][pair].astype("int64")) for side in (0, 1)]
        if any(len(h[side]) != len(ids[side]) for side in (0, 1)):
            raise ArtifactError(
                f"the residual streams of pair {pair} are not as long as its sequences", "remove them and run again"
            )
        return ResidualPair((h[0], h[1]), (ids[0], ids[1]), (covered[0].bool(), covered[1].bool()))


def save_checkpoint(work: WorkArea, name: str, state: TrainingState, curve: list[dict[str, float]]) -> None:
    """Keep a training state in scratch: one file, so tensors and facts are of the same moment."""
    from safetensors.torch import save_file

    facts = json.dumps({"state": state.facts(), "curve": curve})
    with work.publish(name, scratch=True) as path:
        save_file({key: tensor.contiguous() for key, tensor in state.tensors().items()}, path, {"facts": facts})


def load_checkpoint(work: WorkArea, name: str, device: str) -> tuple[TrainingState, list[dict[str, float]]] | None:
    """The state and curve that were kept, or None."""
    from safetensors import safe_open

    from safer_engine.science.sae_training import TrainingState

    if not (work.scratch / name).is_file():
        return None
    with safe_open(work.scratch / name, framework="pt", device=device) as handle:
        facts = json.loads(handle.metadata()["facts"])
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    return TrainingState.restore(tensors, facts["state"]), facts["curve"]


def publish_sae(work: WorkArea, sae: Sae) -> None:
    """Write `sae.safetensors` and `sae.json`."""
    from safetensors.torch import save_file

    with work.publish("sae.safetensors") as path:
        save_file(sae.tensors(), path)
    publish_json(work, "sae.json", sae.facts())


def publish_json(work: WorkArea, name: str, value: Any) -> None:
    """Write a JSON payload file; a non-finite number is an error."""
    with work.publish(name) as path:
        path.write_text(json.dumps(value, allow_nan=False, indent=1))


def publish_curve(work: WorkArea, curve: list[dict[str, float]]) -> None:
    """Write `curve.arrow`."""
    import pyarrow as pa

    from safer_engine.payload_files import write_table

    whole = {"step", "positions"}
    names = ("step", "positions", "loss", "aux_loss", "dead_share", "lr", "l0")
    columns = {name: pa.array([row[name] for row in curve], pa.int64() if name in whole else pa.float64()) for name in names}
    with work.publish("curve.arrow") as path:
        write_table(path, pa.table(columns))
