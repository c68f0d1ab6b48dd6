"""The stability stage's work: the second SAE's latents encoded and tested as the first one's, and both compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safer_engine import latent_files
from safer_engine.artifacts import Activations, Latents, PairSet
from safer_engine.stage import StageContext, stage_seed

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    from safer_engine.science.sae import Sae
    from safer_engine.science.seed_stability import Counterparts, ScopeDiscoveries

_OF_LATENTS = "latents"
"""The stage whose halves and flips are taken over: what differs is to be the SAE alone."""


@dataclass(frozen=True)
class SecondTests:
    """The second SAE's latents.

    Attributes:
        alive_S: which fire at a counted position.
        scopes: by axis (None: all pairs); empty where nothing is tested.
    """

    alive_S: NDArray[np.bool_]
    scopes: Mapping[str | None, ScopeDiscoveries]


@dataclass(frozen=True)
class SecondRun:
    """What the second SAE is tested on."""

    ctx: StageContext
    pairs: PairSet
    activations: Activations
    sae: Sae

    def tested(self) -> SecondTests:
        """The same halves, flips, firing rates and false-discovery rate as for the first SAE."""
        from safer_engine.latent_tables import Strata
        from safer_engine.latent_tests import halve
        from safer_engine.science.latent_acts import add_totals
        from safer_engine.science.salience import eligible_latents
        from safer_engine.science.sign_flips import FlipSettings

        fragments = self._fragments()
        totals = add_totals([fragment.totals for fragment in fragments])
        alive_S, spec = totals.firings_S > 0, self.ctx.spec.salience
        if spec.estimator != "paired_mean":
            return SecondTests(alive_S, {})
        with self.ctx.work.publish("acts.safetensors", scratch=True) as path:
            latent_files.write_acts(path, fragments, self.pairs.pairs.num_rows)
        acts = latent_files.open_acts(self.ctx.work.scratch / "acts.safetensors", self.sae.shape.d_sae)
        strata = Strata.of(self.pairs.pairs, self._seed("halves"))
        eligible_S = eligible_latents(totals.firings_S, totals.n_positions, spec.min_rate, spec.max_rate)
        settings = FlipSettings(spec.fdr, spec.draws, self._seed("flips"))
        halved = halve(acts, strata.groups_P, strata.axes_P, strata.half_P, eligible_S, settings)
        return SecondTests(alive_S, {} if halved is None else _scopes(halved, spec.fdr))

    def _seed(self, unit: str) -> int:
        return stage_seed(self.ctx.base_seed, _OF_LATENTS, unit)

    def _fragments(self) -> list[latent_files.Fragment]:
        """Sums over each shard's responses; those of an earlier, interrupted run are taken as they are."""
        from safer_engine.science.latent_acts import summarise_shard

        names, found = self.activations.names("shard-"), []
        for done, name in enumerate(names):
            self.ctx.progress(done, len(names), "shards")
            path = self.ctx.work.scratch / name
            if not path.is_file():
                rows = latent_files.read_shard(self.activations.path(name), self.ctx.spec.hook, self.ctx.spec.salience)
                acts = summarise_shard(
                    rows, lambda x_BD: self.sae.encode(x_BD.to(self.sae.W_enc_DS.device)), self.sae.shape.d_sae
                )
                with self.ctx.work.publish(name, scratch=True) as temporary:
                    latent_files.save_fragment(temporary, acts, _nothing(), _nothing())
            found.append(latent_files.open_fragment(path))
        return found


def _nothing() -> Any:
    import numpy as np

    from safer_engine.science.contexts import TopContexts

    return TopContexts(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32))


def _scopes(halved: Any, fdr: float) -> dict[str | None, ScopeDiscoveries]:
    from safer_engine.science.seed_stability import ScopeDiscoveries

    pairs = zip(halved.selected, halved.tests.scopes, strict=True)
    return {one.axis: ScopeDiscoveries(tests.tested_S, tests.q_S <= fdr, one.salience.salience_S) for one, tests in pairs}


@dataclass(frozen=True)
class Comparison:
    """`stability.arrow` and the stage's meta."""

    table: pa.Table
    facts: dict[str, Any]


def compare(latents: Latents, own_SD: Tensor, other_SD: Tensor, second: SecondTests, seed: int) -> Comparison:
    """Counterparts of the first SAE's tested latents and candidates, and which discoveries are found again."""
    import numpy as np
    import pyarrow as pa
    import torch

    from safer_engine.science.seed_stability import MIN_COSINE, counterparts, crowding

    frame = latents.latents.select(["latent_id", "axis", "candidate", "p", "discovery", "salience_selection"]).to_pandas()
    frame = frame[frame.candidate | frame.p.notna()].reset_index(drop=True)
    matched = counterparts(own_SD[torch.from_numpy(frame.latent_id.to_numpy(np.int64))], other_SD, second.alive_S)
    discovery = frame.discovery.eq(True).to_numpy(bool)
    again, chance = _found(frame, discovery, matched, second.scopes)
    random = crowding(other_SD, second.alive_S, torch.Generator().manual_seed(seed))
    wanted = np.flatnonzero(discovery | frame.candidate.to_numpy(bool))
    table = pa.table(
        {
            "latent_id": pa.array(frame.latent_id.to_numpy(np.int32)[wanted]),
            "match_id": pa.array(matched.match_F[wanted].astype(np.int32)),
            "match_cosine": pa.array(matched.cosine_F[wanted]),
            "found_again": pa.array(again[wanted], mask=~discovery[wanted]),
        }
    )
    own = matched.cosine_F[discovery]
    facts = {
        "min_cosine": MIN_COSINE,
        "n_discoveries": int(discovery.sum()),
        "n_matched": int((own >= MIN_COSINE).sum()),
        "n_found_again": int(again.sum()),
        "found_again_share": _mean(again[discovery]),
        "by_chance_share": _mean(chance[discovery]),
        "mean_cosine": _mean(own),
        "mean_cosine_tested": _mean(matched.cosine_F[frame.p.notna().to_numpy()]),
        "random_mean_cosine": _mean(random),
        "random_matched_share": _mean(random >= MIN_COSINE),
        "n_second_discoveries": sum(int(one.discovery_S.sum()) for one in second.scopes.values()),
    }
    return Comparison(table, facts)


def _found(
    frame: Any, discovery: NDArray[np.bool_], matched: Counterparts, scopes: Mapping[str | None, ScopeDiscoveries]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each latent is a discovery that is found again, and the chance of it; within the axis that it is shown in."""
    import numpy as np

    from safer_engine.science.seed_stability import Counterparts, found_again

    again, chance = np.zeros(len(frame), dtype=np.bool_), np.zeros(len(frame))
    axes = [axis if isinstance(axis, str) else None for axis in frame.axis]
    for axis, other in scopes.items():
        here = np.flatnonzero(discovery & np.array([one == axis for one in axes], dtype=np.bool_))
        part = Counterparts(matched.match_F[here], matched.cosine_F[here])
        found = found_again(frame.salience_selection.to_numpy(np.float64)[here], part, other)
        again[here], chance[here] = found.found_F, found.by_chance_F
    return again, chance


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
