"""What an audit in the service costs by its number of pairs: seconds, bytes, S3 requests, SQL and Redis, by stage.

    python -m benchmarks.scale [--sizes 2304,4352,6400] [--write]

Redis (or Valkey), PostgreSQL (SQLite where there is none), an S3 server (moto), the API and one worker run here as
processes. Each size is a job of its own on a tiny reward model and generated pairs; what a stage took is told apart by the
times at which stages ended. Statements of the idle service are measured first and taken off. `--write` keeps the figures in
`benchmarks/scale.json`, from which `python -m benchmarks.scale_tables` writes the tables of `docs/scale.md`.

The default sizes are 9, 17 and 25 shards of 256 pairs: each adds one part of eight shards to the one before.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select

from benchmarks.machine_line import machine_line
from benchmarks.scale_servers import Servers, counting_servers, read_requests, read_statements
from benchmarks.service_processes import Deployment, deployment
from service.client import AuditClient, Submission, TransferObserver, read_files
from service.infra.stores import Stores
from service.jobs.access import DEFAULT_PROJECT
from service.jobs.model import FINAL_JOB_STATES, JobState
from service.jobs.tables import METADATA, jobs, stages, units

RESULTS = Path(__file__).with_name("scale.json")
WIDTH, BLOCKS = 32, 2
SPEC: dict[str, Any] = {
    "sae": {"expansion": 8, "k": 16, "batch": 512, "max_steps": 100, "min_steps": 100},
    "causal": {"pairs": 64},
    "report": {"bootstrap": 100},
    "runtime": {"threads": 1},
}
CALM = {
    "lease_seconds": "60", "heartbeat_seconds": "10", "resend_seconds": "30", "reconcile_seconds": "30", "retry_seconds": "15",
}  # fmt: skip
"""The service's own defaults, in place of those under which `benchmarks.service` kills workers."""
_IDLE_SECONDS = 15.0
_EVALUATION = 64


@dataclass(frozen=True)
class Marks:
    """What was counted until now."""

    redis: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class World:
    """Where jobs are run and counted."""

    servers: Servers
    running: Deployment
    stores: Stores
    redis: redis.Redis

    def marks(self) -> Marks:
        """Redis commands and SQL rows until now."""
        found: Any = self.redis.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): int(value["calls"]) for name, value in found.items()}
        with self.running.engine.connect() as connection:
            counts = {
                t.name: connection.execute(select(func.count()).select_from(t)).scalar_one() for t in METADATA.sorted_tables
            }
        return Marks(calls, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2304,4352,6400")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    sizes = [int(size) for size in arguments.sizes.split(",")]
    with tempfile.TemporaryDirectory() as made:
        facts = {"machine": machine_line(), **measure(Path(made), sizes)}
    show(facts)
    if arguments.write:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**kept, "service": facts}, indent=1, sort_keys=True) + "\n")


