"""Windows in which a latent does not fire, matched to windows in which it does: what a label is checked on.

Responses are drawn from every stratum (subset and side) into a pool that is read once for all latents. A window that fires
is matched by one from a response of its stratum, as near as can be had in length, at the place in it that is nearest to
its own, in which the latent is at zero wherever its activation is known. A window without a match is left out with it, so
both kinds have the same subsets and sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from safer_engine.science.contexts import Ints, TopContexts, spans_round
from safer_engine.science.latent_acts import Encode, ShardRows

_POOL = 2048
_LARGEST_POOL = 8192
_TRIED = 8
"""Responses tried for a window before it is left out."""


@dataclass(frozen=True)
class Sequences:
    """The responses of a data set, index 2 × pair + side.

    Attributes:
        lengths_R: tokens of the whole sequence.
        starts_R: first token of the region that is read, stops_R: the one after its last.
        strata_R: subset and side, as integers.
        groups_R: group, as integers.
    """

    lengths_R: Ints
    starts_R: Ints
    stops_R: Ints
    strata_R: Ints
    groups_R: Ints

    def places(self, responses: Ints, positions: Ints) -> NDArray[np.float64]:
        """Where in the region of its response each position lies, 0 at the first token, 1 at the last."""
        reach = np.maximum(self.stops_R[responses] - 1 - self.starts_R[responses], 1)
        return np.asarray((positions - self.starts_R[responses]) / reach, dtype=np.float64)


@dataclass(frozen=True)
class PoolActs:
    """Where the latents of interest fire in the responses of the pool.

    Attributes:
        counted: response → its counted positions, ascending.
        firing: latent → response → positions at which it fires, ascending.
    """

    counted: dict[int, Ints]
    firing: dict[int, dict[int, Ints]]


@dataclass(frozen=True)
class Match:
    """A window without the latent: `row` is that of the window it is matched to."""

    row: int
    response: int
    position: int


def draw_pool(sequences: Sequences, held_out: int, rng: np.random.Generator) -> Ints:
    """Responses to look for windows in, ascending: at random from every stratum, a group at most once in each.

    Args:
        held_out: windows that are to be matched, of each latent.
    """
    order = rng.permutation(len(sequences.strata_R))
    codes = sequences.strata_R[order] * (int(sequences.groups_R.max(initial=0)) + 1) + sequences.groups_R[order]
    once = order[np.sort(np.unique(codes, return_index=True)[1])]
    strata = sequences.strata_R[once]
    within = np.zeros(len(once), dtype=np.int64)
    by_stratum = np.argsort(strata, kind="stable")
    starts = np.flatnonzero(np.diff(strata[by_stratum], prepend=-1))
    within[by_stratum] = np.arange(len(once)) - np.repeat(starts, np.diff(starts, append=len(once)))
    wanted = max(2 * held_out, _POOL // max(1, len(starts)))
    return np.sort(once[within < wanted][:_LARGEST_POOL])


def pool_acts(rows: ShardRows, encode: Encode, responses: Ints, latents: Ints) -> PoolActs:
    """Counted positions and firings in the pool's responses that a shard holds.

    Args:
        responses: ascending; all of them in the shard.
        latents: those of interest, ascending.
    """
    wanted = np.flatnonzero(rows.counted_B & np.isin(rows.response_B, responses))
    acts = encode(rows.x_BD[torch.from_numpy(wanted)])
    fires = acts.positive_BK.float().cpu().numpy() > 0
    ids = acts.indices_BK.cpu().numpy()
    at, slot = np.nonzero(fires & np.isin(ids, latents))
    response, position = rows.response_B[wanted], rows.position_B[wanted].astype(np.int64)
    counted = {int(one): position[response == one] for one in responses}
    firing: dict[int, dict[int, list[int]]] = {}
    for latent, which, where in zip(ids[at, slot].tolist(), response[at].tolist(), position[at].tolist(), strict=True):
        firing.setdefault(latent, {}).setdefault(which, []).append(where)
    sets = {latent: {r: np.asarray(found, dtype=np.int64) for r, found in of.items()} for latent, of in firing.items()}
    return PoolActs(counted, sets)


def join_pools(parts: Sequence[PoolActs]) -> PoolActs:
    """The pool over several shards."""
    counted: dict[int, Ints] = {}
    firing: dict[int, dict[int, Ints]] = {}
    for part in parts:
        counted |= part.counted
        for latent, of in part.firing.items():
            firing.setdefault(latent, {}).update(of)
    return PoolActs(counted, firing)


def match_windows(contexts: TopContexts, shown: TopContexts, pool: PoolActs, sequences: Sequences, window: int) -> list[Match]:
    """A window without the latent for each context, where one can be had.

    Args:
        contexts: held-out contexts, sorted by latent.
        shown: contexts that a labeller is shown; no window is from their groups, nor from that of another context of the latent.
        window: tokens of a window.

    Returns:
        In the order of the contexts; no two of a latent from the same group.
    """
    places = sequences.places(contexts.responses_N, contexts.positions_N.astype(np.int64))
    by_stratum: dict[int, Ints] = {}
    members = np.asarray(sorted(pool.counted), dtype=np.int64)
    for stratum in np.unique(sequences.strata_R[members]).tolist() if len(members) else []:
        by_stratum[stratum] = members[sequences.strata_R[members] == stratum]
    found: list[Match] = []
    taken: set[int] = set()
    latent = -1
    for row, response in enumerate(contexts.responses_N.tolist()):
        if latent != (latent := int(contexts.latents_N[row])):
            both = (contexts.responses_N[contexts.latents_N == latent], shown.responses_N[shown.latents_N == latent])
            taken = set(sequences.groups_R[np.concatenate(both)].tolist())
        near = _nearest(by_stratum.get(int(sequences.strata_R[response])), response, taken, sequences)
        for other in near[:_TRIED].tolist():
            position = _silent(pool, latent, other, float(places[row]), sequences, window)
            if position is not None:
                found.append(Match(row, other, position))
                taken.add(int(sequences.groups_R[other]))
                break
    return found


def _nearest(members: Ints | None, response: int, taken: set[int], sequences: Sequences) -> Ints:
    """Responses of a stratum outside the groups taken, the nearest in length first."""
    if members is None:
        return np.zeros(0, dtype=np.int64)
    free = members[~np.isin(sequences.groups_R[members], sorted(taken))]
    apart = np.abs(np.log(sequences.lengths_R[free] / sequences.lengths_R[response]))
    return free[np.argsort(apart, kind="stable")]


def _silent(pool: PoolActs, latent: int, response: int, place: float, sequences: Sequences, window: int) -> int | None:
    """The counted position nearest to a place of its response round which the latent does not fire; None where there is none."""
    positions = pool.counted[response]
    firing = pool.firing.get(latent, {}).get(response, np.zeros(0, dtype=np.int64))
    starts, stops = spans_round(positions, int(sequences.lengths_R[response]), window)
    silent = np.flatnonzero(np.searchsorted(firing, starts) == np.searchsorted(firing, stops))
    if len(silent) == 0:
        return None
    places = sequences.places(np.full(len(silent), response), positions[silent])
    return int(positions[silent[np.argmin(np.abs(places - place))]])
