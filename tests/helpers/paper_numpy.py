"""The paper's method a second time, in plain numpy with plain loops, written from its description alone.

Source: arXiv 2507.00665. Nothing of the engine is imported: agreement between the two is evidence for both.
Everything is float64. A "text" is prompt and response together; activations are given at the text's sentence ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SENTENCE_ENDS = ".,?!;\n"


@dataclass(frozen=True)
class Dictionary:
    """W_enc [D, S], b_enc [S], W_dec [S, D], b_pre [D], k active latents."""

    W_enc: Array
    b_enc: Array
    W_dec: Array
    b_pre: Array
    k: int


@dataclass(frozen=True)
class Salience:
    """a_chosen, a_rejected [S] totals of positive activation; C their smoothing; s [S] in (−1, 1)."""

    a_chosen: Array
    a_rejected: Array
    C: float
    s: Array


def layer_norm(h: Array, eps: float = 1e-6) -> Array:
    """Each row minus its mean, over its unbiased standard deviation plus eps."""
    rows = []
    for row in h:
        mean = row.sum() / len(row)
        std = np.sqrt(((row - mean) ** 2).sum() / (len(row) - 1))
        rows.append((row - mean) / (std + eps))
    return np.array(rows)


def encode(x: Array, sae: Dictionary) -> Array:
    """The k largest pre-activations of each row at their places, zero elsewhere; negative ones stay."""
    z = np.zeros((len(x), len(sae.b_enc)))
    for row, values in enumerate((x - sae.b_pre) @ sae.W_enc + sae.b_enc):
        kept = sorted(range(len(values)), key=lambda latent: (-values[latent], latent))[: sae.k]
        for latent in kept:
            z[row, latent] = values[latent]
    return z


def decode(z: Array, sae: Dictionary) -> Array:
    """The reconstruction, negative values included."""
    return z @ sae.W_dec + sae.b_pre


def nmse(x: Array, x_hat: Array) -> float:
    """Mean over positions of squared error over squared norm."""
    return float(np.mean([((b - a) ** 2).sum() / (a**2).sum() for a, b in zip(x, x_hat, strict=True)]))


def sentence_ends(tokens: Sequence[str], min_gap: int = 5) -> list[int]:
    """Tokens that end with punctuation or a line break, at least `min_gap` tokens after the last one taken."""
    taken: list[int] = []
    for position, token in enumerate(tokens):
        if token and token[-1] in SENTENCE_ENDS and (not taken or position - taken[-1] >= min_gap):
            taken.append(position)
    return taken


def total_activation(texts: Sequence[Array]) -> Array:
    """Σ over all texts and their sentence ends of the positive activations, per latent."""
    total = np.zeros(texts[0].shape[1])
    for z in texts:
        for row in z:
            total += np.where(row > 0, row, 0.0)
    return total


def salience(chosen: Sequence[Array], rejected: Sequence[Array]) -> Salience:
    """s = (a+ − a−) / (a+ + a− + C), C twice the mean of a over all latents and both sides."""
    plus, minus = total_activation(chosen), total_activation(rejected)
    C = 2 * float(np.mean(np.concatenate([plus, minus])))
    return Salience(plus, minus, C, (plus - minus) / (plus + minus + C))


def most_salient(s: Array, n: int) -> list[int]:
    """The n latents of largest |s|, largest first; the lower id first among equals."""
    return sorted(range(len(s)), key=lambda latent: (-abs(s[latent]), latent))[:n]


def kept_latents(s: Array, ratings: dict[int, int], rating: int = 5, keep: int = 32) -> list[int]:
    """Rated latents with that rating, the `keep` of largest |s|."""
    rated = [latent for latent, given in ratings.items() if given >= rating]
    return sorted(rated, key=lambda latent: (-abs(s[latent]), latent))[:keep]


def text_score(z: Array, s: Array, kept: Sequence[int]) -> float:
    """Mean over sentence ends of Σ_{F+} z − Σ_{F−} z, positive activations only."""
    scores = []
    for row in z:
        up = sum(max(row[latent], 0.0) for latent in kept if s[latent] > 0)
        down = sum(max(row[latent], 0.0) for latent in kept if s[latent] < 0)
        scores.append(up - down)
    return float(np.mean(scores))


def pair_score(chosen: Array, rejected: Array, s: Array, kept: Sequence[int]) -> float:
    """S(chosen text) − S(rejected text)."""
    return text_score(chosen, s, kept) - text_score(rejected, s, kept)
