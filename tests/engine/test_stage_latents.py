import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from safer_engine import payload_files
from safer_engine.artifacts import Activations, Latents, PairSet
from safer_engine.errors import ArtifactError, Interrupted
from safer_engine.events import NullObserver
from safer_engine.latent_files import open_acts
from safer_engine.latent_tests import selection_half
from safer_engine.payload_files import TensorPieces, map_tensors, write_table, write_tensors
from safer_engine.science.salience import salience
from safer_engine.science.sign_flips import FlipSettings, Scope, flip_tests
from safer_engine.stage import stage_seed
from safer_engine.stages.latents import LatentsStage
from tests.helpers.latent_world import LatentWorld, Side, draw_world

SECTIONS: dict[str, Any] = {
    "salience": {"candidates": 12, "min_rate": 0.001, "max_rate": 0.9},
    "contexts": {"per_latent": 5, "window": 12},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LatentWorld:
    return draw_world(tmp_path_factory.mktemp("world"), n_pairs=80, **SECTIONS)


@pytest.fixture(scope="module")
def latents(world: LatentWorld) -> Latents:
    found = world.run(LatentsStage())
    assert isinstance(found, Latents)
    return found


def counted(side: Side) -> np.ndarray:
    outlying = (side.flags & (Activations.FLAG_SPECIAL | Activations.FLAG_HIGH_NORM)) != 0
    return np.asarray(side.covered & (~outlying | (side.flags & Activations.FLAG_HEAD != 0)))


def dense(world: LatentWorld, side: Side) -> np.ndarray:
    """Positive activations at every token; zero where not counted."""
    z = world.sae.encode(torch.from_numpy(side.h)).positive_BK.new_zeros(len(side.h), 40)
    acts = world.sae.encode(torch.from_numpy(side.h))
    z.scatter_add_(1, acts.indices_BK, acts.positive_BK)
    return np.where(counted(side)[:, None], z.numpy(), 0).astype(np.float64)


def test_activation_sums_are_those_of_the_responses(world: LatentWorld, latents: Latents) -> None:
    found = load_file(latents.path("acts.safetensors"))
    assert {name: str(value.dtype) for name, value in found.items()} == {
        "chosen_indptr": "int64", "rejected_indptr": "int64", "chosen_indices": "int32", "rejected_indices": "int32",
        "chosen_sums": "float32", "rejected_sums": "float32", "n_positions": "int32",
    }  # fmt: skip
    for number, name in enumerate(("chosen", "rejected")):
        for pair, sides in enumerate(world.sides):
            part = slice(*found[f"{name}_indptr"][pair : pair + 2])
            full = np.zeros(40)
            full[found[f"{name}_indices"][part]] = found[f"{name}_sums"][part]
            np.testing.assert_allclose(full, dense(world, sides[number]).sum(axis=0), rtol=1e-5)
            assert found["n_positions"][pair, number] == counted(sides[number]).sum()


def chosen_half(world: LatentWorld) -> np.ndarray:
    return selection_half(world.groups, stage_seed(0, "latents", "halves"))


def test_halves_are_of_whole_groups_and_of_equal_size(world: LatentWorld) -> None:
    half = chosen_half(world)
    first, second = (set(np.array(world.groups)[one]) for one in (half, ~half))
    assert not first & second
    assert 0 <= len(second) - len(first) <= 1


def test_the_table_has_one_row_per_latent(world: LatentWorld, latents: Latents) -> None:
    frame = latents.latents.to_pandas()
    assert frame.columns.tolist() == [
        "latent_id", "firing_rate", "responses", "energy", "a_chosen", "a_rejected", "salience", "salience_lo", "salience_hi",
        "t", "salience_paper", "axis", "candidate", "rank", "salience_selection", "p", "q", "q_by", "p_max_t", "n_active",
        "discovery", "replicated", "salience_equal_length", "equal_length_lo", "equal_length_hi", "equal_length_t",
        "length_bound", "p_mixed", "mixed",
    ]  # fmt: skip
    assert frame.latent_id.tolist() == list(range(40))
    z = np.concatenate([dense(world, side) for pair in world.sides for side in pair])
    n = sum(int(counted(side).sum()) for pair in world.sides for side in pair)
    np.testing.assert_allclose(frame.firing_rate, (z > 0).sum(axis=0) / n)
    np.testing.assert_allclose(frame.energy, (z**2).sum(axis=0), rtol=1e-5)
    ranked = frame[frame["rank"].notna()].sort_values("rank")
    assert ranked["rank"].tolist() == list(range(1, len(ranked) + 1))
    for _, one in ranked[ranked.candidate].groupby("axis"):
        for _, tier in one.groupby("discovery", dropna=False):
            assert tier.salience_selection.abs().is_monotonic_decreasing
    assert ranked.candidate.tolist() == [True] * 12 + [False] * (len(ranked) - 12)
    assert ((frame.firing_rate > 0.001) & (frame.firing_rate < 0.9)).tolist() == frame["rank"].notna().tolist()
    assert latents.meta["n_candidates"] == 12
    assert latents.meta["totals"]["positions"] == n
    assert latents.meta["totals"]["firings"] == (z > 0).sum()


def test_salience_is_that_of_the_axis_that_took_a_latent(world: LatentWorld, latents: Latents) -> None:
    acts = open_acts(latents.path("acts.safetensors"), 40)
    codes, axes = np.unique(world.groups, return_inverse=True)[1], np.array(world.axes)
    chooses = chosen_half(world)
    first, found = (
        {axis: salience(acts, codes, "paired_mean", np.flatnonzero((axes == axis) & half)) for axis in ("chat", "safety")}
        for half in (chooses, ~chooses)
    )
    assert min(one.n_groups for one in first.values()) >= 9
    frame = latents.latents.to_pandas()
    np.testing.assert_allclose(frame.salience, [found[axis].salience_S[latent] for latent, axis in enumerate(frame.axis)])
    assert set(frame.axis) == {"chat", "safety"}
    taken, groups = frame[frame.candidate].axis.value_counts(), {axis: one.n_groups for axis, one in first.items()}
    share = groups["chat"] / sum(groups.values())
    assert abs(taken["chat"] - 12 * share) < 1
    np.testing.assert_allclose(frame.t[frame.axis == "chat"], found["chat"].t_S[frame.axis == "chat"])
    paper = salience(acts, codes, "paper")
    np.testing.assert_allclose(frame.salience_paper, paper.salience_S)
    assert latents.meta["totals"]["chosen"] == pytest.approx(paper.a_chosen_S.sum())


def test_axes_and_subsets_hold_every_candidate(world: LatentWorld, latents: Latents) -> None:
    candidates = set(latents.latents.to_pandas().query("candidate").latent_id)
    axes, subsets = latents.table("axes.arrow").to_pandas(), latents.table("subsets.arrow").to_pandas()
    assert set(axes.axis) == {"chat", "safety"}
    assert set(zip(subsets.axis, subsets.subset, strict=True)) == set(zip(world.axes, world.subsets, strict=True))
    for _, part in [*axes.groupby("axis"), *subsets.groupby("subset")]:
        assert set(part.latent_id) == candidates
    acts = open_acts(latents.path("acts.safetensors"), 40)
    codes = np.unique(world.groups, return_inverse=True)[1]
    rows = np.flatnonzero((np.array(world.subsets) == "safety-1") & ~chosen_half(world))
    expected = salience(acts, codes, "paired_mean", rows)
    mine = subsets[subsets.subset == "safety-1"].set_index("latent_id")
    for latent in candidates:
        assert mine.loc[latent, "salience"] == pytest.approx(expected.salience_S[latent])
        assert mine.loc[latent, "n_groups"] == expected.n_groups


def test_the_tests_of_a_latent_are_those_of_the_half_that_chooses(world: LatentWorld, latents: Latents) -> None:
    acts, frame = open_acts(latents.path("acts.safetensors"), 40), latents.latents.to_pandas()
    codes, axes = np.unique(world.groups, return_inverse=True)[1], np.array(world.axes)
    scopes = [Scope(name, np.flatnonzero((axes == name) & chosen_half(world))) for name in ("chat", "safety")]
    settings = FlipSettings(0.05, 8192, stage_seed(0, "latents", "flips"))
    found = flip_tests(acts, codes, "paired_mean", scopes, frame["rank"].notna().to_numpy(), settings)
    for one in found.scopes:
        mine = (frame.axis == one.name).to_numpy()
        np.testing.assert_allclose(frame.p[mine], one.p_S[mine])
        np.testing.assert_allclose(frame.q[mine], one.q_S[mine])
        np.testing.assert_allclose(frame.p_max_t[mine], one.p_max_t_S[mine])
        assert frame.n_active[mine].tolist() == one.n_active_S[mine].tolist()
    assert latents.meta["tests"]["n_tests"] == found.n_tests > 0
    assert latents.meta["tests"]["n_discoveries"] == (frame.discovery == True).sum()  # noqa: E712 (null is neither)
    assert frame.discovery.isna().tolist() == frame.p.isna().tolist()


def test_candidates_have_a_salience_at_equal_length_and_in_every_cluster(world: LatentWorld, latents: Latents) -> None:
    frame, clusters = latents.latents.to_pandas(), latents.table("clusters.arrow").to_pandas()
    assert frame.salience_equal_length.notna().tolist() == frame.candidate.tolist()
    assert set(clusters.latent_id) == set(frame[frame.candidate].latent_id)
    named = {one["cluster"]: one for one in latents.meta["clusters"]}
    assert sum(one["n_groups"] for one in named.values()) == len(set(world.groups))
    sizes = frame[frame.candidate].axis.value_counts()
    half, groups, axes = chosen_half(world), np.array(world.groups), np.array(world.axes)
    for axis, part in clusters.groupby("axis"):
        assert part.groupby("cluster").n_groups.first().sum() == len(set(groups[~half & (axes == axis)]))
        assert part.groupby("cluster").latent_id.count().tolist() == [sizes[axis]] * part.cluster.nunique()
    assert set(clusters.cluster) <= set(named)


def test_the_paper_estimator_ranks_over_all_pairs_and_tests_nothing(tmp_path: Path, world: LatentWorld) -> None:
    sections = {"salience": {**SECTIONS["salience"], "estimator": "paper"}, "contexts": SECTIONS["contexts"]}
    other = LatentWorld(tmp_path, world.sides, world.sae, world.groups, world.axes, world.subsets, spec_sections=sections)
    found = other.run(LatentsStage())
    frame = found.latents.to_pandas()
    codes = np.unique(world.groups, return_inverse=True)[1]
    expected = salience(open_acts(found.path("acts.safetensors"), 40), codes, "paper")
    np.testing.assert_array_equal(frame.salience, expected.salience_S)
    order = frame[frame["rank"].notna()].sort_values("rank").salience.abs()
    assert order.is_monotonic_decreasing
    assert found.meta["tests"] is None
    assert frame[["p", "q", "discovery", "length_bound", "mixed"]].isna().all().all()


def test_contexts_show_the_exact_text_and_the_latents_activations(world: LatentWorld, latents: Latents) -> None:
    rows = latents.table("contexts.arrow").to_pylist()
    assert {row["latent_id"] for row in rows} == set(latents.latents.to_pandas().query("candidate").latent_id)
    for row in rows:
        side = world.sides[int(row["pair_id"][1:])][("chosen", "rejected").index(row["side"])]
        z = dense(world, side)[:, row["latent_id"]]
        start = row["position"] - row["focus"]
        assert row["tokens"] == side.tokens[start : start + len(row["tokens"])]
        assert len(row["tokens"]) == len(row["activations"]) == min(12, len(side.tokens))
        assert row["activation"] == pytest.approx(z.max(), rel=1e-6)
        assert row["position"] == z.argmax()
        assert row["activations"][row["focus"]] == row["activation"]
        for at, activation in enumerate(row["activations"]):
            assert (activation is None) == (not counted(side)[start + at])
            assert activation is None or activation == pytest.approx(z[start + at], rel=1e-6)


def test_contexts_are_the_strongest_one_per_group(world: LatentWorld, latents: Latents) -> None:
    frame = latents.table("contexts.arrow").to_pandas()
    for latent, part in frame.groupby("latent_id"):
        peaks = sorted(((dense(world, side)[:, latent].max(), pair, number)
                        for pair, sides in enumerate(world.sides) for number, side in enumerate(sides)),
                       key=lambda item: (-item[0], item[1], item[2]))  # fmt: skip
        firsts = {
            world.groups[pair]: (f"p{pair}", ("chosen", "rejected")[side]) for value, pair, side in peaks[::-1] if value > 0
        }
        expected = [where for _, pair, side in peaks if (where := (f"p{pair}", ("chosen", "rejected")[side])) in firsts.values()][
            :5
        ]
        assert part["rank"].tolist() == list(range(1, len(expected) + 1))
        assert list(zip(part.pair_id, part.side, strict=True)) == expected


def test_the_background_is_drawn_from_the_responses(world: LatentWorld, latents: Latents) -> None:
    rows = latents.table("background.arrow").to_pylist()
    assert len(rows) == len({row["pair_id"] for row in rows}) == 80
    assert {row["side"] for row in rows} == {"chosen", "rejected"}
    for row in rows:
        side = world.sides[int(row["pair_id"][1:])][("chosen", "rejected").index(row["side"])]
        assert side.start <= row["position"] < len(side.tokens)
        assert row["tokens"][row["focus"]] == side.tokens[row["position"]]


class StopAfter(NullObserver):
    """Asks to stop once so many shards are done."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.left -= unit == "shards"

    def cancelled(self) -> bool:
        return self.left < 0


def test_an_interrupted_run_goes_on_from_the_last_shard(tmp_path: Path, world: LatentWorld, latents: Latents) -> None:
    again = LatentWorld(
        tmp_path, world.sides, world.sae, world.groups, world.axes, world.subsets, spec_sections=world.spec_sections
    )
    with pytest.raises(Interrupted):
        again.run(LatentsStage(), StopAfter(5))
    assert len(list(tmp_path.rglob("scratch/shard-*"))) == 5
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("scratch/shard-*")}
    with pytest.raises(Interrupted):
        again.run(LatentsStage(), StopAfter(7))
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("scratch/shard-*")}
    assert len(after) == 7
    assert {name: after[name] for name in kept} == kept  # what was there is not computed anew
    resumed = again.run(LatentsStage())
    assert resumed.stored.manifest.content_digest == latents.stored.manifest.content_digest


def test_results_do_not_depend_on_the_shards(tmp_path: Path, world: LatentWorld, latents: Latents) -> None:
    other = LatentWorld(
        tmp_path, world.sides, world.sae, world.groups, world.axes, world.subsets, 33, spec_sections=world.spec_sections
    ).run(LatentsStage())
    for name in ("latents.arrow", "axes.arrow", "subsets.arrow", "contexts.arrow", "background.arrow"):
        mine, theirs = latents.table(name), other.table(name)
        assert mine.schema == theirs.schema
        for column in mine.column_names:
            if pa.types.is_floating(mine[column].type):
                np.testing.assert_allclose(mine[column].to_numpy(), theirs[column].to_numpy(), rtol=1e-5, atol=1e-6)
            elif column != "activations":
                assert mine[column].equals(theirs[column]), (name, column)


def test_one_axis_is_all_pairs(tmp_path: Path, world: LatentWorld) -> None:
    found = LatentWorld(
        tmp_path, world.sides, world.sae, world.groups, ["all"] * 80, ["all"] * 80, spec_sections=world.spec_sections
    ).run(LatentsStage())
    frame, axes = found.latents.to_pandas(), found.table("axes.arrow").to_pandas().set_index("latent_id")
    assert frame.axis.isna().all()
    for latent in axes.index:
        assert axes.loc[latent, "salience"] == frame.salience[latent]


def test_a_latent_store_that_nothing_fires_in_is_empty_but_whole(tmp_path: Path, world: LatentWorld) -> None:
    sections = {**SECTIONS, "salience": {"min_rate": 0.98, "max_rate": 0.99}}
    found = LatentWorld(tmp_path, world.sides, world.sae, world.groups, world.axes, world.subsets, spec_sections=sections).run(
        LatentsStage()
    )
    assert found.meta["n_candidates"] == 0
    assert not found.latents.to_pandas().candidate.any()
    assert [found.table(name).num_rows for name in ("contexts.arrow", "axes.arrow", "subsets.arrow")] == [0, 0, 0]


def test_pairs_that_no_shard_covers_are_refused(tmp_path: Path, world: LatentWorld) -> None:
    short = LatentWorld(tmp_path, world.sides[:40], world.sae, world.groups[:40], world.axes[:40], world.subsets[:40])
    short.found[PairSet] = world.found[PairSet]
    with pytest.raises(ArtifactError, match="40 of 80 pairs"):
        short.run(LatentsStage())


def test_importing_the_stages_does_not_import_torch() -> None:
    code = (
        "import sys, safer_engine.stages.latents, safer_engine.stages.labels, safer_engine.labellers.lexicon;"
        "print(sorted({'torch', 'transformers', 'numpy', 'httpx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


class TestPayloadFiles:
    def test_pieces_make_the_file_that_safetensors_reads(self, tmp_path: Path) -> None:
        values = np.arange(12, dtype=np.float32)
        write_tensors(
            tmp_path / "t",
            {
                "a": TensorPieces("I64", (3,), [np.array([1, 2]), np.array([3])]),
                "empty": TensorPieces("I32", (0, 4), []),
                "b": TensorPieces("F32", (4, 3), iter(np.split(values, 4))),
            },
        )
        for found in (load_file(tmp_path / "t"), map_tensors(tmp_path / "t")):
            assert found["a"].tolist() == [1, 2, 3]
            np.testing.assert_array_equal(found["b"], values.reshape(4, 3))
            assert found["empty"].shape == (0, 4)

    def test_pieces_that_do_not_make_the_shape_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="has 16 bytes"):
            write_tensors(tmp_path / "t", {"a": TensorPieces("I64", (3,), [np.array([1, 2])])})

    def test_damaged_and_foreign_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "t"
        write_tensors(path, {"a": TensorPieces("F64", (5,), [np.zeros(5)])})
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        with pytest.raises(ArtifactError, match="shorter"):
            map_tensors(path)
        path.write_bytes(whole.replace(b'"F64"', b'"BF16'[:4] + b'"'))
        with pytest.raises(ArtifactError):
            map_tensors(path)
        for junk in (b"", b"\x04\x00\x00\x00\x00\x00\x00\x00junk"):
            path.write_bytes(junk)
            with pytest.raises(ArtifactError, match="not a safetensors file"):
                map_tensors(path)

    def test_a_type_without_an_equal_is_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "t")
        with pytest.raises(ArtifactError, match="BF16"):
            map_tensors(tmp_path / "t")

    def test_nan_becomes_null(self, tmp_path: Path) -> None:
        table = pa.table({"t": payload_files.nullable(np.array([1.0, np.nan]))})
        write_table(tmp_path / "t", table)
        with pa.memory_map(str(tmp_path / "t")) as source:
            assert pa.ipc.open_file(source).read_all()["t"].to_pylist() == [1.0, None]


def test_held_out_windows_are_what_they_say(world: LatentWorld, latents: Latents) -> None:
    """By a second computation: the latent fires at the focus of one window of each match, and nowhere in the other."""
    rows = latents.table("checks.arrow").to_pylist()
    shown: dict[int, set[str]] = {}
    for row in latents.table("contexts.arrow").to_pylist():
        shown.setdefault(row["latent_id"], set()).add(world.groups[int(row["pair_id"][1:])])
    groups: dict[int, list[str]] = {}
    assert len(rows) > 40
    for fires, silent in zip(rows[::2], rows[1::2], strict=True):
        assert (fires["latent_id"], fires["match"], fires["side"]) == (silent["latent_id"], silent["match"], silent["side"])
        assert silent["activation"] is None
        pairs = [int(row["pair_id"][1:]) for row in (fires, silent)]
        assert world.subsets[pairs[0]] == world.subsets[pairs[1]]
        for row, pair in zip((fires, silent), pairs, strict=True):
            side = world.sides[pair][0 if row["side"] == "chosen" else 1]
            start = row["position"] - row["focus"]
            assert row["tokens"] == side.tokens[start : start + len(row["tokens"])]
            z = dense(world, side)[:, row["latent_id"]]
            if row["activation"] is None:
                assert not z[start : start + len(row["tokens"])].any()
                assert counted(side)[row["position"]]
            else:
                assert z[row["position"]] == pytest.approx(row["activation"], rel=1e-5) == z.max()
            groups.setdefault(row["latent_id"], []).append(world.groups[pair])
    for latent, mine in groups.items():
        assert len(set(mine)) == len(mine)
        assert not shown[latent] & set(mine)
