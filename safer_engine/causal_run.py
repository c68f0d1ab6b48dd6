"""The course of the causal stage: attribution of all latents, then ablation of the chosen ones, file after file.

Imported when the stage runs, for it brings torch along. Each file of residual streams is a unit of resume, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safer_engine import sae_files
from safer_engine.artifacts import Activations
from safer_engine.science.ablation import Changes, Edit, Stream, direct_attribution, reward_changes, sequence_of
from safer_engine.science.readings import choose_by_hash
from safer_engine.science.reward_recovered import ResidualPair, Rewards
from safer_engine.science.sae import Sae
from safer_engine.stage import StageContext

Floats = NDArray[np.float64]
Told = Callable[[float], None]
_SIGNS = (1.0, -1.0)
_HELD_BATCHES = 8
"""Batches of tokens whose streams are in memory at once, to find sequences of one length among."""


@dataclass(frozen=True)
class Attribution:
    """First-order effects of all latents over the kept pairs.

    Attributes:
        margin_S: mean change of the margin when each is ablated. mean_S: mean activation over covered positions.
        fired_S: covered positions at which it fires.
        n_pairs, n_positions: what the means are of.
    """

    margin_S: Floats
    mean_S: Floats
    fired_S: Floats
    n_pairs: int
    n_positions: int


@dataclass(frozen=True)
class Ablated:
    """Rewards of the kept pairs and their changes.

    Attributes:
        pair_P: row index of each pair. reward_P2: rewards as they are. change_P2E: change of each side's reward under each
        edit; NaN where the edit was not run on the pair. runs: sequences that the upper blocks were run on.
    """

    pair_P: NDArray[np.int64]
    reward_P2: Floats
    change_P2E: Floats
    runs: int


@dataclass(frozen=True)
class CausalRun:
    """One run of the stage over the kept pairs."""

    ctx: StageContext
    rows: sae_files.ResidualRows
    sae: Sae
    rewards: Rewards

    @property
    def activations(self) -> Activations:
        """Where the residual streams lie."""
        return self.rows.activations

    @cached_property
    def names(self) -> list[str]:
        """Files of residual streams."""
        return self.activations.names("residual-")

    @cached_property
    def kept(self) -> list[frozenset[int]]:
        """Row indices of the kept pairs, by file."""
        from safetensors import safe_open

        found = []
        for name in self.names:
            with safe_open(self.activations.path(name), framework="np") as handle:
                found.append(frozenset(handle.get_tensor("pair").tolist()))
        return found

    def sample(self, pair_ids: list[str], n: int) -> frozenset[int]:
        """`n` of the kept pairs, chosen by the hash of their ids."""
        found = sorted(frozenset().union(*self.kept))
        chosen = choose_by_hash([pair_ids[index] for index in found], n, self.ctx.base_seed, "causal")
        return frozenset(found[index] for index in chosen)

    def attribution(self) -> Attribution:
        """Effects of all latents to first order: one backward pass per sequence."""
        parts = [self._unit("attribution", index, self._attribute) for index in range(len(self.names))]
        margin_S, z_S, fired_S = (np.sum([part[key] for part in parts], axis=0) for key in ("margin", "z", "fired"))
        n_pairs, n_positions = (int(sum(part[key][0] for part in parts)) for key in ("pairs", "positions"))
        return Attribution(margin_S / max(1, n_pairs), z_S / max(1, n_positions), fired_S, n_pairs, n_positions)

    def ablation(self, edits: list[Edit], everywhere: int, sample: frozenset[int]) -> Ablated:
        """Effects of edits: the first `everywhere` on all kept pairs, the others on those of `sample` alone."""

        def read(name: str, told: Told) -> dict[str, Any]:
            return self._ablate(name, (edits, everywhere, sample), told)

        parts = [self._unit("ablation", index, read) for index in range(len(self.names))]
        pair_P, reward_P2, change_P2E = (np.concatenate([part[key] for part in parts]) for key in ("pair", "reward", "change"))
        return Ablated(pair_P, reward_P2, change_P2E, int(sum(part["runs"][0] for part in parts)))

    def _unit(self, what: str, index: int, compute: Callable[[str, Told], dict[str, Any]]) -> dict[str, Any]:
        """What is computed of a file, kept across restarts; `compute` tells how many of its pairs are done."""
        from safetensors.numpy import load_file, save_file

        before, total = sum(map(len, self.kept[:index])), sum(map(len, self.kept))

        def told(done: float) -> None:
            self.ctx.progress(before + done, total, f"pairs ({what})")

        told(0)
        name = f"{what}-{index:05d}.safetensors"
        path = self.ctx.work.scratch / name
        if not path.is_file():
            found = compute(self.names[index], told)
            with self.ctx.work.publish(name, scratch=True) as temporary:
                save_file({key: np.ascontiguousarray(value) for key, value in found.items()}, temporary)
        return dict(load_file(path))

    def _streams(self, pair: ResidualPair) -> Iterator[Stream]:
        for h_TD, ids_T, covered_T in zip(pair.h_TD, pair.ids_T, pair.covered_T, strict=True):
            yield sequence_of(self.sae, h_TD, ids_T, covered_T)

    def _attribute(self, name: str, told: Told) -> dict[str, Any]:
        d_sae = self.sae.shape.d_sae
        margin_S, z_S, fired_S = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(3))
        pairs = positions = 0
        for _, pair in self.rows.of(name):
            told(pairs)
            pairs += 1
            for sign, stream in zip(_SIGNS, self._streams(pair), strict=True):
                margin_S += sign * direct_attribution(stream, self.sae, self.rewards)
                at, values = stream.indices_NK.flatten().cpu(), stream.values_NK.flatten().double().cpu()
                z_S.index_add_(0, at, values)
                fired_S.index_add_(0, at, (values > 0).double())
                positions += len(stream.at_N)
        arrays = {"margin": margin_S.numpy(), "z": z_S.numpy(), "fired": fired_S.numpy()}
        return {**arrays, "pairs": np.asarray([pairs]), "positions": np.asarray([positions])}

    def _windows(self, name: str) -> Iterator[tuple[list[int], list[Stream]]]:
        """Pairs of a file with their streams (two each), a bounded number of tokens at a time."""
        pairs: list[int] = []
        streams: list[Stream] = []
        for index, pair in self.rows.of(name):
            pairs.append(index)
            streams += self._streams(pair)
            if sum(len(stream.ids_T) for stream in streams) >= _HELD_BATCHES * self.ctx.runtime.batch_tokens:
                yield pairs, streams
                pairs, streams = [], []
        if pairs:
            yield pairs, streams

    def _ablate(self, name: str, wanted: tuple[list[Edit], int, frozenset[int]], told: Told) -> dict[str, Any]:
        edits, everywhere, sample = wanted
        found: list[Changes] = []
        order: list[int] = []
        for pairs, streams in self._windows(name):
            own = [edits if index in sample else edits[:everywhere] for index in pairs for _ in _SIGNS]
            found += reward_changes(
                streams,
                self.sae,
                own,
                self.rewards,
                self.ctx.runtime.batch_tokens,
                partial(_told_within, told, len(order), len(pairs)),
            )
            order += pairs
        change_NE = np.full((len(found), len(edits)), np.nan)
        for change_E, one in zip(change_NE, found, strict=True):
            change_E[: len(one.change_E)] = one.change_E.numpy()
        reward_N = np.asarray([one.reward for one in found], dtype=np.float64)
        shaped = {"reward": reward_N.reshape(-1, 2), "change": change_NE.reshape(-1, 2, len(edits))}
        return {"pair": np.asarray(order, dtype=np.int64), **shaped, "runs": np.asarray([sum(one.runs for one in found)])}


def _told_within(told: Told, before: int, here: int, share: float) -> None:
    told(before + share * here)
