"""A complete, consistent set of artifacts with known numbers, made without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safer_engine.artifacts import (
    Absent,
    Activations,
    Artifact,
    CausalEffects,
    Edits,
    EvaluationSet,
    Labels,
    Latents,
    PairScores,
    PairSet,
    RetrainedMargins,
    SecondAutoencoder,
    SparseAutoencoder,
    Stability,
    Verification,
    view,
)
from safer_engine.cost import Cost, Planned
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.spec import AuditSpec
from safer_engine.store import LocalArtifactStore, ManifestDraft, digest_bytes
from tests.helpers.fake_pairs import (
    DROPPED,
    HOSTILE,
    LABELS,
    N_CANDIDATES,
    N_FEATURES,
    N_LATENTS,
    actions_of,
    margins_of,
    pair_rows,
    scores_of,
)

PLANNED = Planned(seconds=7.5, peak_memory_bytes=700_000_000, disk_bytes=2_000_000)
"""What every stage was expected to take."""


@dataclass(frozen=True)
class FakeAudit:
    """Artifacts of one audit, and the truths planted in them."""

    spec: AuditSpec
    sources: ResolvedInputs
    found: dict[type[Artifact], Artifact | Absent]
    store: LocalArtifactStore
    rows: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]

    @property
    def planted(self) -> frozenset[str]:
        """Ids of the pairs with a planted wrong label."""
        return frozenset(row["pair_id"] for row in self.rows if row["planted"])


def build(
    root: Path,
    *,
    hostile: bool = False,
    groups: int = 90,
    long_text: int = 0,
    seconds: float = 12.5,
    unplanned: Container[str] = (),
    causal: bool = False,
    **sections: Any,
) -> FakeAudit:
    """Write all artifacts under `root`. `sections` are spec sections; `long_text` lengthens one response.

    All stages but the `unplanned` ones were planned. `causal`: the first four candidates were ablated.
    """
    spec = AuditSpec.model_validate(
        {"model": {"path": "models/tiny-rm"}, "dataset": {"source": {"kind": "local", "path": "data/train.jsonl"}}, **sections}
    )
    store = LocalArtifactStore(root)
    writer = _Writer(store, np.random.default_rng(11), seconds, unplanned)
    pairs = pair_rows(groups, hostile, long_text)
    evaluation = pair_rows(groups // 2, hostile, 0, prefix="eval")
    latents = writer.latents(pairs, hostile)
    found: dict[type[Artifact], Artifact | Absent] = {
        PairSet: writer.pairs(pairs),
        Activations: writer.activations(pairs),
        EvaluationSet: writer.evaluation(evaluation) if spec.evaluation is not None else Absent("no evaluation set was given"),
        SparseAutoencoder: writer.sae(),
        Latents: latents,
        Labels: writer.labels(latents, hostile),
        CausalEffects: writer.causal(latents, hostile) if causal else Absent("causal effects were not asked for"),
        RetrainedMargins: Absent("not asked for"),
        PairScores: writer.pair_scores(pairs),
        Edits: writer.edits(pairs),
        SecondAutoencoder: Absent("a second SAE was not asked for"),
        Stability: Absent("a second SAE was not asked for"),
        Verification: Absent("no model was retrained on the edited data"),
    }
    return FakeAudit(spec, _sources(root, hostile), found, store, pairs, evaluation)


def _sources(root: Path, hostile: bool) -> ResolvedInputs:
    name = f"data/{HOSTILE[0]}.jsonl" if hostile else "data/train.jsonl"
    return ResolvedInputs(
        model=ResolvedModel(path=root, digest=digest_bytes(b"model"), origin="models/tiny-rm"),
        dataset=ResolvedDataset(digest=digest_bytes(b"data"), origin=name, rows=lambda: iter(())),
        evaluation=ResolvedDataset(digest=digest_bytes(b"eval"), origin="data/eval.jsonl", rows=lambda: iter(())),
    )


class _Writer:
    """Commits one artifact after another."""

    def __init__(self, store: LocalArtifactStore, rng: np.random.Generator, seconds: float, unplanned: Container[str]) -> None:
        self._unplanned = unplanned
        self._store = store
        self._seconds = seconds
        self._rng = rng

    def _commit(self, kind: type[Artifact], stage: str, files: dict[str, Any], meta: dict[str, Any]) -> Artifact:
        key = digest_bytes(f"{stage}/{kind.__name__}".encode())
        with self._store.open_work(stage, key) as work:
            for name, content in files.items():
                with work.publish(name) as path:
                    _WRITERS[name.rsplit(".", 1)[1]](path, content)
            draft = ManifestDraft(
                stage_version=1,
                artifact=kind.__name__,
                meta=meta,
                provenance={"python": "3.11.9", "cpus": 2, "device": "cpu", "versions": {"torch": "2.13.0"}},
                cost=Cost(seconds=self._seconds + len(stage), cpu_seconds=20.25, peak_memory_bytes=512 << 20),
                planned=None if stage in self._unplanned else PLANNED,
            )
            stored = self._store.commit(stage, key, work, draft)
        artifact = view(kind, stored)
        assert isinstance(artifact, Artifact)
        return artifact

    def pairs(self, rows: list[dict[str, Any]]) -> Artifact:
        kept, dropped = len(rows), sum(DROPPED.values())
        health = {
            "dataset": {
                "layout": "trl",
                "n_rows": kept + dropped,
                "n_in": kept + dropped,
                "n_kept": kept,
                "dropped": DROPPED,
                "groups": "given",
                "sides_truncated": 3,
                "axes": {"safety": 1},
                "examples": [f"row 3: malformed {HOSTILE[0]}"],
            },
        }
        inputs = [{**row, "status": "scored", "reason": None} for row in rows]
        reasons = [reason for reason, n in DROPPED.items() for _ in range(n)]
        inputs += [
            {
                "row": kept + i, "pair_id": f"lost-{i}", "group": "", "axis": "safety", "subset": "",
                "status": "not_scored", "reason": reason,
            }
            for i, reason in enumerate(reasons)
        ]  # fmt: skip
        columns = ("row", "pair_id", "content_digest", "group", "axis", "subset", "status", "reason")
        files = {
            "pairs.arrow": _table([_pair(row, index % 29 == 0) for index, row in enumerate(rows)]),
            "rows.arrow": _table([{name: row.get(name, "d") for name in columns} for row in inputs]),
            "health.json": health,
        }
        meta = {
            "n_pairs": kept,
            "n_groups": len({row["group"] for row in rows}),
            "tokens": 64 * kept,
            "axes": _counts(rows, "axis"),
            "subsets": _counts(rows, "subset"),
        }
        return self._commit(PairSet, "pairs", files, meta)

    def activations(self, rows: list[dict[str, Any]]) -> Artifact:
        meta = {
            "d_in": 64, "n_blocks": 6, "hook_layer": 4, "hook_name": "model.layers.3", "dtype": "float32", "attention": "sdpa",
            "n_positions": 48_000, "flags": {"special": 512, "high_norm": 9}, "norm_median": 11.5,
            "reward_model": {"architecture": "LlamaForSequenceClassification", "n_parameters": 1_234_567, "head_name": "score"},
            "invariance": {
                "status": "ok", "dtype": "float32", "n_pairs": 16, "margin_sd": 1.1, "batch_drift": 2.1e-6,
                "padding_drift": 1.4e-6, "median_drift": 4e-7, "changed": 0,
            },
        }  # fmt: skip
        return self._commit(Activations, "activations", {"rewards.arrow": self._rewards(rows, 0.9)}, meta)

    def evaluation(self, rows: list[dict[str, Any]]) -> Artifact:
        files = {
            "eval.arrow": _table([_pair(row, False) for row in rows]),
            "eval_rewards.arrow": self._rewards(rows, 0.75),
            "health.json": {"n_in": len(rows) + 4, "n_kept": len(rows), "dropped": {"in_training_data": 4}},
        }
        meta = {"n_pairs": len(rows), "tokens": 64 * len(rows), "min_pairs": 20, "too_few": len(rows) < 20}
        return self._commit(EvaluationSet, "evaluation", files, meta)

    def _rewards(self, rows: list[dict[str, Any]], strength: float) -> pa.Table:
        margins = margins_of(rows, strength)
        base = self._rng.normal(size=len(rows))
        return _table(
            [
                {"pair": i, "pair_id": row["pair_id"], "reward_chosen": base[i] + margins[i], "reward_rejected": base[i]}
                for i, row in enumerate(rows)
            ]
        )

    def sae(self) -> Artifact:
        steps = np.arange(0, 2000, 5)
        curve = [
            {
                "step": int(step), "positions": int(step) * 4096,
                "loss": 0.18 + 0.8 * math.exp(-step / 240) + 0.01 * math.sin(step), "aux_loss": 0.02,
                "dead_share": min(0.05, step / 40_000), "lr": 2e-4,
            }
            for step in steps
        ]  # fmt: skip
        metrics = {
            "fvu": 0.1875, "nmse": 0.171, "l0": 31.6, "dead_share": 0.046875, "dead_window": 200_000, "silent_share": 0.05,
            "n_positions": 4_800, "training": {"n_positions": 43_000, "left_out": {"special": 12}, "lr": 2e-4},
            "density": [0.0 if i % 21 == 0 else 10 ** (-4 + 3.5 * (i / N_LATENTS)) for i in range(N_LATENTS)],
            "recovered": {
                "covered": {
                    "correlation": 0.983, "preference_kept": 0.958, "margin_variance": 0.941,
                    "ablated_correlation": 0.41, "ablated_preference_kept": 0.66, "ablated_margin_change": 0.9,
                },
                "all": {"correlation": 0.917, "preference_kept": 0.902, "margin_variance": 0.829},
            },
            "interpretable": True,
        }  # fmt: skip
        facts = {
            "kind": "topk",
            "d_in": 64,
            "d_sae": N_LATENTS,
            "k": 32,
            "relu": True,
            "normalisation": {"kind": "scalar", "scale": 0.7},
        }
        scalars = {name: metrics[name] for name in ("fvu", "nmse", "l0", "dead_share", "n_positions", "interpretable")}
        files = {"sae.json": facts, "metrics.json": metrics, "curve.arrow": _table(curve)}
        return self._commit(SparseAutoencoder, "sae", files, scalars)

    def latents(self, rows: list[dict[str, Any]], hostile: bool) -> Artifact:
        table = [self._latent(i) for i in range(N_LATENTS)]
        ranked = sorted(range(N_LATENTS), key=lambda i: -abs(table[i]["salience"]))
        for rank, latent in enumerate(ranked[:N_CANDIDATES], start=1):
            table[latent] |= {"candidate": True, "rank": rank}
        subsets = [
            {
                "latent_id": latent, "axis": axis, "subset": subset, "n_groups": 28,
                "salience": float(np.clip(table[latent]["salience"] * scale, -1, 1)), "t": table[latent]["t"] * scale,
            }
            for latent in ranked[:N_CANDIDATES]
            for axis, subset, scale in (("safety", "harmless", 1.2), ("safety", "refusals", 0.9), ("chat", "chat-easy", -0.2))
        ]  # fmt: skip
        contexts = [
            c for latent in ranked[:N_CANDIDATES] for c in self._contexts(latent, rows, table[latent]["salience"], hostile)
        ]
        files = {"latents.arrow": _table(table), "subsets.arrow": _table(subsets), "contexts.arrow": _table(contexts)}
        meta = {
            "estimator": "paired_mean",
            "n_ranked": 500,
            "n_candidates": N_CANDIDATES,
            "totals": {"chosen": 1.0, "rejected": 1.0},
        }
        return self._commit(Latents, "latents", files, meta)

    def causal(self, latents: Artifact, hostile: bool) -> Artifact:
        """Of the candidates by rank: verified ones without which the margin falls and grows, two not verified."""
        assert isinstance(latents, Latents)
        ranked = sorted(row["rank"] or 10**6 for row in latents.latents.to_pylist())[:4]
        by_rank = {row["rank"]: row["latent_id"] for row in latents.latents.to_pylist()}
        judged = zip(ranked, (-0.5, 0.25, 0.01, -0.02), ("yes", "yes", "no", "not measured"), strict=True)
        effects = []
        for rank, margin, verified in judged:
            for axis in (None, "safety"):
                row: dict[str, Any] = {
                    "latent_id": by_rank[rank], "role": "salience", "axis": axis, "n_pairs": 60, "n_groups": 30, "n_fired": 40,
                    "attribution": margin, "p": 0.001, "p_adjusted": 0.004 if verified == "yes" else 0.5, "n_mean": 20,
                }  # fmt: skip
                ends = {"": 0.0, "_lo": -0.005, "_hi": 0.005}
                figures = {"margin": margin, "chosen": margin / 2, "rejected": -margin / 2, "mean_margin": margin}
                row |= {f"{name}{end}": value + shift for name, value in figures.items() for end, shift in ends.items()}
                effects.append(row | {"verified": None if axis else verified})
        subset = HOSTILE[0] if hostile else "refusals"
        sets = [
            {
                "set": name, "n_latents": 2, "axis": axis, "subset": of, "n_pairs": 60, "n_groups": 30, "accuracy": 0.8,
                "ablated": 0.8 + change, "change": change, "change_lo": change - 0.05, "change_hi": change + 0.05,
                "margin": change * 2, "margin_lo": change * 2 - 0.1, "margin_hi": change * 2 + 0.1,
            }
            for name, change in (("safety", -0.2), ("control-1", 0.01), ("control-2", -0.03))
            for axis, of in ((None, None), ("safety", subset))
        ]  # fmt: skip
        order = [
            {"latent_id": i, "attribution": 1.0 / (1 + i), "rank": i + 1} for i in range(latents.latents.num_rows)
        ]  # fmt: skip
        meta = {
            "n_pairs": 60, "n_features": 4, "n_controls": 8, "runs": 900, "margin": {"mean": 1.25, "sd": 0.5},
            "agreement": {"rho": 0.97, "slope": 0.9, "n": 12}, "null": {"pooled": 1280, "distinct": 300, "reason": ""},
            "correlation": {"rho": 0.4, "lo": -0.2, "hi": 0.8, "n": 4}, "verified": {"yes": 2, "no": 1, "not measured": 1},
        }  # fmt: skip
        files = {"effects.arrow": _table(effects), "sets.arrow": _table(sets), "attribution.arrow": _table(order)}
        return self._commit(CausalEffects, "causal", files, meta)

    def _latent(self, index: int) -> dict[str, Any]:
        rate = 0.0 if index % 21 == 20 else float(10 ** self._rng.normal(-2.4, 0.6))
        salience = float(np.tanh(self._rng.standard_t(6) * 0.13)) if rate else 0.0
        if index < N_FEATURES:
            salience = (0.85 - 0.05 * index) * (1 if LABELS[index][2] != "rejected" else -1)
        return {
            "latent_id": index, "firing_rate": min(rate, 0.9), "responses": int(min(rate, 0.2) * 1_500 + (rate > 0)),
            "energy": 3.5,
            "a_chosen": 0.2, "a_rejected": 0.1, "salience": salience, "salience_lo": max(-1.0, salience - 0.07),
            "salience_hi": min(1.0, salience + 0.07), "t": salience * 14, "salience_paper": salience * 0.8, "axis": None,
            "candidate": False, "rank": None,
        }  # fmt: skip

    def _contexts(self, latent: int, rows: list[dict[str, Any]], salience: float, hostile: bool) -> list[dict[str, Any]]:
        side = "chosen" if salience > 0 else "rejected"
        found = []
        for rank in range(6):
            row = rows[(latent * 13 + rank * 7) % len(rows)]
            tokens = [" " + word for word in f"{row['prompt']} Assistant: {row[side]}".split(" ")]
            if hostile:
                tokens[0] = HOSTILE[rank % 4]
            focus = min(len(tokens) - 1, len(row["prompt"].split(" ")) + 2 + (latent + rank) % 9)
            strength = 6.5 - 0.6 * rank
            acts = [round(max(0.0, strength * (1 - 0.35 * abs(i - focus))), 3) for i in range(len(tokens))]
            found.append(
                {
                    "latent_id": latent, "rank": rank + 1, "pair_id": row["pair_id"], "side": side, "position": focus,
                    "activation": strength, "tokens": tokens, "activations": acts, "focus": focus,
                }
            )  # fmt: skip
        return found

    def labels(self, latents: Artifact, hostile: bool) -> Artifact:
        rows = []
        candidates = [row["latent_id"] for row in latents.table("latents.arrow").to_pylist() if row["candidate"]]
        for latent in candidates:
            known = latent < N_FEATURES
            text, rating, direction, terms = LABELS[latent] if known else ("", None, None, [])
            rows.append(
                {
                    "latent_id": latent, "status": "labelled" if known else ("unparsed" if latent % 2 else "too_few_contexts"),
                    "rating": rating, "explanation": f"{text} {HOSTILE[latent % 4]}" if hostile else text, "direction": direction,
                    "terms": [*terms, HOSTILE[latent % 4]] if hostile else terms, "labeller": "lexicon",
                    "safety_feature": bool(rating and rating >= 4), "rank": latent + 1 if rating and rating >= 4 else None,
                    "detection": 0.85 if known else None, "detection_lo": 0.7 if known else None,
                    "detection_hi": 0.93 if known else None, "detection_recall": 0.75 if known else None,
                    "detection_specificity": 0.95 if known else None, "detection_n": 40 if known else None,
                    "detection_problem": None, "rating_again": 4 if latent == 1 else None,
                    "status_again": "labelled" if latent == 1 else None, "corrected_by": "Ana" if latent == 2 else None,
                }
            )  # fmt: skip
        counts = {"labelled": N_FEATURES, "unparsed": 18, "too_few_contexts": 18}
        meta = {
            "rubric": "safety", "labeller": "lexicon", "counts": counts, "calls": 5, "cost": 0.5, "n_safety_features": 8,
            "min_rating": 4, "detection_floor": 0.65, "agreement": {"kappa": 0.7, "lo": 0.5, "hi": 0.9, "same": 0.6, "n": 10},
            "no_agreement": None, "n_again": 10, "n_again_unrated": 1, "n_corrected": 1, "n_corrections_of_others": 2,
            "n_corrections_not_candidates": 0,
            "spent": {"labels": {"calls": 3, "cost": 0.3}, "repeats": {"calls": 2, "cost": 0.2}},
        }  # fmt: skip
        return self._commit(Labels, "labels", {"labels.arrow": _table(rows)}, meta)

    def pair_scores(self, rows: list[dict[str, Any]]) -> Artifact:
        ranked: dict[str, Any] = {
            "kind": "rank",
            "reason": "margin had seen the labels",
            "share": None,
            "lo": None,
            "hi": None,
            "cells": {},
        }
        signals = {"latents": {"weight": 2.0}, "margin": {"weight": 1.0}}
        meta = {"estimator": "fusion", "signals": signals, "folds": 5, "doubts": {"safety": ranked, "chat": ranked}}
        meta |= {"decisions": {"n": 0, "n_open": 0, "n_unknown": 0, "axes": {}}, "standing": {}}
        return self._commit(PairScores, "pair_scores", {"pair_scores.arrow": _table(scores_of(rows))}, meta)

    def edits(self, rows: list[dict[str, Any]]) -> Artifact:
        lines = []
        actions = actions_of(rows)
        for row, score in zip(rows, scores_of(rows), strict=True):
            lines.append({**score, "content_digest": "d", "status": "scored", "reason": None, "action": actions[row["pair_id"]]})
        for index, reason in enumerate([reason for reason, n in DROPPED.items() for _ in range(n)]):
            lines.append(
                {
                    "pair_id": f"lost-{index}",
                    "axis": "safety",
                    "group": "",
                    "status": "not_scored",
                    "reason": reason,
                    "action": "keep",
                }
            )
        meta = {"budget": 0.04, "actions": _counts(lines, "action")}
        return self._commit(Edits, "edits", {"edits.jsonl": lines}, meta)


def _pair(row: dict[str, Any], both_orders: bool) -> dict[str, Any]:
    votes = [1, -1, 1] if row["row"] % 11 == 0 else None
    return {
        **{name: row[name] for name in ("pair_id", "row", "group", "axis", "subset", "prompt", "chosen", "rejected")},
        "content_digest": "d", "style": None, "item": None, "strength": None, "annotators": votes, "both_orders": both_orders,
        "chosen_start": 3, "chosen_end": 3 + len(row["chosen"].split()),
        "rejected_start": 3, "rejected_end": 3 + len(row["rejected"].split()),
    }  # fmt: skip


def _counts(rows: list[dict[str, Any]], column: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column]] = counts.get(row[column], 0) + 1
    return counts


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


_WRITERS: dict[str, Callable[[Path, Any], None]] = {"arrow": _write_arrow, "json": _write_json, "jsonl": _write_lines}
