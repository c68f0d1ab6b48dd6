"""What a reward model's reward becomes when latents are changed in its residual stream.

At every covered position p: x_p ← x_p + c_p Σ_i (z'_{p,i} − z_{p,i}) d_i, d_i the decoder's direction, c_p what undoes the input
scaling (1/s for the scalar; std + eps of the unedited position under LayerNorm, its mean frozen as well). What the SAE does
not reconstruct stays as it is and nothing is encoded again. Then the blocks above the hook point run.
Only positive z are activations; negative values of an SAE that keeps them are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.reward_recovered import Rewards
from safer_engine.science.sae import Sae

_ROWS = 64
"""Positions whose active directions are held at once."""


@dataclass(frozen=True)
class Stream:
    """One sequence after the hooked block, with the latents at its covered positions.

    Attributes:
        h_TD: activations of every token, float32. ids_T: token ids.
        at_N: covered positions. values_NK, indices_NK: positive activations there (0 fills up) and their latents.
        scale_N1: c_p of each covered position.
    """

    h_TD: Tensor
    ids_T: Tensor
    at_N: Tensor
    values_NK: Tensor
    indices_NK: Tensor
    scale_N1: Tensor

    @cached_property
    def _index(self) -> tuple[dict[int, tuple[int, int]], Tensor, Tensor]:
        """Where each latent fires: its span in the two tensors (place among the covered positions, activation)."""
        place_M, slot_M = (self.values_NK > 0).nonzero(as_tuple=True)
        latent_M, order_M = self.indices_NK[place_M, slot_M].sort(stable=True)
        ids, counts = torch.unique_consecutive(latent_M, return_counts=True)
        ends = counts.cumsum(0).tolist()
        spans = dict(zip(ids.tolist(), zip([0, *ends[:-1]], ends, strict=True), strict=True))
        return spans, place_M[order_M], self.values_NK[place_M, slot_M][order_M]

    @cached_property
    def latents(self) -> frozenset[int]:
        """Latents that fire at a covered position."""
        return frozenset(self._index[0])

    def firing(self, latent: int) -> tuple[Tensor, Tensor]:
        """Where a latent fires: places among the covered positions, and z there."""
        spans, place_M, z_M = self._index
        start, end = spans.get(latent, (0, 0))
        return place_M[start:end], z_M[start:end]


@dataclass(frozen=True)
class Edit:
    """z' = factor · z + offset for each of some latents: (0, 0) is zero-ablation, (0, mean) mean-ablation, (2, 0) doubles."""

    latents: tuple[int, ...]
    factor: float = 0.0
    offset: float = 0.0

    def changes(self, firing: frozenset[int]) -> bool:
        """Whether anything changes where only `firing` fire; where not, the reward's change is exactly 0."""
        return self.offset != 0 or (self.factor != 1 and not firing.isdisjoint(self.latents))


@dataclass(frozen=True)
class Changes:
    """Change of the reward under each edit (float64 [E]) and how many sequences were run for them, unedited ones included."""

    reward: float
    change_E: Tensor
    runs: int


def sequence_of(sae: Sae, h_TD: Tensor, ids_T: Tensor, covered_T: Tensor) -> Stream:
    """Encode the covered positions of a sequence. Raises NumericalError where an activation is not finite."""
    device = sae.W_enc_DS.device
    h_TD = h_TD.to(device).float()
    at_N = covered_T.to(device).nonzero()[:, 0]
    scaled = sae.normalise(h_TD[at_N])
    acts = sae.encode_normalised(scaled.x_BD)
    return Stream(h_TD, ids_T.to(device), at_N, acts.positive_BK, acts.indices_BK, scaled.scale_B1)


def edited(sequence: Stream, sae: Sae, edit: Edit) -> Tensor:
    """The residual stream [T, D] under an edit; the sequence's own is not changed."""
    h_TD = sequence.h_TD.clone()
    for latent in edit.latents:
        place_M, z_M = sequence.firing(latent)
        change_M1 = ((edit.factor - 1) * z_M)[:, None] * sequence.scale_N1[place_M]
        h_TD[sequence.at_N[place_M]] += change_M1 * sae.W_dec_SD[latent]
        if edit.offset:
            h_TD[sequence.at_N] += edit.offset * sequence.scale_N1 * sae.W_dec_SD[latent]
    return h_TD


