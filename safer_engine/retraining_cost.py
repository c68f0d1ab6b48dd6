"""What retraining would take: as many operations and bytes as its trainings have."""

from __future__ import annotations

from safer_engine.spec import AuditSpec
from safer_engine.spec_retraining import folds_of

TRAINED = ("retraining", "verification")
"""Stages that train models of their own, from section `retraining`'s base."""
_STATE_BYTES, _FROZEN_BYTES = 16, 4
"""Of a weight that is trained: itself, its gradient and both moments in float32; of one that is not."""
_ACTIVATION_BYTES = 64
"""Kept of a token for the backward pass, for each block and dimension."""


def trains(stage: str, spec: AuditSpec) -> bool:
    """Whether one of the stages `TRAINED` has anything to train."""
    return bool(folds_of(spec.retraining)) if stage == "retraining" else spec.verification is not None


def trained_work(stage: str, spec: AuditSpec, tokens: tuple[int, int], parameters: int) -> float:
    """Floating-point operations of all trainings of a stage and of what is read with them; 0 where it trains nothing.

    A training takes six operations a token and parameter (forward and backward) in every epoch, reading two. `retraining`: each
    of `folds` trainings sees (folds − 1) / folds of the tokens, and each pair is then read once. `verification`: all arms of
    every seed, none stopped early, and each model reads the evaluation pairs.

    Args:
        tokens: of the dataset under audit, and of the evaluation pairs.
        parameters: of the base without its embeddings.
    """
    if spec.retraining is None or not trains(stage, spec):
        return 0.0
    seen, measured = tokens
    epochs = 6.0 * spec.retraining.recipe.epochs
    if stage == "retraining":
        return parameters * seen * (epochs * (spec.retraining.folds - 1) + 2.0)
    trainings = spec.verification.seeds * spec.verification.n_arms if spec.verification is not None else 0
    return trainings * parameters * (epochs * seen + 2.0 * measured)


def trained_memory(stage: str, spec: AuditSpec, parameters: int, breadth: int) -> float:
    """Bytes at the peak of a training: the weights with their optimiser, and what the backward pass needs of a batch.

    Args:
        breadth: width times number of blocks.
    """
    if spec.retraining is None or not trains(stage, spec):
        return 0.0
    held = parameters * (_FROZEN_BYTES if spec.retraining.lora else _STATE_BYTES)
    return held + spec.runtime.batch_tokens / 2 * breadth * _ACTIVATION_BYTES
