"""`safer-audit up`: the whole service on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from cli.programs import ENGINE, become, require


@click.command("up")
@click.option("--home", type=click.Path(path_type=Path, file_okay=False), help="Folder; default ~/.local/share/safer-audit.")
@click.option("--port", type=click.IntRange(0, 65535), help="Of the pages and the API; 0 takes a free one. Default 8321.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Worker processes.")
@click.option("--no-worker", is_flag=True, help="As --workers 0. Workers of your own need SAFER_BROKER_URL to be set.")
@click.option("--json", "as_json", is_flag=True, help="Print address and key as one line of JSON.")
def up_command(home: Path | None, port: int | None, workers: int, no_worker: bool, as_json: bool) -> None:
    """Run the whole service on this machine, for yourself: pages, API, a worker, a database and a queue. Ctrl-C stops it.

    Nothing is to be set up. Commands on this machine find the service by themselves; unfinished jobs go on at the next `up`.
    """
    arguments = ["--workers", "0" if no_worker else str(workers)]
    arguments += ["--home", str(home)] if home else []
    arguments += ["--port", str(port)] if port is not None else []
    if workers and not no_worker:
        require(ENGINE)
    become("service.up", [*arguments, *(["--json"] if as_json else [])])
