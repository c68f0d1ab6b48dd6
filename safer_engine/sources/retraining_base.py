"""Finding the model that reward models are retrained from: checked and fingerprinted as `train-rm` does it."""

from __future__ import annotations

from pathlib import Path

from safer_engine.errors import ModelRefused
from safer_engine.sources.models import resolve_base
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.spec import RuntimeSpec
from safer_engine.spec_retraining import RetrainingSpec


def resolve_retraining_base(spec: RetrainingSpec | None, runtime: RuntimeSpec, cache: Path | None) -> ResolvedModel | None:
    """The files of `retraining.base`; None where nothing is retrained.

    Args:
        cache: folder where file digests are remembered; None hashes anew.

    Raises:
        ModelRefused: as `resolve_base`.
    """
    if spec is None:
        return None
    try:
        return resolve_base(spec.base, runtime, cache)
    except ModelRefused as error:
        raise ModelRefused(f"retraining.base {spec.base} cannot be used: {error.message}", error.hint) from error
