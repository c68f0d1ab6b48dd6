"""`safer-audit cancel`: ask a job to stop."""

from __future__ import annotations

import click

from cli.options import json_option
from cli.output import print_json
from cli.profile import connect


@click.command("cancel")
@click.argument("job_id", metavar="ID")
@json_option
def cancel_command(job_id: str, as_json: bool) -> None:
    """Ask a job to stop. What it has finished is kept; `retry` lets it go on from there."""
    with connect() as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    elif job.state == "cancelled":
        click.echo(f"job {job.id}: cancelled")
    else:
        click.echo(f"job {job.id}: stopping")
