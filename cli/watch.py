"""`safer-audit watch`: a job's stages as they run."""

from __future__ import annotations

import json
from contextlib import closing

import click

from cli.output import console
from cli.profile import connect


@click.command("watch")
@click.argument("job_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: the job's events as they happen, then the job.")
def watch_command(job_id: str, as_json: bool) -> None:
    """A job's stages as they run, until it ends. Ctrl-C leaves it running.

    The exit code is the job's: 0 succeeded, 2 refused input, 4 failed or cancelled.
    """
    from cli.live import outcome_error, wait_for
    from safer_engine.errors import Interrupted

    with connect() as client:
        if as_json:
            try:
                with closing(client.events(job_id)) as events:
                    for event in events:
                        click.echo(json.dumps(event.model_dump(mode="json"), ensure_ascii=False))
            except KeyboardInterrupt:
                raise Interrupted(f"no longer watching; job {job_id} goes on") from None
            job = client.job(job_id)
            click.echo(json.dumps(job.model_dump(mode="json"), ensure_ascii=False))
        else:
            job = wait_for(client, job_id, console(err=True))
    if (error := outcome_error(job)) is not None:
        raise error
