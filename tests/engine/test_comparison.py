"""Two small audits compared: the same SAE on both, what is found against the artifacts themselves, the page, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pyarrow import parquet

import safer_engine
from safer_engine import demo_data
from safer_engine.artifacts import Absent, CausalEffects, Latents, SecondAutoencoder, SparseAutoencoder
from safer_engine.comparison.build import compare_sides
from safer_engine.comparison.model import ComparisonDocument, json_schema
from safer_engine.comparison.page import render_page
from safer_engine.comparison.sides import Side, load_side
from safer_engine.errors import InputRefused, SpecError
from safer_engine.store import LocalArtifactStore
from tests.helpers.tiny_model import build_reward_model

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "sae": {"max_steps": 40, "min_steps": 40, "batch": 256, "k": 8},
    "causal": {"pairs": 24, "features": 8},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a (llama, seed 0), b (its weights moved, with a's SAE), c (as b, with an SAE of its own)."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("compared")
    demo_data.write_demo(folder, demo_data.generate(seed=1, n_groups=60))
    build_reward_model(folder / "rm-a", "llama")
    shutil.copytree(folder / "rm-a", folder / "rm-b")
    weights = load_file(folder / "rm-b" / "model.safetensors")
    name = next(key for key in weights if key.startswith("score"))
    save_file({**weights, name: -0.5 * weights[name]}, folder / "rm-b" / "model.safetensors", {"format": "pt"})
    audit(folder, "a", "rm-a")
    audit(folder, "b", "rm-b", given=str(folder / "a" / "sae"))
    audit(folder, "c", "rm-b", seed=3)
    return folder


def audit(folder: Path, name: str, model: str, *, given: str | None = None, **more: Any) -> safer_engine.AuditReport:
    inputs = {"model": str(folder / model), "dataset": str(folder / "preferences.jsonl")}
    document = {**inputs, "evaluation": str(folder / "evaluation.jsonl"), **SMALL, **more}
    sae = {**SMALL["sae"], **({} if given is None else {"given": given})}
    return safer_engine.audit({**document, "sae": sae}, store=folder / "store", out=folder / name)


def side(place: Path, name: str, *, stored: bool = True) -> Side:
    return load_side(place / name, name.upper(), LocalArtifactStore(place / "store") if stored else None)


def test_an_audit_with_a_given_sae_has_that_sae_and_none_is_trained(place: Path) -> None:
    again = audit(place, "b", "rm-b", given=str(place / "a" / "sae"), stability={"second_sae": True})
    digests = [json.loads((place / name / "report.json").read_text())["sae"]["digest"] for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    made = again.artifacts[SparseAutoencoder]
    assert isinstance(made, SparseAutoencoder)
    assert made.path("sae.safetensors").read_bytes() == (place / "a" / "sae" / "sae.safetensors").read_bytes()
    assert made.meta["training"]["steps"] == 0
    second = again.artifacts[SecondAutoencoder]
    assert isinstance(second, Absent)
    assert "given" in second.reason


def test_turned_rewards_are_found_and_the_scale_is_not(place: Path) -> None:
    """B is A with its head times −0.5: every preference is turned, and on its own scale every margin is −A's."""
    found = compare_sides(side(place, "a"), side(place, "b"))
    for pairs in (found.evaluation, found.audited):
        assert pairs is not None
        assert pairs.scale_b == pytest.approx(0.5 * pairs.scale_a, rel=1e-4)
        whole = pairs.slices[0]
        assert whole.n == pairs.n_common
        assert pairs.n_changed == whole.n
        assert whole.accuracy_b == pytest.approx(1 - whole.accuracy_a)
        assert whole.rank_correlation is not None
        assert whole.rank_correlation.estimate == pytest.approx(-1, abs=1e-4)
        first = pairs.changed_pairs[0]
        assert first.moved == pytest.approx(-2 * first.margin_a / pairs.scale_a, rel=1e-3)
        assert [abs(p.moved) for p in pairs.changed_pairs] == sorted((abs(p.moved) for p in pairs.changed_pairs), reverse=True)
    table = parquet.read_table(place / "a" / "pair_scores.parquet")
    margins = np.array(table["reward_margin"].to_pylist())
    assert found.audited is not None
    assert found.audited.scale_a == pytest.approx(float(np.sqrt((margins**2).mean())))


