"""Which latents fire differently on the two sides, against what chance does: a null made by flipping signs of prompt groups.

With u_g = v+_g − v−_g (see `science.salience`), were the labels of a group drawn by a coin, its u_g would have either sign
with equal chance, all latents and pairs of the group together. A flip draws one sign a group. Σ_g u_g² does not change under
flips, so the studentised t is a rising function of the self-normalised sum

    r = |Σ_g ε_g u_g| / √(Σ_g u_g²)

whose square has mean 1 under flips whatever the latent. p-values compare a latent's r with the flipped ones of *all* latents of
its stratum: latents are put together by the effective number of groups that they fire differently in, (Σu²)² / Σu⁴, as sums
over few groups are coarse and have lighter tails. So p is as fine as 1 / (draws × latents of the stratum), and is calibrated on
average over the latents of a stratum (not of each by itself). Draws are added in rounds until p-values are fine enough for the
false-discovery rate among so many tests.

`p_max_t` compares r with the largest of all latents and scopes under each flip (Westfall and Young 1993, single step): it keeps
the chance of *any* false discovery, whatever the dependence between latents, and needs no pooling.

What is tested is chosen without the labels: the firing rate, and the number of groups with u ≠ 0, which no flip changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import NumericalError
from safer_engine.science.latent_acts import ResponseActs
from safer_engine.science.multiple_testing import benjamini_hochberg, benjamini_yekutieli
from safer_engine.science.salience import Estimator, GroupBlock, group_blocks, usable_pairs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_ACTIVE_GROUPS = 10
"""A latent whose u is 0 in all but fewer groups is not tested: flips can at best give it a p of its own of 2⁻⁸."""
ROUND = 1024
"""Flips of a round: one pass over the data, S × ROUND sums in memory."""
MIN_STRATUM = 256
"""Latents of a stratum at least, where there are as many."""
_EXPECTED = 20
"""Flipped sums that a stratum's pool is to have beyond the strictest cut, fdr / tests: a tail of few draws would be too noisy."""
_COLUMNS = 256
"""Flips multiplied at once: a block's signs for so many stay in a processor's cache."""
_SLACK = 1 + 1e-5
"""Sums that differ by rounding alone are equal: p must not be too small by it. Sums of a block are float32, of all float64."""


@dataclass(frozen=True)
class Scope:
    """Some pairs that are tested together, such as the pairs of an axis; `pairs` are indices of pairs."""

    name: str | None
    pairs: Ints


@dataclass(frozen=True)
class FlipSettings:
    """How many flips.

    Attributes:
        fdr: false-discovery rate that p-values must be fine enough for, in (0, 1).
        max_draws: flips at most, rounded up to whole rounds.
        seed: of the flips.
    """

    fdr: float
    max_draws: int
    seed: int


@dataclass(frozen=True)
class ScopeTests:
    """Tests of all latents within a scope; NaN where a latent is not tested.

    Attributes:
        n_active_S: groups with u ≠ 0.
        p_S: two-sided, in (0, 1]; see the module.
        q_S, q_by_S: by Benjamini and Hochberg, and by Benjamini and Yekutieli, over the tests of all scopes.
        p_max_t_S: adjusted over the tests of all scopes.
    """

    name: str | None
    n_active_S: Ints
    p_S: Floats
    q_S: Floats
    q_by_S: Floats
    p_max_t_S: Floats

    @property
    def tested_S(self) -> Bools:
        """Which latents were tested."""
        return np.isfinite(self.p_S)


@dataclass(frozen=True)
class FlipTests:
    """Tests of all scopes.

    Attributes:
        n_draws: flips drawn.
        n_tests: tests made, over all scopes.
        smallest_p: p that no test could fall below, of the smallest stratum; 1 without any test.
    """

    scopes: tuple[ScopeTests, ...]
    n_draws: int
    n_tests: int
    smallest_p: float


