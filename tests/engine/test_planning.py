"""What a plan says: sizes that are counted, times that follow rates, nothing computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import run_main
from safer_engine import api, demo_data
from safer_engine.artifacts import view
from safer_engine.cost import Cost, Planned
from safer_engine.events import NullObserver
from safer_engine.pipeline import STAGES, AuditRequest, Found, plan, run_stage
from safer_engine.planning import AuditSize, audit_size, estimate, estimate_of, model_size, record_rates
from safer_engine.rates import machine_flops, rates_file
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.spec_stability import StabilitySpec
from safer_engine.store import LocalArtifactStore, Manifest, ManifestDraft
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


def _flags(material: Path, store: Path, *more: str) -> list[str]:
    """What `plan`, `check` and `run` all take."""
    inputs = ["-m", str(material / "rm"), "-d", str(material / "preferences.jsonl")]
    return [*inputs, "--store", str(store), "--device", "cpu", *more]


def test_a_sample_of_rows_tells_the_workload_within_a_fifth(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    guessed = estimate(request_, store).workload
    assert not guessed.exact
    found: Found = {}
    for stage in [stage for stage in STAGES if stage.name in ("pairs", "evaluation")]:
        found[stage.produces] = view(stage.produces, run_stage(stage, request_, store, found, NullObserver()))
    counted = estimate(request_, store).workload
    assert counted.exact
    assert guessed.n_pairs == counted.n_pairs
    assert guessed.n_eval == counted.n_eval
    assert abs(guessed.tokens / counted.tokens - 1) < 0.2


def test_an_estimate_computes_nothing_and_remembers_rates(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    first = estimate(request_, store)
    assert set(first.stages) == {stage.name for stage in STAGES}
    assert not (tmp_path / "manifests").exists()
    assert all(e.state == "compute" and e.seconds is not None and e.seconds >= 0 for e in first.stages.values())
    assert not any(e.measured for e in first.stages.values())
    record_rates(rates_file(store), first, _took(store, activations=104.0), request_.spec)
    second = estimate(request_, store)
    assert second.stages["activations"].measured
    assert second.stages["activations"].seconds == pytest.approx(104.0, rel=1e-6)
    assert second.stages["sae"].seconds == pytest.approx(first.stages["sae"].seconds, rel=1e-6)
    assert second.flops == first.flops


def test_the_rate_of_a_stage_that_was_not_computed_now_is_not_taken(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    run_stage(STAGES[0], request_, store, {}, NullObserver())
    expected = estimate(request_, store)
    record_rates(rates_file(store), expected, _took(store, pairs=50.0, activations=0.1), request_.spec)
    assert set(json.loads((tmp_path / "rates.json").read_text())) == {"matmul/cpu/float32"}


class _CountingStore(LocalArtifactStore):
    """Remembers which stages it was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def has(self, stage: str, key: str) -> bool:
        self.asked.append(stage)
        return super().has(stage, key)


def test_a_plan_walks_the_stages_once(request_: AuditRequest, tmp_path: Path) -> None:
    store = _CountingStore(tmp_path)
    run_stage(STAGES[0], request_, store, {}, NullObserver())
    store.asked.clear()
    estimate(request_, store)
    assert len(store.asked) == len(set(store.asked))
    assert {"pairs", "activations"} <= set(store.asked)


def _took(store: LocalArtifactStore, **seconds: float) -> list[Manifest]:
    """Records of stages that took so long."""
    kinds = {stage.name: stage.produces for stage in STAGES}
    found = []
    for name, value in seconds.items():
        other = LocalArtifactStore(store.root / "elsewhere")
        with other.open_work(name, "0" * 64) as work:
            draft = ManifestDraft(stage_version=1, artifact=kinds[name].__name__, meta={}, cost=Cost(seconds=value))
            found.append(other.commit(name, "0" * 64, work, draft).manifest)
    return found


