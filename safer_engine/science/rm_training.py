"""Training of a reward model on preference pairs with the Bradley–Terry loss.

The trainer holds no file, no clock and no global random state: what is random (order of pairs, dropout) follows from
the seed and the step, so that a training that was stopped and restored goes on exactly as one that was not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from safer_engine.errors import NumericalError, SpecError
from safer_engine.science.sharding import ALONE, Share, laid_out_as, whole

MEGABATCH = 16
"""Batches whose pairs are sorted by length together: little padding, and still another order in each epoch."""


@dataclass(frozen=True)
class TokenPairs:
    """Tokenised pairs, row by row.

    Attributes:
        pair_id: unique ids; the order of training depends on them, not on the order of the rows.
        chosen, rejected: token ids of the two sides, as the reward model reads them.
    """

    pair_id: tuple[str, ...]
    chosen: tuple[NDArray[np.int32], ...]
    rejected: tuple[NDArray[np.int32], ...]

    def __post_init__(self) -> None:
        if not len(self.pair_id) == len(self.chosen) == len(self.rejected) == len(set(self.pair_id)):
            raise ValueError("pair ids must be unique, with two sides each")

    def __len__(self) -> int:
        return len(self.pair_id)

    def length(self, row: int) -> int:
        """Tokens of a pair's longer side."""
        return max(len(self.chosen[row]), len(self.rejected[row]))


@dataclass(frozen=True)
class OptimSettings:
    """What a trainer needs besides model and pairs; see `train_spec.RecipeSpec` for the meaning of each.

    `batch_tokens` bounds the tokens of one forward pass, padding included (a pair that is longer goes alone). `steps`: optimiser
    steps of the whole training, however many pairs there are; None: those of `epochs`.
    """

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    schedule: Literal["linear", "cosine"]
    warmup: float
    clip: float
    centring: float
    seed: int
    batch_tokens: int
    bfloat16: bool
    steps: int | None = None


@dataclass(frozen=True)
class StepStats:
    """One optimiser step: mean loss and pair accuracy of its batch (before the step), rate, gradient norm, real tokens."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    tokens: int


@dataclass(frozen=True)
class PairRewards:
    """Rewards of both sides, float64 [P], in the order of the pairs."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]

    @property
    def margin(self) -> NDArray[np.float64]:
        """Reward margin r(chosen) − r(rejected)."""
        return self.chosen - self.rejected


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, centring: float = 0.0) -> Tensor:
    """Per-pair −log σ(r+ − r−) (+ centring · (r+ + r−)²), [B], ≥ 0.

    Source: arXiv 2507.00665 eq. 1; the centring term is that of arXiv 2312.09244.
    """
    loss_B = -F.logsigmoid(chosen_B - rejected_B)
    return loss_B + centring * (chosen_B + rejected_B) ** 2 if centring else loss_B


