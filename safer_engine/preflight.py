"""Preflight: the checks that need the model in memory, without an audit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from safer_engine.artifacts import PairSet
from safer_engine.pipeline import AuditRequest

_SAMPLE_PAIRS = 32


@dataclass(frozen=True)
class Preflight:
    """What the checks found.

    Attributes:
        model: facts about the loaded model.
        invariance: how its rewards move with batching and padding.
        example: the first pair as the model reads it, response tokens marked, by side.
    """

    model: dict[str, Any]
    invariance: dict[str, Any]
    example: dict[str, str]


def preflight(request: AuditRequest, pairs: PairSet) -> Preflight:
    """Load the model and try it on the first pairs.

    Raises:
        ModelRefused: whatever an audit would refuse.
    """
    from safer_engine.science.batches import BatchPlan
    from safer_engine.science.invariance import measure_invariance, require_invariance
    from safer_engine.sources.model_loading import load_reward_model

    rm = load_reward_model(request.sources.model, request.spec.model, request.spec.runtime)
    table = pairs.pairs.slice(0, _SAMPLE_PAIRS)
    ids = [[cell.values.to_numpy() for cell in table[f"{side}_ids"]] for side in ("chosen", "rejected")]
    found = measure_invariance(rm, list(zip(*ids, strict=True)), BatchPlan(tokens=request.spec.runtime.batch_tokens))
    require_invariance(found)
    return Preflight(
        model=dataclasses.asdict(rm.info),
        invariance={**dataclasses.asdict(found), "finding": found.sentence()},
        example={side: marked(table.slice(0, 1).to_pylist()[0], side) for side in ("chosen", "rejected")},
    )


def marked(row: dict[str, Any], side: str) -> str:
    """The text of one side with its response between ⟦ ⟧ and · between response tokens."""
    import numpy as np

    from safer_engine.science.rendering import RenderedSide, mark_response

    ids = np.array(row[f"{side}_ids"], dtype=np.int32)
    rendered = RenderedSide(
        text=row[f"{side}_text"],
        ids=ids,
        offsets=np.array(row[f"{side}_offsets"], dtype=np.int32).reshape(-1, 2),
        special=np.zeros(len(ids), dtype=bool),
        start=row[f"{side}_start"],
        end=row[f"{side}_end"],
        truncated=0,
    )
    return mark_response(rendered)
