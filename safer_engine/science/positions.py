"""Which tokens of a sequence are covered: the positions whose activations are read.

Source of sentence ends: arXiv 2507.00665 (positions that end a sentence, some tokens apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safer_engine.spec import HookSpec

SENTENCE_ENDS = ".,?!;\n"
"""A token ends a sentence when the last character of its text is one of these."""


@dataclass(frozen=True)
class SideTokens:
    """One rendered side, as the covered positions need it.

    Attributes:
        text: the exact text the model reads.
        offsets: start and end character of each token, flattened [2T] or [T, 2]; an empty span for tokens that stand
            for no text.
        start, end: response tokens are start ≤ i < end.
    """

    text: str
    offsets: Sequence[int] | NDArray[np.integer]
    start: int
    end: int


def sentence_end_mask(side: SideTokens, region: tuple[int, int], min_gap: int) -> NDArray[np.bool_]:
    """Tokens that end a sentence.

    Args:
        region: first token and one past the last token that may be marked.
        min_gap: a mark nearer than this to the previous mark is skipped (tokens); the first is always kept.

    Returns:
        [T] bool; false outside the region and for tokens that stand for no text.
    """
    spans_T2 = np.asarray(side.offsets, dtype=np.int64).reshape(-1, 2)
    mask_T = np.zeros(len(spans_T2), dtype=np.bool_)
    codes = np.frombuffer(side.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ends = np.isin(codes, [ord(character) for character in SENTENCE_ENDS])
    first, stop = region
    last = -min_gap
    for token in np.flatnonzero(spans_T2[:, 1] > spans_T2[:, 0]):
        if first <= token < stop and ends[spans_T2[token, 1] - 1] and token - last >= min_gap:
            mask_T[token] = True
            last = int(token)
    return mask_T


def covered_positions(side: SideTokens, spec: HookSpec, head_position: int) -> NDArray[np.bool_]:
    """Positions whose activations are stored for a side.

    Args:
        head_position: index of the token the reward head reads (last token of a decoder, 0 of most encoders): it is
            always covered, whatever the region.

    Returns:
        [T] bool with at least one true value.

    Raises:
        IndexError: `head_position` is outside the sequence.
    """
    n_tokens = len(side.offsets) // 2 if np.ndim(side.offsets) == 1 else len(side.offsets)
    if not 0 <= head_position < n_tokens:
        raise IndexError(f"head position {head_position} in a sequence of {n_tokens} tokens")
    region = (side.start, side.end) if spec.region == "response" else (0, n_tokens)
    if spec.positions == "sentence_ends":
        mask_T = sentence_end_mask(side, region, spec.min_gap)
    else:
        mask_T = np.zeros(n_tokens, dtype=np.bool_)
        mask_T[region[0] : region[1]] = True
    mask_T[head_position] = True
    return mask_T
