"""Starting a worker: settings, database, caches, metrics; then Celery, or one unit."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

from prometheus_client import CollectorRegistry, start_http_server
from sqlalchemy import Engine

from service.errors import Unavailable
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
_LOOK_SECONDS = 2.0
_START_SECONDS = 60.0
"""So long a worker that stays waits for the database when it starts; then it ends, for whoever supervises it to see."""
NOTHING_CAME = 75
"""Exit code of a worker that was to wait for one unit, in vain (EX_TEMPFAIL of sysexits.h: to be tried again)."""
_LOG = logging.getLogger("workers")


def run(queues: str | None, *, once: bool, wait: float | None = None) -> int:
    """Run a worker to its end. Returns the exit code. Raises SaferError where it cannot start.

    Args:
        wait: with `once`, seconds to wait for a unit; then none is told apart from one that is done.
    """
    given = {"queues": queues} if queues is not None else {}
    settings = load_settings(**given)
    configure_logging(settings)
    _environment(settings)
    engine = open_database(settings)
    _await_database(engine, _START_SECONDS if not once else wait or 0.0)
    registry = CollectorRegistry()
    bench = open_bench(settings, engine, registry, () if once else settings.queues)
    nursery = Nursery(settings)
    runner = Runner(bench, nursery)
    if once:
        _offer_metrics(settings, registry)
        return _once(settings, bench, runner, wait)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, registry=registry)
    nursery.warm_up()
    from workers.app import serve

    _LOG.info("worker %s serves %s", runner.owner, ", ".join(settings.queues))
    return serve(bench, runner)


def _await_database(engine: Engine, seconds: float) -> None:
    """Wait for a database that cannot be used yet. Raises Unavailable when it still cannot; SchemaMismatch at once."""
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            return check_version(engine)
        except Unavailable as error:
            if time.monotonic() >= end:
                raise
            if not told:
                _LOG.warning("%s; waiting up to %.0f s for it", error.message, seconds)
            told = True
        time.sleep(_LOOK_SECONDS)


def _environment(settings: Settings) -> None:
    """What libraries in the children read from their environment: where the hub's cache is, and to be quiet."""
    os.environ.setdefault("HF_HOME", str(settings.folder / "cache" / "hub"))
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _offer_metrics(settings: Settings, registry: CollectorRegistry) -> None:
    """Metrics of a worker that takes one unit, where the port was chosen: several such workers may share a machine."""
    if settings.metrics_port and "metrics_port" in settings.model_fields_set:
        try:
            start_http_server(settings.metrics_port, registry=registry)
        except OSError as error:
            _LOG.warning("no metrics on port %d: %s", settings.metrics_port, error.strerror)


def _once(settings: Settings, bench: Bench, runner: Runner, wait: float | None) -> int:
    """Take one unit of the first queue that has one. Returns 0 when it is done or given back, or nothing waits; 4 when it failed.

    Where it is to wait, and nothing came: NOTHING_CAME.
    """
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        runner.stop()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    end = time.monotonic() + (wait or 0.0)
    while True:
        try:
            taken = _take_one(settings, bench, runner)
        except Unavailable:
            if wait is None or time.monotonic() >= end:
                raise
            taken = None
        if taken is not None:
            return 4 if taken is Taken.FAILED else 0
        if runner.stopping or time.monotonic() >= end:
            break
        stopped.wait(min(_LOOK_SECONDS, max(0.0, end - time.monotonic())))
    _LOG.info("nothing waits in %s", ", ".join(settings.queues))
    return 0 if wait is None or runner.stopping else NOTHING_CAME


def _take_one(settings: Settings, bench: Bench, runner: Runner) -> Taken | None:
    """What became of the first unit that could be taken; None where there is none. Raises Unavailable."""
    for queue in settings.queues:
        for unit in bench.jobs.waiting_units(queue, _AT_ONCE):
            bench.jobs.mark_sent(unit)  # where it is sent already, its message will find nothing to do
            taken = runner.take(unit)
            if taken not in (Taken.NOTHING, Taken.PARKED):
                return taken
    return None
