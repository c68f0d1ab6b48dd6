"""The stages `second_sae` and `stability`: what a second SAE has too, known by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safer_engine.artifacts import Absent, Latents, SecondAutoencoder, SparseAutoencoder, Stability
from safer_engine.errors import Interrupted
from safer_engine.events import NullObserver
from safer_engine.report.model_salience import SeedStability
from safer_engine.report.tables import features_table
from safer_engine.science.sae import Sae
from safer_engine.spec import AuditSpec
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.stages.latents import LatentsStage
from safer_engine.stages.sae import SaeStage
from safer_engine.stages.second_sae import SecondSaeStage
from safer_engine.stages.stability import StabilityStage
from tests.helpers.latent_world import LatentWorld, draw_sae, draw_world

SECTIONS: dict[str, Any] = {
    "salience": {"candidates": 12, "min_rate": 0.001, "max_rate": 0.9},
    "contexts": {"per_latent": 5, "window": 12},
    "stability": {"second_sae": True},
    "sae": {"d_sae": 40, "k": 5, "max_steps": 30, "min_steps": 30, "batch": 64},
    "split": {"held_out": 0.2},
    "runtime": {"device": "cpu"},
}
TRAINED = SECTIONS["sae"]


def planted_world(folder: Path) -> LatentWorld:
    """Latents 3 and 7 fire more on chosen and on rejected responses."""
    drawn = draw_world(folder / "drawn", n_pairs=160, **SECTIONS)
    for pair in drawn.sides:
        for side, latent in zip(pair, (3, 7), strict=True):
            side.h[:] += 2.0 * drawn.sae.W_enc_DS[:, latent].numpy() / float(drawn.sae.W_enc_DS[:, latent].norm())
    return LatentWorld(folder, drawn.sides, drawn.sae, drawn.groups, drawn.axes, drawn.subsets, spec_sections=SECTIONS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LatentWorld:
    found = planted_world(tmp_path_factory.mktemp("world"))
    found.run(LatentsStage())
    return found


def second(world: LatentWorld, sae: Sae) -> LatentWorld:
    """The world with a second SAE of known weights."""
    kind = SecondAutoencoder
    files = {"sae.safetensors": sae.tensors(), "sae.json": sae.facts()}
    root = world.root / f"second-{abs(hash(sae.b_enc_S.numpy().tobytes()))}"
    other = LatentWorld(root, world.sides, world.sae, world.groups, world.axes, world.subsets, spec_sections=SECTIONS)
    other.found |= {Latents: world.found[Latents], kind: other._commit(kind, files, {"fvu": 0.3, "l0": 5.0, "dead_share": 0.0})}
    return other


def shuffled(sae: Sae, order: torch.Tensor, turned: bool = False) -> Sae:
    sign = -1 if turned else 1
    return Sae(
        sae.shape, sae.W_enc_DS[:, order].clone(), sae.b_enc_S[order].clone(), sign * sae.W_dec_SD[order], sae.b_dec_D.clone()
    )


def test_the_same_sae_in_another_order_has_every_discovery(world: LatentWorld) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    found = second(world, shuffled(world.sae, order)).run(StabilityStage())
    assert isinstance(found, Stability)
    rows = found.matches.to_pylist()
    discoveries = [row["latent_id"] for row in world.found[Latents].latents.to_pylist() if row["discovery"]]  # type: ignore[union-attr]
    assert {3, 7} <= set(discoveries)
    assert all(order[row["match_id"]] == row["latent_id"] and row["match_cosine"] > 0.999 for row in rows)
    assert {row["latent_id"]: row["found_again"] for row in rows if row["found_again"] is not None} == dict.fromkeys(
        discoveries, True
    )
    meta = found.meta
    assert (meta["n_discoveries"], meta["n_matched"], meta["n_found_again"]) == (len(discoveries),) * 3
    assert meta["found_again_share"] == 1.0
    assert meta["by_chance_share"] < 1
    assert meta["second_sae"] == {"fvu": 0.3, "l0": 5.0, "dead_share": 0.0}
    text = SeedStability(**{n: v for n, v in meta.items() if n != "second_sae"}, second_fvu=0.3).words
    assert f"has {len(discoveries)} of the {len(discoveries)} discoveries too (100%" in text


def test_other_directions_are_not_found_again(world: LatentWorld) -> None:
    drawn = draw_sae(np.random.default_rng(99), 16, 40, 5)
    found = second(world, drawn).run(StabilityStage())
    assert found.meta["n_found_again"] <= 0.2 * found.meta["n_discoveries"]
    assert found.meta["mean_cosine"] < 0.75
    turned = second(world, shuffled(drawn, torch.arange(40).flip(0), turned=True)).run(StabilityStage())
    assert turned.meta["n_found_again"] <= 0.2 * turned.meta["n_discoveries"]


def test_features_tell_their_counterpart(world: LatentWorld) -> None:
    found = second(world, shuffled(world.sae, torch.arange(40).flip(0))).run(StabilityStage())
    latents = world.found[Latents]
    assert isinstance(latents, Latents)
    table = features_table(latents, None, found, text=False)
    assert table.column_names[-3:] == ["second_seed_match_id", "second_seed_match_cosine", "second_seed_found_again"]
    for row in table.to_pylist():
        assert row["second_seed_match_id"] == 39 - row["latent_id"]
        assert row["second_seed_found_again"] is (True if row["discovery"] else None)
    assert features_table(latents, None, text=False).column_names == table.column_names[:-3]


class Stops(NullObserver):
    """Asks to stop after so many units of work."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.seen: list[float] = []

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.left -= 1
        self.seen.append(done)

    def cancelled(self) -> bool:
        return self.left < 0


