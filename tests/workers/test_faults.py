"""Real processes are killed, servers stopped, messages lost and doubled; every job ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from safer_engine import demo_data
from safer_engine.train_spec import TrainSpec
from safer_engine.training import train_reward_model
from service.jobs.model import FINAL_JOB_STATES, FINAL_UNIT_STATES, JobKind, JobRecord, JobState, StageState, UnitState
from service.jobs.queue import Sender
from tests.helpers.servers import Postgres, Redis, redis_server, wait_until
from tests.helpers.workplace import Workplace, alive, audit_of, material, stop_group, working_child

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
SLOW: dict[str, Any] = {"sae": {"kind": "topk", "max_steps": 6000, "min_steps": 6000, "batch": 256, "k": 8}}
"""A stage that is at work for some seconds."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return material(tmp_path_factory.mktemp("material"))


@dataclass
class Scene:
    """A service with its broker and its workers."""

    place: Workplace
    redis: Redis
    files: dict[str, Path]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, workers: int = 1) -> None:
        for _ in range(workers):
            self.workers.append(self.place.worker())

    def submit(self, **sections: Any) -> JobRecord:
        return self.place.submit(audit_of(self.place, self.files, **sections))

    def open_stage(self, job: JobRecord) -> str | None:
        return next((row.name for row in self.place.jobs.stages(job.id) if row.state is StageState.OPEN), None)

    def at_work(self, job: JobRecord, stage: str) -> int:
        """Wait until a child computes a stage, and say which worker's it is (its place in `workers`)."""

        def busy() -> list[int]:
            if self.open_stage(job) != stage:
                return []
            return [place for place, worker in enumerate(self.workers) if working_child(worker.pid) is not None]

        wait_until(lambda: bool(busy()), f"{stage} is at work", 120)
        return busy()[0]

    def lost(self, job: JobRecord) -> set[str]:
        """Stages that lost a process."""
        events = self.place.jobs.events(job.id)
        died = {e.stage for e in events if e.data.get("state") == "retrying" and e.data["error"]["code"] == "worker_died"}
        return {stage for stage in died | {e.stage for e in events if e.data.get("state") == "expired"} if stage}


