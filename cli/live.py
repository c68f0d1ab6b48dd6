"""A job on the terminal as it goes on: a bar for each stage, or a line for each change where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from cli.output import duration, left
from safer_engine.errors import Interrupted, SaferError
from service.client import is_final, job_error, make_error
from service.errors import TooManyRequests, Unavailable, Unreachable

if TYPE_CHECKING:
    from service.client import AuditClient
    from service.schemas import EventView, JobView, StageView

T = TypeVar("T")
_POLL_SECONDS = 1.0
_LATER_POLL_SECONDS = 3.0
_EAGER_SECONDS = 60.0
_LONGEST_PAUSE = 60.0
_AWAY_SECONDS = 120.0
_LINE_SECONDS = 10.0


def wait_for(client: AuditClient, job_id: str, shown: Console | None) -> JobView:
    """Show a job until it ends. A service that is away for a while is waited for.

    Raises:
        Interrupted: Ctrl-C; the job goes on.
        Unreachable: the service stayed away for two minutes.
    """
    display = JobDisplay(shown)
    began, away_since = time.monotonic(), None
    try:
        with display.showing():
            while True:
                try:
                    job = in_turn(lambda: client.job(job_id))
                    display.update(job)
                    display.notes(in_turn(lambda: tuple(client.events(job_id, after=display.seen, follow=False))))
                    away_since = None
                    if is_final(job):
                        return display.end(job)
                except (Unreachable, Unavailable):
                    away_since = away_since or time.monotonic()
                    if time.monotonic() - away_since > _AWAY_SECONDS:
                        raise
                    display.say("the service cannot be reached; trying again")
                time.sleep(_POLL_SECONDS if time.monotonic() - began < _EAGER_SECONDS else _LATER_POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(f"no longer watching; job {job_id} goes on", f"come back with: safer-audit watch {job_id}") from None


def in_turn(ask: Callable[[], T]) -> T:
    """The answer to a call, however long others with the same key use up its rate."""
    while True:
        try:
            return ask()
        except TooManyRequests as error:
            time.sleep(min(error.retry_after, _LONGEST_PAUSE))


def outcome_error(job: JobView) -> SaferError | None:
    """The error that stands for how a job ended; None for a success or a job that has not ended."""
    if job.state == "cancelled":
        return make_error("cancelled", f"job {job.id} was cancelled", f"let it go on with: safer-audit retry {job.id}")
    if job.state != "failed":
        return None
    cause = job_error(job)
    if cause is None:
        return make_error("failed", f"job {job.id} failed", f"see: safer-audit logs {job.id}")
    cause.message = f"job {job.id} failed: {cause.message}"
    return cause


class JobDisplay:
    """Shows what changed since the last look. `shown`: None shows nothing. `seen`: id of the last event."""

    def __init__(self, shown: Console | None) -> None:
        self._shown = shown
        self._bars = shown is not None and shown.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            console=shown,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}
        self._last_line = 0.0
        self._said = ""
        self.seen = 0

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show during the block."""
        if not self._bars:
            yield
            return
        with self._progress:
            yield

    def say(self, line: str) -> None:
        """A line, unless it was the last one."""
        if self._shown is not None and line != self._said:
            self._said = line
            self._shown.print(line, markup=False, style="yellow" if self._bars else None)

    def notes(self, events: Iterable[EventView]) -> None:
        """Show what workers noted; of other events only remember that they were seen."""
        for event in events:
            self.seen = event.id
            if event.kind == "note" and self._shown is not None:
                self._shown.print(f"[{event.stage}] {event.data.get('message', '')}", markup=False, style="yellow")

    def update(self, job: JobView) -> None:
        """Show a job as it stands."""
        if self._shown is None:
            return
        self._wait(job)
        for stage in job.stages:
            if stage.state == "pending":
                continue
            if self._bars:
                self._move(stage, job)
            else:
                self._print(stage, job)

    def end(self, job: JobView) -> JobView:
        """Say how a job ended; gives it back."""
        self.say(f"job {job.id}: {job.state.value}")
        return job

    def _wait(self, job: JobView) -> None:
        """The line of a job that waits for its turn, for a worker, or for its end after a request to stop."""
        waiting = waiting_line(job)
        if not self._bars:
            if waiting:
                self.say(waiting)
        elif waiting:
            task = self._tasks.get("")
            if task is None:
                self._tasks[""] = self._progress.add_task("waiting", total=None, said=waiting)
            else:
                self._progress.update(task, said=waiting)
        elif "" in self._tasks:
            self._progress.remove_task(self._tasks.pop(""))

    def _move(self, stage: StageView, job: JobView) -> None:
        if stage.name not in self._tasks:
            self._tasks[stage.name] = self._progress.add_task(stage.name, total=None, said="")
        total, done = (stage.total or None, stage.done) if stage.state == "open" else (1.0, float(stage.state == "done"))
        self._progress.update(self._tasks[stage.name], total=total, completed=done, said=stage_line(stage, job))

    def _print(self, stage: StageView, job: JobView) -> None:
        assert self._shown is not None
        line = f"{stage.name}: {stage_line(stage, job)}"
        mark = stage.state if stage.state != "open" else "open" if stage.total else "started"
        fresh = self._told.get(stage.name) != mark
        moved = stage.state == "open" and stage.total and time.monotonic() - self._last_line > _LINE_SECONDS
        if fresh or moved:
            self._told[stage.name] = mark
            self._last_line = time.monotonic()
            self._shown.print(line, markup=False)


def waiting_line(job: JobView) -> str:
    """Why nothing of a job runs now; empty while something does, or when it has ended."""
    if is_final(job):
        return ""
    if job.cancel_requested:
        return "stopping"
    if job.queue_position is not None:
        return (
            f"waiting for a worker, place {job.queue_position} in the queue" if job.queue_position > 1 else "waiting for a worker"
        )
    return ""


def stage_line(stage: StageView, job: JobView) -> str:
    """How a stage stands, in a few words."""
    if stage.state == "done":
        said = {"cached": "cached", "absent": "not computed"}.get(stage.outcome or "")
        return said or duration(stage.seconds)
    if stage.state != "open":
        return stage.state.value
    if not stage.total:
        said = "running" if stage.started else "waiting"
    else:
        said = f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}"
    known = job.stage == stage.name and job.eta_seconds is not None and stage.started is not None
    return f"{said}; job: {left(job.eta_seconds)}" if known and job.eta_seconds is not None else said
