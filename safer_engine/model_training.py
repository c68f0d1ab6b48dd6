"""The training of one reward model from a base: in this process, or shared by several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safer_engine.machine import resolve_device
from safer_engine.sources.base_models import BaseModel, BaseTokenizer, add_lora, load_base
from safer_engine.sources.resolved import ResolvedModel
from safer_engine.train_loop import Checkpoints, train_to_end
from safer_engine.train_spec import TrainSpec

if TYPE_CHECKING:
    from safer_engine.science.rm_training import OptimSettings, RewardTrainer, StepStats, TokenPairs
    from safer_engine.science.sharding import Share

_SMALL = 100_000_000
Told = Callable[[int, int], bool]
"""Told (steps done, all steps) of a training after each of them; true stops."""


@dataclass(frozen=True)
class Training:
    """A model to be trained; `steps`: as in `OptimSettings`."""

    spec: TrainSpec
    base: ResolvedModel
    ready: BaseTokenizer
    pairs: TokenPairs
    steps: int | None = None

    def load(self) -> tuple[BaseModel, Any]:
        """The base, and the model to train: itself, or with adapters; on the CPU. Raises ModelRefused, SpecError."""
        from safer_engine.science.rm_training import silence_dropout

        base = load_base(self.base, self.ready, self.spec.runtime, self.spec.seed)
        model = add_lora(base, self.spec.lora, self.spec.seed) if self.spec.lora else base.model
        if not self.spec.recipe.dropout:
            silence_dropout(model)
        return base, model

    def trainer(self, base: BaseModel, model: Any, device: str, share: Share | None = None) -> RewardTrainer:
        """The trainer of a model that `load` gave, which is on the device already. Raises SpecError."""
        from safer_engine.science.rm_training import RewardTrainer
        from safer_engine.science.sharding import ALONE

        settings = replace(optim_settings(self.spec, base.n_parameters, device), steps=self.steps)
        return RewardTrainer(model, self.pairs, settings, self.ready.tokenizer.pad_token_id, share or ALONE)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in memory, on its device, and the course of its training."""

    base: BaseModel
    trainer: RewardTrainer
    curve: list[StepStats]

    @property
    def model(self) -> Any:
        """The model that was trained."""
        return self.trainer.model


def train(training: Training, checkpoints: Checkpoints, told: Told) -> TrainedModel:
    """Train a model to its end, from its last checkpoint, in as many processes as `runtime.processes` says.

    Raises:
        NumericalError: it diverged. Interrupted: `told` asked to stop; the state is kept. ResourceError: a process of several
            ended. ModelRefused, SpecError.
    """
    device = resolve_device(training.spec.runtime.device)
    if training.spec.runtime.processes > 1:
        from safer_engine.sharded_training import train_in_processes

        train_in_processes(training, checkpoints, told)  # leaves the last state as checkpoint
    base, model = training.load()
    trainer = training.trainer(base, model.to(device), device)
    return TrainedModel(base, trainer, train_to_end(trainer, checkpoints, told))


def optim_settings(spec: TrainSpec, n_parameters: int, device: str) -> OptimSettings:
    """The trainer's settings, with every `auto` and default that depends on model or device decided."""
    from safer_engine.science.rm_training import OptimSettings

    recipe = spec.recipe
    default_lr = 2e-4 if spec.lora else 5e-5 if n_parameters < _SMALL else 2e-5
    shared = recipe.model_dump(include={"epochs", "batch", "weight_decay", "schedule", "warmup", "clip", "centring"})
    return OptimSettings(
        **shared,
        lr=recipe.lr or default_lr,
        seed=spec.seed,
        batch_tokens=spec.runtime.batch_tokens,
        bfloat16=recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and device.startswith("cuda")),
    )
