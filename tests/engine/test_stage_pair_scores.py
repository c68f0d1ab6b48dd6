"""The stage `pair_scores`: artifacts in, one row per pair out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from safer_engine.artifacts import Absent, Activations, Labels, Latents, PairSet
from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.science.pair_scoring import PaperFeatures, ScoringParams, SignalInputs, paper_pair_scores, score_pairs
from safer_engine.science.signals import unit_ranks
from safer_engine.science.stats import average_precision
from safer_engine.signal_inputs import mean_activation_delta, paper_features, signal_inputs
from safer_engine.spec import SuspicionSpec
from safer_engine.stages.pair_scores import PairScoresStage
from tests.helpers.planted_pairs import planted_pairs
from tests.helpers.score_artifacts import ScoreArtifacts, pair_tables

FEATURES = [1, 4, 9]
PLANTED = planted_pairs(0, n_groups=150, n_latents=50, informative=12)


def shards(n_pairs: int, d_in: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two shards in bf16: each response has 3 positions, its second one special, its last the head's (and special too)."""
    generator = torch.Generator().manual_seed(0)
    kinds = [0, Activations.FLAG_SPECIAL, Activations.FLAG_SPECIAL | Activations.FLAG_HEAD]
    found = {}
    half = n_pairs // 2
    for number, (first, last) in enumerate([(0, half), (half, n_pairs)]):
        pair = torch.arange(first, last).repeat_interleave(6)
        flags = torch.tensor(kinds).repeat(2 * (last - first))
        found[f"shard-{number:05d}.safetensors"] = {
            "x": torch.randn(len(pair), d_in, generator=generator).bfloat16(),
            "pair": pair.to(torch.int32),
            "side": torch.tensor([0, 0, 0, 1, 1, 1]).repeat(last - first).to(torch.uint8),
            "position": torch.arange(len(pair), dtype=torch.int32),
            "flags": flags.to(torch.uint8),
        }
    return found


@pytest.fixture
def world(tmp_path: Path) -> tuple[ScoreArtifacts, dict]:
    made = ScoreArtifacts(tmp_path)
    data = PLANTED.inputs
    salience = np.linspace(-0.5, 0.5, 50)
    found = {
        PairSet: made.pairs(*pair_tables(data)),
        Activations: made.activations(data, shards(len(data.margins_P), 4), 4),
        Latents: made.latents(data, salience),
        Labels: made.labels(list(range(20)), FEATURES),
    }
    return made, found


FUSED = {"suspicion": {"signals": {"latents": 2.0, "margin": 1.0}}}


