"""What the service bears: many small jobs while workers are killed, the API's speed with many stored jobs, overhead a stage.

    python -m benchmarks.service [--jobs 1000] [--distinct 100] [--workers 4] [--kill-every 4] [--stored 1000,100000]

Jobs audit a tiny reward model, trained here, on one of `--distinct` small preference sets; those of equal data find the
others' artifacts. A worker or a stage's process is killed with -9 every few seconds. Reported: lost jobs (not succeeded),
doubled ones (a stage of one cache key computed and committed twice), submits per second, what the queue adds to a stage
(jobs that run alone, everything cached), bytes of database a job, the API's peak memory, and p50 / p99 of API calls at so
many stored jobs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, insert, select, text

from benchmarks.machine_line import machine_line
from benchmarks.service_processes import LOCAL, Deployment, deployment
from service.client import AuditClient, JobFilter, Submission, TransferObserver, read_files
from service.embedded import broker_program, free_port
from service.jobs.ids import new_id
from service.jobs.model import FINAL_JOB_STATES, JobState
from service.jobs.tables import jobs, stages

SPEC: dict[str, Any] = {
    "sae": {"expansion": 2, "k": 4, "batch": 64, "max_steps": 10},
    "causal": {"pairs": 4},
    "report": {"bootstrap": 100, "features": 4, "pairs": 4},
    "runtime": {"threads": 1},
}
_POLL_SECONDS = 2.0
_CALLS = 200
_ALONE = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=100, help="different preference sets; the other jobs share them")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill-every", type=float, default=4.0, help="seconds on average; 0 kills nothing")
    parser.add_argument("--stored", default="1000,100000")
    parser.add_argument("--database", help="SQLAlchemy URL of an empty PostgreSQL database; default: SQLite")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    facts: dict[str, Any] = {"machine": machine_line()}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with broker(folder) as url, deployment(folder / "home", url, arguments.workers, arguments.database) as running:
            facts |= storm(running, folder, arguments)
            show(facts)
            for number in (int(text) for text in arguments.stored.split(",") if text):
                facts[f"api at {number} jobs"] = api_speed(running, number)
    show(facts)


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """A Redis or Valkey of this run's own."""
    port = free_port()
    command = [str(broker_program()), "--port", str(port), "--bind", LOCAL, "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://{LOCAL}:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def storm(running: Deployment, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Submit all jobs, kill workers while they run, wait until every job is in a final state."""
    specs = uploaded(running, folder, arguments.distinct)
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool, AuditClient(running.url, running.token) as client:
        submitted = list(pool.map(lambda at: client.submit(Submission(specs[at % len(specs)])).id, range(arguments.jobs)))
    submit_seconds = time.monotonic() - started
    if arguments.kill_every:
        running.keep_killing(arguments.kill_every)
    states = wait_for_all(running, set(submitted))
    total_seconds = time.monotonic() - started
    running.stop_killing()
    succeeded = sum(state == JobState.SUCCEEDED for state in states.values())
    return {
        "jobs": len(submitted),
        "distinct data": len(specs),
        "workers": arguments.workers,
        "kill -9": dict(running.kills),
        "lost": len(submitted) - succeeded,
        "doubled": doubled(running),
        "submits per second": len(submitted) / submit_seconds,
        "seconds in all": total_seconds,
        "database, kB a job": database_bytes(running) / len(submitted) / 1000.0,
        "API's peak memory, MB": peak_memory(running.processes["api"].pid) / 1e6,
        "overhead of a stage, ms": overhead(running, specs[0]),
    }


def uploaded(running: Deployment, folder: Path, distinct: int) -> list[dict[str, Any]]:
    """One spec for each preference set, with everything uploaded."""
    model = tiny_model(folder / "model")
    with AuditClient(running.url, running.token) as client:
        files = read_files(model, sorted(path for path in model.rglob("*") if path.is_file()), TransferObserver())
        name = client.upload(files, "model").name
        specs = []
        for seed in range(distinct):
            path = preference_set(folder / "data" / f"set-{seed}.jsonl", seed)
            dataset = client.upload(read_files(path.parent, [path], TransferObserver()), "dataset").name
            source = {"kind": "local", "path": dataset}
            specs.append({**SPEC, "model": {"path": name, "max_length": 64}, "dataset": {"source": source}})
    return specs


def preference_set(path: Path, seed: int) -> Path:
    """A small set of pairs, different for each seed."""
    from safer_engine.demo_data import generate

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = generate(seed, n_groups=14).rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_model(folder: Path) -> Path:
    """A reward model of width 16, trained for a few steps."""
    from safer_engine.demo_data import build_base, generate
    from safer_engine.train_spec import TrainSpec
    from safer_engine.training import train_reward_model

    data = generate(0, n_groups=20)
    base = build_base(folder.parent / "base", [row["chosen"][0]["content"] for row in data.rows], width=16, blocks=2)
    document = {
        "base": str(base),
        "dataset": {"source": {"kind": "memory"}},
        "recipe": {"epochs": 1, "max_length": 64},
        "runtime": {"device": "cpu", "threads": 1},
    }
    return train_reward_model(TrainSpec.model_validate(document), folder, rows=data.rows).path


def wait_for_all(running: Deployment, wanted: set[str], seconds: float = _POLL_SECONDS) -> dict[str, JobState]:
    """Poll the database until every job is in a final state."""
    while True:
        with running.engine.connect() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.state)).all()
        states = {job_id: JobState(state) for job_id, state in rows if job_id in wanted}
        final = sum(state in FINAL_JOB_STATES for state in states.values())
        Console(stderr=True).print(f"{final} of {len(wanted)} jobs are over; killed {running.kills}")
        if final == len(wanted):
            return states
        time.sleep(seconds)