def test_a_second_training_differs_in_its_seed_alone_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    whole, broken = planted_world(tmp_path / "a"), planted_world(tmp_path / "b")
    first = whole.run(SecondSaeStage())
    with pytest.raises(Interrupted):
        broken.run(SecondSaeStage(), Stops(12))
    watcher = Stops(10_000)
    again = broken.run(SecondSaeStage(), watcher)
    assert watcher.seen[0] > 1  # not from the beginning
    digests = [{name: entry.digest for name, entry in one.stored.manifest.files.items()} for one in (first, again)]
    assert digests[0] == digests[1]
    assert isinstance(first, SparseAutoencoder)
    assert first.meta["training"]["steps"] == 30
    assert 0 < first.meta["fvu"] < 1


def test_stability_goes_on_from_the_shards_it_had_encoded(world: LatentWorld, tmp_path: Path) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(8))
    other = second(world, shuffled(world.sae, order))
    with pytest.raises(Interrupted):
        other.run(StabilityStage(), Stops(6))
    kept = sorted(path.name for path in other.root.rglob("shard-*.safetensors") if "work" in path.parts)
    assert len(kept) == 6
    stamps = {path: path.stat().st_mtime_ns for path in other.root.rglob("shard-*.safetensors") if "work" in path.parts}
    reader = Stops(10_000)
    assert other.run(StabilityStage(), reader).meta["found_again_share"] == 1.0
    assert all(not path.exists() or path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_off_by_default_and_absent_with_a_reason(tmp_path: Path) -> None:
    world = draw_world(tmp_path, n_pairs=20, **{**SECTIONS, "stability": {}})
    assert isinstance(world.run(SecondSaeStage()), Absent)
    world.found[Latents] = Absent("not made here")
    absent = world.run(StabilityStage())
    assert isinstance(absent, Absent)
    assert "stability.second_sae" in absent.reason
    paper = {"model": {"path": "rm"}, "dataset": {"source": {"kind": "local", "path": "d.jsonl"}}, "preset": "paper"}
    assert build_spec([Layer("test", paper)]).spec.stability.second_sae is False


def test_nothing_but_the_two_stages_and_the_report_reads_the_switch() -> None:
    from safer_engine.pipeline import STAGES

    assert [stage.name for stage in STAGES if "stability" in stage.reads] == ["second_sae", "report"]
    assert "salience" not in SecondSaeStage.reads
    assert SaeStage.name != SecondSaeStage.name  # seeds depend on the name
    assert set(AuditSpec.model_fields) >= {"stability"}
