"""`python -m service`: the API, its pages and the dispatcher in one process. Ends cleanly on SIGTERM and SIGINT.

Exit codes: 0 after a clean stop, 2 when a setting or the schema is wrong, 4 when something that is needed is away or has ended.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

import uvicorn

from safer_engine.errors import SaferError
from service.callbacks import Callbacks
from service.embedded import require_free
from service.errors import Unavailable
from service.gate_deliveries import Deliveries, GateCallbacks
from service.gate_judge import GateJudge
from service.housekeeping import Housekeeping
from service.http.app import create_app
from service.http.services import Services, open_services
from service.infra.logs import configure_logging
from service.infra.settings import Settings, load_settings
from service.jobs.callbacks import CallbackStore
from service.jobs.database import check_version
from service.jobs.deliveries import CALLBACK
from service.jobs.dispatcher import Dispatcher
from service.jobs.job_log import JobLogs
from service.loops import Loops
from service.mlflow.audits import RegistryAudits
from service.mlflow.tags import TagWriter

_STOP_SECONDS = 10


class Server(uvicorn.Server):
    """Tells the streams to end when it is asked to stop: it waits for every open connection."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        self._stopping.set()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        """End as a signal would have it."""
        self.should_exit = True


def serve(settings: Settings) -> None:
    """Serve until a signal comes.

    Raises:
        SaferError: a setting is missing, or the database is away or has another schema.
        Unavailable: also where something that acts beside the API ended unasked.
    """
    require_free(settings.host, settings.port)
    services = open_services(settings)
    check_version(services.engine)
    services.access.ensure_project("default")
    logs = JobLogs(services.engine, services.jobs, services.stores)
    housekeeping = Housekeeping(services.stores, services.engine, services.jobs, services.stopping)

    def now_and_then() -> None:
        logs.write_missing()
        housekeeping.look()

    dispatcher = Dispatcher(services.jobs, services.sender, settings, now_and_then)
    callbacks = Callbacks(CallbackStore(services.engine), services.outbound, settings)
    judge = GateJudge(services.gates, services.jobs, services.stores, settings)
    told = GateCallbacks(services.gates, services.outbound, settings)
    loops = (dispatcher, callbacks, judge, Deliveries(services.deliveries, CALLBACK, told), *_registry(services))
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn hands a signal on when it has stopped: by then it is old news
        signal.signal(number, lambda *_: services.stopping.set())
    server = Server(_config(settings, services), services.stopping)
    beside = Loops(loops, services.stopping, server.end)
    beside.start()
    try:
        server.run()
    finally:
        services.stopping.set()
        beside.join(_STOP_SECONDS)
        housekeeping.join(_STOP_SECONDS)
        services.close()
    if beside.fallen:
        raise Unavailable(f"{', '.join(beside.fallen)} ended unasked", "the log says why; start the service again")


def _registry(services: Services) -> tuple[RegistryAudits | TagWriter, ...]:
    """What acts on the webhooks of a model registry, where one is set."""
    hook = services.mlflow
    return (RegistryAudits(services, hook), TagWriter(hook.versions, hook.registry)) if hook is not None else ()


def main() -> int:
    """The process; its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of a container is not stopped by default
    try:
        settings = load_settings()
        configure_logging(settings)
        serve(settings)
    except SaferError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return 4 if isinstance(error, Unavailable) else 2
    return 0


def _config(settings: Settings, services: Services) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(settings, services),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )


if __name__ == "__main__":
    sys.exit(main())