def flip_tests(
    acts: ResponseActs, groups_P: Ints, estimator: Estimator, scopes: Sequence[Scope], eligible_S: Bools, settings: FlipSettings
) -> FlipTests:
    """Test the eligible latents in every scope. Memory: a block of groups, and S × `ROUND` sums.

    Args:
        acts: per-response sums.
        groups_P: group of each pair, as integers from 0; a group has the same sign in every scope.
        estimator: what v is.
        scopes: names differ.
        eligible_S: chosen blind to the labels.
        settings: see there.
    """
    n_groups = int(groups_P.max(initial=0)) + 1
    found = [_Scope(acts, groups_P, estimator, scope, eligible_S) for scope in scopes]
    n_tests = sum(len(one.tested) for one in found)
    largest: list[Floats] = []
    rounds = max(1, -(-settings.max_draws // ROUND)) if n_tests else 0
    for number in range(rounds):
        signs = _Signs.draw(n_groups, np.random.default_rng([settings.seed, number]))
        largest.append(np.max([one.add_round(signs) for one in found if len(one.tested)], axis=0))
        if all(one.smallest_p * _EXPECTED <= settings.fdr / n_tests for one in found):
            break
    maxima = np.sort(np.concatenate(largest)) if largest else np.zeros(0)
    return _adjusted(found, maxima, ROUND * len(largest), n_tests)


def _adjusted(found: Sequence[_Scope], maxima: Floats, n_draws: int, n_tests: int) -> FlipTests:
    p_AS = np.stack([one.p() for one in found])
    q_AS, q_by_AS = (adjust(p_AS.ravel()).reshape(p_AS.shape) for adjust in (benjamini_hochberg, benjamini_yekutieli))
    tests = tuple(
        ScopeTests(one.scope.name, one.n_active_S, p_S, q_S, q_by_S, one.p_max_t(maxima))
        for one, p_S, q_S, q_by_S in zip(found, p_AS, q_AS, q_by_AS, strict=True)
    )
    return FlipTests(tests, n_draws, n_tests, max((one.smallest_p for one in found), default=1.0) if n_tests else 1.0)


@dataclass(frozen=True)
class _Signs:
    """One sign for each group and flip, as bits [n_groups, ROUND / 8]."""

    bits: NDArray[np.uint8]

    @staticmethod
    def draw(n_groups: int, rng: np.random.Generator) -> _Signs:
        return _Signs(rng.integers(0, 256, (n_groups, ROUND // 8), dtype=np.uint8))

    def of(self, groups: Ints) -> NDArray[np.float32]:
        """±1 [groups, 1 + ROUND]; the first column is 1 throughout, which gives what was observed by the same arithmetic."""
        flipped = np.ones((len(groups), 1 + ROUND), dtype=np.float32)
        flipped[:, 1:] -= 2 * np.unpackbits(self.bits[groups], axis=1).astype(np.float32)
        return flipped


class _Scope:
    """A scope's tested latents, and how often flipped sums reached theirs."""

    def __init__(self, acts: ResponseActs, groups_P: Ints, estimator: Estimator, scope: Scope, eligible_S: Bools) -> None:
        self.scope = scope
        self._source = (acts, groups_P, estimator, usable_pairs(acts, estimator, scope.pairs))
        active, squares, fourths = np.zeros(acts.d_sae, dtype=np.int64), np.zeros(acts.d_sae), np.zeros(acts.d_sae)
        for block in self._blocks():
            u_GS = _differences(block)
            active += np.bincount(u_GS.indices, minlength=acts.d_sae)
            squares += np.bincount(u_GS.indices, u_GS.data**2, acts.d_sae)
            fourths += np.bincount(u_GS.indices, u_GS.data**4, acts.d_sae)
        if not np.isfinite(squares).all():
            raise NumericalError("a latent's summed activation is not finite", "train the SAE again with a lower sae.lr")
        self.n_active_S = active
        self.tested = np.flatnonzero(eligible_S & (active >= MIN_ACTIVE_GROUPS) & (fourths > 0))
        self.root_T = np.sqrt(squares[self.tested])
        self.stratum_T = strata_of(squares[self.tested] ** 2 / fourths[self.tested])
        self.observed_T = np.zeros(len(self.tested))
        self.exceeded_T = np.zeros(len(self.tested), dtype=np.int64)
        self.pool_T = np.zeros(len(self.tested), dtype=np.int64)

    @property
    def smallest_p(self) -> float:
        """Of the stratum with the smallest pool; 0 without tests."""
        return 1 / (1 + int(self.pool_T.min())) if len(self.tested) else 0.0

    def add_round(self, signs: _Signs) -> Floats:
        """Count a round of flips; the largest r of each flip [ROUND]."""
        sums_TB = np.zeros((len(self.tested), 1 + ROUND))
        for block in self._blocks():
            u_TG, signs_GB = _differences(block)[:, self.tested].T.tocsr().astype(np.float32), signs.of(block.groups_G)
            for start in range(0, 1 + ROUND, _COLUMNS):
                part = slice(start, start + _COLUMNS)
                sums_TB[:, part] += u_TG @ np.ascontiguousarray(signs_GB[:, part])
        r_TB = np.abs(sums_TB, out=sums_TB)
        r_TB /= self.root_T[:, None]
        self.observed_T = r_TB[:, 0].copy()
        for stratum in np.unique(self.stratum_T):
            members = np.flatnonzero(self.stratum_T == stratum)
            pool = np.sort(r_TB[members, 1:], axis=None)
            self.exceeded_T[members] += len(pool) - np.searchsorted(pool, self.observed_T[members] / _SLACK)
            self.pool_T[members] += len(pool)
        return np.asarray(r_TB[:, 1:].max(axis=0))

    def p(self) -> Floats:
        """(1 + exceeded) / (1 + pool) of the tested latents, NaN of the others [S]."""
        return self._spread((1 + self.exceeded_T) / (1 + self.pool_T))

    def p_max_t(self, maxima: Floats) -> Floats:
        """The same against the sorted maxima over all scopes."""
        exceeded = len(maxima) - np.searchsorted(maxima, self.observed_T / _SLACK)
        return self._spread((1 + exceeded) / (1 + len(maxima)))

    def _spread(self, values_T: Floats) -> Floats:
        spread = np.full(len(self.n_active_S), np.nan)
        spread[self.tested] = values_T
        return spread

    def _blocks(self) -> Iterator[GroupBlock]:
        acts, groups_P, estimator, usable = self._source
        return group_blocks(acts, groups_P, estimator, usable) if len(usable) else iter(())


def _differences(block: GroupBlock) -> Any:
    u_GS = (block.plus_GS - block.minus_GS).tocsr()
    u_GS.eliminate_zeros()
    return u_GS


def strata_of(effective_T: Floats) -> Ints:
    """Strata by effective number of groups, an octave each; those of fewer than `MIN_STRATUM` latents join the next lower one.

    The lowest, if it is too small, joins the next higher one.
    """
    octave = np.floor(np.log2(np.maximum(effective_T, 1))).astype(np.int64)
    found, counts = np.unique(octave, return_counts=True)
    merged: dict[int, int] = {}
    start, size = 0, 0
    stratum = 0
    for index in range(len(found) - 1, -1, -1):
        merged[int(found[index])] = stratum
        size += int(counts[index])
        if size >= MIN_STRATUM:
            start, size, stratum = index, 0, stratum + 1
    if size and stratum:
        merged.update({int(one): stratum - 1 for one in found[:start]})
    return np.array([merged[int(one)] for one in octave], dtype=np.int64)
