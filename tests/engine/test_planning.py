"""What a plan says: sizes that are counted, times that follow rates, nothing computed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.main import run_main
from safer_engine import api, demo_data
from safer_engine.artifacts import PairSet, view
from safer_engine.errors import ModelRefused
from safer_engine.events import NullObserver
from safer_engine.pipeline import STAGES, AuditRequest, run_stage
from safer_engine.planning import estimate, machine_flops, model_size, record_rates, workload
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.stages.evaluation import EvaluationStage
from safer_engine.store import LocalArtifactStore
from tests.helpers.tiny_model import build_reward_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    demo_data.write_demo(folder, demo_data.generate(seed=2, n_groups=150))
    build_reward_model(folder / "rm", "llama")
    return folder


@pytest.fixture
def request_(material: Path) -> AuditRequest:
    named = {"model": str(material / "rm"), "dataset": str(material / "preferences.jsonl"), "runtime": {"device": "cpu"}}
    return api.prepare(build_spec([Layer("test", {**named, "evaluation": str(material / "evaluation.jsonl")})]).spec)


def test_a_sample_of_rows_tells_the_workload_within_a_fifth(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    guessed = workload(request_, store)
    assert not guessed.exact
    pairs = view(PairSet, run_stage(STAGES[0], request_, store, {}, NullObserver()))
    assert not workload(request_, store).exact, "the evaluation set was not read"
    run_stage(EvaluationStage(), request_, store, {PairSet: pairs}, NullObserver())
    counted = workload(request_, store)
    assert counted.exact
    assert guessed.n_pairs == counted.n_pairs
    assert guessed.n_eval == counted.n_eval
    assert abs(guessed.tokens / counted.tokens - 1) < 0.2


def test_an_estimate_computes_nothing_and_remembers_rates(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    first = estimate(request_, store)
    assert set(first) == {stage.name for stage in STAGES}
    assert not (tmp_path / "manifests").exists()
    assert all(e.state == "compute" and e.seconds is not None and e.seconds >= 0 for e in first.values())
    assert not any(e.measured for e in first.values())
    record_rates(store, first, {"activations": 104.0}, request_.spec)
    second = estimate(request_, store)
    assert second["activations"].measured
    assert second["activations"].seconds == pytest.approx(104.0, rel=1e-6)
    assert second["sae"].seconds == pytest.approx(first["sae"].seconds, rel=3.0)


def test_more_work_takes_longer_and_more_room(request_: AuditRequest, tmp_path: Path, material: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    record_rates(store, estimate(request_, store), {"sae": 50.0}, request_.spec)
    larger = request_.spec.model_copy(update={"sae": request_.spec.sae.model_copy(update={"expansion": 64})})
    small, large = estimate(request_, store), estimate(AuditRequest(larger, request_.sources), store)
    assert small["sae"].seconds is not None
    assert large["sae"].seconds is not None
    assert large["sae"].seconds > 4 * small["sae"].seconds
    assert large["sae"].disk_bytes == 8 * small["sae"].disk_bytes
    assert large["activations"].disk_bytes == small["activations"].disk_bytes


def test_a_cached_stage_takes_nothing(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    run_stage(STAGES[0], request_, store, {}, NullObserver())
    pairs = estimate(request_, store)["pairs"]
    assert (pairs.state, pairs.seconds, pairs.disk_bytes) == ("cached", None, 0)


def test_the_model_s_size_is_read_from_its_files(material: Path, tmp_path: Path) -> None:
    size = model_size(material / "rm")
    assert (size.d_in, size.n_blocks) == (32, 3)
    assert 0 < size.body_parameters < size.parameters
    assert size.weight_bytes >= 4 * size.parameters
    with pytest.raises(ModelRefused, match="width and depth"):
        model_size(tmp_path)


def test_damaged_rates_are_forgotten(request_: AuditRequest, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("{")
    assert not estimate(request_, LocalArtifactStore(tmp_path))["activations"].measured


def test_the_matrix_product_has_a_rate() -> None:
    assert 1e8 < machine_flops("cpu", "float32") < 1e14


def test_plan_speaks_json_and_tables(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "plan",
        "-m",
        str(material / "rm"),
        "-d",
        str(material / "preferences.jsonl"),
        "--store",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert run_main([*flags, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["workload"]["n_pairs"] > 200
    assert [stage["stage"] for stage in shown["stages"]] == [stage.name for stage in STAGES]
    assert run_main(flags) == 0
    table = capsys.readouterr().out
    assert "activations" in table
    assert "extrapolated" in table
    assert "total" in table


def test_check_shows_a_pair_as_the_model_reads_it(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "check",
        "-m",
        str(material / "rm"),
        "-d",
        str(material / "preferences.jsonl"),
        "--store",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert run_main(flags) == 0
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert "nothing is refused" in shown
    assert run_main([*flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["invariance"]["status"] == "ok"
    assert facts["health"]["dataset"]["n_kept"] > 200
    assert facts["example"]["chosen"]["response_tokens"] > 3


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hook.layer=9", "there is no block 9|the model has 3 blocks"),
        ("sae.k=999", "sae.k is 999, more than the SAE's 256 latents"),
        ("labels.rubric=nowhere.yaml", "there is no rubric 'nowhere.yaml'"),
    ],
)
def test_check_refuses_what_run_would(
    setting: str, said: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", str(material / "rm"), "-d", str(material / "preferences.jsonl"), "--store", str(tmp_path)]
    assert run_main(["check", *flags, "--device", "cpu", "--set", setting]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_check_reads_the_rubric(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rubric.yaml").write_text("name: half\n")
    flags = ["-m", str(material / "rm"), "-d", str(material / "preferences.jsonl"), "--store", str(tmp_path / "store")]
    assert run_main(["check", *flags, "--set", f"labels.rubric={tmp_path / 'rubric.yaml'}"]) == 2
    assert "title" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
