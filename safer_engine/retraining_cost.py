"""What retraining would take: as many operations and bytes as its trainings have."""

from __future__ import annotations

from safer_engine.spec import RuntimeSpec
from safer_engine.spec_retraining import RetrainingSpec

_STATE_BYTES, _FROZEN_BYTES = 16, 4
"""Of a weight that is trained: itself, its gradient and both moments in float32; of one that is not."""
_ACTIVATION_BYTES = 64
"""Kept of a token for the backward pass, for each block and dimension."""


def retraining_work(spec: RetrainingSpec | None, tokens: int, parameters: int) -> float:
    """Floating-point operations of all trainings and of reading what they leave out; 0 where nothing is retrained.

    A training sees (folds − 1) / folds of the tokens in every epoch, forward and backward (six operations a token and
    parameter), and there are `folds` of them; each pair is then read once (two).

    Args:
        tokens: of the dataset under audit; parameters: of the base without its embeddings.
    """
    if spec is None:
        return 0.0
    return parameters * tokens * (6.0 * spec.recipe.epochs * (spec.folds - 1) + 2.0)


def retraining_memory(spec: RetrainingSpec | None, runtime: RuntimeSpec, parameters: int, breadth: int) -> float:
    """Bytes at the peak of a training: the weights with their optimiser, and what the backward pass needs of a batch.

    Args:
        breadth: width times number of blocks.
    """
    if spec is None:
        return 0.0
    held = parameters * (_FROZEN_BYTES if spec.lora else _STATE_BYTES)
    return held + runtime.batch_tokens / 2 * breadth * _ACTIVATION_BYTES
