"""Committed artifacts from which pair scores and edits are made, with planted contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from safer_engine.artifacts import Absent, Activations, Artifact, Labels, Latents, PairSet, RetrainedMargins
from safer_engine.events import NullObserver
from safer_engine.science.pair_scoring import SignalInputs
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.stage import Draft, Inputs, SpecView, Stage, StageContext
from safer_engine.store import LocalArtifactStore, ManifestDraft

KEY = "planted"
SPEC: dict[str, Any] = {"model": {"path": "rm"}, "dataset": {"source": {"kind": "memory"}}}
NOWHERE = ResolvedInputs(ResolvedModel(Path("rm"), "0", "rm"), ResolvedDataset("0", "memory", lambda: iter(())))


class ScoreArtifacts:
    """Writes artifacts into a store, one method per stage."""

    def __init__(self, root: Path) -> None:
        self.store = LocalArtifactStore(root)

    def commit(self, stage: str, kind: type[Any], files: dict[str, Any], meta: dict[str, Any] | None = None) -> Any:
        """Commit Arrow tables (pa.Table) and tensors (dict of torch.Tensor) by file name."""
        with self.store.open_work(stage, KEY) as work:
            for name, value in files.items():
                with work.publish(name) as path:
                    if isinstance(value, pa.Table):
                        with pa.ipc.new_file(str(path), value.schema) as writer:
                            writer.write_table(value)
                    else:
                        save_file(value, path)
            return kind(self.store.commit(stage, KEY, work, ManifestDraft(1, kind.__name__, meta or {})))

    def pairs(self, table: pa.Table, rows: pa.Table) -> PairSet:
        """A pair set; only the columns that scoring and edits read."""
        found: PairSet = self.commit("pairs", PairSet, {"pairs.arrow": table, "rows.arrow": rows}, {"layout": "trl"})
        return found

    def activations(self, data: SignalInputs, shards: dict[str, dict[str, torch.Tensor]], d_in: int) -> Activations:
        """Rewards whose margins are the planted ones, head vectors, shards."""
        n_pairs = len(data.margins_P)
        shuffled = np.random.default_rng(0).permutation(n_pairs)
        rewards = pa.table(
            {
                "pair": pa.array(shuffled, pa.int32()),
                "pair_id": [f"p{i}" for i in shuffled],
                "reward_chosen": data.margins_P[shuffled] + 3.0,
                "reward_rejected": np.full(n_pairs, 3.0),
            }
        )
        assert data.head_delta_PD is not None
        head = {"chosen": torch.from_numpy(data.head_delta_PD), "rejected": torch.zeros(data.head_delta_PD.shape)}
        files = {"rewards.arrow": rewards, "head.safetensors": head, **shards}
        found: Activations = self.commit("activations", Activations, files, {"d_in": d_in})
        return found

    def latents(
        self, data: SignalInputs, salience: np.ndarray, estimator: str = "paired_mean", mixed: tuple[int, ...] = ()
    ) -> Latents:
        """Sums of all latents, and a salience per latent; `mixed` have no one sign."""
        assert data.latents is not None
        acts = {"n_positions": torch.from_numpy(data.latents.n_positions_P2.astype(np.int32))}
        for side, matrix in (("chosen", data.latents.chosen_PS), ("rejected", data.latents.rejected_PS)):
            matrix.sort_indices()
            acts[f"{side}_indptr"] = torch.from_numpy(matrix.indptr.astype(np.int64))
            acts[f"{side}_indices"] = torch.from_numpy(matrix.indices.astype(np.int32))
            acts[f"{side}_sums"] = torch.from_numpy(matrix.data.astype(np.float32))
        ids = np.arange(len(salience))
        signs = {"salience": salience, "salience_paper": -salience, "mixed": np.isin(ids, mixed)}
        table = pa.table({"latent_id": ids, **signs})
        found: Latents = self.commit(
            "latents", Latents, {"acts.safetensors": acts, "latents.arrow": table}, {"estimator": estimator}
        )
        return found

    def labels(self, candidates: list[int], features: list[int], cut: tuple[int, ...] = ()) -> Labels:
        """Candidates, some of which are safety features; `cut` are rated as high but were not kept."""
        rated = {*features, *cut}
        table = pa.table(
            {
                "latent_id": pa.array(candidates, pa.int32()),
                "rating": pa.array([5 if latent in rated else 1 for latent in candidates], pa.int8()),
                "safety_feature": pa.array([latent in features for latent in candidates], pa.bool_()),
            }
        )
        found: Labels = self.commit("labels", Labels, {"labels.arrow": table}, {"min_rating": 4})
        return found

    def run(
        self,
        stage: Stage,
        found: dict[type[Artifact], Artifact | Absent],
        spec: dict[str, Any] | None = None,
        sources: ResolvedInputs = NOWHERE,
    ) -> Any:
        """Run a stage on artifacts and commit what it writes; returns its artifact."""
        audit = AuditSpec.model_validate({**SPEC, **(spec or {})})
        with self.store.open_work(stage.name, KEY) as work:
            view = SpecView(audit, stage.reads)
            context = StageContext(stage.name, view, audit.runtime, sources, work, NullObserver(), audit.seed)
            draft = stage.run(context, Inputs({RetrainedMargins: Absent("not asked for"), **found}))
            assert isinstance(draft, Draft)
            kind = stage.produces.__name__
            return stage.produces(self.store.commit(stage.name, KEY, work, ManifestDraft(1, kind, draft.meta)))


def pair_tables(data: SignalInputs, flipped_orders: tuple[int, ...] = ()) -> tuple[pa.Table, pa.Table]:
    """`pairs.arrow` and `rows.arrow` with one row per pair; `flipped_orders` are the pairs in both orders."""
    n_pairs = len(data.margins_P)
    ids = [f"p{i}" for i in range(n_pairs)]
    pairs = pa.table(
        {
            "pair_id": ids,
            "row": pa.array(range(n_pairs), pa.int64()),
            "content_digest": [f"{i:064x}" for i in range(n_pairs)],
            "group": data.groups_P.tolist(),
            "axis": data.axes_P.tolist(),
            "subset": data.subsets_P.tolist(),
            "strength": pa.nulls(n_pairs, pa.float64()),
            "annotators": pa.nulls(n_pairs, pa.list_(pa.int8())),
            "both_orders": [i in flipped_orders for i in range(n_pairs)],
        }
    )
    rows = pa.table(
        {
            "row": pa.array(range(n_pairs), pa.int64()),
            "pair_id": ids,
            "content_digest": [f"digest-{i}" for i in range(n_pairs)],
            "group": data.groups_P.tolist(),
            "axis": data.axes_P.tolist(),
            "subset": data.subsets_P.tolist(),
            "status": ["scored"] * n_pairs,
            "reason": pa.nulls(n_pairs, pa.string()),
        }
    )
    return pairs, rows
