"""The steps of a training, one after another, with a checkpoint in a work area now and then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import Interrupted
from safer_engine.store import WorkArea

if TYPE_CHECKING:
    from torch import Tensor

    from safer_engine.science.rm_training import RewardTrainer, StepStats

CHECKPOINT = "checkpoint.safetensors"
_SAVING_SHARE = 0.05
_FORGOTTEN = "none"
Told = Callable[[int, int], bool]
"""Told (steps done, all steps) after each of them; true stops."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its state.

    Attributes:
        every_seconds: between two of them, or more where saving takes long.
        training: which training it is, where several follow one another in a work area; a state of another is not read.
    """

    work: WorkArea
    every_seconds: float
    training: str = ""
    name: str = CHECKPOINT

    def save(self, trainer: RewardTrainer, curve: list[StepStats]) -> None:
        """Keep the trainer's state and the curve so far, in place of the last ones."""
        with self.work.publish(self.name, scratch=True) as path:
            write_state(path, trainer.state(), curve, self.training)

    def forget(self) -> None:
        """No state is found from now on: a training that diverged would diverge again from its last one."""
        from safetensors.torch import save_file

        with self.work.publish(self.name, scratch=True) as path:
            save_file({}, path, metadata={"training": _FORGOTTEN})

    def restore(self, trainer: RewardTrainer) -> list[StepStats]:
        """Bring a trainer to the last state, if there is one; returns the curve until there."""
        path = self.work.fetch(self.name)
        return [] if path is None else restore_state(path, trainer, self.training)


def write_state(path: Path, state: Mapping[str, Tensor], curve: list[StepStats], training: str) -> None:
    """Write what `restore_state` reads."""
    from safetensors.torch import save_file

    facts = {"curve": json.dumps([asdict(stats) for stats in curve]), "training": training}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=facts)


def restore_state(path: Path, trainer: RewardTrainer, training: str) -> list[StepStats]:
    """Bring a trainer to the state of a file; returns the curve until there. A file of another training is not read."""
    from safetensors import safe_open

    from safer_engine.science.rm_training import StepStats

    with safe_open(path, framework="pt") as handle:
        facts = handle.metadata()
        if facts.get("training", "") != training:
            return []
        trainer.restore({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118 - not a mapping
        return [StepStats(**stats) for stats in json.loads(facts["curve"])]


def train_to_end(trainer: RewardTrainer, checkpoints: Checkpoints, told: Told) -> list[StepStats]:
    """Train from the last checkpoint to the end; returns the whole curve.

    Raises:
        Interrupted: `told` asked to stop; the state is kept. NumericalError: training diverged.
    """
    curve = checkpoints.restore(trainer)
    saved, pause = time.monotonic(), checkpoints.every_seconds
    while trainer.done < trainer.n_steps:
        curve.append(trainer.step())
        stop = told(trainer.done, trainer.n_steps)
        if stop or time.monotonic() - saved > pause or trainer.done == trainer.n_steps:
            began = time.monotonic()
            checkpoints.save(trainer, curve)
            saved = time.monotonic()
            pause = max(checkpoints.every_seconds, (saved - began) / _SAVING_SHARE)
        if stop:
            raise Interrupted("stopped on request", "run the same command again to go on")
    return curve
