"""Training of a sparse autoencoder: the loop, its schedule, and a state that can be put down and taken up again.

Tied initialisation, decoder bias at the geometric median, unit-norm decoder with the parallel gradient removed, Adam with
linear warm-up and a linear decay at the end, gradient norm clipped, AuxK for dead latents (arXiv 2406.04093), threshold
for batch top-k as a running mean (arXiv 2412.06410). The gradients are in `sae_gradients`.

The run is a function of (params, batches, initial weights): nothing random happens in it, so a state restored from
`TrainingState.tensors` and `facts` continues bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.science.sae import Normalisation, Sae, SaeShape, normalise
from safer_engine.science.sae_budget import default_lr, refuse_too_many_active, sae_width, training_size
from safer_engine.science.sae_gradients import StepOutcome, StepSettings, Weights, step_gradients
from safer_engine.science.topk import block_rows
from safer_engine.spec import SaeSpec

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_CLIP = 1.0
_THRESHOLD_MEMORY = 0.98
_WEISZFELD_STEPS = 100

Batches = Callable[[int], Iterator[Tensor]]
"""Opens the endless sequence of training batches (raw activations [batch, D]) at the n-th batch."""


@dataclass(frozen=True)
class TrainingParams:
    """Everything a training run depends on but data and initial weights.

    Attributes:
        steps: number of updates; warmup_steps at the beginning and decay_steps at the end have a linear rate.
        lr: Adam's rate between them.
        dead_after: a latent is dead when it did not fire in this many positions.
        renorm_every: decoder rows get norm 1 every so many steps; with 1, the gradient's parallel part is removed.
    """

    shape: SaeShape
    batch: int
    steps: int
    lr: float
    warmup_steps: int
    decay_steps: int
    loss: Literal["fvu", "nmse"]
    aux_k: int
    aux_weight: float
    dead_after: int
    renorm_every: int
    matmul: Literal["float32", "bfloat16"]

    @property
    def settings(self) -> StepSettings:
        """What a step's loss depends on."""
        shape = self.shape
        coarse = torch.bfloat16 if self.matmul == "bfloat16" else None
        return StepSettings(shape.kind, shape.k, shape.relu, self.loss, self.aux_k, self.aux_weight, coarse)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0; positive in every step."""
        rising = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        falling = (self.steps - step) / (self.decay_steps + 1)
        return self.lr * min(rising, falling, 1.0)


def plan_training(spec: SaeSpec, normalisation: Normalisation, d_in: int, n_positions: int, device: str) -> TrainingParams:
    """The run that a spec asks for on n training positions.

    Raises NumericalError when there is no position to train on, SpecError when k is larger than the number of latents.
    """
    size = training_size(spec, n_positions)
    d_sae = sae_width(spec, d_in)
    refuse_too_many_active(spec, d_sae)
    shape = SaeShape(spec.kind, d_in, d_sae, spec.k, spec.relu, normalisation)
    on_gpu = torch.device(device).type == "cuda"
    matmul: Literal["float32", "bfloat16"] = spec.dtype if spec.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    return TrainingParams(
        shape=shape,
        batch=size.batch,
        steps=size.steps,
        lr=spec.lr or default_lr(d_sae, size.steps),
        warmup_steps=round(spec.warmup * size.steps),
        decay_steps=round(spec.decay * size.steps),
        loss=spec.loss,
        aux_k=d_in // 2 if spec.aux_k is None else spec.aux_k,
        aux_weight=spec.aux_weight,
        dead_after=spec.dead_after,
        renorm_every=spec.renorm_every,
        matmul=matmul,
    )


@dataclass(frozen=True)
class TrainingProgress:
    """One finished step, counted from 1.

    Attributes:
        positions: positions trained on so far.
        loss, aux_loss: of this step's batch; dead_share: of the latents, before this step.
        lr: rate of this step; l0: mean active latents per position.
    """

    step: int
    positions: int
    loss: float
    aux_loss: float
    dead_share: float
    lr: float
    l0: float


class TrainingState:
    """Weights, Adam moments and counters of a run: mutable, and all that a run has to remember."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.first = Weights(*(torch.zeros_like(weight) for weight in weights))
        self.second = Weights(*(torch.zeros_like(weight) for weight in weights))
        self.since_fired_S = torch.zeros_like(weights.b_enc_S, dtype=torch.int64)
        self.step = 0
        self.threshold_sum = 0.0
        self.threshold_weight = 0.0
        self.is_whole = True
        """False while a step is writing into it: broken off then, it belongs to no step."""

    @property
    def threshold(self) -> float | None:
        """Running mean of the smallest activation kept per batch; None before the first step."""
        return self.threshold_sum / self.threshold_weight if self.threshold_weight > 0 else None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        parts = {"weight": self.weights, "first": self.first, "second": self.second}
        named = {f"{part}.{name}": getattr(of, name) for part, of in parts.items() for name in _NAMES}
        return {**named, "since_fired": self.since_fired_S}

    def facts(self) -> dict[str, Any]:
        """All else, as JSON values (floats survive exactly)."""
        return {"step": self.step, "threshold_sum": self.threshold_sum, "threshold_weight": self.threshold_weight}

    @staticmethod
    def restore(tensors: dict[str, Tensor], facts: dict[str, Any]) -> TrainingState:
        """The state that gave `tensors` and `facts`. Raises ArtifactError where they are not one."""
        try:
            parts = {part: Weights(*(tensors[f"{part}.{name}"] for name in _NAMES)) for part in ("weight", "first", "second")}
            state = TrainingState(parts["weight"])
            state.first, state.second = parts["first"], parts["second"]
            state.since_fired_S = tensors["since_fired"]
            state.step = int(facts["step"])
            state.threshold_sum, state.threshold_weight = float(facts["threshold_sum"]), float(facts["threshold_weight"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"this is not an SAE training state: {error}", "remove the work area and run again") from error
        return state

    def sae(self, shape: SaeShape) -> Sae:
        """The SAE as trained so far."""
        weights = self.weights
        threshold = self.threshold if shape.kind == "batch_topk" else None
        encoder_DS = weights.W_enc_SD.T.contiguous()
        return Sae(shape, encoder_DS, weights.b_enc_S.clone(), weights.W_dec_SD.clone(), weights.b_dec_D.clone(), threshold)


_NAMES = ("W_enc_SD", "b_enc_S", "W_dec_SD", "b_dec_D")


def initial_state(params: TrainingParams, sample_BD: Tensor, generator: torch.Generator) -> TrainingState:
    """Weights before the first step.

    Decoder rows are random directions, the encoder is their transpose, the decoder bias the geometric median of the sample.

    Args:
        sample_BD: raw activations of training positions, on the device to train on.
        generator: a CPU generator.
    """
    shape = params.shape
    x_BD = normalise(sample_BD, shape.normalisation).x_BD
    directions_SD = torch.randn(shape.d_sae, shape.d_in, generator=generator)
    directions_SD = (directions_SD / directions_SD.norm(dim=1, keepdim=True)).to(x_BD.device)
    bias_S = x_BD.new_zeros(shape.d_sae)
    return TrainingState(Weights(directions_SD.clone(), bias_S, directions_SD, geometric_median(x_BD)))


def state_from(sae: Sae) -> TrainingState:
    """A fresh run that begins with the weights of an SAE (fine-tuning)."""
    weights = Weights(sae.W_enc_DS.T.contiguous(), sae.b_enc_S.clone(), sae.W_dec_SD.clone(), sae.b_dec_D.clone())
    return TrainingState(weights)


def geometric_median(x_BD: Tensor) -> Tensor:
    """The point of least summed Euclidean distance to the rows, by Weiszfeld's iteration; float64 inside, dtype of x."""
    points_BD = x_BD.double()
    median_D = points_BD.mean(0)
    for _ in range(_WEISZFELD_STEPS):
        weights_B = 1 / (points_BD - median_D).norm(dim=1).clamp(min=1e-12)
        moved_D = (weights_B @ points_BD) / weights_B.sum()
        shift, median_D = float((moved_D - median_D).norm()), moved_D
        if shift <= 1e-9 * max(float(median_D.norm()), 1e-12):
            break
    return median_D.to(x_BD.dtype)


def train(params: TrainingParams, state: TrainingState, batches: Batches) -> Iterator[TrainingProgress]:
    """Run the steps that are left, changing `state` in place; yields after each.

    While `state.is_whole` it may be exported, between two yields always. Raises NumericalError on a non-finite loss or gradient.
    """
    if state.step >= params.steps:
        return
    for x_BD in batches(state.step):
        yield _step(params, state, x_BD)
        if state.step >= params.steps:
            return


def _step(params: TrainingParams, state: TrainingState, raw_BD: Tensor) -> TrainingProgress:
    x_BD = normalise(raw_BD, params.shape.normalisation).x_BD
    dead_S = state.since_fired_S >= params.dead_after
    n_dead = int(dead_S.sum())
    outcome = step_gradients(state.weights, x_BD, params.settings, dead_S if n_dead else None, state.threshold)
    loss = float(outcome.loss)
    if not (math.isfinite(loss) and math.isfinite(float(outcome.aux_loss))):
        raise NumericalError(f"the SAE's loss is {loss} at step {state.step + 1}", "lower the learning rate (sae.lr)")
    rate = params.rate(state.step)
    state.is_whole = False
    _update(params, state, outcome.gradients, rate)
    _count(state, outcome, len(x_BD))
    state.is_whole = True
    return TrainingProgress(
        step=state.step,
        positions=state.step * params.batch,
        loss=loss,
        aux_loss=float(outcome.aux_loss),
        dead_share=n_dead / params.shape.d_sae,
        lr=rate,
        l0=float(outcome.l0),
    )


def _update(params: TrainingParams, state: TrainingState, gradients: Weights, rate: float) -> None:
    weights = state.weights
    if params.renorm_every == 1:
        _remove_parallel(gradients.W_dec_SD, weights.W_dec_SD)
    norm = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in gradients))
    if not math.isfinite(norm):
        raise NumericalError(f"a gradient is not finite at step {state.step + 1}", "lower the learning rate (sae.lr)")
    if norm > _CLIP:
        for gradient in gradients:
            gradient.mul_(_CLIP / norm)
    _adam(state, gradients, rate)
    if (state.step + 1) % params.renorm_every == 0 or state.step + 1 == params.steps:
        weights.W_dec_SD.div_(weights.W_dec_SD.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _remove_parallel(gradient_SD: Tensor, unit_SD: Tensor) -> None:
    """Take from each row of the gradient its part along the unit row, some rows at a time: no temporary of full size."""
    rows = block_rows(unit_SD.shape[1], unit_SD.device)
    for gradient_RD, unit_RD in zip(torch.split(gradient_SD, rows), torch.split(unit_SD, rows), strict=True):
        along_R1 = (gradient_RD * unit_RD).sum(dim=1, keepdim=True)
        gradient_RD.addcmul_(unit_RD, along_R1, value=-1)


def _adam(state: TrainingState, gradients: Weights, rate: float) -> None:
    """One Adam update (arXiv 1412.6980, algorithm 1), fused: one pass over weights and moments."""
    counts = [torch.tensor(float(state.step), device=weight.device) for weight in state.weights]
    adam(
        list(state.weights),
        list(gradients),
        list(state.first),
        list(state.second),
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=_BETAS[0],
        beta2=_BETAS[1],
        lr=rate,
        weight_decay=0.0,
        eps=_EPS,
        maximize=False,
    )


def _count(state: TrainingState, outcome: StepOutcome, n_positions: int) -> None:
    state.since_fired_S.add_(n_positions).masked_fill_(outcome.fired_S, 0)
    smallest = float(outcome.smallest)
    if math.isfinite(smallest):
        state.threshold_sum = _THRESHOLD_MEMORY * state.threshold_sum + (1 - _THRESHOLD_MEMORY) * smallest
        state.threshold_weight = _THRESHOLD_MEMORY * state.threshold_weight + (1 - _THRESHOLD_MEMORY)
    state.step += 1
