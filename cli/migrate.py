"""`safer-audit migrate`: bring the service's database up to date."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import json_option
from cli.output import print_json
from cli.programs import ask

home_option = click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Folder of a service that `up` runs; SAFER_HOME."
)


@click.command("migrate")
@home_option
@json_option
def migrate_command(home: Path | None, as_json: bool) -> None:
    """Bring the database of SAFER_DATABASE_URL (default: SQLite in SAFER_HOME) up to date. Back it up first."""
    answer = ask(["migrate"], home)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['database']}: up to date")
