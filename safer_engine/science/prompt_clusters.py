"""Prompt groups put into clusters by the words of their prompts: cheap, deterministic, and without looking at labels.

Each text is a vector of log(1 + count) · inverse document frequency over 4 096 hashed words (CRC-32), of length 1. Spherical
k-means (Dhillon and Modha 2001) from a farthest-first start: the first centre is the text nearest to the mean, each next one the
text least like any centre; at most 12 rounds on a sample of at most 20 000 texts, then all are assigned.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BUCKETS = 4096
_ROUNDS = 12
_SAMPLE = 20_000
_CHARACTERS = 2000
_WORD = re.compile(r"[^\W_]{2,}")


@dataclass(frozen=True)
class Clusters:
    """Clusters of texts.

    Attributes:
        cluster_T: of each text, 0 … n − 1, the largest first.
        terms: of each cluster the words that mark it, the most telling first.
    """

    cluster_T: Ints
    terms: tuple[tuple[str, ...], ...]


def cluster_texts(texts: Sequence[str], n_clusters: int, n_terms: int = 6) -> Clusters:
    """Put texts into at most n_clusters clusters; fewer where there are fewer distinct ones.

    Args:
        texts: in any order; only the first 2 000 characters count.
        n_clusters: 0 gives none at all (cluster_T is −1).
        n_terms: words named for each cluster.
    """
    if n_clusters == 0 or not texts:
        return Clusters(np.full(len(texts), -1, dtype=np.int64), ())
    words = [_WORD.findall(text[:_CHARACTERS].lower()) for text in texts]
    x = _vectors(words)
    step = max(1, -(-len(texts) // _SAMPLE))
    centres = _centres(x[::step], n_clusters)
    nearest = np.asarray((x @ centres.T).argmax(axis=1)).ravel()
    sizes = np.bincount(nearest, minlength=len(centres))
    order = [int(one) for one in np.argsort(-sizes, kind="stable") if sizes[one]]
    place = np.zeros(len(centres), dtype=np.int64)
    place[order] = np.arange(len(order))
    return Clusters(place[nearest], _terms(words[::step], place[nearest][::step], len(order), n_terms))


def _vectors(words: Sequence[Sequence[str]]) -> sparse.csr_array:
    known: dict[str, int] = {}
    columns = [[known.setdefault(word, zlib.crc32(word.encode()) % _BUCKETS) for word in text] for text in words]
    indptr = np.concatenate([[0], np.cumsum([len(text) for text in columns])])
    flat = np.fromiter((column for text in columns for column in text), dtype=np.int64, count=int(indptr[-1]))
    counts = sparse.csr_array((np.ones(len(flat)), flat, indptr), shape=(len(words), _BUCKETS))
    counts.sum_duplicates()
    held = np.bincount(counts.indices, minlength=_BUCKETS)
    counts.data = np.log1p(counts.data) * np.log((1 + len(words)) / (1 + held))[counts.indices]
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    scale = sparse.dia_array((1 / np.where(norms > 0, norms, 1)[None, :], [0]), shape=(len(words), len(words)))
    return sparse.csr_array(scale @ counts)


def _centres(x: sparse.csr_array, n_clusters: int) -> Floats:
    """Unit centres [n, buckets]."""
    first = int(np.argmax(x @ np.asarray(x.sum(axis=0)).ravel()))
    chosen = [first]
    likeness = np.asarray(x @ x[[first]].toarray().ravel())
    while len(chosen) < n_clusters:
        farthest = int(np.argmin(likeness))
        if likeness[farthest] >= 1 - 1e-9:
            break
        chosen.append(farthest)
        likeness = np.maximum(likeness, x @ x[[farthest]].toarray().ravel())
    centres = x[chosen].toarray()
    for _ in range(_ROUNDS):
        nearest = np.asarray((x @ centres.T).argmax(axis=1)).ravel()
        members = sparse.csr_array(
            (np.ones(len(nearest)), (nearest, np.arange(len(nearest)))), shape=(len(centres), len(nearest))
        )
        sums = (members @ x).toarray()
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(norms > 0, sums / np.where(norms > 0, norms, 1), centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    return np.asarray(centres, dtype=np.float64)


def _terms(words: Sequence[Sequence[str]], cluster_T: Ints, n: int, n_terms: int) -> tuple[tuple[str, ...], ...]:
    """Words by share of the cluster's texts that hold them × log of how much more often they do than all texts."""
    everywhere: dict[str, int] = {}
    within: list[dict[str, int]] = [{} for _ in range(n)]
    for text, cluster in zip(words, cluster_T.tolist(), strict=True):
        for word in set(text):
            everywhere[word] = everywhere.get(word, 0) + 1
            within[cluster][word] = within[cluster].get(word, 0) + 1
    sizes, total = np.maximum(np.bincount(cluster_T, minlength=n), 1), len(words)
    found = []
    for cluster, counts in enumerate(within):
        size = int(sizes[cluster])
        score = {
            word: count / size * float(np.log(count / size * total / everywhere[word]))
            for word, count in counts.items()
            if count > 1 or size == 1
        }
        ranked = sorted((word for word in score if score[word] > 0), key=lambda word: (-score[word], word))
        found.append(tuple(ranked[:n_terms]))
    return tuple(found)