@pytest.fixture
def scene(tmp_path: Path, files: dict[str, Path]) -> Iterator[Scene]:
    server = redis_server(tmp_path)
    server.start()
    place = Workplace(tmp_path, broker_url=server.url)
    try:
        with place.dispatching():
            yield Scene(place, server, files)
    finally:
        place.close()
        server.stop()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]
) -> Iterator[dict[str, tuple[str | None, str | None]]]:
    """Key and content of every stage of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    server = redis_server(folder)
    server.start()
    place = Workplace(folder, broker_url=server.url)
    try:
        place.worker()
        with place.dispatching():
            job = place.wait(place.submit(audit_of(place, files)), 300)
        assert job.state is JobState.SUCCEEDED, job.error
        yield contents(place, job)
    finally:
        place.close()
        server.stop()


def contents(place: Workplace, job: JobRecord) -> dict[str, tuple[str | None, str | None]]:
    """Key and content of every stage; the report tells when it was made, so that only its key counts."""
    rows = place.jobs.stages(job.id)
    return {row.name: (row.key, None if row.name == "report" else row.content_digest) for row in rows}


def require_right(place: Workplace, job: JobRecord) -> None:
    """A job that succeeded, with nothing left under way, and each artifact committed once."""
    ended = place.wait(job, 400)
    assert ended.state is JobState.SUCCEEDED, (ended.error, place.log())
    assert {row.state for row in place.jobs.stages(job.id)} == {StageState.DONE}
    assert {unit.state for unit in place.jobs.units(job.id)} <= FINAL_UNIT_STATES
    committed = [(each.stage, each.key) for each in place.store.committed()]
    assert len(committed) == len(set(committed))
    assert {(row.name, row.key) for row in place.jobs.stages(job.id) if row.key} <= set(committed)
    for stage, key in committed:
        stored = place.store.read(stage, key)
        for name in stored.manifest.files:
            assert stored.path(name).is_file()  # reading verifies the digest


def keep_killing(scene: Scene, job: JobRecord, kill: Callable[[subprocess.Popen[bytes], int], None]) -> None:
    """Kill something of every stage once, until the job has ended."""
    gone: set[int] = set()
    while scene.place.jobs.job(job.id).state not in FINAL_JOB_STATES:
        stage = scene.open_stage(job)
        if stage is not None and stage not in scene.lost(job):
            for worker in list(scene.workers):
                child = working_child(worker.pid)
                if child is not None and child not in gone and scene.open_stage(job) == stage:
                    gone.add(child)
                    kill(worker, child)
        time.sleep(0.005)


def test_children_killed_in_every_stage(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start()
    job = scene.submit()
    keep_killing(scene, job, lambda _, child: os.kill(child, signal.SIGKILL))
    require_right(scene.place, job)
    assert scene.lost(job) == set(undisturbed)
    assert contents(scene.place, job) == undisturbed


def test_parents_killed_in_every_stage(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start(2)
    job = scene.submit()
    orphans: list[int] = []

    def kill(worker: subprocess.Popen[bytes], child: int) -> None:
        orphans.append(child)
        scene.workers.remove(worker)
        worker.kill()
        worker.wait()
        scene.start()

    keep_killing(scene, job, kill)
    require_right(scene.place, job)
    assert len(scene.lost(job)) >= len(undisturbed) - 2  # a parent may die when its stage is just done
    assert contents(scene.place, job) == undisturbed
    wait_until(lambda: not any(map(alive, orphans)), "no child outlives its parent")


def test_every_message_delivered_many_times_at_once(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start(2)
    job = scene.submit()
    sender = Sender(scene.place.settings)
    while scene.place.jobs.job(job.id).state not in FINAL_JOB_STATES:
        for unit in scene.place.jobs.units(job.id):
            for _ in range(2):
                sender.send(unit.id, unit.queue)
        time.sleep(0.2)
    sender.close()
    require_right(scene.place, job)
    assert contents(scene.place, job) == undisturbed
    assert {unit.attempts for unit in scene.place.jobs.units(job.id)} == {1}


def test_two_jobs_that_need_the_same_compute_it_once(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start(2)
    jobs = [scene.submit() for _ in range(2)]
    for job in jobs:
        require_right(scene.place, job)
        assert contents(scene.place, job)["labels"] == undisturbed["labels"]
    first, second = (scene.place.jobs.stages(job.id) for job in jobs)
    for one, other in zip(first[1:], second[1:], strict=True):
        assert sorted([str(one.outcome), str(other.outcome)]) in (["cached", "computed"], ["absent", "absent"]), one.name


@pytest.mark.parametrize("seconds", [0.0, 5.0, 30.0])
def test_redis_loses_everything_and_is_away(scene: Scene, undisturbed: dict[str, Any], seconds: float) -> None:
    scene.start(2)
    job = scene.submit()
    for stage in ("pairs", "sae", "labels"):
        with suppress(TimeoutError):
            wait_until(lambda: scene.open_stage(job) == stage, stage, 120)  # noqa: B023 - called at once
        if seconds == 0.0:
            scene.redis.flush()
        elif stage == "sae":
            scene.redis.stop(signal.SIGKILL)
            time.sleep(seconds)
            scene.redis.start()
    require_right(scene.place, job)
    assert contents(scene.place, job) == undisturbed


def test_redis_hangs_for_a_while(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start()
    job = scene.submit()
    scene.at_work(job, "pairs")
    scene.redis.pause()
    time.sleep(8.0)
    scene.redis.resume()
    require_right(scene.place, job)
    assert contents(scene.place, job) == undisturbed


@pytest.mark.parametrize("all_processes", [False, True])
def test_a_worker_asked_to_stop_gives_its_unit_back_and_the_next_goes_on(scene: Scene, all_processes: bool) -> None:
    scene.start()
    job = scene.submit(**SLOW, runtime={"checkpoint_seconds": 3600.0, "threads": 1, "device": "cpu"})
    scene.at_work(job, "sae")
    wait_until(lambda: scene.place.jobs.stages(job.id)[4].done > 200, "the training is under way", 60)
    worker = scene.workers.pop()
    if all_processes:  # the child hears of it last: nobody that ends before it may end it
        child = working_child(worker.pid)
        assert child is not None
        os.kill(child, signal.SIGSTOP)
        os.killpg(worker.pid, signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(3)
        os.kill(child, signal.SIGCONT)
    else:
        worker.terminate()
    assert worker.wait(30) == 0
    (unit,) = [each for each in scene.place.jobs.units(job.id) if each.stage == "sae"]
    assert (unit.state in (UnitState.READY, UnitState.SENT), unit.failures, unit.owner) == (True, 0, None)
    scratch = scene.place.settings.folder / "artifacts" / "work" / "default"
    (kept,) = scratch.rglob("training.safetensors")
    with safe_open(kept, framework="np") as handle:
        assert json.loads(handle.metadata()["facts"])["state"]["step"] > 200
    scene.start()
    require_right(scene.place, job)


def test_a_worker_that_slept_past_its_lease_writes_nothing_more(scene: Scene) -> None:
    scene.start()
    job = scene.submit(**SLOW)
    scene.at_work(job, "sae")
    sleeper = scene.workers.pop()
    os.kill(sleeper.pid, signal.SIGSTOP)
    child = working_child(sleeper.pid)
    (unit,) = [each for each in scene.place.jobs.units(job.id) if each.stage == "sae"]

    def taken_away() -> bool:
        (now,) = [each for each in scene.place.jobs.units(job.id) if each.stage == "sae"]
        return now.owner != unit.owner

    wait_until(taken_away, "the lease ran out", 30)
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_until(lambda: child is None or not alive(child), "the sleeper ended its child", 20)
    scene.workers.append(sleeper)
    require_right(scene.place, job)
    assert "given to another worker" in scene.place.log()


def test_cancelling_ends_the_child_and_keeps_a_log(scene: Scene) -> None:
    scene.start()
    job = scene.submit(**SLOW)
    place = scene.at_work(job, "sae")
    child = working_child(scene.workers[place].pid)
    assert child is not None
    scene.place.jobs.request_cancel("default", job.id, "tester")
    ended = scene.place.wait(job, 60)
    assert ended.state is JobState.CANCELLED
    wait_until(lambda: not alive(child), "the child is gone")
    assert {unit.state for unit in scene.place.jobs.units(job.id)} <= FINAL_UNIT_STATES
    again = scene.place.jobs.retry("default", job.id, "tester")
    require_right(scene.place, again)


def test_a_stage_over_its_memory_fails_its_job_after_some_tries(tmp_path: Path, files: dict[str, Path]) -> None:
    server = redis_server(tmp_path)
    server.start()
    place = Workplace(tmp_path, broker_url=server.url, worker_memory_bytes=50 << 20, max_failures=2)
    try:
        with place.dispatching():
            place.worker()
            job = place.wait(place.submit(audit_of(place, files)), 200)
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert (job.error.code, "more memory" in job.error.message) == ("resource_exhausted", True)
        assert place.jobs.units(job.id)[-1].failures == 2
    finally:
        place.close()
        server.stop()


def test_a_training_killed_on_the_way_ends_as_one_that_was_not(scene: Scene, tmp_path: Path) -> None:
    texts = [row["chosen"][0]["content"] for row in demo_data.generate(seed=1, n_groups=20).rows]
    base = demo_data.build_base(tmp_path / "base", texts, width=16, blocks=2)
    document = {
        "dataset": {"source": {"kind": "local", "path": str(scene.files["dataset"])}},
        "recipe": {"epochs": 80, "batch": 8, "lr": 3e-4, "max_length": 64},
        "runtime": {"checkpoint_seconds": 0.2, "threads": 1, "device": "cpu"},
    }
    wanted = train_reward_model(TrainSpec.model_validate({**document, "base": str(base)}), tmp_path / "wanted")
    steps = len(wanted.record["curve"])
    names: dict[str, Any] = {"base": scene.place.upload(base)}
    names["dataset"] = {"source": {"kind": "local", "path": scene.place.upload(scene.files["dataset"])}}
    spec = TrainSpec.model_validate({**document, **names}).model_dump(mode="json")
    scene.start()
    job = scene.place.submit(spec, JobKind.TRAIN_RM)
    scene.at_work(job, "training")
    for share in (0.2, 0.5):
        wait_until(lambda: _steps(scene, job) > share * steps, f"{share:.0%} is trained", 120)  # noqa: B023 - called at once
        child = working_child(scene.workers[0].pid)
        assert child is not None
        os.kill(child, signal.SIGKILL)
        (checkpoint,) = (scene.place.settings.folder / "artifacts" / "work").rglob("checkpoint.safetensors")
        with safe_open(checkpoint, framework="np") as handle:
            kept = len(json.loads(handle.metadata()["curve"]))
        assert kept > 0
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            assert _steps(scene, job) >= kept
            time.sleep(0.05)
    require_right(scene.place, job)
    key = scene.place.jobs.stages(job.id)[1].key
    assert key is not None
    found = scene.place.store.read("training", key).path("model.safetensors").read_bytes()
    assert found == (wanted.path / "model.safetensors").read_bytes()


def _steps(scene: Scene, job: JobRecord) -> float:
    return scene.place.jobs.stages(job.id)[1].done


def test_the_database_is_restarted(
    tmp_path: Path, files: dict[str, Path], postgres: Postgres, undisturbed: dict[str, Any]
) -> None:
    server = redis_server(tmp_path)
    server.start()
    place = Workplace(tmp_path, broker_url=server.url, database_url=postgres.fresh("restarted"))
    try:
        with place.dispatching():
            place.worker()
            job = place.submit(audit_of(place, files))
            for _ in range(3):
                time.sleep(4.0)
                postgres.stop(signal.SIGQUIT)
                time.sleep(1.0)
                postgres.start()
                wait_until(postgres.answers, "PostgreSQL answers")
            require_right(place, job)
        assert contents(place, job) == undisturbed
    finally:
        place.close()
        server.stop()


def test_a_worker_waits_for_its_database(tmp_path: Path, files: dict[str, Path], postgres: Postgres) -> None:
    server = redis_server(tmp_path)
    server.start()
    place = Workplace(tmp_path, broker_url=server.url, database_url=postgres.fresh("late"))
    try:
        job = place.submit(audit_of(place, files))
        postgres.stop(signal.SIGQUIT)
        worker = place.worker()
        wait_until(lambda: "waiting up to 60 s for it" in place.log(), "the worker waits")
        assert worker.poll() is None
        postgres.start()
        wait_until(postgres.answers, "PostgreSQL answers")
        with place.dispatching():
            require_right(place, job)
    finally:
        place.close()
        server.stop()


def test_random_kills_of_many_workers_lose_and_double_nothing(scene: Scene, undisturbed: dict[str, Any]) -> None:
    scene.start(2)
    jobs = [scene.submit(seed=seed) for seed in range(3)]
    stop = threading.Event()

    def reap() -> None:
        turn = 0
        while not stop.wait(3.0):
            turn += 1
            worker = scene.workers.pop(0)
            stop_group(worker, signal.SIGKILL) if turn % 2 else stop_group(worker)
            scene.start()

    killer = threading.Thread(target=reap)
    killer.start()
    try:
        time.sleep(30.0)
    finally:
        stop.set()
        killer.join()
    for job in jobs:
        require_right(scene.place, job)
    assert contents(scene.place, jobs[0]) == undisturbed
