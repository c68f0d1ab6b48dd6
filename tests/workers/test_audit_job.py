"""Whole jobs through a real worker process: an audit of uploads, once computed and once from the cache, and its parts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safer_engine import demo_data
from safer_engine.pipeline import STAGES
from safer_engine.sources.models import resolve_model
from safer_engine.spec import ModelSpec, RuntimeSpec
from safer_engine.train_spec import TrainSpec
from service.artifact_names import LOG_NAME, LOG_STAGE
from service.jobs.attachments import AttachmentStore
from service.jobs.model import JobKind, JobRecord, JobState, StagePart, StageRecord, UnitKind, UnitState
from service.jobs.requests import NewJob
from tests.helpers.servers import Redis, wait_until
from tests.helpers.workplace import PROJECT, Workplace, alive, audit_of, children_of, material, stop_group

CANARY = "canary-5f1d0c7e2b"
ABSENT = {"retraining", "second_sae", "stability", "verification"}
SECRETS = {
    "hub_token": f"hf-{CANARY}",
    "labeller_api_key": f"labeller-{CANARY}",
    "secret_pepper": f"pepper-{CANARY}",
}


@dataclass(frozen=True)
class Done:
    """A job that was computed, the same submitted again, one whose model is none, and a training."""

    place: Workplace
    first: JobRecord
    again: JobRecord
    wrong: JobRecord
    trained: JobRecord
    spec: dict[str, Any]
    ended_with: int
    left_over: list[int]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, redis: Redis) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("job")
    redis.flush()
    place = Workplace(folder, broker_url=redis.url, **SECRETS)
    files = material(folder / "material")
    spec = audit_of(place, files, runtime={"device": "cuda:7", "threads": 1, "shard_pairs": 8})
    worker = place.worker()
    try:
        with place.dispatching():
            first = place.wait(place.submit(spec))
            again = place.wait(place.submit(spec))
            wrong = place.wait(place.submit({**spec, "model": {"path": spec["dataset"]["source"]["path"]}}))
            trained = place.wait(place.submit(training(place, folder, spec), JobKind.TRAIN_RM))
            wait_until(lambda: has_log(place, wrong), "the log of the failed job is there")
            started = children_of(worker.pid)
            code = stop_group_leader(worker)
        wait_until(lambda: not any(map(alive, started)), "the worker's children are gone")
        yield Done(place, first, again, wrong, trained, spec, code, [pid for pid in started if alive(pid)])
    finally:
        place.close()


def training(place: Workplace, folder: Path, audit: dict[str, Any]) -> dict[str, Any]:
    texts = [row["chosen"][0]["content"] for row in demo_data.generate(seed=1, n_groups=20).rows]
    base = place.upload(demo_data.build_base(folder / "base", texts, width=16, blocks=2))
    recipe = {"epochs": 1, "batch": 16, "lr": 3e-3, "max_length": 64}
    document = {"base": base, "dataset": audit["dataset"], "evaluation": audit["evaluation"], "recipe": recipe}
    return TrainSpec.model_validate(document).model_dump(mode="json")


def stop_group_leader(worker: subprocess.Popen[bytes]) -> int:
    worker.terminate()
    return worker.wait(30)


def has_log(place: Workplace, job: JobRecord) -> bool:
    return any(found.stage == LOG_STAGE for found in AttachmentStore(place.engine).attached(job.id))


def stages(done: Done, job: JobRecord) -> dict[str, StageRecord]:
    return {row.name: row for row in done.place.jobs.stages(job.id)}


def report(done: Done) -> dict[str, Any]:
    key = stages(done, done.first)["report"].key
    assert key is not None
    document: dict[str, Any] = json.loads(done.place.store.read("report", key).path("report.json").read_bytes())
    return document


def test_an_audit_of_uploads_is_computed_and_its_report_committed(done: Done) -> None:
    assert done.first.state is JobState.SUCCEEDED, (done.first.error, done.place.log())
    found = stages(done, done.first)
    assert [*found] == ["prepare", *(stage.name for stage in STAGES)]
    assert {row.outcome for name, row in found.items() if name not in ABSENT} == {"computed"}
    assert {row.outcome for name, row in found.items() if name in ABSENT} == {"absent"}
    cost = found["activations"].cost
    assert cost is not None
    assert cost["seconds"] > 0
    assert report(done)["schema_version"]


def test_the_report_has_what_was_planned_beside_what_it_took(done: Done) -> None:
    timing = report(done)["provenance"]["timing"]
    assert {stage["unplanned"] for stage in timing["stages"]} == {None}
    assert timing["planned"]["seconds"] > 0
    plan, again = done.first.plan, done.again.plan
    assert plan is not None
    assert again is not None
    assert {each["cached"] for each in plan["stages"].values()} == {False}
    assert {each["cached"] for each in again["stages"].values()} == {True}
    assert again["stages"]["sae"]["work"] > 0


def test_names_of_uploads_and_digests_of_contents_are_what_is_recorded(done: Done) -> None:
    inputs = report(done)["provenance"]["inputs"]
    spec = done.spec
    assert inputs["model"]["origin"] == spec["model"]["path"]
    assert inputs["dataset"]["origin"] == spec["dataset"]["source"]["path"]
    pinned = done.first.inputs
    assert {role: inputs[role]["digest"] for role in inputs} == {role: pinned[role] for role in inputs}
    assert pinned["model.dtype"] == pinned["sae.dtype"] == "float32"


def test_the_same_job_again_computes_nothing_but_finds_its_inputs(done: Done) -> None:
    first, again = stages(done, done.first), stages(done, done.again)
    assert done.again.state is JobState.SUCCEEDED
    assert {row.outcome for name, row in again.items() if name != "prepare"} == {"cached", "absent"}
    assert {name: row.key for name, row in again.items()} == {name: row.key for name, row in first.items()}


def test_shards_of_activations_were_parts_joined_once(done: Done) -> None:
    units = [unit for unit in done.place.jobs.units(done.first.id) if unit.stage == "activations"]
    kinds = [unit.kind for unit in units]
    assert kinds.count(UnitKind.WHOLE) == kinds.count(UnitKind.JOIN) == 1
    assert kinds.count(UnitKind.PART) >= 1
    assert {unit.state for unit in units} == {UnitState.DONE}
    assert {unit.failures for unit in units} == {0}


def test_a_model_that_is_none_fails_the_job_with_a_hint_and_no_path(done: Done) -> None:
    error = done.wrong.error
    assert done.wrong.state is JobState.FAILED
    assert error is not None
    assert (error.code, error.retryable) == ("model_refused", False)
    assert error.hint
    assert str(done.place.folder) not in error.message
    assert done.spec["dataset"]["source"]["path"] in error.message


def test_a_training_is_an_artifact_that_loads_as_a_reward_model(done: Done, tmp_path: Path) -> None:
    assert done.trained.state is JobState.SUCCEEDED, (done.trained.error, done.place.log())
    found = stages(done, done.trained)
    assert [*found] == ["prepare", "training"]
    key = found["training"].key
    assert key is not None
    stored = done.place.store.read("training", key)
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= set(stored.manifest.files)
    for name in stored.manifest.files:
        (tmp_path / name).write_bytes(stored.path(name).read_bytes())
    assert resolve_model(ModelSpec(path=str(tmp_path)), RuntimeSpec(), None).digest
    record = json.loads((tmp_path / "training.json").read_bytes())
    assert record["key"] == key
    assert record["base"]["origin"] == record["spec"]["base"] == done.trained.spec["base"]
    assert (found["training"].done, found["training"].unit) == (found["training"].total, "steps")


def test_the_log_of_every_ended_job_is_an_artifact(done: Done) -> None:
    for job in (done.first, done.again, done.wrong, done.trained):
        (reference,) = [each for each in AttachmentStore(done.place.engine).attached(job.id) if each.stage == LOG_STAGE]
        lines = done.place.store.read(LOG_STAGE, reference.key).path(LOG_NAME).read_text().splitlines()
        events = [json.loads(line) for line in lines]
        assert [events[0][name] for name in ("event", "state")] == ["job", "queued"]
        assert [events[-1][name] for name in ("event", "state")] == ["job", job.state]


def test_no_path_and_no_secret_of_the_worker_is_in_artifacts_events_or_logs(done: Done) -> None:
    folder = str(done.place.folder).encode()
    blobs = [path for path in (done.place.settings.folder / "artifacts").rglob("*") if path.is_file()]
    assert len(blobs) > 40
    for path in blobs:
        data = path.read_bytes()
        assert folder not in data, path
        assert CANARY.encode() not in data, path
    events = [str(event) for job in (done.first, done.wrong) for event in done.place.jobs.events(job.id)]
    assert not [line for line in events if CANARY in line or folder.decode() in line]
    assert CANARY not in done.place.log()


def test_no_dataset_text_is_in_the_logs(done: Done) -> None:
    rows = (done.place.folder / "material" / "preferences.jsonl").read_text().splitlines()
    words = {word for row in rows for text in re.findall(r"[A-Za-z' ]{40,}", row) for word in [text.strip()[:40]]}
    logs = done.place.log() + "".join(str(event) for event in done.place.jobs.events(done.first.id))
    assert len(words) > 10
    assert not [text for text in words if text in logs]


def test_sigterm_ends_the_worker_and_its_processes(done: Done) -> None:
    assert done.ended_with == 0
    assert done.left_over == []


def test_only_what_was_committed_is_left_in_the_store(done: Done) -> None:
    committed = [(each.stage, each.key) for each in done.place.store.committed()]
    assert len(committed) == len(set(committed))
    wanted = {(name, row.key) for name, row in stages(done, done.first).items() if row.key}
    assert wanted <= set(committed)
    assert [area.stage for area in done.place.store.work_areas()] == []
    assert not list((done.place.settings.folder / "cache" / "nowhere").iterdir())


def test_a_worker_for_once_says_whether_it_failed(tmp_path: Path) -> None:
    place = Workplace(tmp_path, broker_url="redis://127.0.0.1:1/0")
    try:
        assert place.worker("--once").wait(60) == 0
        job = place.jobs.submit(PROJECT, NewJob(JobKind.AUDIT, {}, (StagePart("stage-of-tomorrow", "gpu"),))).job
        assert place.worker("--once", "--queues", "cpu").wait(60) == 0
        assert place.jobs.job(job.id).state is JobState.QUEUED
        assert place.worker("--once", "--queues", "gpu").wait(60) == 4
        ended = place.jobs.job(job.id)
        assert ended.state is JobState.FAILED
        assert ended.error is not None
        assert "stage-of-tomorrow" in ended.error.message
        assert has_log(place, ended)
    finally:
        place.close()


def test_a_worker_that_cannot_start_says_what_to_type(tmp_path: Path) -> None:
    place = Workplace(tmp_path, broker_url="redis://127.0.0.1:1/0")
    try:
        process = place.worker("--once", SAFER_HOME=str(tmp_path / "elsewhere"))
        assert process.wait(60) == 2
        assert "safer-audit migrate" in place.log()
        assert stop_group(process) == 2
    finally:
        place.close()
