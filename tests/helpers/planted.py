"""A planted dictionary: activations whose true sparse directions are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    """Activations x = Σ_i a_i d_i + mean + noise.

    Attributes:
        x_BD: activations, float32.
        atoms_SD: the true unit directions d_i.
        acts_BS: the true activations a_i ≥ 0.
        mean_D: the offset all positions share.
    """

    x_BD: Tensor
    atoms_SD: Tensor
    acts_BS: Tensor
    mean_D: Tensor


def spread_atoms(n_atoms: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Unit directions that stay apart: random ones, pushed away from their nearest neighbours."""
    atoms_SD = torch.randn(n_atoms, d_in, generator=generator)
    for _ in range(200):
        atoms_SD = atoms_SD / atoms_SD.norm(dim=1, keepdim=True)
        cosine_SS = atoms_SD @ atoms_SD.T
        cosine_SS.fill_diagonal_(0)
        atoms_SD = atoms_SD - 0.1 * (cosine_SS**5) @ atoms_SD
    return atoms_SD / atoms_SD.norm(dim=1, keepdim=True)


def planted_dictionary(n_positions: int, seed: int, d_in: int = 32, n_atoms: int = 128, noise: float = 0.05) -> Planted:
    """Correlated sparse activations of an overcomplete dictionary.

    Atoms come in groups of four. In a position about one group in ten is `on`; an atom of an `on` group fires with
    probability 0.4, any other with probability 0.005, so firing is correlated within groups. Noise is Gaussian with
    `noise` × the root mean square of the clean signal per dimension.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms_SD = spread_atoms(n_atoms, d_in, generator)
    on_BG = torch.rand(n_positions, n_atoms // 4, generator=generator) < 0.06
    chance_BS = torch.where(on_BG.repeat_interleave(4, dim=1), 0.4, 0.005)
    fires_BS = torch.rand(n_positions, n_atoms, generator=generator) < chance_BS
    acts_BS = fires_BS * (0.5 + torch.rand(n_positions, n_atoms, generator=generator))
    mean_D = torch.randn(d_in, generator=generator)
    clean_BD = acts_BS @ atoms_SD
    size = float(clean_BD.square().mean().sqrt())
    x_BD = clean_BD + mean_D + noise * size * torch.randn(n_positions, d_in, generator=generator)
    return Planted(x_BD, atoms_SD, acts_BS, mean_D)


def recovered_share(atoms_SD: Tensor, W_dec_SD: Tensor, least: float = 0.9) -> float:
    """Share of true atoms with a decoder direction at cosine > `least`."""
    found_SD = W_dec_SD / W_dec_SD.norm(dim=1, keepdim=True)
    best_S = (atoms_SD @ found_SD.T).amax(dim=1)
    return float((best_S > least).float().mean())
