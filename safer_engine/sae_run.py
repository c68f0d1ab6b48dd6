"""One SAE from activation shards: scaling, training with checkpoints, measures on held-out groups."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safer_engine import sae_files
from safer_engine.artifacts import Activations, PairSet
from safer_engine.errors import NumericalError
from safer_engine.machine import resolve_device
from safer_engine.splits import held_out_groups
from safer_engine.stage import StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from safer_engine.science.reward_recovered import Rewards
    from safer_engine.science.sae import Normalisation, Sae
    from safer_engine.science.sae_training import Batches, TrainingParams, TrainingState

_BUFFER_BYTES = 1 << 28
_SAMPLE = 8192
_CURVE_POINTS = 500


@dataclass(frozen=True)
class SaeRun:
    """What one stage run works on."""

    ctx: StageContext
    pairs: PairSet
    activations: Activations

    @cached_property
    def device(self) -> str:
        """Where the SAE is trained."""
        return resolve_device(self.ctx.runtime.device)

    @cached_property
    def rows(self) -> sae_files.ShardRows:
        """The shards' rows, with the held-out pairs marked."""
        import numpy as np

        share, seed = self.ctx.spec.split.held_out, self.ctx.base_seed
        groups = self.pairs.pairs.column("group").to_pylist()
        apart = held_out_groups(groups, share, seed)
        return sae_files.ShardRows(self.activations, np.array([group in apart for group in groups], dtype=bool))

    @cached_property
    def training_rows(self) -> sae_files.ChunkList:
        """The rows to train on."""
        return self.rows.training()

    def normalisation(self) -> Normalisation:
        """The input scaling the spec asks for; the scalar comes from all training rows."""
        from safer_engine.science.sae import Normalisation, scalar_scale

        if self.ctx.spec.sae.normalisation == "layernorm":
            return Normalisation("layernorm")
        rows = self.training_rows
        return Normalisation("scalar", scalar_scale(rows.sum_of_squares, rows.n_rows, self.activations.meta["d_in"]))

    def train(self, start: Sae | None = None) -> Trained:
        """The trained SAE; continues from a checkpoint where there is one, else from `start`, else from fresh weights."""
        import torch

        from safer_engine.science.activation_stream import ActivationStream
        from safer_engine.science.sae_training import initial_state, plan_training, state_from

        rows, d_in = self.training_rows, int(self.activations.meta["d_in"])
        normalisation = start.shape.normalisation if start is not None else self.normalisation()
        params = plan_training(self.ctx.spec.sae, normalisation, d_in, rows.n_rows, self.device)
        buffer = max(params.batch, _BUFFER_BYTES // (4 * d_in))
        stream = ActivationStream(rows.chunks, self.rows.load, params.batch, buffer, self.ctx.seed("stream"))
        loop = Loop(self.ctx, "training.safetensors", self.device)

        def fresh() -> TrainingState:
            if start is not None:
                return state_from(start)
            generator = torch.Generator().manual_seed(self.ctx.seed("weights"))
            return initial_state(params, stream.sample(_SAMPLE).to(self.device), generator)

        return loop.run(params, fresh, stream.batches)

    def measure(self, sae: Sae) -> dict[str, Any]:
        """Measures on the held-out rows."""
        from safer_engine.science.sae_metrics import MetricsAccumulator

        held_out = self.rows.held_out()
        found = MetricsAccumulator(sae)
        for done, chunk in enumerate(held_out.chunks):
            found.add(self.rows.load_held_out(chunk).to(self.device))
            self.ctx.progress(done + 1, len(held_out.chunks), "held-out chunks")
        metrics = found.metrics()
        scalars = {"fvu": metrics.fvu, "nmse": metrics.nmse, "l0": metrics.l0, "silent_share": metrics.silent_share}
        left_out = {reason: count for reason, count in held_out.dropped.items() if reason != "not_held_out"}
        return {**scalars, "n_positions": metrics.n_positions, "left_out": left_out, "density": metrics.density_S.tolist()}

    def recovered(self, sae: Sae, rewards: Rewards) -> dict[str, Any]:
        """Reward recovered on held-out pairs, and whether the features may be interpreted."""
        from safer_engine.science.readings import token_ids
        from safer_engine.science.reward_recovered import Unmeasured, reward_recovered

        table = self.pairs.pairs
        ids = (token_ids(table, "chosen"), token_ids(table, "rejected"))
        found = reward_recovered(sae_files.ResidualRows(self.activations, self.rows.held_out_P, ids), sae, rewards)
        if isinstance(found, Unmeasured):
            return {"recovered": None, "recovered_reason": found.reason, "recovered_pairs": 0, "interpretable": False}
        floor = self.ctx.spec.sae.interpretable_floor
        parts = {"covered": asdict(found.covered), "all": asdict(found.all)}
        interpretable = found.covered.margin_variance >= floor
        return {"recovered": parts, "recovered_pairs": found.n_pairs, "interpretable": interpretable}

    def training_facts(self, trained: Trained) -> dict[str, Any]:
        """How the SAE was trained, and on what: n_positions + Σ left_out = positions of all shards."""
        rows, params = self.training_rows, asdict(trained.params)
        params.pop("shape")
        return {"n_positions": rows.n_rows, "left_out": rows.dropped, **params}


@dataclass(frozen=True)
class Trained:
    """An SAE and how it came about.

    Attributes:
        curve: rows of `curve.arrow`.
        dead_share: share of latents that did not fire in the last `dead_window` training positions.
    """

    sae: Sae
    params: TrainingParams
    curve: list[dict[str, float]]
    dead_share: float
    dead_window: int


@dataclass(frozen=True)
class Loop:
    """A training run with checkpoints in scratch under `name`."""

    ctx: StageContext
    name: str
    device: str

    def run(self, params: TrainingParams, fresh: Callable[[], TrainingState], batches: Batches) -> Trained:
        """Train to the end, from the checkpoint where there is one."""
        kept = sae_files.load_checkpoint(self.ctx.work, self.name, self.device)
        state, curve = kept if kept is not None else (fresh(), [])
        if state.step < params.steps:
            try:
                self._train(params, state, curve, batches)
            except NumericalError:  # going on from here would only fail again
                raise
            except BaseException:  # asked to stop, Ctrl-C, or broken down outside: the steps done are worth keeping
                if state.is_whole:
                    sae_files.save_checkpoint(self.ctx.work, self.name, state, curve)
                raise
            sae_files.save_checkpoint(self.ctx.work, self.name, state, curve)
        window = min(params.dead_after, state.step * params.batch)
        dead = float((state.since_fired_S >= window).double().mean())
        return Trained(state.sae(params.shape), params, curve, dead, window)

    def _train(self, params: TrainingParams, state: TrainingState, curve: list[dict[str, float]], batches: Batches) -> None:
        from safer_engine.science.sae_training import train

        def on_device(first: int) -> Iterator[Tensor]:
            return (x_BD.to(self.device) for x_BD in batches(first))

        every = math.ceil(params.steps / _CURVE_POINTS)
        saved = time.monotonic()
        for progress in train(params, state, on_device):
            if progress.step % every == 0 or progress.step in (1, params.steps):
                curve.append(asdict(progress))
            if time.monotonic() - saved >= self.ctx.runtime.checkpoint_seconds:
                sae_files.save_checkpoint(self.ctx.work, self.name, state, curve)
                saved = time.monotonic()
            self.ctx.progress(progress.step, params.steps, "steps")
