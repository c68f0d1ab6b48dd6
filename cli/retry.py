"""`safer-audit retry`: let a failed or cancelled job go on."""

from __future__ import annotations

import click

from cli.options import json_option
from cli.output import print_json
from cli.profile import connect


@click.command("retry")
@click.argument("job_id", metavar="ID")
@json_option
def retry_command(job_id: str, as_json: bool) -> None:
    """Let a failed or cancelled job go on. What it had finished is not computed again."""
    with connect() as client:
        job = client.retry(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo(f"job {job.id}: {job.state.value}, attempt {job.attempt}")
        click.echo(f"watch it: safer-audit watch {job.id}", err=True)
