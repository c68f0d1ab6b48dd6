"""`safer-audit report`: a job's report."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import click

from cli.output import console
from cli.profile import connect


@click.command("report")
@click.argument("job_id", metavar="ID")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File (.html) or folder; default audits/ID.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead.")
def report_command(job_id: str, show: bool, out: Path | None, as_json: bool) -> None:
    """A job's report: saved as a page that needs nothing else, and its path printed."""
    from cli.transfers import fetch
    from safer_engine.publishing import require_writable

    with connect() as client:
        name = {"compare": "comparison", "drill": "drill"}.get(client.job(job_id).kind, "report")
        wanted = client.artifact(job_id, f"{name}.json" if as_json else f"{name}.html")
        target = _place(job_id, out, wanted.name)
        if as_json:
            click.echo(json.dumps(json.loads(client.read(job_id, wanted)), indent=2, ensure_ascii=False))
            return
        require_writable(target.parent, "--out")
        (path,) = fetch(client, job_id, [(wanted, target)], None)
    click.echo(str(path.resolve()))
    if show and not webbrowser.open(path.resolve().as_uri()):
        console(err=True).print("no browser could be started; open the file above", markup=False)


def _place(job_id: str, out: Path | None, name: str) -> Path:
    if out is not None and out.suffix in (".html", ".htm"):
        return out
    return (out or Path("audits") / job_id) / name
