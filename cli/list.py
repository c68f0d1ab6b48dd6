"""`safer-audit list`: jobs, newest first."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from cli.options import json_option
from cli.output import console, print_json, table
from cli.profile import connect

_STATES = ("queued", "running", "succeeded", "failed", "cancelled")


@click.command("list")
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), help="Only jobs in this state; may be repeated.")
@click.option("--kind", type=click.Choice(["audit", "verify", "train-rm", "compare", "drill"]), help="Only jobs of this kind.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only jobs with this label; may be repeated.")
@click.option("--stage", metavar="NAME", help="Only jobs of which this step is open.")
@click.option("--since", type=click.DateTime(), metavar="DATE", help="Only jobs made from then on (UTC).")
@click.option("--before", type=click.DateTime(), metavar="DATE", help="Only jobs made before (UTC).")
@click.option("--limit", "-n", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@json_option
def list_command(limit: int, as_json: bool, since: datetime | None, before: datetime | None, **given: Any) -> None:
    """Jobs of the project, newest first."""
    from cli.status import called
    from cli.submit import parse_labels
    from service.client import JobFilter

    times = [None if time is None else time.replace(tzinfo=UTC) for time in (since, before)]
    wanted = JobFilter(given["states"], given["kind"], parse_labels(given["labels"]), given["stage"], *times)
    with connect() as client:
        jobs = list(client.jobs(wanted, limit))
    if as_json:
        print_json({"items": [job.model_dump(mode="json") for job in jobs]})
        return
    rows = [
        (
            job.id,
            job.state.value if not job.error else f"{job.state.value} ({job.error.code})",
            f"{job.kind.value}: {called(job, job.model, digest=False)} on {called(job, job.dataset, digest=False)}",
            job.created.strftime("%Y-%m-%d %H:%M"),
            " ".join(f"{name}={value}" for name, value in sorted(job.labels.items())),
            job.verdict["outcome"] if job.verdict else "",
        )
        for job in jobs
    ]
    console().print(
        table(
            f"{len(rows)} jobs" if len(rows) != 1 else "1 job", ("id", "state", "what", "made (UTC)", "labels", "verdict"), rows
        )
    )
