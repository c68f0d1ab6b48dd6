"""Steering: dose curves on the pairs of an audit and on one pair, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from safer_engine import pipeline
from safer_engine.api import prepare
from safer_engine.artifacts import CausalEffects
from safer_engine.errors import SpecError
from safer_engine.events import NullObserver
from safer_engine.pipeline import AuditRequest
from safer_engine.spec import AuditSpec, DatasetSpec
from safer_engine.steering import steer
from safer_engine.store import LocalArtifactStore
from tests.engine.test_stage_causal import CAUSAL, SAE, STAGES, rows
from tests.helpers.tiny_model import build_reward_model

PAIR = {"prompt": "Question 1", "chosen": rows()[0]["chosen"], "rejected": rows()[1]["rejected"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("steer")
    build_reward_model(made / "model", "llama")
    lines = [json.dumps({"axis": "ab", **row}) + "\n" for row in rows()]
    (made / "rows.jsonl").write_text("".join(lines))
    return made


def request_of(folder: Path, **causal: Any) -> AuditRequest:
    document = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "dataset": {"source": {"kind": "local", "path": str(folder / "rows.jsonl")}},
        "salience": {"candidates": 30},
        "causal": {**CAUSAL, **causal},
        "sae": SAE,
        "runtime": {"device": "cpu", "shard_pairs": 7, "threads": 1},
    }
    return prepare(AuditSpec.model_validate(document))


@pytest.fixture(scope="module")
def strongest(folder: Path) -> dict[str, Any]:
    """The ablated latent of the largest effect; its audit lies in `store`."""
    found = pipeline.run(request_of(folder), LocalArtifactStore(folder / "store"), NullObserver(), stages=STAGES)[CausalEffects]
    assert isinstance(found, CausalEffects)
    whole = [row for row in found.effects.to_pylist() if row["axis"] is None]
    return dict(max(whole, key=lambda row: abs(row["margin"])))


class Watched(NullObserver):
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.seen.append((stage, done, total))


def test_doses_agree_with_the_audits_ablation(folder: Path, strongest: dict[str, Any]) -> None:
    watched = Watched()
    store = LocalArtifactStore(folder / "store")
    found = steer(request_of(folder), store, strongest["latent_id"], [0.0, 1.0, 2.0], observer=watched)
    assert (found.n_pairs, found.n_fired) == (strongest["n_pairs"], strongest["n_fired"])
    ablated, as_is, doubled = found.doses
    assert ablated.margin_change == pytest.approx(strongest["margin"], abs=1e-6)
    assert as_is.margin_change == 0
    assert doubled.margin_change * ablated.margin_change < 0
    assert ablated.margin == pytest.approx(as_is.margin + ablated.margin_change, abs=1e-6)
    assert ablated.margin_lo is not None
    assert watched.seen[0] == ("steer", 0, 16)
    assert len(watched.seen) == 16


def test_one_pair_of_texts(folder: Path, strongest: dict[str, Any]) -> None:
    store = LocalArtifactStore(folder / "store")
    found = steer(request_of(folder), store, strongest["latent_id"], [0.0, 1.0], PAIR)
    assert found.n_pairs == 1
    assert found.doses[0].margin_lo is None
    assert found.doses[1].margin_change == 0
    assert (found.doses[0].margin_change != 0) == (found.n_fired == 1)


def test_another_dataset_is_read_as_the_audits_own(folder: Path, strongest: dict[str, Any]) -> None:
    store, latent = LocalArtifactStore(folder / "store"), strongest["latent_id"]
    request = request_of(folder)
    same = steer(request, store, latent, [0.0], request.spec.dataset.model_copy(update={"sample": 1000}))
    assert same == steer(request, store, latent, [0.0])  # all are read, and the same ones kept
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows()]
    (folder / "turned.jsonl").write_text("".join(json.dumps({"axis": "ab", **row}) + "\n" for row in turned))
    other = steer(request, store, latent, [0.0], whole_of(folder / "turned.jsonl"))
    assert other.n_pairs == same.n_pairs
    assert other.doses[0].margin_change == pytest.approx(-same.doses[0].margin_change, abs=1e-6)
    assert other.doses[0].chosen == pytest.approx(same.doses[0].rejected, abs=1e-6)


def whole_of(path: Path) -> DatasetSpec:
    return DatasetSpec.model_validate({"source": {"kind": "local", "path": str(path)}, "sample": 1000})


def test_what_cannot_be_steered_is_said(folder: Path, strongest: dict[str, Any], tmp_path: Path) -> None:
    store = LocalArtifactStore(folder / "store")
    with pytest.raises(SpecError, match="no latent 96"):
        steer(request_of(folder), store, 96, [0.0])
    with pytest.raises(SpecError, match="run it first|no stage `pairs`"):
        steer(request_of(folder), LocalArtifactStore(tmp_path / "empty"), strongest["latent_id"], [0.0])
    without = request_of(folder, pairs=0)
    pipeline.run(without, store, NullObserver(), stages=STAGES[:3])
    with pytest.raises(SpecError, match="kept no residual streams"):
        steer(without, store, 0, [0.0])
    assert steer(without, store, strongest["latent_id"], [1.0], PAIR).n_pairs == 1


def test_the_command_prints_a_curve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "sae.max_steps=20",
        "sae.min_steps=20",
        "sae.d_sae=96",
        "sae.k=4",
        "sae.batch=128",
        "causal.pairs=8",
        "causal.features=4",
    ]
    flags = ["-m", str(folder / "model"), "-d", str(folder / "rows.jsonl"), "--device", "cpu", "--store", str(folder / "cli")]
    flags += [part for value in small for part in ("--set", value)]
    assert run_main(["run", *flags, "--out", str(folder / "out")]) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    latent = str(next(f["latent_id"] for f in report["features"] if f["causal_effect"]))
    capsys.readouterr()
    assert run_main(["steer", *flags, "--latent", latent]) == 0
    out = capsys.readouterr().out
    assert f"latent {latent}: fires in " in out
    assert all(dose in out for dose in ("×0 ", "×0.5", "×1 ", "×2 ", "×4 "))
    assert run_main(["steer", *flags, "--latent", latent, "--scale", "0", "--json"]) == 0
    dose = json.loads(capsys.readouterr().out)["doses"][0]
    assert run_main(["steer", *flags, "--latent", latent, "--over", str(folder / "rows.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_pairs"] == 8
    told = next(f["causal_effect"] for f in report["features"] if str(f["latent_id"]) == latent)
    assert dose["margin_change"] == pytest.approx(told, abs=1e-6)
    for wrong in (
        ["--scale", "0", "--dose", "1"],
        ["--dose", "much"],
        ["--dose", "1e9"],
        ["--chosen", "alone"],
        ["--over", "a", "--chosen", "b", "--rejected", "c"],
    ):
        assert run_main(["steer", *flags, "--latent", latent, *wrong]) == 2
        assert capsys.readouterr().err