def test_latents_of_the_shared_sae_are_the_artifacts_own_figures(place: Path) -> None:
    """Body and SAE are the same, so every latent fires alike; the head is −0.5 times, so on its own scale an effect is turned."""
    found = compare_sides(side(place, "a"), side(place, "b")).features
    assert found is not None
    assert found.complete
    store = LocalArtifactStore(place / "store")
    keys = {s["stage"]: s["cache_key"] for s in json.loads((place / "a" / "report.json").read_text())["provenance"]["stages"]}
    rows = {row["latent_id"]: row for row in Latents(store.read("latents", keys["latents"])).latents.to_pylist()}
    for one in found.latents:
        assert one.a.firing_rate == one.b.firing_rate == rows[one.latent_id]["firing_rate"]
        assert one.a.salience == pytest.approx(rows[one.latent_id]["salience"])
        if one.salience_change is not None:
            assert one.salience_change.estimate == 0
    causal = CausalEffects(store.read("causal", keys["causal"]))
    effects = {row["latent_id"]: row["margin"] for row in causal.effects.to_pylist() if row["axis"] is None}
    tested = [one for one in found.latents if one.effect_change is not None]
    assert tested
    for one in tested:
        assert one.a.effect == pytest.approx(effects[one.latent_id] / causal.meta["margin"]["sd"])
        assert one.effect_change is not None
        assert one.effect_change.estimate == pytest.approx(-2 * (one.a.effect or 0), abs=1e-4)
    assert found.evidence is not None


def test_an_audit_against_itself_changes_nothing(place: Path) -> None:
    found = compare_sides(side(place, "a"), side(place, "a", stored=False))
    assert found.same_model
    assert found.evaluation is not None
    assert found.features is not None
    assert not found.features.complete
    assert found.evaluation.n_changed == 0
    assert found.evaluation.slices[0].accuracy_change.estimate == 0
    assert all(one.salience_change is None or one.salience_change.estimate == 0 for one in found.features.latents)
    assert found.features.evidence == []


def test_without_a_shared_sae_rewards_alone_are_compared(place: Path) -> None:
    found = compare_sides(side(place, "a"), side(place, "c"))
    assert found.features is None
    assert "trained an SAE each" in found.not_computed["features"]
    assert found.evaluation is not None


def test_files_that_are_missing_or_of_another_audit_are_said(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "b", tmp_path / "b")
    (tmp_path / "b" / "pair_scores.parquet").unlink()
    found = compare_sides(side(place, "a"), load_side(tmp_path / "b", "B", None))
    assert found.audited is None
    assert "B has no pair_scores.parquet" in found.not_computed["audited"]
    (tmp_path / "b" / "evaluation.jsonl").unlink()
    with pytest.raises(InputRefused, match="no pairs to compare"):
        compare_sides(side(place, "a"), load_side(tmp_path / "b", "B", None))
    (tmp_path / "b" / "pair_scores.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputRefused, match="not as an audit wrote it"):
        load_side(tmp_path / "b", "B", None)
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    report["features"][0]["salience"] = "large"
    (tmp_path / "b" / "pair_scores.parquet").unlink()
    (tmp_path / "b" / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputRefused, match="features.0.salience"):
        _ = load_side(tmp_path / "b", "B", None).report


def test_a_given_sae_that_cannot_be_used_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no sae\.safetensors"):
        audit(place, "d", "rm-a", given=str(tmp_path))
    shutil.copytree(place / "a" / "sae", tmp_path / "sae")
    (tmp_path / "sae" / "sae.json").write_text("{}")
    with pytest.raises(SpecError, match="no SAE that can be used"):
        audit(place, "d", "rm-a", given=str(tmp_path / "sae"))
    build_reward_model(place / "wide", "llama", width=48)
    with pytest.raises(SpecError, match="reads vectors of"):
        audit(place, "d", "wide", given=str(place / "a" / "sae"))


def test_the_schema_is_published_and_holds(place: Path) -> None:
    published = json.loads((ROOT / "docs" / "comparison.schema.json").read_text())
    assert published == json_schema(), "stale: python -m safer_engine.comparison.schema docs/comparison.schema.json"
    found = compare_sides(side(place, "a"), side(place, "b"))
    jsonschema.validate(json.loads(found.model_dump_json()), published)
    assert ComparisonDocument.model_validate_json(found.model_dump_json()) == found


def test_the_page_shows_names_and_never_runs_them(place: Path) -> None:
    found = compare_sides(side(place, "a"), side(place, "b"))
    assert found.evaluation is not None
    assert found.features is not None
    hostile = "<script>alert(1)</script>\u202e"
    pair = found.evaluation.changed_pairs[0].model_copy(update={"pair_id": hostile, "subset": hostile})
    latent = found.features.latents[0].model_copy(update={"name": hostile})
    page = render_page(
        found.model_copy(
            update={
                "evaluation": found.evaluation.model_copy(update={"changed_pairs": [pair]}),
                "features": found.features.model_copy(update={"latents": [latent]}),
                "a": found.a.model_copy(update={"model": hostile}),
            }
        )
    )
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") >= 4
