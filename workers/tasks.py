"""The one Celery task: look at a unit."""

from __future__ import annotations

from celery import Celery, Task
from celery.exceptions import Reject

from service.jobs.queue import TASK
from workers.listening import Ear
from workers.runner import Runner


def register(app: Celery, runner: Runner, ear: Ear) -> None:
    """Let an application do units with a runner."""

    @app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
    def unit(_task: Task, unit_id: int) -> str:
        """Do a unit, if it is still to be done; what became of it is in SQL, and returned for the log only."""
        with ear.message() as open_:
            if runner.stopping or not open_:
                raise Reject("this worker stops", requeue=True)
            return str(runner.take(int(unit_id)))
