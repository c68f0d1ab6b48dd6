"""Stage `causal`: from residual streams to effects, stopped and resumed, and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safer_engine import pipeline
from safer_engine.api import prepare
from safer_engine.artifacts import Absent, Artifact, CausalEffects
from safer_engine.errors import Interrupted
from safer_engine.events import NullObserver
from safer_engine.spec import AuditSpec
from safer_engine.stage import SpecView, cache_key
from safer_engine.stages.activations import ActivationsStage
from safer_engine.stages.causal import CausalStage
from safer_engine.stages.labels import LabelsStage
from safer_engine.stages.latents import LatentsStage
from safer_engine.stages.pairs import PairsStage
from safer_engine.stages.sae import SaeStage
from safer_engine.store import LocalArtifactStore
from tests.helpers.tiny_model import CORPUS, build_reward_model

STAGES = (PairsStage(), ActivationsStage(), SaeStage(), LatentsStage(), LabelsStage(), CausalStage())
SAE = {"kind": "topk", "d_sae": 96, "k": 4, "batch": 128, "min_steps": 30, "max_steps": 30}
CAUSAL = {"pairs": 16, "features": 20, "attributed": 4, "controls": 6, "sample": 5}


def rows() -> list[dict[str, Any]]:
    found = []
    for number in range(24):
        answers = [f"{CORPUS[(number + shift) % 10]} {CORPUS[(number + 2 * shift) % 10]}" for shift in (1, 3)]
        prompt = f"Question {number}: {CORPUS[number % 10]}"
        found.append(
            {"id": f"p{number}", "prompt": prompt, "chosen": answers[0], "rejected": answers[1], "axis": "ab"[number % 2]}
        )
    return found


class Stops(NullObserver):
    """Asks to stop at a given report of progress of the causal stage, and counts the files of each pass that were computed."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.seen += stage == "causal"

    def cancelled(self) -> bool:
        return self.seen >= self.at


def run(
    folder: Path, store: str, observer: NullObserver | None = None, labels: dict[str, Any] | None = None, **causal: Any
) -> Artifact | Absent:
    document = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "dataset": {"source": {"kind": "memory"}},
        "salience": {"candidates": 30},
        "causal": {**CAUSAL, **causal},
        "labels": labels or {},
        "sae": SAE,
        "runtime": {"device": "cpu", "shard_pairs": 7, "threads": 1},
    }
    request = prepare(AuditSpec.model_validate(document), rows())
    found = pipeline.run(request, LocalArtifactStore(folder / store), observer or NullObserver(), stages=STAGES)
    return found[CausalEffects]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("causal")
    build_reward_model(made / "model", "llama")
    return made


def test_payload_is_what_the_artifact_promises(folder: Path) -> None:
    found = run(folder, "store")
    assert isinstance(found, CausalEffects)
    meta, effects = found.meta, found.effects.to_pylist()
    assert meta["n_pairs"] == 16
    reported = [row for row in effects if row["axis"] is None and row["role"] != "control"]
    assert len(reported) == meta["n_features"] == sum(meta["roles"].values())
    assert sum(meta["verified"].values()) == meta["n_features"]
    for row in effects:
        assert row["margin"] == pytest.approx(row["chosen"] - row["rejected"], abs=1e-12)
        assert row["margin_lo"] <= row["margin"] + 1e-12
        assert row["margin_hi"] >= row["margin"] - 1e-12
        if row["n_fired"] == 0:
            assert row["margin"] == row["chosen"] == row["rejected"] == 0
    assert {row["axis"] for row in effects} == {None, "a", "b"}
    assert {row["n_mean"] for row in reported} == {5}
    by_latent = {row["latent_id"]: row for row in effects if row["axis"] is None}
    for latent, whole in by_latent.items():
        parts = [row for row in effects if row["latent_id"] == latent and row["axis"] is not None]
        assert sum(row["margin"] * row["n_pairs"] for row in parts) == pytest.approx(whole["margin"] * 16, abs=1e-9)
    attribution = {row["latent_id"]: row["attribution"] for row in found.table("attribution.arrow").to_pylist()}
    assert len(attribution) == 96
    assert all(row["attribution"] == attribution[latent] for latent, row in by_latent.items())


def test_a_set_of_one_is_the_latent_itself_and_controls_stand_beside_it(folder: Path) -> None:
    found = run(folder, "sets", labels={"min_rating": 1, "detection_floor": None}, features=1, control_sets=3)
    assert isinstance(found, CausalEffects)
    assert found.meta["roles"]["safety"] == 1
    sets = found.table("sets.arrow").to_pylist()
    whole = {row["set"]: row for row in sets if row["axis"] is None and row["subset"] is None}
    assert list(whole) == ["safety", "control-1", "control-2", "control-3"]
    assert {row["n_latents"] for row in sets} == {1}
    alone = next(row for row in found.effects.to_pylist() if row["role"] == "safety" and row["axis"] is None)
    assert whole["safety"]["margin"] == pytest.approx(alone["margin"], abs=1e-6)
    for row in sets:
        assert row["change"] == pytest.approx(row["ablated"] - row["accuracy"], abs=1e-12)
        assert row["change_lo"] <= row["change"] + 1e-12
        assert row["margin_hi"] >= row["margin"] - 1e-12
    assert sorted({row["axis"] for row in sets if row["subset"] is not None}) == ["a", "b"]


@pytest.mark.parametrize("at", [2, 12, 23])
def test_stopped_and_resumed_is_the_same_to_the_last_bit(folder: Path, at: int) -> None:
    whole = run(folder, "store")
    with pytest.raises(Interrupted):
        run(folder, f"resumed-{at}", Stops(at))
    resumed = run(folder, f"resumed-{at}")
    assert isinstance(whole, CausalEffects)
    assert isinstance(resumed, CausalEffects)
    assert resumed.stored.manifest.content_digest == whole.stored.manifest.content_digest


@pytest.mark.parametrize(("causal", "reason"), [({"pairs": 0}, "causal.pairs is 0"), ({"enabled": False}, "causal.enabled")])
def test_left_out_with_its_reason(folder: Path, causal: dict[str, Any], reason: str) -> None:
    found = run(folder, "store", **causal)
    assert isinstance(found, Absent)
    assert reason in found.reason


def test_settings_of_ablation_leave_activations_as_they_are(folder: Path) -> None:
    def spec_of(**causal: Any) -> AuditSpec:
        document = {"model": {"path": str(folder / "model")}, "dataset": {"source": {"kind": "memory"}}, "causal": causal}
        return AuditSpec.model_validate(document)

    def key(**causal: Any) -> str:
        request = prepare(spec_of(**causal), rows())
        return cache_key(ActivationsStage(), request.spec, request.sources, {}, "project")

    known = key()
    assert {key(features=21), key(controls=7), key(enabled=False), key(sample=3)} == {known}
    assert key(pairs=15) != known
    view = SpecView(spec_of(), ActivationsStage.reads)
    assert view.causal.pairs == 512
    with pytest.raises(AttributeError, match="features"):
        _ = view.causal.features