def test_a_size_that_was_written_down_gives_the_same_estimate_without_the_inputs(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    planned = plan(request_, store)
    size = audit_size(request_, store, planned)
    expected = estimate(request_, store)
    record_rates(rates_file(store), expected, [], request_.spec)  # the matrix product is timed once
    again = AuditSize.loaded(json.loads(json.dumps(size.dumped())))
    assert again == size
    assert estimate_of(request_.spec, again, planned, rates_file(store)).stages == expected.stages
    assert AuditSize.loaded(replace(size, model=None).dumped()).model is None


def test_more_work_takes_longer_and_more_room(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    record_rates(rates_file(store), estimate(request_, store), _took(store, sae=50.0), request_.spec)
    larger = request_.spec.model_copy(update={"sae": request_.spec.sae.model_copy(update={"expansion": 64})})
    small, large = estimate(request_, store).stages, estimate(AuditRequest(larger, request_.sources), store).stages
    assert small["sae"].seconds is not None
    assert large["sae"].seconds is not None
    assert large["sae"].seconds > 4 * small["sae"].seconds
    assert small["sae"].disk_bytes
    assert large["sae"].disk_bytes == 8 * small["sae"].disk_bytes
    assert large["activations"].disk_bytes == small["activations"].disk_bytes


def test_what_the_model_does_not_say_is_not_guessed(request_: AuditRequest, material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(material / "rm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "hidden_size"}))
    sources = replace(request_.sources, model=replace(request_.sources.model, path=folder))
    expected = estimate(AuditRequest(request_.spec, sources), LocalArtifactStore(tmp_path / "store"))
    assert expected.flops is None
    assert expected.stages["sae"].planned == Planned()
    assert expected.stages["pairs"].seconds is not None
    assert expected.total.seconds is None


def test_a_cached_stage_takes_nothing(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    run_stage(STAGES[0], request_, store, {}, NullObserver())
    pairs = estimate(request_, store).stages["pairs"]
    assert (pairs.state, pairs.seconds, pairs.disk_bytes) == ("cached", None, 0)


def test_the_model_s_size_is_read_from_its_files(material: Path, tmp_path: Path) -> None:
    size = model_size(material / "rm")
    assert size is not None
    assert (size.d_in, size.n_blocks) == (32, 3)
    assert 0 < size.body_parameters < size.parameters
    assert size.weight_bytes >= 4 * size.parameters
    assert model_size(tmp_path) is None


@pytest.mark.parametrize("names", [("n_embd", "n_layer"), ("dim", "n_layers"), ("d_model", "num_layers")])
def test_models_that_call_their_size_otherwise_are_sized_too(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({names[0]: 24, names[1]: 5}))
    size = model_size(tmp_path)
    assert size is not None
    assert (size.d_in, size.n_blocks) == (24, 5)


def test_damaged_rates_are_forgotten(request_: AuditRequest, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("{")
    assert not estimate(request_, LocalArtifactStore(tmp_path)).stages["activations"].measured


def test_the_matrix_product_has_a_rate() -> None:
    assert 1e8 < machine_flops("cpu", "float32") < 1e14


def test_plan_speaks_json_and_tables(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", *_flags(material, tmp_path)]
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
    flags = ["check", *_flags(material, tmp_path)]
    assert run_main(flags) == 0
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert "nothing is refused" in shown
    assert run_main([*flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["invariance"]["status"] == "ok"
    assert facts["health"]["dataset"]["n_kept"] > 200
    assert facts["example"]["chosen"]["response_tokens"] > 3


def test_check_counts_and_warns_of_evaluation_pairs(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (material / "evaluation.jsonl").read_text().splitlines()[:5]
    leaked = (material / "preferences.jsonl").read_text().splitlines()[:3]
    (tmp_path / "apart.jsonl").write_text("\n".join([*lines, *leaked]))
    flags = ["check", *_flags(material, tmp_path / "store", "--eval-dataset", str(tmp_path / "apart.jsonl"))]
    assert run_main(flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: only 5 of 8 evaluation pairs are usable, fewer than 20 (dropped: 3 in training data)" in shown
    assert run_main([*flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["health"]["evaluation"]["n_kept"], len(facts["warnings"])) == (5, 1)
    (tmp_path / "apart.jsonl").write_text('{"text": "a"}\n' * 30)
    assert run_main(flags) == 2
    assert "the evaluation set cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hook.layer=9", "hook.layer is 9, but the model has 3 blocks"),
        ("sae.k=999", "sae.k is 999, more than the SAE's 256 latents"),
        ("labels.rubric=nowhere.yaml", "there is no rubric 'nowhere.yaml'"),
        ("labels.labeller={kind: chat_api, base_url: 'http://127.0.0.1:9/v1', model: m, api_key_env: NO_KEY}", "set NO_KEY, or"),
        ("labels.labeller={kind: chat_api, base_url: 'ftp://host/v1', model: m}", "no http"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "check", "run"])
def test_plan_and_check_and_run_refuse_the_same(
    command: str, setting: str, said: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "store", ["--out", str(tmp_path / "out")] if command == "run" else []
    assert run_main([command, *_flags(material, store), *out, "--set", setting]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (store / "manifests").exists()


def test_memory_follows_from_the_texts_and_not_from_the_limit(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    longer = request_.spec.model_copy(update={"model": request_.spec.model.model_copy(update={"max_length": 999_999})})
    usual, wide = estimate(request_, store), estimate(AuditRequest(longer, request_.sources), store)
    assert wide.total.peak_memory_bytes == usual.total.peak_memory_bytes


def test_check_reads_the_rubric(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rubric.yaml").write_text("name: half\n")
    flags = ["check", *_flags(material, tmp_path / "store"), "--set", f"labels.rubric={tmp_path / 'rubric.yaml'}"]
    assert run_main(flags) == 2
    assert "title" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_second_sae_costs_what_the_first_did_and_nothing_where_it_is_off(request_: AuditRequest, tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    off = estimate(request_, store)
    assert [off.stages[name].seconds for name in ("second_sae", "stability")] == [0.0, 0.0]
    record_rates(rates_file(store), off, _took(store, sae=100.0, latents=30.0), request_.spec)
    asked = replace(request_, spec=request_.spec.model_copy(update={"stability": StabilitySpec(second_sae=True)}))
    on = estimate(asked, store)
    for name, like in (("second_sae", "sae"), ("stability", "latents")):
        assert on.stages[name].work == on.stages[like].work
        assert on.stages[name].seconds == pytest.approx(on.stages[like].seconds)
        assert on.stages[name].memory_bytes == on.stages[like].memory_bytes
    assert on.stages["second_sae"].disk_bytes == on.stages["sae"].disk_bytes
    assert {name: stage.seconds for name, stage in on.stages.items() if name not in ("second_sae", "stability")} == {
        name: stage.seconds for name, stage in estimate(request_, store).stages.items() if name not in ("second_sae", "stability")
    }
