"""What a reward model's reward becomes when latents are changed in its residual stream.

At every covered position p: x_p ← x_p + c_p Σ_i (z'_{p,i} − z_{p,i}) d_i, d_i the decoder's direction, c_p what undoes the input
scaling (1/s for the scalar; std + eps of the unedited position under LayerNorm, its mean frozen as well). What the SAE does
not reconstruct stays as it is and nothing is encoded again. Then the blocks above the hook point run.
Only positive z are activations; negative values of an SAE that keeps them are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.reward_recovered import Rewards
from safer_engine.science.sae import Sae

_ROWS = 1024


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

    @property
    def latents(self) -> frozenset[int]:
        """Latents that fire at a covered position."""
        return frozenset(torch.unique(self.indices_NK[self.values_NK > 0]).tolist())

    def activation(self, latent: int) -> Tensor:
        """z [N] of a latent at the covered positions."""
        return (self.values_NK * (self.indices_NK == latent)).sum(1)


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
    change_ND = torch.zeros_like(sequence.h_TD[sequence.at_N])
    for latent in edit.latents:
        z_N = sequence.activation(latent)
        dz_N = (edit.factor - 1) * z_N + edit.offset
        change_ND += dz_N[:, None] * sae.W_dec_SD[latent]
    h_TD = sequence.h_TD.clone()
    h_TD[sequence.at_N] += change_ND * sequence.scale_N1
    return h_TD


def reward_changes(sequence: Stream, sae: Sae, edits: Sequence[Edit], rewards: Rewards, batch_tokens: int) -> Changes:
    """Run the upper blocks under each edit that changes anything; the others are exactly 0.

    Edits of a sequence share batches, which so hold no padding; each batch holds the unedited sequence too, and changes
    are against that row, so that rounding that hangs on a batch's size is not taken for an effect.

    Raises:
        NumericalError: a reward is not finite.
    """
    firing = sequence.latents
    active = [index for index, edit in enumerate(edits) if edit.changes(firing)]
    change_E = torch.zeros(len(edits), dtype=torch.float64)
    width = max(1, batch_tokens // max(1, len(sequence.ids_T)) - 1)
    reward, runs = 0.0, 0
    for start in range(0, max(1, len(active)), width):
        part = active[start : start + width]
        h_BTD = torch.stack([sequence.h_TD, *(edited(sequence, sae, edits[index]) for index in part)])
        ids_BT = sequence.ids_T.expand(len(h_BTD), -1)
        with torch.no_grad():
            found_B = rewards(h_BTD, torch.ones_like(ids_BT), ids_BT).double().cpu()
        if not bool(found_B.isfinite().all()):
            raise NumericalError("a reward under ablation is not finite", "run the reward model in float32 (model.dtype)")
        reward = reward if start else float(found_B[0])
        change_E[part] = found_B[1:] - found_B[0]
        runs += len(found_B)
    return Changes(reward, change_E, runs)


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
        slope_NK = (grad_ND[rows] @ sae.W_dec_SD.T).gather(1, sequence.indices_NK[rows])
        effect_NK = (-sequence.values_NK[rows] * slope_NK).double().cpu()
        total_S.index_add_(0, sequence.indices_NK[rows].flatten().cpu(), effect_NK.flatten())
    if not bool(total_S.isfinite().all()):
        raise NumericalError("a gradient of the reward is not finite", "run the reward model in float32 (model.dtype)")
    return total_S
