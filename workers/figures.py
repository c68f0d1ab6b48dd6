"""What metrics say of an artifact that was computed, from its manifest and its counts of rows: numbers, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from safer_engine.store import StoredArtifact

_HEALTH = "health.json"
KEPT = "kept"


def figures_of(stage: str, meta: Mapping[str, Any]) -> dict[str, float]:
    """Name of a figure of `service.infra.stage_figures` → its value."""
    found = {"tokens": meta.get("tokens")}
    if stage == "sae":
        covered = (meta.get("recovered") or {}).get("covered") or {}
        found |= {"sae_fvu": meta.get("fvu"), "sae_dead_share": meta.get("dead_share")}
        found |= {"reward_recovered": covered.get("margin_variance")}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def rows_of(stored: StoredArtifact) -> dict[str, int]:
    """What became of the rows of the dataset that a stage read: `kept`, or why they were dropped → how many."""
    if _HEALTH not in stored.manifest.files:
        return {}
    document = json.loads(stored.path(_HEALTH).read_text(encoding="utf-8"))
    counts = document.get("dataset", document)
    return {fate: int(number) for fate, number in {KEPT: counts["n_kept"], **counts["dropped"]}.items()}