def test_scores_equal_the_pure_functions(world: tuple[ScoreArtifacts, dict]) -> None:
    made, found = world
    scores = made.run(PairScoresStage(), found, FUSED)
    table = scores.scores
    data = PLANTED.inputs
    assert table.column_names == [
        "pair", "pair_id", "group", "axis", "subset", "reward_margin", "pair_score", "suspicion", "suspicion_kind",
        "suspicion_base", "status", "disputed_by", "signal_latents", "signal_margin", "evidence",
    ]  # fmt: skip
    assert table["pair_id"].to_pylist() == [f"p{i}" for i in range(table.num_rows)]
    np.testing.assert_allclose(table["reward_margin"].to_numpy(), data.margins_P)
    assert data.latents is not None
    expected = paper_pair_scores(data.latents, PaperFeatures(np.asarray(FEATURES), np.asarray([-1.0, -1.0, -1.0])))
    np.testing.assert_allclose(table["pair_score"].to_numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(table["signal_margin"].to_numpy(), -data.margins_P)
    fused = (2 * unit_ranks(table["signal_latents"].to_numpy()) + unit_ranks(-data.margins_P)) / 3
    np.testing.assert_allclose(table["suspicion"].to_numpy(), fused)
    assert set(table["suspicion_kind"].to_pylist()) == {"rank"}
    assert average_precision(PLANTED.flipped, table["suspicion"].to_numpy()) > 3 * PLANTED.flipped.mean()
    assert scores.meta["folds"] == {"safety": 5}
    assert scores.meta["signals"]["latents"] == {"weight": 2.0, "used": True}
    assert scores.meta["n_without_suspicion"] == 0


def test_evidence_lists_latents_with_signed_contributions(world: tuple[ScoreArtifacts, dict]) -> None:
    made, found = world
    evidence = made.run(PairScoresStage(), found).scores["evidence"].to_pylist()
    assert all(len(entry) <= 8 for entry in evidence)
    for entry in evidence:
        sizes = [abs(item["contribution"]) for item in entry]
        assert sizes == sorted(sizes, reverse=True)
    totals = np.asarray([sum(item["contribution"] for item in entry) for entry in evidence])
    assert totals[PLANTED.flipped].mean() < totals[~PLANTED.flipped].mean()


def test_same_seed_same_bytes(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    made, found = world
    first = made.run(PairScoresStage(), found).stored.manifest.files
    again = ScoreArtifacts(tmp_path / "again").run(PairScoresStage(), found).stored.manifest.files
    assert first == again


def test_without_latents_nothing_is_invented(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    made, found = world
    without = {**found, Latents: Absent("no SAE"), Labels: Absent("no SAE")}
    scores = made.run(PairScoresStage(), without, FUSED)
    assert scores.meta["left_out"] == {"latents": "there are no latents"}
    assert scores.meta["signals"]["latents"]["used"] is False
    assert "signal_latents" not in scores.scores.column_names
    assert scores.scores["pair_score"].null_count == scores.scores.num_rows
    assert not any(scores.scores["evidence"].to_pylist())
    assert scores.scores["suspicion"].null_count == 0
    by_default = ScoreArtifacts(tmp_path / "default").run(PairScoresStage(), without)
    assert by_default.scores["suspicion"].null_count == by_default.scores.num_rows
    assert by_default.meta["n_without_suspicion"] == by_default.scores.num_rows


def test_paper_estimator_uses_the_paper_salience_for_signs(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    _, found = world
    made = ScoreArtifacts(tmp_path / "paper")
    latents = made.latents(PLANTED.inputs, np.linspace(-0.5, 0.5, 50), estimator="paper")
    table = made.run(PairScoresStage(), {**found, Latents: latents}, {"suspicion": {"estimator": "paper"}}).scores
    data = PLANTED.inputs
    assert data.latents is not None
    expected = paper_pair_scores(data.latents, PaperFeatures(np.asarray(FEATURES), np.asarray([1.0, 1.0, 1.0])))
    np.testing.assert_allclose(table["pair_score"].to_numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(table["suspicion"].to_numpy(), unit_ranks(-table["pair_score"].to_numpy()))


def test_paper_estimator_without_safety_features_has_no_suspicion(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    _, found = world
    made = ScoreArtifacts(tmp_path / "none")
    labels = made.labels(list(range(20)), [])
    scores = made.run(PairScoresStage(), {**found, Labels: labels}, {"suspicion": {"estimator": "paper"}})
    assert scores.scores["suspicion"].null_count == scores.scores.num_rows == scores.meta["n_without_suspicion"]
    assert "no labelled safety features" in scores.meta["left_out"]["paper"]


def test_dense_means_are_pooled_across_shards_without_special_tokens(world: tuple[ScoreArtifacts, dict]) -> None:
    _, found = world
    delta = mean_activation_delta(found[Activations], len(PLANTED.inputs.margins_P))
    raw = shards(len(PLANTED.inputs.margins_P), 4)
    x = torch.cat([shard["x"] for shard in raw.values()]).float().reshape(-1, 2, 3, 4).numpy()
    pooled = (x[:, :, 0] + x[:, :, 2]) / 2  # the special token in the middle is left out, the one the head reads is not
    np.testing.assert_allclose(delta, pooled[:, 0] - pooled[:, 1], atol=1e-6)


def test_all_signals_through_the_stage(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    _, found = world
    weights = dict.fromkeys(("latents", "knn", "probe_cv", "dense", "margin", "paper"), 1.0)
    scores = ScoreArtifacts(tmp_path / "all").run(PairScoresStage(), found, {"suspicion": {"signals": weights}})
    assert not scores.meta["left_out"]
    for name in weights:
        assert scores.scores[f"signal_{name}"].null_count == 0


def test_what_signals_read_is_joined_by_pair(world: tuple[ScoreArtifacts, dict]) -> None:
    _, found = world
    data = signal_inputs(found[PairSet], found[Activations], found[Latents], found[Labels])
    assert isinstance(data, SignalInputs)
    np.testing.assert_allclose(data.margins_P, PLANTED.inputs.margins_P)
    assert data.head_delta_PD is not None
    assert data.dense_delta_PD is None
    expected = score_pairs(PLANTED.inputs, ScoringParams({"latents": 1.0})).suspicion_P
    np.testing.assert_allclose(score_pairs(data, ScoringParams({"latents": 1.0})).suspicion_P, expected)


def test_artifacts_that_do_not_cover_the_pairs_are_refused(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    _, found = world
    made = ScoreArtifacts(tmp_path / "short")
    fewer = PLANTED.inputs.take(np.arange(10))
    with pytest.raises(ArtifactError, match="cover 10 pairs"):
        made.run(PairScoresStage(), {**found, Latents: made.latents(fewer, np.zeros(50))})
    with pytest.raises(NumericalError, match="no finite reward margin"):
        made.run(PairScoresStage(), {**found, Activations: made.activations(fewer, {}, 4)})


def test_a_reward_that_is_not_finite_is_refused(world: tuple[ScoreArtifacts, dict], tmp_path: Path) -> None:
    _, found = world
    margins = PLANTED.inputs.margins_P.copy()
    margins[3] = np.nan
    made = ScoreArtifacts(tmp_path / "nan")
    activations = made.activations(replace(PLANTED.inputs, margins_P=margins), {}, 4)
    with pytest.raises(NumericalError):
        made.run(PairScoresStage(), {**found, Activations: activations})


def test_importing_the_stages_loads_no_heavy_library() -> None:
    code = (
        "import sys, safer_engine.stages.pair_scores, safer_engine.stages.edits, safer_engine.edit_files;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("signals", [{"margin": -1.0, "latents": 2.0}, {"margin": 0.0}, {}, {"margin": float("nan")}])
def test_weights_that_make_no_mean_are_refused_by_the_spec(signals: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights of signals|finite number"):
        SuspicionSpec(signals=signals)


def test_a_latent_of_mixed_sign_is_in_no_pair_score(tmp_path: Path) -> None:
    made, data, salience = ScoreArtifacts(tmp_path), PLANTED.inputs, np.linspace(-0.5, 0.5, 50)
    latents = made.latents(data, salience, mixed=(FEATURES[0],))
    found = paper_features(latents, made.labels(list(range(20)), FEATURES))
    assert found is not None
    assert found.pool is not None
    assert found.latent_ids.tolist() == sorted(FEATURES[1:])
    assert FEATURES[0] not in found.pool.tolist()
