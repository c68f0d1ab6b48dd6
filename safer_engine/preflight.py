"""Preflight: the checks that need the model in memory, without an audit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from safer_engine.artifacts import PairSet
from safer_engine.errors import SpecError
from safer_engine.pipeline import AuditRequest
from safer_engine.preview import Preview, preview
from safer_engine.spec import SaeSpec

_SAMPLE_PAIRS = 32


@dataclass(frozen=True)
class Preflight:
    """What the checks found.

    Attributes:
        model: facts about the loaded model.
        invariance: how its rewards move with batching and padding.
        example: the first pair as the model reads it, response tokens marked.
    """

    model: dict[str, Any]
    invariance: dict[str, Any]
    example: Preview


def preflight(request: AuditRequest, pairs: PairSet) -> Preflight:
    """Load the model and try it on the first pairs.

    Raises:
        ModelRefused, SpecError: whatever an audit would refuse.
    """
    from safer_engine.science.extraction import batch_plan
    from safer_engine.science.hooks import check_layer
    from safer_engine.science.invariance import measure_invariance, require_invariance
    from safer_engine.science.reward_model import hook_layer
    from safer_engine.sources.model_loading import load_reward_model

    spec = request.spec
    rm = load_reward_model(request.sources.model, spec.model, spec.runtime)
    check_layer(rm, hook_layer(rm.info.n_blocks, spec.hook.layer, spec.hook.depth))
    _check_latents(spec.sae, rm.info.d_in)
    table = pairs.pairs.slice(0, _SAMPLE_PAIRS)
    ids = [[cell.values.to_numpy() for cell in table[f"{side}_ids"]] for side in ("chosen", "rejected")]
    found = measure_invariance(rm, list(zip(*ids, strict=True)), batch_plan(rm, spec.runtime.batch_tokens))
    require_invariance(found)
    return Preflight(
        model=dataclasses.asdict(rm.info),
        invariance={**dataclasses.asdict(found), "finding": found.sentence()},
        example=preview(request.sources.model, spec.model, request.sources.dataset, spec.dataset, spec.runtime.trust_remote_code),
    )


def _check_latents(spec: SaeSpec, d_in: int) -> None:
    d_sae = spec.d_sae or spec.expansion * d_in
    if spec.k > d_sae:
        raise SpecError(f"sae.k is {spec.k}, more than the SAE's {d_sae} latents", f"set sae.k to at most {d_sae}")
