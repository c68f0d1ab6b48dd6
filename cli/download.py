"""`safer-audit download`: the files that a job made."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import json_option, quiet_option
from cli.output import console, print_json, size, table
from cli.profile import connect

if TYPE_CHECKING:
    from service.schemas import ArtifactView

_INNER = "stages/"


@click.command("download")
@click.argument("job_id", metavar="ID")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--out", "-o", type=click.Path(path_type=Path, file_okay=False), help="Folder; default audits/ID.")
@click.option("--list", "only_list", is_flag=True, help="Only say what there is.")
@json_option
@quiet_option
def download_command(job_id: str, names: tuple[str, ...], out: Path | None, only_list: bool, as_json: bool, quiet: bool) -> None:
    """The files that a job made: those named (`sae/*` works), else all but the stages' own (`stages/…`).

    Digests are checked. An interrupted download goes on when the command is given again.
    """
    from cli.transfers import fetch, into
    from safer_engine.publishing import require_writable
    from service.errors import NotFound

    with connect() as client:
        there = client.artifacts(job_id)
        wanted = chosen(there, names)
        if not wanted and not only_list:
            raise NotFound(f"job {job_id} has no such file yet", "see what there is: safer-audit download ID --list '*'")
        if only_list:
            _show(wanted, as_json)
            return
        folder = out or Path("audits") / job_id
        require_writable(folder, "--out")
        paths = fetch(client, job_id, into(folder, wanted), None if quiet or as_json else console(err=True))
    if as_json:
        print_json({"files": [str(path.resolve()) for path in paths]})
    else:
        click.echo(str(folder.resolve()))


def chosen(there: list[ArtifactView], names: tuple[str, ...]) -> list[ArtifactView]:
    """The files that the names choose. Raises NotFound for a name that chooses none."""
    from service.errors import NotFound

    if not names:
        return [artifact for artifact in there if not artifact.name.startswith(_INNER)]
    for name in names:
        if not any(fnmatchcase(artifact.name, name) for artifact in there):
            known = ", ".join(artifact.name for artifact in there if not artifact.name.startswith(_INNER))
            raise NotFound(f"there is no file {name}", f"there are: {known or 'none yet'}")
    return [artifact for artifact in there if any(fnmatchcase(artifact.name, name) for name in names)]


def _show(found: list[ArtifactView], as_json: bool) -> None:
    if as_json:
        print_json({"items": [artifact.model_dump(mode="json") for artifact in found]})
        return
    rows = [(artifact.name, size(artifact.size), artifact.digest[:12]) for artifact in found]
    console().print(table("Files", ("name", ">size", "digest"), rows))
