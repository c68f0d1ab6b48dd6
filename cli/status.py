"""`safer-audit status`: how a job stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.options import json_option
from cli.output import console, duration, left, print_json, table
from cli.profile import connect

if TYPE_CHECKING:
    from service.schemas import JobSummary, JobView


@click.command("status")
@click.argument("job_id", metavar="ID")
@json_option
def status_command(job_id: str, as_json: bool) -> None:
    """How a job stands: its stages, its place in the queue, and why it failed if it did."""
    with connect() as client:
        job = client.job(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        show_job(job)


def show_job(job: JobView) -> None:
    """Print a job."""
    from cli.live import stage_line, waiting_line

    shown = console()
    shown.print(table(f"Job {job.id}", ("", ""), [(name, value) for name, value in _facts(job) if value]))
    rows = [(stage.name, stage.queue, "" if stage.state == "pending" else stage_line(stage, job)) for stage in job.stages]
    shown.print(table("Stages", ("stage", "queue", "state"), rows))
    if waiting := waiting_line(job):
        shown.print(waiting, markup=False)
    if job.error is not None:
        shown.print(f"error [{job.error.code}]: {job.error.message}", markup=False)
        if job.error.hint:
            shown.print(f"  hint: {job.error.hint}", markup=False)


def _facts(job: JobView) -> list[tuple[str, str]]:
    asked = " (asked to stop)" if job.cancel_requested and job.finished is None else ""
    took = (job.finished - job.started).total_seconds() if job.finished and job.started else None
    budget = "" if job.gpu_seconds_budget is None else f" of {duration(job.gpu_seconds_budget)}"
    return [
        ("kind", job.kind.value),
        ("state", job.state.value + asked),
        ("left", left(job.eta_seconds) if job.eta_seconds is not None else ""),
        ("model", called(job, job.model)),
        ("dataset", called(job, job.dataset)),
        ("labels", ", ".join(f"{name}={value}" for name, value in sorted(job.labels.items()))),
        ("priority", str(job.priority) if job.priority else ""),
        ("made", job.created.strftime("%Y-%m-%d %H:%M:%S UTC")),
        ("took", duration(took) if took is not None else ""),
        ("time on the GPU queue", duration(job.gpu_seconds) + budget if job.gpu_seconds or budget else ""),
        ("attempt", str(job.attempt) if job.attempt > 1 else ""),
        ("verdict", f"{job.verdict['outcome']} ({job.verdict_reason})" if job.verdict else ""),
    ]


def called(job: JobSummary, name: str, *, digest: bool = True) -> str:
    """What people call a model or dataset of a job: of an upload the file or folder, and the beginning of its digest."""
    from service.client import UPLOAD

    if not name.startswith(UPLOAD):
        return name
    short = f"{name[: len(UPLOAD) + 10]}…"
    told = job.names.get(name)
    return short if told is None else f"{told} ({short})" if digest else told