def doubled(running: Deployment) -> int:
    """Stages that count a computation more than once under one cache key."""
    computed = (stages.c.outcome == "computed") & stages.c.key.is_not(None)
    query = select(func.count()).where(computed).group_by(stages.c.name, stages.c.key).having(func.count() > 1)
    with running.engine.connect() as connection:
        return len(connection.execute(query).all())


def database_bytes(running: Deployment) -> int:
    """Size of the database, without its write-ahead log."""
    sqlite = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
    query = sqlite if running.engine.dialect.name == "sqlite" else "SELECT pg_database_size(current_database())"
    with running.engine.connect() as connection:
        return int(connection.execute(text(query)).scalar_one())


def peak_memory(pid: int) -> int:
    """Bytes that a process held at most."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def overhead(running: Deployment, spec: dict[str, Any]) -> dict[str, float]:
    """Milliseconds from the end of a stage to the end of the next in jobs that run alone and find everything cached.

    That is all the queue does for a stage (dispatch, message, lease, key, finish), without the start of a child.
    """
    with AuditClient(running.url, running.token) as client:
        alone = []
        for _ in range(_ALONE):
            alone.append(client.submit(Submission(spec)).id)
            wait_for_all(running, {alone[-1]}, seconds=0.2)
    query = select(stages.c.job_id, stages.c.outcome, stages.c.finished).order_by(stages.c.job_id, stages.c.ordinal)
    with running.engine.connect() as connection:
        rows = connection.execute(query.where(stages.c.job_id.in_(alone))).all()
    spans = [
        1000.0 * (row.finished - before.finished).total_seconds()
        for before, row in pairwise(rows)
        if before.job_id == row.job_id and row.outcome == "cached"
    ]
    return quantiles(spans)


def api_speed(running: Deployment, stored: int) -> dict[str, Any]:
    """p50 and p99 of calls when so many jobs are stored, in milliseconds."""
    fill(running, stored)
    with running.engine.connect() as connection:
        some = connection.execute(select(jobs.c.id).limit(1)).scalar_one()
    with AuditClient(running.url, running.token) as client:
        calls: dict[str, Callable[[], object]] = {
            "status": lambda: client.job(some),
            "list of 20": lambda: list(client.jobs(limit=20)),
            "list of failed": lambda: list(client.jobs(JobFilter(states=["failed"]), limit=20)),
        }
        return {name: quantiles([timed(call) for _ in range(_CALLS)]) for name, call in calls.items()}


def fill(running: Deployment, stored: int) -> None:
    """Add finished jobs until so many are stored."""
    with running.engine.begin() as connection:
        template = connection.execute(select(jobs).limit(1)).mappings().one()
        missing = stored - connection.execute(select(func.count()).select_from(jobs)).scalar_one()
        for _ in range(0, max(missing, 0), 1000):
            rows = [{**template, "id": new_id(), "idempotency_key": None} for _ in range(1000)]
            connection.execute(insert(jobs), rows)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    started = time.perf_counter()
    call()
    return 1000.0 * (time.perf_counter() - started)


def quantiles(values: list[float]) -> dict[str, float]:
    """p50 and p99, and how many there were."""
    if not values:
        return {"n": 0}
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "n": len(values)}


def show(facts: dict[str, Any]) -> None:
    table = Table("what", "value", title="service")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else str(value))
    Console(width=150).print(table)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
