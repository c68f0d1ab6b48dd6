"""Finding the language model of a `local_lm` labeller: checked and fingerprinted like a reward model, never with its own code."""

from __future__ import annotations

from pathlib import Path

from safer_engine.errors import ModelRefused
from safer_engine.sources.models import resolve_base
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.spec import RuntimeSpec
from safer_engine.spec_labels import Labeller, LocalLmLabeller


def resolve_labeller(spec: Labeller, cache: Path | None) -> ResolvedModel | None:
    """The files of a labeller's model; None where it has none on this machine.

    Args:
        cache: folder where file digests are remembered; None hashes anew.

    Raises:
        ModelRefused: not found, no config, tokenizer or weights, pickled weights, remote code, or a damaged file.
    """
    if not isinstance(spec, LocalLmLabeller):
        return None
    try:
        return resolve_base(spec.path, RuntimeSpec(), cache)
    except ModelRefused as error:
        raise ModelRefused(f"labels.labeller.path {spec.path} cannot be used: {error.message}", error.hint) from error
