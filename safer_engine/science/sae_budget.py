"""How long an SAE is trained: batch, steps and learning rate from the data there is. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safer_engine.errors import NumericalError, SpecError
from safer_engine.spec import SaeSpec

_SMALLEST_BATCH = 512
_LONG_RUN = 40_000
_HIGHEST_LR = 5e-3


@dataclass(frozen=True)
class TrainingSize:
    """Positions per step, and number of steps."""

    batch: int
    steps: int


def sae_width(spec: SaeSpec, d_in: int) -> int:
    """Number of latents for inputs of width d_in."""
    return spec.d_sae or spec.expansion * d_in


def refuse_too_many_active(spec: SaeSpec, d_sae: int) -> None:
    """Raise SpecError when more latents are to be active than there are."""
    if spec.k > d_sae:
        raise SpecError(f"sae.k is {spec.k}, more than the SAE's {d_sae} latents", f"set sae.k to at most {d_sae}")


def training_size(spec: SaeSpec, n_positions: int) -> TrainingSize:
    """Batch and steps for n training positions.

    The number of updates decides the quality of a short run, the number of positions its cost. So where `passes` over the
    data would give fewer than `min_steps` full batches, batches are smaller first (down to 512), and only then is the data
    passed more often. Raises NumericalError when there is no position to train on.
    """
    if n_positions < 1:
        raise NumericalError("no position is left to train the SAE on", "audit more pairs, or widen hook.positions")
    wanted = spec.passes * n_positions
    batch = spec.batch
    if spec.min_steps:
        batch = min(batch, max(_SMALLEST_BATCH, int(wanted // spec.min_steps)))
    batch = min(batch, n_positions)
    steps = min(max(math.ceil(wanted / batch), spec.min_steps, 1), spec.max_steps)
    return TrainingSize(batch, steps)


def default_lr(d_sae: int, steps: int) -> float:
    """2e-4 / √(d_sae / 2¹⁴) for runs of 40 000 steps and more; shorter ones get √(40 000 / steps) times that, up to 5e-3."""
    base = 2e-4 / math.sqrt(d_sae / 2**14)
    return max(base, min(base * math.sqrt(_LONG_RUN / steps), _HIGHEST_LR))