def rate_factor(step: int, n_steps: int, warmup: float, schedule: Literal["linear", "cosine"]) -> float:
    """Share of the peak learning rate used in a step (0-based), in (0, 1]: rises linearly, then falls towards zero."""
    rising = math.ceil(warmup * n_steps)
    if step < rising:
        return (step + 1) / rising
    left = (n_steps - step) / max(1, n_steps - rising)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def epoch_batches(pairs: TokenPairs, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of each optimiser step of an epoch, every row exactly once.

    The order is by sha256 of (seed, epoch, pair id); within `MEGABATCH` batches pairs are then sorted by length, and the
    batches of the epoch are put in hashed order again, so that lengths don't come in waves.
    """
    order = sorted(range(len(pairs)), key=lambda row: _hashed(seed, epoch, pairs.pair_id[row]))
    span = batch * MEGABATCH
    batches: list[list[int]] = []
    for start in range(0, len(order), span):
        by_length = sorted(order[start : start + span], key=pairs.length)
        batches += [by_length[at : at + batch] for at in range(0, len(by_length), batch)]
    return sorted(batches, key=lambda rows: _hashed(seed, epoch, pairs.pair_id[rows[0]] + "/batch"))


def micro_batches(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Split rows into runs of near-equal length with 2 · n · longest ≤ batch_tokens (at least one row each)."""
    runs: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row], reverse=True):
        longest = lengths[runs[-1][0]] if runs else 0
        if runs and 2 * (len(runs[-1]) + 1) * longest <= batch_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def init_head(model: nn.Module, names: Sequence[str], std: float, generator: torch.Generator) -> None:
    """Give the named parameters fresh values, in name order: matrices normal(0, std), biases 0, other vectors (norms) 1."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            weight = parameters[name]
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)


def silence_dropout(model: nn.Module) -> int:
    """Set every dropout of a model to zero; returns how many there were.

    Attention blocks hold their rate as a plain number, which they pass to the attention function.
    """
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
            found += 1
        for name in ("dropout_prob", "attention_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return found


class RewardTrainer:
    """Trains a model in place, one optimiser step a call.

    Args:
        model: maps input_ids, attention_mask [N, T] to an output whose `.logits` is [N, 1]; it is put in training mode.
        pairs: what to learn from.
        settings: how.
        pad_id: token id that fills short sequences.
        share: of this process, where several train the model together; its weights are in shards then.

    Raises:
        SpecError: there is nothing to train on, or no weight to train.
    """

    def __init__(self, model: nn.Module, pairs: TokenPairs, settings: OptimSettings, pad_id: int, share: Share = ALONE) -> None:
        self.model = model
        self.share = share
        self.pairs = pairs
        self.settings = settings
        self.done = 0
        self._pad_id = pad_id
        self._lengths = [pairs.length(row) for row in range(len(pairs))]
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not self._trained or not len(pairs):
            raise SpecError("there is nothing to train", "give a base with trainable weights and a dataset with pairs")
        decayed = [weight for weight in self._trained.values() if weight.ndim > 1]
        others = [weight for weight in self._trained.values() if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, fused=True)
        self._epoch_plan: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(self.pairs) / self.settings.batch)

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.settings.steps or self.steps_per_epoch * self.settings.epochs

    def step(self) -> StepStats:
        """Take one optimiser step (collective, see `Share`). Raises NumericalError when loss or gradient is not finite."""
        settings, rows, step, share = self.settings, self._rows(self.done), self.done, self.share
        device = next(iter(self._trained.values())).device
        rate = settings.lr * rate_factor(step, self.n_steps, settings.warmup, settings.schedule)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self.model.train()
        losses, right, tokens = 0.0, 0, 0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(_hashed(settings.seed, step, f"dropout{share.rank or ''}")[:7], "big"))
            for run, weight in self._runs(rows):
                sides = [self.pairs.chosen[row] for row in run] + [self.pairs.rejected[row] for row in run]
                reward_N = forward_rewards(self.model, sides, self._pad_id, settings.bfloat16)
                chosen_B, rejected_B = reward_N[: len(run)], reward_N[len(run) :]
                loss = bradley_terry_loss(chosen_B, rejected_B, settings.centring).sum()
                mean = loss / len(rows) * (weight * share.of)  # gradients are averaged over the processes
                mean.backward()  # type: ignore[no-untyped-call]
                losses += weight * float(loss.detach())
                right += weight * int((chosen_B > rejected_B).sum())
                tokens += weight * sum(len(side) for side in sides)
        norm = float(whole(nn.utils.clip_grad_norm_(list(self._trained.values()), settings.clip)))
        losses, right, tokens = (
            number(value) for number, value in zip((float, int, int), share.total(losses, right, tokens), strict=True)
        )
        if not (math.isfinite(losses) and math.isfinite(norm)):
            raise NumericalError(f"training diverged at step {step}: loss {losses}, gradient norm {norm}", "lower --lr")
        self._adam.step()
        self._adam.zero_grad()
        self.done += 1
        epoch = self.done / self.steps_per_epoch
        return StepStats(self.done, epoch, losses / len(rows), right / len(rows), rate, norm, tokens)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return list(self._trained.values())

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs, by name: trained weights, both moments of Adam, steps done (collective, see `Share`).

        Tensors are shared; where several processes train, they are whole in each.
        """
        tensors = {"done": torch.tensor(self.done, dtype=torch.int64)}
        for name, weight in self._trained.items():
            tensors[f"weight/{name}"] = whole(weight.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                if weight in self._adam.state:
                    tensors[f"{moment}/{name}"] = whole(self._adam.state[weight][moment])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state` of a trainer of the same model, pairs and settings, however many processes shared it.

        A training that is done needs no moments, and gets none.
        """
        self.done = int(tensors["done"])
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(laid_out_as(tensors[f"weight/{name}"], weight))
                if 0 < self.done < self.n_steps:
                    moments = {key: laid_out_as(tensors[f"{key}/{name}"], weight) for key in ("exp_avg", "exp_avg_sq")}
                    count = torch.tensor(float(self.done), device=weight.device)
                    self._adam.state[weight] = {"step": count, **moments}

    def _runs(self, rows: Sequence[int]) -> list[tuple[list[int], int]]:
        """Rows of each forward pass of this process, and 1; 0 for a pass that only keeps step with the other processes."""
        dealt = sorted(rows, key=lambda row: self._lengths[row])
        share, tokens = self.share, self.settings.batch_tokens
        runs = [micro_batches(dealt[rank :: share.of], self._lengths, tokens) for rank in range(share.of)]
        mine, turns = runs[share.rank], max(map(len, runs))
        return [(run, 1) for run in mine] + [([dealt[0]], 0)] * (turns - len(mine))

    def _rows(self, step: int) -> list[int]:
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch_plan[0] != epoch:
            self._epoch_plan = (epoch, epoch_batches(self.pairs, self.settings.batch, self.settings.seed, epoch))
        return self._epoch_plan[1][at]


def forward_rewards(model: nn.Module, sides: Sequence[NDArray[np.int32]], pad_id: int, bfloat16: bool) -> Tensor:
    """Rewards of token sequences in one forward pass, float32 [N]; short sequences are filled on the right."""
    device = next(model.parameters()).device
    width = max(len(side) for side in sides)
    ids_NT = np.full((len(sides), width), pad_id, dtype=np.int64)
    mask_NT = np.zeros((len(sides), width), dtype=np.int64)
    for row, side in enumerate(sides):
        ids_NT[row, : len(side)] = side
        mask_NT[row, : len(side)] = 1
    precision: AbstractContextManager[Any] = nullcontext()
    if bfloat16:
        precision = torch.autocast(device.type, dtype=torch.bfloat16)
    with precision:
        output = model(input_ids=torch.from_numpy(ids_NT).to(device), attention_mask=torch.from_numpy(mask_NT).to(device))
    logits: Tensor = output.logits
    return logits[:, 0].float()


def pair_rewards(model: nn.Module, pairs: TokenPairs, pad_id: int, batch_tokens: int, bfloat16: bool) -> PairRewards:
    """Rewards of all pairs in evaluation mode, length-sorted under the token budget. Raises NumericalError if not finite."""
    lengths = [pairs.length(row) for row in range(len(pairs))]
    found = np.full((2, len(pairs)), np.nan)
    model.eval()
    with torch.inference_mode():
        for run in micro_batches(range(len(pairs)), lengths, batch_tokens):
            sides = [pairs.chosen[row] for row in run] + [pairs.rejected[row] for row in run]
            reward_N = forward_rewards(model, sides, pad_id, bfloat16).double().cpu().numpy()
            found[:, run] = reward_N.reshape(2, len(run))
    if not np.isfinite(found).all():
        raise NumericalError("the trained model gives rewards that are not finite", "lower --lr, or train in float32")
    return PairRewards(found[0], found[1])


def _hashed(seed: int, unit: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{unit}/{name}".encode()).digest()
