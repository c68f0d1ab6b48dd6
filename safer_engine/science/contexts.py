"""The contexts in which a latent fires most: found in one streaming pass, cut out of the exact text afterwards.

A prompt group gives a latent at most one context, at its highest activation: responses of a group quote each other or
are the same text, and would fill the list with copies. Order: activation falling; among equals the earlier pair, chosen
before rejected. The order is total, so merging parts in any grouping gives the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from safer_engine.errors import NumericalError
from safer_engine.science.latent_acts import Encode, ShardActs, ShardRows

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TopContexts:
    """Where latents fire most, sorted by latent, then from the strongest.

    Attributes:
        latents_N: latent ids, int32.
        activations_N: activation at the position, > 0, float32.
        responses_N: 2 × pair + side (0 chosen, 1 rejected), int64.
        positions_N: token index in that sequence, int32.
    """

    latents_N: NDArray[np.int32]
    activations_N: NDArray[np.float32]
    responses_N: Ints
    positions_N: NDArray[np.int32]

    def of(self, latents: Ints) -> TopContexts:
        """Only those latents' contexts."""
        return self.take(np.flatnonzero(np.isin(self.latents_N, latents)))

    def take(self, rows: Ints) -> TopContexts:
        """Only those rows."""
        return TopContexts(self.latents_N[rows], self.activations_N[rows], self.responses_N[rows], self.positions_N[rows])

    @property
    def ranks_N(self) -> Ints:
        """0 for a latent's strongest context, then 1, 2, …"""
        return _places(self.latents_N)


@dataclass(frozen=True)
class Span:
    """Tokens shown round a focus: ids[start:stop] of a sequence, the focus at `start + focus`."""

    start: int
    stop: int
    focus: int


def shard_contexts(shard: ShardActs, keep: int, groups_P: Ints) -> TopContexts:
    """The `keep` strongest contexts of each latent within a shard.

    Args:
        groups_P: group of every pair of the data set, as integers.
    """
    return merge_contexts([peaks_of(shard)], keep, groups_P)


def peaks_of(shard: ShardActs) -> TopContexts:
    """The peak of each latent in each response of a shard in which it fires, in no order that counts."""
    return TopContexts(shard.latents_N, shard.peaks_N, shard.responses_N, shard.peak_positions_N)


def merge_contexts(parts: Sequence[TopContexts], keep: int, groups_P: Ints) -> TopContexts:
    """The `keep` strongest contexts of each latent over several parts (at least one), each from another group."""
    together = _joined(parts)
    order = np.lexsort((together.positions_N, together.responses_N, -together.activations_N, together.latents_N))
    return _first_of_groups(together.take(order), keep, groups_P)


def sample_contexts(parts: Sequence[TopContexts], keep: int, groups_P: Ints, seed: int) -> TopContexts:
    """`keep` contexts of each latent over several parts (at least one), drawn in proportion to their activation.

    Drawn without replacement, each from another group, in the order of −ln(u) / activation with u in (0, 1) a hash of the
    seed, the latent and the response (Efraimidis & Spirakis 2006): the draw does not depend on how the parts were made, and
    the first of a sample, or those of it outside some groups, are a sample of the same kind.

    Returns:
        Sorted by latent, then in the order drawn; `ranks_N` counts it.
    """
    together = _joined(parts)
    keys = -np.log(_uniform(seed, together)) / together.activations_N.astype(np.float64)
    order = np.lexsort((together.positions_N, together.responses_N, keys, together.latents_N))
    return _first_of_groups(together.take(order), keep, groups_P)


