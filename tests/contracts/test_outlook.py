"""How long a job will still compute: known answers, and that nothing is said where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from service.jobs.clock import utc_after
from service.jobs.model import JobRecord, StageRecord, StageState
from service.jobs.outlook import JobPlan, Outlook, PastStage, StageOutlook, past_stages, rest_of, seconds_left, usual_seconds
from service.jobs.requests import Finished
from service.jobs.tables import stages
from tests.helpers.databases import Database

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
PENDING = StageRecord(2, "j", 1, "sae", "gpu", StageState.PENDING)


def opened(done: float = 0.0, total: float = 0.0, *, ago: float = 100.0, pace: tuple[float, float] | None = None) -> StageRecord:
    """A stage that began so many seconds ago; `pace`: what was done, and how many seconds ago, when it was first heard of."""
    step = StageRecord(1, "j", 0, "activations", "gpu", StageState.OPEN, done=done, total=total, started=before(ago))
    return step if pace is None else replace(step, pace_done=pace[0], pace_since=before(pace[1]))


def before(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def plan_of(**stages: StageOutlook) -> dict[str, object]:
    return JobPlan({}, stages).dumped()


def test_the_median_of_the_nearest_sizes_is_what_is_usual() -> None:
    past = [
        PastStage("sae", work, seconds) for work, seconds in ((90, 10), (100, 12), (110, 500), (120, 14), (300, 99), (1e6, 9e9))
    ]
    assert usual_seconds("sae", StageOutlook(False, 100.0, 77.0), past[:4]) == 13.0
    assert usual_seconds("sae", StageOutlook(False, 100.0, 77.0), past) == 14.0, "one outlier and a size unlike it count little"
    assert usual_seconds("sae", StageOutlook(False, 1.0, 77.0), past) == 77.0, "nothing of like size: the plan"
    assert usual_seconds("latents", StageOutlook(False, 100.0), past) is None
    assert usual_seconds("sae", StageOutlook(True, 100.0, 77.0), past) == 0.0
    assert usual_seconds("sae", None, past) is None
    assert usual_seconds("causal", StageOutlook(False, 0.0), [PastStage("causal", 0.0, 0.5)]) == 0.5


def test_stages_to_come_add_up_and_one_unknown_is_none() -> None:
    past = [PastStage("activations", 10.0, 60.0), PastStage("sae", 10.0, 30.0)]
    plan = plan_of(activations=StageOutlook(False, 10.0), sae=StageOutlook(False, 10.0))
    assert seconds_left(plan, [opened(ago=20.0), PENDING], past, NOW) == 40.0 + 30.0
    assert seconds_left(plan, [replace(opened(), state=StageState.DONE), PENDING], past, NOW) == 30.0
    assert seconds_left(plan, [opened(ago=20.0), PENDING], past[:1], NOW) is None
    assert seconds_left(None, [opened(ago=20.0), PENDING], past, NOW) is None
    cached = plan_of(activations=StageOutlook(False, 10.0), sae=StageOutlook(True, 10.0))
    assert seconds_left(cached, [opened(ago=20.0), PENDING], past[:1], NOW) == 40.0


def test_a_job_that_is_slower_than_usual_is_expected_to_stay_so() -> None:
    past = [PastStage("activations", 10.0, 60.0), PastStage("sae", 10.0, 30.0)]
    plan = plan_of(activations=StageOutlook(False, 10.0), sae=StageOutlook(False, 10.0))
    for took, left in ((60.0, 30.0), (120.0, 60.0), (9000.0, 90.0), (1.0, 15.0)):
        done = replace(opened(ago=took), state=StageState.DONE, outcome="computed", finished=NOW)
        assert seconds_left(plan, [done, PENDING], past, NOW) == left
        assert seconds_left(plan, [replace(done, outcome="cached"), PENDING], past, NOW) == 30.0


def test_the_own_pace_counts_once_there_is_enough_behind_it() -> None:
    half = opened(50, 100, pace=(0.0, 60.0))
    assert rest_of(half, None, NOW) == 60.0
    assert rest_of(half, 1e9, NOW) == 60.0, "half way, history has no say"
    assert rest_of(opened(1, 100, pace=(0.0, 1.0)), None, NOW) is None, "one of a hundred after a second says nothing"
    assert rest_of(opened(1, 100, ago=1.0, pace=(0.0, 1.0)), 200.0, NOW) == pytest.approx(198.0)
    assert rest_of(opened(2, 100, pace=(0.0, 60.0)), None, NOW) == pytest.approx(2940.0), "after a minute little is enough"
    mixed = rest_of(opened(15, 100, pace=(0.0, 15.0)), 200.0, NOW)
    assert mixed == pytest.approx(0.5 * 85.0 + 0.5 * 170.0)


def test_a_worker_that_takes_over_is_measured_from_its_own_start() -> None:
    resumed = opened(80, 100, ago=36000.0, pace=(60.0, 10.0))
    assert rest_of(resumed, None, NOW) == pytest.approx(10.0), "not the ten hours that nobody worked"


def test_what_takes_far_longer_than_usual_is_not_known() -> None:
    assert rest_of(opened(ago=9.0), 10.0, NOW) == 1.0
    assert rest_of(opened(ago=30.0), 10.0, NOW) == 1.0
    assert rest_of(opened(ago=600.0), 10.0, NOW) is None
    assert rest_of(replace(opened(), started=None), 10.0, NOW) == 10.0


def test_an_estimate_falls_as_work_is_done_and_starts_near_the_truth() -> None:
    """A stage that takes 100 s while 60 s were usual, with a slow start of 8 s: never wild, and ever nearer."""
    told = []
    for second in range(0, 100, 2):
        done = max(0.0, second - 8.0) / 92.0 * 1000.0
        step = opened(done, 1000.0 if done else 0.0, ago=second, pace=(0.0, second - 8.0) if done else None)
        told.append(rest_of(step, 60.0, NOW))
    left = [100.0 - second for second in range(0, 100, 2)]
    assert all(each is not None and truth / 2 <= each <= truth * 1.5 + 1 for each, truth in zip(told, left, strict=True)), told
    assert told[-1] == pytest.approx(2.0, abs=0.1)
    assert all(later <= earlier for earlier, later in pairwise(told[20:]))  # type: ignore[operator]


def finished_job(db: Database, work: float, seconds: float) -> JobRecord:
    job = db.submit("prepare", "pairs")
    db.store.finish(db.take(), Finished(plan=plan_of(pairs=StageOutlook(False, work))))
    db.store.finish(db.take(), Finished())
    db.change(
        stages, (stages.c.job_id == job.id) & (stages.c.name == "pairs"), started=utc_after(-seconds), finished=utc_after(0.0)
    )
    return db.get(job)


def test_jobs_of_the_project_tell_how_long_the_next_one_takes(db: Database) -> None:
    for seconds in (30.0, 40.0, 50.0):
        finished_job(db, 1000.0, seconds)
    finished_job(db, 1e9, 90000.0)
    outlook = Outlook(db.engine)
    job = db.submit("prepare", "pairs")
    assert outlook.seconds_left(db.get(job), db.store.stages(job.id), outlook.now()) is None, "it waits"
    lease = db.take()
    assert outlook.seconds_left(db.get(job), db.store.stages(job.id), outlook.now()) is None, "nothing is planned"
    db.store.finish(lease, Finished(plan=plan_of(pairs=StageOutlook(False, 1100.0))))
    assert outlook.seconds_left(db.get(job), db.store.stages(job.id), outlook.now()) == pytest.approx(40.0, abs=1.0)
    db.store.request_cancel("default", job.id, "a")
    assert outlook.seconds_left(db.get(job), db.store.stages(job.id), outlook.now()) is None


def test_what_was_found_in_the_cache_says_nothing_of_how_long_it_takes(db: Database) -> None:
    job = db.submit("prepare", "pairs")
    db.store.finish(db.take(), Finished(plan=plan_of(pairs=StageOutlook(False, 5.0))))
    db.store.finish(db.take(), Finished("cached"))
    assert [each.name for each in past_stages(db.engine, "default")] == ["prepare"]
    assert db.get(job).plan == plan_of(pairs=StageOutlook(False, 5.0))


def test_the_pace_is_measured_from_the_first_word_of_each_worker(db: Database) -> None:
    job = db.submit("prepare")
    first = db.take()
    assert db.store.stages(job.id)[0].pace_since is None
    db.store.progress(first, 10, 100, "rows")
    step = db.store.stages(job.id)[0]
    assert step.pace_done == 10
    db.store.progress(first, 30, 100, "rows")
    assert (db.store.stages(job.id)[0].pace_done, db.store.stages(job.id)[0].pace_since) == (10, step.pace_since)
    db.store.give_back(first)
    second = db.take(owner="worker-2")
    assert db.store.stages(job.id)[0].pace_since is None
    db.store.progress(second, 25, 100, "rows")
    assert db.store.stages(job.id)[0].pace_done == 25
    db.store.progress(second, 1, 10, "files")
    assert db.store.stages(job.id)[0].pace_done == 1, "it counts something else now"
