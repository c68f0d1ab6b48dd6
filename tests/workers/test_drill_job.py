"""A drill as a job: seeds on several workers, one of them killed; the figures of a drill of one process; no poison is left."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from safer_engine.redteam import LOG
from safer_engine.report.model_drill import DrillDocument
from service.jobs.model import JobKind, JobState, UnitKind
from tests.engine.test_drill import Bench
from tests.helpers.servers import Redis, wait_until
from tests.helpers.workplace import Workplace, stop_group

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


@pytest.fixture
def place(tmp_path: Path, redis: Redis) -> Iterator[Workplace]:
    redis.flush()
    made = Workplace(tmp_path, broker_url=redis.url)
    try:
        yield made
    finally:
        made.close()


def test_a_drill_goes_on_where_a_killed_worker_left_it(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_ENABLE_REDTEAM", "1")
    (place.folder / "bench").mkdir()
    bench = Bench(place.folder / "bench")
    local = bench.run("local")
    spec = bench.spec().model_dump(mode="json")
    names = {"train": place.upload(bench.root / "train.jsonl"), "eval": place.upload(bench.root / "eval.jsonl")}
    spec |= {"base": place.upload(bench.base)}
    for role, name in (("dataset", "train"), ("evaluation", "eval")):
        spec[role]["source"]["path"] = names[name]
    folder = place.folder / "home" / "artifacts" / "work" / "default"
    first = place.worker()
    with place.dispatching():
        job = place.submit(spec, JobKind.DRILL)
        wait_until(lambda: any(folder.glob("drill-*/scratch/clean-seed-*.json")), "a clean arm is there", 300)
        stop_group(first, signal.SIGKILL)
        place.worker()
        place.worker()
        done = place.wait(job, 600)
    assert done.state is JobState.SUCCEEDED, (done.error, place.log())
    (stage,) = (row for row in place.jobs.stages(job.id) if row.name == "drill")
    assert stage.key is not None
    stored = place.store.read("drill", stage.key)
    text = stored.path("drill.json").read_text(encoding="utf-8")
    found = DrillDocument.model_validate_json(text)
    assert (found.done, found.planned) == (2, 2)
    assert [cell.model_dump() for cell in found.cells] == [cell.model_dump() for cell in local.cells]
    assert str(place.folder) not in text
    assert names["train"] in text
    assert b"<html" in stored.path("drill.html").read_bytes()
    parts = {unit.name for unit in place.jobs.units(job.id) if unit.kind is UnitKind.PART}
    assert parts == {"seed-0", "seed-1"}
    assert not [path for path in (place.folder / "home").rglob("*") if "safer-redteam" in path.name]
    (log,) = (place.folder / "home").rglob(LOG)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["who"], line["action"]) for line in lines} == {(f"job {job.id}", "drill.arm")}
    arms = [line["arm"] for line in lines]
    assert set(arms) == {f"{arm}/seed-{seed}" for arm in ("clean", "random-0.3") for seed in (0, 1)}


def test_an_axis_that_no_pair_has_is_refused_before_anything_is_trained(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFER_ENABLE_REDTEAM", "1")
    (place.folder / "bench").mkdir()
    bench = Bench(place.folder / "bench")
    spec = bench.spec(axis="code").model_dump(mode="json")
    spec["base"] = place.upload(bench.base)
    for role, name in (("dataset", "train"), ("evaluation", "eval")):
        spec[role]["source"]["path"] = place.upload(bench.root / f"{name}.jsonl")
    place.worker()
    with place.dispatching():
        job = place.submit(spec, JobKind.DRILL)
        done = place.wait(job, 120)
    assert done.state is JobState.FAILED
    assert done.error is not None
    assert "no pair of the dataset is of axis 'code'" in done.error.message
    assert not [row for row in place.jobs.stages(job.id) if row.name == "drill" and row.key]


def test_a_worker_whose_operator_does_not_allow_it_refuses(place: Workplace) -> None:
    (place.folder / "bench").mkdir()
    bench = Bench(place.folder / "bench")
    place.worker(SAFER_ENABLE_REDTEAM="0")
    with place.dispatching():
        done = place.wait(place.submit(bench.spec().model_dump(mode="json"), JobKind.DRILL), 120)
    assert done.state is JobState.FAILED
    assert done.error is not None
    assert "switches it on" in done.error.message