def without_groups_of(contexts: TopContexts, other: TopContexts, keep: int, groups_P: Ints) -> TopContexts:
    """The first `keep` contexts of each latent whose groups none of the latent's `other` contexts is from."""
    n_groups = int(groups_P.max(initial=0)) + 1
    mine, theirs = (part.latents_N.astype(np.int64) * n_groups + groups_P[part.responses_N // 2] for part in (contexts, other))
    left = contexts.take(np.flatnonzero(~np.isin(mine, theirs)))
    return left.take(np.flatnonzero(left.ranks_N < keep))


def _joined(parts: Sequence[TopContexts]) -> TopContexts:
    return TopContexts(
        np.concatenate([part.latents_N for part in parts]),
        np.concatenate([part.activations_N for part in parts]),
        np.concatenate([part.responses_N for part in parts]),
        np.concatenate([part.positions_N for part in parts]),
    )


def _first_of_groups(ordered: TopContexts, keep: int, groups_P: Ints) -> TopContexts:
    """The first `keep` contexts of each latent, each the first of its group."""
    groups = groups_P[ordered.responses_N // 2]
    n_groups = int(groups_P.max(initial=0)) + 1
    first = np.unique(ordered.latents_N.astype(np.int64) * n_groups + groups, return_index=True)[1]
    distinct = ordered.take(np.sort(first))
    return distinct.take(np.flatnonzero(distinct.ranks_N < keep))


def span_round(position: int, length: int, window: int) -> Span:
    """The `window` tokens round a position, as near to centred as the sequence allows (all of a shorter sequence)."""
    if not 0 <= position < length:
        raise NumericalError(f"position {position} is outside a sequence of {length} tokens")
    starts, stops = spans_round(np.asarray([position]), length, window)
    return Span(int(starts[0]), int(stops[0]), position - int(starts[0]))


def spans_round(positions_N: Ints, length: int, window: int) -> tuple[Ints, Ints]:
    """First token of the span round each position of one sequence, and the one after its last (see `span_round`)."""
    starts = np.clip(positions_N - window // 2, 0, max(0, length - window))
    return starts, np.minimum(length, starts + window)


def token_texts(text: str, offsets: Sequence[int] | NDArray[np.integer], start: int, stop: int) -> list[str]:
    """The exact text of tokens start … stop − 1, which joined give the text they cover without a gap.

    A token owns the characters from the end of the tokens before it to its own end: spaces between words belong to
    the word after them, a character shared by several tokens to the first, and a token that stands for no text
    (an added [CLS]) is empty.

    Args:
        text: what the tokens were made from.
        offsets: start and end characters of each token, flattened.
    """
    ends = np.maximum.accumulate(np.asarray(offsets[1 : 2 * stop : 2], dtype=np.int64))
    edges = np.concatenate([[0], ends]).tolist()
    return [text[a:b] for a, b in zip(edges[start:stop], edges[start + 1 : stop + 1], strict=True)]


def window_activations(
    rows: ShardRows, encode: Encode, contexts: TopContexts, spans: Sequence[Span]
) -> list[NDArray[np.float32]]:
    """Activation of each context's latent at every token of its span.

    Args:
        rows: a shard that holds the contexts' responses.
        spans: of each context.

    Returns:
        Per context [stop − start], ≥ 0; NaN at tokens that are not among the counted positions.
    """
    bounds = np.searchsorted(rows.response_B, np.stack([contexts.responses_N, contexts.responses_N + 1]))
    members = []
    for (first, last), span in zip(bounds.T, spans, strict=True):
        inside = np.arange(first, last)
        position = rows.position_B[first:last]
        members.append(inside[rows.counted_B[first:last] & (position >= span.start) & (position < span.stop)])
    needed = np.unique(np.concatenate([*members, np.zeros(0, dtype=np.int64)])).astype(np.int64)
    acts = encode(rows.x_BD[torch.from_numpy(needed)])
    values_BK, latents_BK = acts.positive_BK.float().cpu().numpy(), acts.indices_BK.cpu().numpy()
    found = []
    for latent, member, span in zip(contexts.latents_N, members, spans, strict=True):
        at = np.searchsorted(needed, member)
        window = np.full(span.stop - span.start, np.nan, dtype=np.float32)
        window[rows.position_B[member] - span.start] = np.where(latents_BK[at] == latent, values_BK[at], 0).sum(axis=1)
        found.append(window)
    return found


def _uniform(seed: int, contexts: TopContexts) -> NDArray[np.float64]:
    """A figure in (0, 1) for each latent and response (splitmix64 over both and the seed)."""
    mixed = _mixed(np.full(len(contexts.latents_N), seed, dtype=np.uint64))
    for part in (contexts.latents_N, contexts.responses_N):
        mixed = _mixed(mixed ^ part.astype(np.uint64))
    return np.asarray(((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _places(sorted_latents: NDArray[np.int32]) -> Ints:
    """0, 1, 2, … within each run of equal latents."""
    n = len(sorted_latents)
    starts = np.flatnonzero(np.diff(sorted_latents, prepend=-1))
    return np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
