"""A process that does with a database what others do at the same time. Run as a module; writes what it won as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from service.errors import LeaseLost
from service.jobs.database import open_database
from service.jobs.requests import Finished
from service.jobs.store import JobStore
from tests.helpers.databases import new_job, settings_for


def lease_all(store: JobStore, owner: str, units: list[int]) -> list[list[int]]:
    """Ask for every unit twice; [unit, token] of those that were won."""
    found = [store.lease(unit, owner) for unit in (*units, *reversed(units))]
    return [[lease.unit_id, lease.token] for lease in found if lease is not None]


def work(store: JobStore, owner: str, _: list[int]) -> list[list[int]]:
    """Hand out, lease, claim one of few keys and finish until every job is over; [unit, token] of what was finished."""
    done = []
    while any(count for state, count in store.job_counts().items() if state in ("queued", "running")):
        for unit in store.ready_units("cpu", 2):
            store.mark_sent(unit)
            lease = store.lease(unit, owner)
            if lease is None:
                continue
            try:
                if store.claim_key(lease, f"{lease.stage}-{lease.unit_id % 3}"):
                    store.finish(lease, Finished(key=f"{lease.stage}-{lease.unit_id % 3}"))
                    done.append([lease.unit_id, lease.token])
            except LeaseLost:
                continue
        store.reconcile()
    return done


def submit_same(store: JobStore, owner: str, keys: list[int]) -> list[list[int]]:
    """Submit under idempotency keys that others use too; [key, 1] of those that made a job."""
    made = [(key, store.submit("default", new_job(idempotency_key=str(key)))) for key in keys]
    return [[key, 1] for key, submitted in made if submitted.created]


def main() -> None:
    """Arguments: folder, URL or `-`, what to do, owner, file to write, moment to start, numbers."""
    folder, url, deed, owner, out, start, *numbers = sys.argv[1:]
    settings = settings_for(Path(folder), None if url == "-" else url)
    store = JobStore(open_database(settings), settings)
    store.job_counts()
    time.sleep(max(0.0, float(start) - time.time()))
    deeds = {"lease_all": lease_all, "work": work, "submit_same": submit_same}
    Path(out).write_text(json.dumps(deeds[deed](store, owner, [int(number) for number in numbers])))


if __name__ == "__main__":
    main()
