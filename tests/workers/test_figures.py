"""What metrics say of an artifact: numbers, of known names, and nothing where there is no number."""

from __future__ import annotations

import json
from pathlib import Path

from safer_engine.science.drops import Drop
from safer_engine.store import LocalArtifactStore, ManifestDraft, StoredArtifact
from service.infra.stage_figures import FIGURES
from workers.figures import KEPT, figures_of, rows_of

META = {
    "tokens": 11, "fvu": 0.2, "dead_share": 0.0, "template": "text of a dataset",
    "recovered": {"covered": {"margin_variance": 0.97}}, "training": {"loss": 1.0},
}  # fmt: skip


def stored(folder: Path, **health: object) -> StoredArtifact:
    store = LocalArtifactStore(folder)
    with store.open_work("pairs", "k" * 64) as work:
        if health:
            with work.publish("health.json") as path:
                path.write_text(json.dumps(health), encoding="utf-8")
        return store.commit("pairs", "k" * 64, work, ManifestDraft(1, "PairSet", {}))


def test_an_autoencoder_and_another_stage() -> None:
    assert figures_of("sae", META) == {"tokens": 11.0, "sae_fvu": 0.2, "sae_dead_share": 0.0, "reward_recovered": 0.97}
    assert figures_of("pairs", META) == {"tokens": 11.0}
    assert set(figures_of("sae", META)) <= set(FIGURES)


def test_what_is_no_number_is_left_out() -> None:
    assert figures_of("sae", {"recovered": None, "fvu": float("nan"), "tokens": "many"}) == {}


def test_rows_of_a_dataset_and_of_an_evaluation_set(tmp_path: Path) -> None:
    counts = {"n_in": 10, "n_kept": 7, "dropped": {Drop.TIE: 2, Drop.DUPLICATE: 1}, "axes": {"safety": 7}}
    assert rows_of(stored(tmp_path / "a", dataset=counts)) == {KEPT: 7, "tie": 2, "duplicate": 1}
    assert rows_of(stored(tmp_path / "b", **counts)) == {KEPT: 7, "tie": 2, "duplicate": 1}
    assert rows_of(stored(tmp_path / "c")) == {}
