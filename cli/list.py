"""`safer-audit list`: jobs, newest first."""

from __future__ import annotations

import click

from cli.options import json_option
from cli.output import console, print_json, table
from cli.profile import connect

_STATES = ("queued", "running", "succeeded", "failed", "cancelled")


@click.command("list")
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), help="Only jobs in this state; may be repeated.")
@click.option("--kind", type=click.Choice(["audit", "train-rm"]), help="Only jobs of this kind.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only jobs with this label; may be repeated.")
@click.option("--limit", "-n", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@json_option
def list_command(states: tuple[str, ...], kind: str | None, labels: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Jobs of the project, newest first."""
    from cli.submit import parse_labels

    with connect() as client:
        jobs = list(client.jobs(states=states, kind=kind, labels=parse_labels(labels), limit=limit))
    if as_json:
        print_json({"items": [job.model_dump(mode="json") for job in jobs]})
        return
    rows = [
        (
            job.id,
            job.kind.value,
            job.state.value if not job.error else f"{job.state.value} ({job.error.code})",
            job.created.strftime("%Y-%m-%d %H:%M"),
            " ".join(f"{name}={value}" for name, value in sorted(job.labels.items())),
        )
        for job in jobs
    ]
    console().print(
        table(f"{len(rows)} jobs" if len(rows) != 1 else "1 job", ("id", "kind", "state", "made (UTC)", "labels"), rows)
    )
