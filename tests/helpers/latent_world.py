"""Small artifacts with known content, for the stages that read activations and an SAE: pairs, activations, an SAE."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from safer_engine.artifacts import Absent, Activations, Artifact, PairSet, SparseAutoencoder, view
from safer_engine.events import NullObserver, Observer
from safer_engine.pipeline import AuditRequest, run_stage
from safer_engine.science.sae import Normalisation, Sae, SaeShape
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.stage import Stage
from safer_engine.store import LocalArtifactStore, ManifestDraft, digest_bytes

WORDS = ["sorry", "bomb", "cake", "the", "a", "help", "you", "with", "that", "sugar", "today", "never", "it", "so"]
ENDS = [".", ",", "?", "!", ";", "\n"]


@dataclass(frozen=True)
class Side:
    """One sequence: its tokens, the response's extent, activations at all tokens, and the flags of the covered ones."""

    tokens: list[str]
    start: int
    h: NDArray[np.float32]
    covered: NDArray[np.bool_]
    flags: NDArray[np.uint8]

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def offsets(self) -> list[int]:
        edges = np.cumsum([0, *(len(token) for token in self.tokens)])
        return [int(edge) for pair in itertools.pairwise(edges) for edge in pair]


def draw_side(rng: np.random.Generator, d_in: int) -> Side:
    """Random words and sentence ends; every fourth flagged at random; all response tokens are covered."""
    n, start = int(rng.integers(14, 60)), int(rng.integers(1, 8))
    tokens = [str(rng.choice(ENDS)) if rng.random() < 0.25 else f" {rng.choice(WORDS)}" for _ in range(n)]
    covered = np.arange(n) >= start
    flags = np.where(rng.random(n) < 0.1, rng.integers(1, 3, n), 0).astype(np.uint8)
    flags[-1] = Activations.FLAG_HEAD
    return Side(tokens, start, rng.normal(size=(n, d_in)).astype(np.float32), covered, flags)


def draw_sae(rng: np.random.Generator, d_in: int, d_sae: int, k: int, kind: str = "layernorm", relu: bool = False) -> Sae:
    """Random weights, not trained; with half of the latents active, some of the active ones are negative."""
    shape = SaeShape("topk", d_in, d_sae, k, relu, Normalisation(kind))  # type: ignore[arg-type]

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=size).astype(np.float32)) * 0.3

    return Sae(shape, draw(d_in, d_sae), draw(d_sae), draw(d_sae, d_in), draw(d_in))


@dataclass
class LatentWorld:
    """Artifacts in a store. `sides[pair]` is (chosen, rejected)."""

    root: Path
    sides: list[tuple[Side, Side]]
    sae: Sae
    groups: list[str]
    axes: list[str]
    subsets: list[str]
    shard_pairs: int = 7
    spec_sections: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = LocalArtifactStore(self.root)
        self.found: dict[type[Artifact], Artifact | Absent] = {
            PairSet: self._commit(PairSet, {"pairs.arrow": self._pairs()}, {}),
            Activations: self._commit(Activations, self._shards(), {"d_in": self.sae.shape.d_in}),
            SparseAutoencoder: self._commit(
                SparseAutoencoder, {"sae.safetensors": self.sae.tensors(), "sae.json": self.sae.facts()}, {}
            ),
        }

    @property
    def spec(self) -> AuditSpec:
        """The spec, with `spec_sections` merged over what every audit needs."""
        needed = {"model": {"path": "rm"}, "dataset": {"source": {"kind": "local", "path": "d.jsonl"}}}
        return build_spec([Layer("test", {**needed, **self.spec_sections})]).spec

    def run(self, stage: Stage, observer: Observer | None = None, extra: dict[str, str] | None = None) -> Any:
        """Run a stage; its artifact joins the others."""
        sources = ResolvedInputs(
            model=ResolvedModel(path=self.root, digest="m", origin="rm"),
            dataset=ResolvedDataset(digest="d", origin="d.jsonl", rows=lambda: iter(())),
            extra=extra or {},
        )
        stored = run_stage(stage, AuditRequest(self.spec, sources), self.store, self.found, observer or NullObserver())
        self.found[stage.produces] = view(stage.produces, stored)
        return self.found[stage.produces]

    def _pairs(self) -> pa.Table:
        columns: dict[str, Any] = {
            "pair_id": [f"p{pair}" for pair in range(len(self.sides))],
            "prompt": ["".join(pair[0].tokens[: pair[0].start]) for pair in self.sides],
            "group": self.groups,
            "axis": self.axes,
            "subset": self.subsets,
        }
        for number, name in enumerate(("chosen", "rejected")):
            mine = [pair[number] for pair in self.sides]
            columns[f"{name}_text"] = [side.text for side in mine]
            columns[f"{name}_ids"] = pa.array([[1] * len(side.tokens) for side in mine], type=pa.list_(pa.int32()))
            columns[f"{name}_offsets"] = pa.array([side.offsets for side in mine], type=pa.list_(pa.int32()))
            columns[f"{name}_start"] = pa.array([side.start for side in mine], type=pa.int32())
            columns[f"{name}_end"] = pa.array([len(side.tokens) for side in mine], type=pa.int32())
        return pa.table(columns)

    def _shards(self) -> dict[str, Any]:
        shards = {}
        for number, first in enumerate(range(0, len(self.sides), self.shard_pairs)):
            parts: dict[str, list[Any]] = {name: [] for name in ("x", "pair", "side", "position", "flags")}
            for pair in range(first, min(first + self.shard_pairs, len(self.sides))):
                for which, side in enumerate(self.sides[pair]):
                    at = np.flatnonzero(side.covered)
                    parts["x"].append(side.h[at])
                    parts["pair"].append(np.full(len(at), pair, dtype=np.int32))
                    parts["side"].append(np.full(len(at), which, dtype=np.uint8))
                    parts["position"].append(at.astype(np.int32))
                    parts["flags"].append(side.flags[at])
            joined = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
            shards[f"shard-{number:05d}.safetensors"] = joined
        return shards

    def _commit(self, kind: type[Artifact], files: dict[str, Any], meta: dict[str, Any]) -> Artifact | Absent:
        key = digest_bytes(kind.__name__.encode())
        stage = kind.__name__.lower()
        with self.store.open_work(stage, key) as work:
            for name, content in files.items():
                with work.publish(name) as path:
                    _write(path, content)
            return view(kind, self.store.commit(stage, key, work, ManifestDraft(1, kind.__name__, meta)))


def draw_world(root: Path, seed: int = 0, n_pairs: int = 30, k: int = 5, **sections: Any) -> LatentWorld:
    """Random pairs, 16 activations, 40 latents; pairs in groups of one to three, two axes, three subsets."""
    rng = np.random.default_rng(seed)
    sides = [(draw_side(rng, 16), draw_side(rng, 16)) for _ in range(n_pairs)]
    groups = [f"g{group}" for group in np.repeat(np.arange(n_pairs), rng.integers(1, 4, n_pairs))[:n_pairs]]
    axes = ["safety" if int(group[1:]) % 2 else "chat" for group in groups]
    subsets = [axis if axis == "chat" else f"safety-{int(group[1:]) % 4}" for axis, group in zip(axes, groups, strict=True)]
    return LatentWorld(root, sides, draw_sae(rng, 16, 40, k), groups, axes, subsets, spec_sections=sections)


def _write(path: Path, content: Any) -> None:
    if isinstance(content, pa.Table):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
            writer.write_table(content)
    elif all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, str(path))
    else:
        path.write_text(json.dumps(content))
