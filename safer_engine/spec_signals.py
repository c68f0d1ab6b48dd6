"""Signals of suspicion by name, and which are fused where the spec does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from safer_engine.spec_retraining import RETRAINED, RetrainingSpec, folds_of

SignalName = Literal["latents", "knn", "probe_cv", "dense", "margin", "retrained", "paper"]
DEFAULT_SIGNALS: dict[SignalName, float] = {"latents": 1.0, "knn": 0.5}
"""Chosen in docs/label-noise.md."""
DEFAULT_SIGNALS_RETRAINED: dict[SignalName, float] = {"latents": 1.0, "knn": 0.5, "retrained": 0.5}
"""The same where section `retraining` is given."""


def with_default_signals(document: Any) -> Any:
    """A spec's document, in which the default signals are written out where models are retrained and nobody named signals."""
    if not isinstance(document, dict) or not _retrains(document.get("retraining")):
        return document
    suspicion = document.get("suspicion", {})
    given = suspicion.model_dump(exclude_unset=True) if isinstance(suspicion, BaseModel) else suspicion
    if not isinstance(given, dict) or "signals" in given or given.get("estimator") == "paper":
        return document
    return {**document, "suspicion": {**given, "signals": dict(DEFAULT_SIGNALS_RETRAINED)}}


def require_retraining(signals: Mapping[SignalName, float], retraining: RetrainingSpec | None) -> None:
    """Refuse a signal that nothing would give. Raises ValueError."""
    if RETRAINED in signals and not folds_of(retraining):
        raise ValueError(
            "suspicion.signals names `retrained`, and no model is retrained: give section retraining with a base "
            "(retraining.base) and folds, or leave the signal out"
        )


def _retrains(section: Any) -> bool:
    """Whether a section of a document asks for folds; what is wrong with it is found later."""
    given = section.model_dump() if isinstance(section, BaseModel) else section
    return isinstance(given, dict) and given.get("folds") != 0
