"""Starting a worker: settings, database, caches, metrics; then Celery, or one unit."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

from prometheus_client import CollectorRegistry, start_http_server

from service.infra.logs import configure_logging
from service.infra.settings import Settings, load_settings
from service.jobs.database import check_version, open_database
from workers.runner import Bench, Runner, Taken, open_bench
from workers.supervisor import Nursery

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
_AT_ONCE = 16
_LOG = logging.getLogger("workers")


def run(queues: str | None, *, once: bool) -> int:
    """Run a worker to its end. Returns the exit code. Raises SaferError where it cannot start."""
    given = {"queues": queues} if queues is not None else {}
    settings = load_settings(**given)
    configure_logging(settings)
    _environment(settings)
    engine = open_database(settings)
    check_version(engine)
    registry = CollectorRegistry()
    bench = open_bench(settings, engine, registry, () if once else settings.queues)
    nursery = Nursery(settings)
    runner = Runner(bench, nursery)
    if once:
        return _once(settings, bench, runner)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, registry=registry)
    nursery.warm_up()
    from workers.app import serve

    _LOG.info("worker %s serves %s", runner.owner, ", ".join(settings.queues))
    return serve(bench, runner)


def _environment(settings: Settings) -> None:
    """What libraries in the children read from their environment: where the hub's cache is, and to be quiet."""
    os.environ.setdefault("HF_HOME", str(settings.folder / "cache" / "hub"))
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _once(settings: Settings, bench: Bench, runner: Runner) -> int:
    """Take one unit of the first queue that has one. Returns 0 when it is done, or nothing waits; 4 when it failed."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        runner.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for queue in settings.queues:
        for unit in bench.jobs.waiting_units(queue, _AT_ONCE):
            bench.jobs.mark_sent(unit)  # where it is sent already, its message will find nothing to do
            taken = runner.take(unit)
            if taken in (Taken.NOTHING, Taken.PARKED):
                continue
            return 4 if taken is Taken.FAILED else 0
    _LOG.info("nothing waits in %s", ", ".join(settings.queues))
    return 0
