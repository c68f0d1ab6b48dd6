"""`safer-audit logs`: what happened to a job."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from cli.options import json_option
from cli.profile import connect
from safer_engine.errors import Interrupted

if TYPE_CHECKING:
    from service.schemas import EventView


@click.command("logs")
@click.argument("job_id", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends.")
@json_option
def logs_command(job_id: str, follow: bool, as_json: bool) -> None:
    """What happened to a job, a line each: its stages, notes and errors. The workers' own log is the file `job.log`."""
    with connect() as client, closing(client.events(job_id, follow=follow)) as events:
        try:
            for event in events:
                click.echo(json.dumps(event.model_dump(mode="json"), ensure_ascii=False) if as_json else event_line(event))
        except KeyboardInterrupt:
            raise Interrupted(f"no longer following; job {job_id} goes on") from None


def event_line(event: EventView) -> str:
    """An event on one line."""
    said = " ".join(f"{name}={_short(value)}" for name, value in event.data.items() if value not in (None, "", {}, []))
    stage = f" [{event.stage}]" if event.stage else ""
    return f"{event.at.strftime('%Y-%m-%d %H:%M:%S')}{stage} {event.kind} {said}".rstrip()


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
