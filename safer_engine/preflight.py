"""Preflight: what an audit would refuse or warn of, found out without one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.artifacts import PairSet
from safer_engine.evaluation_pairs import shortage, survey_evaluation, write_evaluation_pairs
from safer_engine.pair_tables import drops, unusable
from safer_engine.pipeline import AuditRequest, plan
from safer_engine.preview import Preview, preview
from safer_engine.science.sae_budget import refuse_too_many_active, sae_width
from safer_engine.store import ArtifactStore

_SAMPLE_PAIRS = 32


@dataclass(frozen=True)
class Preflight:
    """What the checks found.

    Attributes:
        model: facts about the loaded model.
        invariance: how its rewards move with batching and padding.
        example: the first pair as the model reads it, response tokens marked.
        evaluation: what became of the evaluation pairs (see `pair_tables.health`); None without an evaluation set.
        warnings: what an audit would go on with, and say.
    """

    model: dict[str, Any]
    invariance: dict[str, Any]
    example: Preview
    evaluation: dict[str, Any] | None
    warnings: tuple[str, ...]


def check_evaluation(request: AuditRequest, store: ArtifactStore) -> None:
    """Refuse an evaluation set that cannot be read as preference pairs; one that this audit has read already is not read again.

    Raises:
        DatasetRefused: see `survey_evaluation`.
    """
    source, spec = request.sources.evaluation, request.spec.evaluation
    if source is None or spec is None or any(p.name == "evaluation" and p.state == "cached" for p in plan(request, store)):
        return
    survey_evaluation(source, spec, request.spec.seed)


def preflight(request: AuditRequest, pairs: PairSet) -> Preflight:
    """Load the model and try it on the first pairs.

    Raises:
        ModelRefused, SpecError, DatasetRefused: whatever an audit would refuse.
    """
    from safer_engine.science.extraction import batch_plan
    from safer_engine.science.hook_place import hook_layer
    from safer_engine.science.hooks import check_layer
    from safer_engine.science.invariance import measure_invariance, require_invariance
    from safer_engine.sources.model_loading import load_reward_model

    spec = request.spec
    apart = _evaluation_health(request, pairs)
    rm = load_reward_model(request.sources.model, spec.model, spec.runtime)
    check_layer(rm, hook_layer(rm.info.n_blocks, spec.hook.layer, spec.hook.depth))
    refuse_too_many_active(spec.sae, sae_width(spec.sae, rm.info.d_in))
    table = pairs.pairs.slice(0, _SAMPLE_PAIRS)
    ids = [[cell.values.to_numpy() for cell in table[f"{side}_ids"]] for side in ("chosen", "rejected")]
    found = measure_invariance(rm, list(zip(*ids, strict=True)), batch_plan(rm, spec.runtime.batch_tokens))
    require_invariance(found)
    return Preflight(
        model=dataclasses.asdict(rm.info),
        invariance={**dataclasses.asdict(found), "finding": found.sentence()},
        example=preview(request.sources.model, spec.model, request.sources.dataset, spec.dataset, spec.runtime.trust_remote_code),
        evaluation=apart,
        warnings=tuple(_warnings(request, pairs.health["dataset"], apart)),
    )


def _warnings(request: AuditRequest, counts: dict[str, Any], apart: dict[str, Any] | None) -> Iterator[str]:
    if lost := unusable(counts["n_in"], counts["n_kept"], counts["dropped"]):
        why = f"dropped: {drops(counts['dropped'])}"
        yield f"{lost} of {counts['n_in']} pairs could not be used ({why}): see the reasons, and check dataset.format and columns"
    minimum = request.spec.evaluation.min_pairs if request.spec.evaluation is not None else 0
    if apart is not None and (short := shortage(apart, minimum)):
        yield short


def _evaluation_health(request: AuditRequest, pairs: PairSet) -> dict[str, Any] | None:
    """What would become of the evaluation pairs: they are rendered, and thrown away."""
    from safer_engine.sources.tokenizers import load_renderer

    spec, source = request.spec, request.sources.evaluation
    if source is None or spec.evaluation is None:
        return None
    renderer = load_renderer(request.sources.model.path, spec.model, spec.runtime.trust_remote_code)
    surveyed = survey_evaluation(source, spec.evaluation, spec.seed, pairs.prompt_keys)
    with tempfile.TemporaryDirectory() as folder:
        return write_evaluation_pairs(Path(folder) / "eval.arrow", source, surveyed, renderer, lambda _done, _total: None)
