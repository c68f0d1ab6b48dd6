"""The Celery application of a worker: every option, and why.

A parent takes one message at a time in one thread; the work itself happens in a child process (`supervisor`). Messages are
acknowledged late, so that one whose worker dies comes again; whether it means anything is decided in SQL.
"""

from __future__ import annotations

import os
import socket
import threading

from celery import Celery, signals
from kombu import Queue

from service.infra.settings import Settings
from service.jobs.queue import common_options
from workers.broker import keep_listening
from workers.listening import Ear, Watch, step_of
from workers.runner import Bench, Runner
from workers.tasks import register

VISIBILITY_SECONDS = 6 * 3600
"""Redis delivers a message again that was not acknowledged for so long. Sooner only costs a look in SQL."""


def make_app(settings: Settings) -> Celery:
    """The application, without its task."""
    app = Celery("safer", broker=settings.broker_url.get_secret_value(), set_as_current=False)
    app.conf.update(common_options())
    app.conf.update(
        task_queues=[Queue(name, routing_key=name) for name in settings.queues],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_acks_on_failure_or_timeout=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # for ever: a worker outlives its broker
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,  # nobody who can write to Redis commands a worker
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_proc_alive_timeout=60.0,
    )
    app.conf.broker_transport_options |= {
        "visibility_timeout": VISIBILITY_SECONDS,
        "socket_connect_timeout": 5.0,
        "health_check_interval": 25,
    }
    return app


def serve(bench: Bench, runner: Runner) -> int:
    """Take messages until SIGTERM or SIGINT; the unit at hand is given back first. Returns the exit code.

    Where no message is heard any more (`listening`), the process ends with exit code 75.
    """
    keep_listening()
    ear = Ear()
    app = make_app(bench.settings)
    app.steps["consumer"].add(step_of(ear))
    register(app, runner, ear)

    def stop(**_: object) -> None:
        runner.stop()

    signals.worker_shutting_down.connect(stop, weak=False)
    worker = app.Worker(
        hostname=f"worker-{os.getpid()}@{socket.gethostname()}",
        pool_cls="threads",
        concurrency=1,
        queues=list(bench.settings.queues),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    watch = Watch(bench.settings, bench.jobs, bench.sender, ear)
    threading.Thread(target=watch.run, name="listening", daemon=True).start()
    worker.start()
    return int(worker.exitcode or 0)
