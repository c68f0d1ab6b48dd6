"""Which latents another SAE, trained from another seed on the same activations, has too.

A latent's counterpart is the other SAE's latent whose decoder direction has the largest cosine with its own; two latents may
have the same one. Mean largest cosines are the MMCS of arXiv 2309.08600 (appendix B).

Two things would make counterparts where nothing is shared, and each has a figure of its own: directions crowd
(`crowding`: largest cosines of random directions that are spread as the other SAE's are), and where many latents are
discoveries, a counterpart drawn blindly is often one (`by_chance_F`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_engine.errors import NumericalError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_COSINE = 0.7
"""Decoder cosine from which on a counterpart counts as the same latent (our choice; `crowding` tells what chance reaches)."""
_BLOCK = 1024
_RANDOM = 1024


@dataclass(frozen=True)
class Counterparts:
    """The nearest latent of another SAE, for each of F latents.

    Attributes:
        match_F: its latent id.
        cosine_F: cosine of the decoder directions, in [−1, 1].
    """

    match_F: Ints
    cosine_F: Floats


def counterparts(directions_FD: Tensor, other_SD: Tensor, alive_S: Bools) -> Counterparts:
    """The nearest among the other SAE's latents that fire.

    Args:
        directions_FD, other_SD: decoder rows, of any length but 0.
        alive_S: which latents of the other SAE fire at all; at least one.

    Raises NumericalError where a direction is not finite, or no latent of the other SAE fires.
    """
    if not alive_S.any():
        raise NumericalError("no latent of the second SAE fires", "train longer (sae.passes, sae.min_steps)")
    alive = np.flatnonzero(alive_S)
    others_ND = _unit(other_SD[torch.from_numpy(alive).to(other_SD.device)])
    match, cosine = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for block_BD in torch.split(_unit(directions_FD.to(other_SD.device)), _BLOCK):
        best = (block_BD @ others_ND.T).max(dim=1)
        match.append(alive[best.indices.cpu().numpy()])
        cosine.append(best.values.double().cpu().numpy())
    return Counterparts(np.concatenate(match), np.clip(np.concatenate(cosine), -1, 1))


def crowding(other_SD: Tensor, alive_S: Bools, generator: torch.Generator, n: int = _RANDOM) -> Floats:
    """Largest cosines [n] of random directions: Gaussian, with the second moments of the other SAE's own directions.

    Args:
        generator: a CPU generator.
    """
    own_ND = _unit(other_SD[torch.from_numpy(np.flatnonzero(alive_S)).to(other_SD.device)])
    drawn = [torch.randn(min(_BLOCK, n - at), len(own_ND), generator=generator) for at in range(0, n, _BLOCK)]
    random_ND = torch.cat([weights.to(own_ND) @ own_ND for weights in drawn])
    return counterparts(random_ND, other_SD, alive_S).cosine_F


@dataclass(frozen=True)
class ScopeDiscoveries:
    """Tests of an SAE's latents within one scope (an axis, or all pairs).

    Attributes:
        tested_S: which were tested; discovery_S: which are discoveries.
        salience_S: in the half of the groups that tests; its sign counts.
    """

    tested_S: Bools
    discovery_S: Bools
    salience_S: Floats


@dataclass(frozen=True)
class FoundAgain:
    """For each of F discoveries.

    Attributes:
        found_F: its counterpart is near enough, and a discovery of the same scope with the same sign.
        by_chance_F: the chance of that, were the counterpart's place taken by a tested latent drawn at random: 0 where it is
            not near enough.
    """

    found_F: Bools
    by_chance_F: Floats


def found_again(salience_F: Floats, matched: Counterparts, other: ScopeDiscoveries) -> FoundAgain:
    """Which discoveries of one scope the other SAE has too; `salience_F` is of the discoveries, in the half that tests."""
    near_F = matched.cosine_F >= MIN_COSINE
    same_F = other.discovery_S[matched.match_F] & (other.salience_S[matched.match_F] * salience_F > 0)
    n_tested = max(1, int(other.tested_S.sum()))
    rates = {sign: float((other.discovery_S & (other.salience_S * sign > 0)).sum()) / n_tested for sign in (1, -1)}
    chance_F = np.where(salience_F > 0, rates[1], rates[-1])
    return FoundAgain(near_F & same_F, np.where(near_F, chance_F, 0.0))


def _unit(rows_ND: Tensor) -> Tensor:
    if not bool(torch.isfinite(rows_ND).all()):
        raise NumericalError("a decoder direction is not finite", "train the SAE again with a lower sae.lr")
    unit_ND: Tensor = rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit_ND
