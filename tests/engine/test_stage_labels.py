import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from safer_engine.artifacts import Labels, Latents, SparseAutoencoder
from safer_engine.errors import LabellerError, SpecError
from safer_engine.events import NullObserver
from safer_engine.labellers.corrections import label_files_digest
from safer_engine.labellers.rubric import load_rubric, rubric_digest
from safer_engine.spec_labels import LabelSpec
from safer_engine.stages.labels import LabelsStage
from safer_engine.stages.latents import LatentsStage
from tests.helpers.chat_endpoint import GOOD, ChatEndpoint, answer, status
from tests.helpers.latent_world import LatentWorld, draw_world

KEY = "sk-test-51ab"
CONTEXTS = {"per_latent": 8, "minimum": 4, "window": 16}
UNCHECKED = {"detection_floor": None, "repeats": 0.0}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentWorld:
    """Latents are there; a test sets `spec_sections['labels']` and runs the labels stage."""
    monkeypatch.setenv("LABEL_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    drawn = draw_world(tmp_path / "store", n_pairs=24, salience={"candidates": 10, "max_rate": 1.0}, contexts=CONTEXTS)
    drawn.run(LatentsStage())
    return drawn


@pytest.fixture
def wide_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentWorld:
    """The same with pairs enough for held-out windows of either kind."""
    monkeypatch.setenv("LABEL_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contexts = {**CONTEXTS, "held_out_window": 6}
    drawn = draw_world(tmp_path / "store", n_pairs=60, salience={"candidates": 10, "max_rate": 1.0}, contexts=contexts)
    drawn.run(LatentsStage())
    return drawn


def rows_of(labels: Any) -> list[dict[str, Any]]:
    assert isinstance(labels, Labels)
    return list(labels.labels.to_pylist())


def chat(endpoint: ChatEndpoint, **changes: Any) -> dict[str, Any]:
    fields = {"kind": "chat_api", "base_url": endpoint.url, "model": "m", "api_key_env": "LABEL_KEY", "retries": 0}
    return {"labeller": {**fields, **changes}, **UNCHECKED}


def rank_order(world: LatentWorld) -> list[int]:
    latents = world.found[Latents]
    assert isinstance(latents, Latents)
    frame = latents.latents.to_pandas().query("candidate")
    return list(frame.sort_values("rank").latent_id)


def test_the_offline_labeller_labels_every_candidate(world: LatentWorld) -> None:
    world.spec_sections["labels"] = {"min_rating": 1, "keep": 4, **UNCHECKED}
    labels = world.run(LabelsStage())
    rows = rows_of(labels)
    assert [row["latent_id"] for row in rows] == rank_order(world)
    assert {row["labeller"] for row in rows} == {"lexicon"}
    assert {row["status"] for row in rows} == {"labelled"}
    assert labels.meta["counts"] == {"labelled": 10}
    assert sum(labels.meta["ratings"].values()) == 10
    assert (labels.meta["calls"], labels.meta["cost"]) == (0, 0.0)
    assert labels.labels.column_names == [
        "latent_id", "status", "rating", "explanation", "direction", "terms", "labeller", "safety_feature", "rank",
        "detection", "detection_lo", "detection_hi", "detection_recall", "detection_specificity", "detection_n",
        "detection_problem", "rating_again", "status_again", "corrected_by",
    ]  # fmt: skip


def test_safety_features_are_rated_high_enough_and_the_first_by_salience(world: LatentWorld) -> None:
    with ChatEndpoint() as endpoint:
        ratings = [5, 3, 4, 5, 2, 5, 5, 1, 4, 5]
        endpoint.script = [answer(json.dumps({**GOOD, "rating": rating})) for rating in ratings]
        world.spec_sections["labels"] = {**chat(endpoint), "min_rating": 4, "keep": 4}
        labels = world.run(LabelsStage())
    rows = rows_of(labels)
    assert [row["rating"] for row in rows] == ratings
    assert [row["rank"] for row in rows] == [1, None, 2, 3, None, 4, None, None, None, None]
    assert [row["safety_feature"] for row in rows] == [row["rank"] is not None for row in rows]
    assert labels.meta["n_safety_features"] == 4


def test_only_labelled_latents_can_be_safety_features(world: LatentWorld) -> None:
    notes: list[str] = []

    class Notes(NullObserver):
        def note(self, stage: str, message: str) -> None:
            notes.append(message)

    with ChatEndpoint() as endpoint:
        good = answer(json.dumps(GOOD))
        endpoint.script = [good, answer("It is a 5."), status(400), good]
        world.spec_sections["labels"] = chat(endpoint, max_calls=4)
        labels = world.run(LabelsStage(), Notes())
    rows = rows_of(labels)
    assert [row["status"] for row in rows] == ["labelled", "unparsed", "error", "labelled", *["skipped"] * 6]
    assert [row["safety_feature"] for row in rows] == [True, False, False, True, *[False] * 6]
    assert all(row["rating"] is None for row in rows if row["status"] != "labelled")
    assert labels.meta["counts"] == {"error": 1, "labelled": 2, "skipped": 6, "unparsed": 1}
    assert notes == ["8 of 10 candidates got no label and cannot be safety features"]


def test_latents_with_too_few_contexts_are_not_labelled(world: LatentWorld) -> None:
    world.spec_sections |= {"contexts": {**CONTEXTS, "minimum": 9}, "labels": {"min_rating": 1}}
    rows = rows_of(world.run(LabelsStage()))
    assert {row["status"] for row in rows} == {"too_few_contexts"}
    assert not any(row["safety_feature"] for row in rows)


def test_answers_survive_a_failure_and_the_key_is_written_nowhere(world: LatentWorld) -> None:
    with ChatEndpoint() as endpoint:
        world.spec_sections["labels"] = chat(endpoint)
        endpoint.script = [answer(json.dumps(GOOD))] * 6
        endpoint.otherwise = status(503)
        with pytest.raises(LabellerError, match="HTTP 503"):
            world.run(LabelsStage())
        kept = list(world.root.rglob("answer-*.json"))
        assert len(kept) == 6
        endpoint.otherwise = answer(json.dumps(GOOD))
        endpoint.asked.clear()
        labels = world.run(LabelsStage())
        assert labels.meta["counts"] == {"labelled": 10}
        assert len(endpoint.asked) == 4
        assert labels.meta["spent"]["labels"]["calls"] == 10  # what the first attempt paid for its answers counts too
        endpoint.asked.clear()
        world.run(LabelsStage())
        assert endpoint.asked == []  # committed
    files = [path for path in world.root.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_rubric_file_is_used_and_its_change_is_noticed(world: LatentWorld, tmp_path: Path) -> None:
    path = tmp_path / "baking.yaml"
    document = load_rubric("safety").model_dump(mode="json") | {"name": "baking"}
    document["categories"] = [{"name": "sweets", "terms": ["sugar", "cake"]}]
    path.write_text(yaml.safe_dump(document))
    world.spec_sections["labels"] = {"rubric": str(path), "min_rating": 1}
    labels = world.run(LabelsStage(), extra={"labels": rubric_digest(str(path))})
    assert any("sweets" in row["explanation"] for row in rows_of(labels))
    with pytest.raises(SpecError, match="changed while the audit ran"):
        world.run(LabelsStage(), extra={"labels": "another"})


def test_contexts_on_a_theme_are_found_by_the_offline_labeller(tmp_path: Path) -> None:
    """A latent made to fire on “ bomb” alone is the one that is labelled as harmful."""
    world = draw_world(
        tmp_path, n_pairs=60, contexts={**CONTEXTS, "held_out_window": 6}, salience={"candidates": 40, "max_rate": 1.0}
    )
    weight = world.sae.W_enc_DS
    weight[:, 7] = 0
    weight[0, 7] = 50.0
    world.sae.b_enc_S[7] = -60.0
    for pair in world.sides:
        for side in pair:
            side.h[:, 0] = [6.0 if token == " bomb" else 0.0 for token in side.tokens]
    planted = LatentWorld(
        tmp_path / "planted", world.sides, world.sae, world.groups, world.axes, world.subsets, spec_sections=world.spec_sections
    )
    latents = planted.run(LatentsStage())
    focus = {row["tokens"][row["focus"]] for row in latents.table("contexts.arrow").to_pylist() if row["latent_id"] == 7}
    assert focus == {" bomb"}
    row = next(row for row in rows_of(planted.run(LabelsStage())) if row["latent_id"] == 7)
    assert "“bomb” in 8 of 8" in row["explanation"]
    assert (row["status"], row["detection_recall"], row["detection_problem"]) == ("labelled", 1.0, None)
    assert row["detection"] > 0.9
    assert row["detection_lo"] > 0.65
    assert "bomb" in row["terms"]
    assert row["direction"] == "harmful_content"


def test_labels_that_do_not_tell_where_a_latent_fires_are_unverified(wide_world: LatentWorld) -> None:
    """Every latent is said to be about one thing, and every window to show it: no better than a guess."""
    world = wide_world
    with ChatEndpoint() as endpoint:
        every = json.dumps({"fires": list(range(1, 11))})
        endpoint.script = [answer(json.dumps(GOOD))] * 10
        endpoint.otherwise = answer(every)
        world.spec_sections |= {"labels": {**chat(endpoint), "detection_floor": 0.6}}
        labels = world.run(LabelsStage())
        rows = rows_of(labels)
        assert {row["status"] for row in rows} == {"unverified"}
        assert {row["rating"] for row in rows} == {5}
        assert not any(row["safety_feature"] for row in rows)
        assert all(row["detection"] == 0.5 or row["detection_problem"] for row in rows)
        assert sum(row["detection"] == 0.5 for row in rows) > 3
        assert labels.meta["spent"]["detection"]["calls"] == labels.meta["calls"] - 10 == len(endpoint.asked) - 10
        assert not any("Refusals." in message["content"] for asked in endpoint.asked[:10] for message in asked.body["messages"])
        assert all("Refusals." in asked.body["messages"][1]["content"] for asked in endpoint.asked[10:])


def test_checks_survive_a_failure_and_no_request_is_sent_twice(wide_world: LatentWorld) -> None:
    """The endpoint goes away while labels are checked: what it said of labels and windows is not asked again."""
    world = wide_world
    every = answer(json.dumps({"fires": list(range(1, 11))}))
    with ChatEndpoint() as endpoint:
        endpoint.script = [answer(json.dumps(GOOD))] * 10 + [every] * 3
        endpoint.otherwise = status(503)
        world.spec_sections |= {"labels": {**chat(endpoint), "detection_floor": 0.6}}
        with pytest.raises(LabellerError, match="HTTP 503"):
            world.run(LabelsStage())
        answered = [asked.body for asked in endpoint.asked[:13]]
        endpoint.otherwise = every
        endpoint.asked.clear()
        labels = world.run(LabelsStage())
        assert labels.meta["spent"]["labels"]["calls"] == 10
        assert len(endpoint.asked) + 3 == labels.meta["spent"]["detection"]["calls"]
        assert endpoint.asked
        assert not any(asked.body in answered for asked in endpoint.asked)
    assert sum(row["detection"] == 0.5 for row in rows_of(labels)) > 3


def test_a_persons_word_stands_for_its_own_sae_alone(world: LatentWorld, tmp_path: Path) -> None:
    sae = world.found[SparseAutoencoder]
    assert isinstance(sae, SparseAutoencoder)
    digest = sae.stored.manifest.files["sae.safetensors"].digest
    first, second = rank_order(world)[:2]
    said = {"rating": 5, "explanation": "Refusals to help.", "by": "Ana"}
    entries = [{"sae": digest, "latent_id": first, **said}, {"sae": "0" * 64, "latent_id": second, **said}]
    path = tmp_path / "corrections.yaml"
    path.write_text(yaml.safe_dump({"corrections": entries}))
    world.spec_sections["labels"] = {"corrections": str(path), "detection_floor": 1.0}
    labels = world.run(LabelsStage(), extra={"labels": label_files_digest(world.spec.labels)})
    rows = {row["latent_id"]: row for row in rows_of(labels)}
    assert (rows[first]["status"], rows[first]["rating"], rows[first]["corrected_by"]) == ("labelled", 5, "Ana")
    assert rows[first]["safety_feature"]
    assert rows[second]["corrected_by"] is None
    assert (labels.meta["n_corrected"], labels.meta["n_corrections_of_others"]) == (1, 1)
    inline = {"corrections": entries, "detection_floor": 1.0}
    assert label_files_digest(LabelSpec.model_validate(inline)) == label_files_digest(world.spec.labels)
    entries[0]["rating"] = 1
    changed = {"corrections": entries, "detection_floor": 1.0}
    assert label_files_digest(LabelSpec.model_validate(changed)) != label_files_digest(world.spec.labels)
