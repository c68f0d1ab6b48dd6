"""The report's tables for machines: evaluation.jsonl, features.parquet, pair_scores.parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.artifacts import CausalEffects, Labels, Latents, PairScores, Stability
from safer_engine.pair_tables import longer_by
from safer_engine.report.columns import by_id, finite

if TYPE_CHECKING:
    import pyarrow as pa

_OF_LABELS = (
    "status", "rating", "explanation", "direction", "terms", "labeller", "safety_feature", "detection", "detection_lo",
    "detection_hi", "detection_recall", "detection_specificity", "detection_n", "detection_problem", "rating_again",
    "status_again", "corrected_by",
)  # fmt: skip
_TEXTS = ("explanation", "direction", "terms")


def write_evaluation(path: Path, table: pa.Table, rewards: pa.Table) -> None:
    """One line for each evaluation pair: pair_id, group, axis, subset, style, margin, longer_by (see `pair_tables.longer_by`).

    Raises:
        ArtifactError: a pair has no reward. NumericalError: a margin is not finite.
    """
    rows = table.select(["pair_id", "group", "axis", "subset", "style"]).to_pylist()
    ids = [row["pair_id"] for row in rows]
    chosen, rejected = (by_id(rewards, ids, f"reward_{side}") for side in ("chosen", "rejected"))
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for row, high, low, tokens in zip(rows, chosen, rejected, longer_by(table).tolist(), strict=True):
            line = {**row, "margin": finite(high - low, f"the margin of {row['pair_id']}"), "longer_by": tokens}
            handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


_OF_EFFECTS = {
    **{f"{side}{end}": f"causal_{side}{end}" for side in ("margin", "chosen", "rejected") for end in ("", "_lo", "_hi")},
    **{"n_fired": "causal_n_fired", "p_adjusted": "causal_p", "verified": "causal_verified"},
}


def features_table(
    latents: Latents,
    labels: Labels | None,
    stability: Stability | None = None,
    causal: CausalEffects | None = None,
    *,
    text: bool,
) -> pa.Table:
    """One row for each candidate latent: its columns in latents.arrow, in stability.arrow (`second_seed_` before them), of
    effects.arrow over all pairs and of attribution.arrow (`causal_` and `attribution`) and, prefixed nowhere, those of its label.

    Args:
        text: false leaves out what was written from texts (explanation, direction, terms).
    """
    import pyarrow.compute as pc

    table = latents.latents
    table = table.filter(pc.field("candidate")).drop_columns(["candidate"]).sort_by([("rank", "ascending")])
    if stability is not None:
        matches = stability.matches
        names = [name if name == "latent_id" else f"second_seed_{name}" for name in matches.column_names]
        table = _joined(table, matches.rename_columns(names))
    if causal is not None:
        effects = causal.effects.filter(pc.field("axis").is_null()).select(["latent_id", *_OF_EFFECTS])
        table = _joined(table, effects.rename_columns(["latent_id", *_OF_EFFECTS.values()]))
        order = causal.table("attribution.arrow").rename_columns(["latent_id", "attribution", "attribution_rank"])
        table = _joined(table, order)
    if labels is None:
        return table
    known = labels.labels.column_names
    wanted = [name for name in _OF_LABELS if name in known and (text or name not in _TEXTS)]
    labelled = labels.labels.select(["latent_id", *wanted, "rank"]).rename_columns(["latent_id", *wanted, "safety_rank"])
    return _joined(table, labelled)


def _joined(table: pa.Table, labels: pa.Table) -> pa.Table:
    """Left join by latent_id, in the order of `table` (Arrow's own join keeps no order and takes no list columns)."""
    import pyarrow as pa

    places = {latent: place for place, latent in enumerate(labels.column("latent_id").to_pylist())}
    rows = pa.array([places.get(latent) for latent in table.column("latent_id").to_pylist()], pa.int64())
    for name in labels.column_names:
        if name != "latent_id":
            table = table.append_column(labels.schema.field(name), labels.column(name).take(rows))
    return table


def scores_table(scores: PairScores) -> pa.Table:
    """All columns of pair_scores.arrow."""
    return scores.scores