def reward_changes(
    sequences: Sequence[Stream],
    sae: Sae,
    edits: Sequence[Sequence[Edit]],
    rewards: Rewards,
    batch_tokens: int,
    told: Callable[[float], None] = lambda _share: None,
) -> list[Changes]:
    """Run the upper blocks under each edit of each sequence that changes anything; the others are exactly 0.

    Sequences of one length share batches, which so hold no padding; each batch holds its sequences unedited too, and
    changes are against these rows, so that rounding that hangs on a batch's size is not taken for an effect.

    Args:
        edits: those of each sequence.
        told: share of the work that is done, in [0, 1), before each batch; may raise to stop.

    Raises:
        NumericalError: a reward is not finite.
    """
    change = [torch.zeros(len(own), dtype=torch.float64) for own in edits]
    reward, runs = [0.0] * len(sequences), [0] * len(sequences)
    work = sum(1 + sum(edit.changes(at.latents) for edit in own) for at, own in zip(sequences, edits, strict=True))
    for rows in _batches(sequences, edits, batch_tokens):
        told(min(0.999, sum(runs) / work))
        h_BTD = torch.stack([_row(sequences[at], sae, None if which is None else edits[at][which]) for at, which in rows])
        ids_BT = torch.stack([sequences[at].ids_T for at, _ in rows])
        with torch.no_grad():
            found = rewards(h_BTD, torch.ones_like(ids_BT), ids_BT).double().cpu()
        if not bool(found.isfinite().all()):
            raise NumericalError("a reward under ablation is not finite", "run the reward model in float32 (model.dtype)")
        unedited = 0.0
        for (at, which), value in zip(rows, found.tolist(), strict=True):
            if which is None:
                unedited, reward[at] = value, value
            else:
                change[at][which] = value - unedited
            runs[at] += 1
    return [Changes(*parts) for parts in zip(reward, change, runs, strict=True)]


def _row(sequence: Stream, sae: Sae, edit: Edit | None) -> Tensor:
    return sequence.h_TD if edit is None else edited(sequence, sae, edit)


def _batches(
    sequences: Sequence[Stream], edits: Sequence[Sequence[Edit]], batch_tokens: int
) -> Iterator[list[tuple[int, int | None]]]:
    """Rows (sequence, edit or None for unedited) of each batch: one length, each sequence's unedited row before its edits."""
    by_length: dict[int, list[int]] = {}
    for at, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence.ids_T), []).append(at)
    for length, members in sorted(by_length.items()):
        most = max(2, batch_tokens // max(1, length))
        rows: list[tuple[int, int | None]] = []
        for at in members:
            waiting = [index for index, edit in enumerate(edits[at]) if edit.changes(sequences[at].latents)]
            while True:
                if len(rows) > most - 2:
                    yield rows
                    rows = []
                taken = waiting[: most - len(rows) - 1]
                rows += [(at, None), *((at, which) for which in taken)]
                waiting = waiting[len(taken) :]
                if not waiting:
                    break
        if rows:
            yield rows


def direct_attribution(sequence: Stream, sae: Sae, rewards: Rewards) -> Tensor:
    """First-order change of the reward when each latent is ablated: −Σ_p z_{p,i} c_p d_i · ∂r/∂x_p; float64 [S], on the CPU.

    One backward pass. Source: gradient × activation, arXiv 2403.19647 eq. 2, with z' = 0.
    """
    h_BTD = sequence.h_TD[None].detach().clone().requires_grad_(True)
    ids_BT = sequence.ids_T[None]
    with torch.enable_grad():
        reward = rewards(h_BTD, torch.ones_like(ids_BT), ids_BT).sum()
        (grad_BTD,) = torch.autograd.grad(reward, h_BTD)
    grad_ND = grad_BTD[0, sequence.at_N].float() * sequence.scale_N1
    total_S = torch.zeros(sae.shape.d_sae, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(grad_ND), device=grad_ND.device), _ROWS):
        slope_NK = (sae.W_dec_SD[sequence.indices_NK[rows]] @ grad_ND[rows, :, None])[:, :, 0]
        effect_NK = (-sequence.values_NK[rows] * slope_NK).double().cpu()
        total_S.index_add_(0, sequence.indices_NK[rows].flatten().cpu(), effect_NK.flatten())
    if not bool(total_S.isfinite().all()):
        raise NumericalError("a gradient of the reward is not finite", "run the reward model in float32 (model.dtype)")
    return total_S