def measure(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Run all sizes in one service."""
    with (
        counting_servers(folder) as servers,
        deployment(folder / "home", servers.redis_url, 1, servers.database_url, **servers.s3, **CALM) as running,
        redis.Redis.from_url(servers.redis_url, decode_responses=True) as client,
    ):
        world = World(servers, running, Stores(running.settings, running.engine), client)
        specs = uploaded(running, folder, sizes)
        time.sleep(3.0)  # until the worker has said hello
        idle = idle_rates(world)
        runs = [one_job(world, spec, idle) for spec in specs]
        database = running.engine.dialect.name
    return {"database": database, "width": WIDTH, "blocks": BLOCKS, "spec": SPEC, "idle": idle, "runs": runs}


def uploaded(running: Deployment, folder: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """One spec for each size, with everything uploaded."""
    from safer_engine.demo_data import generate
    from tests.helpers.tiny_model import build_reward_model

    model = build_reward_model(folder / "model", "llama", width=WIDTH, blocks=BLOCKS)
    rows = generate(0, n_groups=max(sizes) // 2).rows
    apart = generate(1, n_groups=_EVALUATION).rows[:_EVALUATION]
    with AuditClient(running.url, running.token) as client:

        def upload(root: Path, paths: list[Path], kind: str) -> str:
            return str(client.upload(read_files(root, paths, TransferObserver()), kind).name)

        def dataset(name: str, some: Sequence[dict[str, Any]]) -> dict[str, Any]:
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
            return {"source": {"kind": "local", "path": upload(folder, [path], "dataset")}}

        named = {"path": upload(model, sorted(path for path in model.rglob("*") if path.is_file()), "model"), "max_length": 256}
        given = {**SPEC, "model": named, "evaluation": dataset("evaluation", apart)}
        return [{**given, "dataset": dataset(f"pairs-{size}", rows[:size])} for size in sizes]


def idle_rates(world: World) -> dict[str, float]:
    """SQL statements, Redis commands and S3 requests a second while nothing is to be done."""
    before, since = world.marks().redis, time.time()
    time.sleep(_IDLE_SECONDS)
    until, after = time.time(), world.marks().redis
    said = [one for one in read_statements(world.servers.statements) or () if since < one.at <= until]
    rates = {f"sql {name}": count / _IDLE_SECONDS for name, count in Counter(one.process for one in said if one.process).items()}
    rates["redis"] = sum(after.get(name, 0) - before.get(name, 0) for name in after if name != "info") / _IDLE_SECONDS
    rates["s3"] = sum(since < one.at <= until for one in read_requests(world.servers.requests)) / _IDLE_SECONDS
    return rates


def one_job(world: World, spec: dict[str, Any], idle: dict[str, float]) -> dict[str, Any]:
    """Run one audit alone; what it took by stage."""
    before, began = world.marks(), time.time()
    with AuditClient(world.running.url, world.running.token) as client:
        job_id = client.submit(Submission(spec)).id
    state = wait(world.running, job_id)
    time.sleep(2.0)  # the job's log is written after its end
    over, after = time.time(), world.marks()
    if state is not JobState.SUCCEEDED:
        raise SystemExit(f"the job ended as {state}: {log_tail(world.running)}")
    with world.running.engine.connect() as connection:
        rows = connection.execute(select(stages).where(stages.c.job_id == job_id).order_by(stages.c.ordinal)).mappings().all()
        query = select(stages.c.name, func.count(), func.sum(units.c.attempts), func.sum(units.c.failures))
        query = query.join(units, units.c.stage_id == stages.c.id).where(stages.c.job_id == job_id).group_by(stages.c.name)
        counted = {str(row[0]): [int(value) for value in row[1:]] for row in connection.execute(query)}
    ends = [(str(row["name"]), row["finished"].timestamp()) for row in rows]
    windows = {name: (start, end) for (_, start), (name, end) in pairwise([("", began), *ends, ("after", over)])}
    keys = {str(row["name"]): row["key"] for row in rows if row["key"]}
    found = {name: stage_costs(world, name, window, keys.get(name), idle) for name, window in windows.items()}
    for name, numbers in counted.items():
        found[name] |= dict(zip(("units", "attempts", "failures"), numbers, strict=True))
    return {
        **sizes_of(world, keys),
        "stages": found,
        "sql_rows": grown(before.rows, after.rows),
        "redis": grown(before.redis, after.redis),
        "wall": ends[-1][1] - began,
    }


def stage_costs(world: World, name: str, window: tuple[float, float], key: str | None, idle: dict[str, float]) -> dict[str, Any]:
    """What was asked of the servers within a stage's time, and what its manifest says."""
    start, end = window
    asked = [one for one in read_requests(world.servers.requests) if start < one.at <= end]
    costs: dict[str, Any] = {
        "wall": end - start,
        "s3": dict(Counter(one.kind for one in asked)),
        "s3_areas": dict(Counter(f"{one.kind} {one.area}" for one in asked)),
        "s3_sent": sum(one.sent for one in asked),
        "s3_received": sum(one.received for one in asked),
    }
    said = read_statements(world.servers.statements)
    if said is not None:
        here = [one for one in said if start < one.at <= end and one.process]
        at_rest = (end - start) * sum(rate for process, rate in idle.items() if process.startswith("sql "))
        costs["statements"] = max(0.0, len(here) - at_rest)
        costs["writes"] = sum(one.verb in ("INSERT", "UPDATE", "DELETE", "WITH") for one in here)
    if key is not None:
        manifest = world.stores.project(DEFAULT_PROJECT).manifest(name, key)
        costs |= manifest.cost.model_dump()
        sizes: Counter[str] = Counter()
        for file, entry in manifest.files.items():
            sizes[re.sub(r"\d{5}", "N", file)] += entry.size
        costs["bytes"] = dict(sizes)
    return costs


def sizes_of(world: World, keys: dict[str, str]) -> dict[str, Any]:
    """How large the job was: what the formulas of sizes are in."""
    store = world.stores.project(DEFAULT_PROJECT)
    pairs, reading = (store.manifest(name, keys[name]) for name in ("pairs", "activations"))
    return {
        "pairs": pairs.meta["n_pairs"],
        "tokens": pairs.meta["tokens"],
        "positions": reading.meta["n_positions"],
        "shards": sum(name.startswith("shard-") for name in reading.files),
        "d_in": reading.meta["d_in"],
    }


def wait(running: Deployment, job_id: str, seconds: float = 600.0) -> JobState:
    """The state a job ended in; asked of the database once a second, so that the API is not counted."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with running.engine.connect() as connection:
            state = JobState(connection.execute(select(jobs.c.state).where(jobs.c.id == job_id)).scalar_one())
        if state in FINAL_JOB_STATES:
            return state
        time.sleep(1.0)
    raise SystemExit(f"no end within {seconds:.0f} s: {log_tail(running)}")


def log_tail(running: Deployment) -> str:
    return (running.folder / "worker-0.log").read_text(errors="replace")[-3000:]


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before.get(name, 0) for name in sorted(after) if after[name] > before.get(name, 0)}


def show(facts: dict[str, Any]) -> None:
    """A table for the terminal; the docs' tables are made by `benchmarks.scale_tables`."""
    table = Table(
        "stage", *(f"{run['pairs']:,} pairs" for run in facts["runs"]), title="seconds (CPU), S3 requests, SQL, peak MB"
    )
    for name in facts["runs"][0]["stages"]:
        table.add_row(name, *(cell(run["stages"][name]) for run in facts["runs"]))
    Console(width=170).print(table, facts["machine"])


def cell(costs: dict[str, Any]) -> str:
    requests = total(costs["s3"].values())
    peak = f", {costs['peak_memory_bytes'] / 1e6:,.0f} MB" if costs.get("peak_memory_bytes") else ""
    return f"{costs['wall']:.1f} s ({costs.get('cpu_seconds', 0):.1f}), {requests}, {costs.get('statements', 0):.0f}{peak}"


def total(values: Iterable[int]) -> int:
    return sum(values)


if __name__ == "__main__":
    main()
