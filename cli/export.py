"""`safer-audit export`: an audit in the form that others read."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("audit", type=click.Path(path_type=Path), metavar="AUDIT")
@click.option("--to", "target", type=click.Choice(["evidence"]), required=True, help="The form to write.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path(), help="Folder to write to; default: this one.")
def export_command(audit: Path, target: str, out: Path) -> None:
    """Write evidence.json and evidence.md of AUDIT, a finished audit's folder or report.json, and print their paths.

    A job's files are fetched with `safer-audit download` first.
    """
    from safer_engine.publishing import publishing, require_writable
    from safer_engine.report.evidence import evidence, evidence_markdown

    assert target == "evidence"
    document = evidence(audit, "AUDIT")
    require_writable(out, "--out")
    texts = {"evidence.json": document.model_dump_json(indent=2) + "\n", "evidence.md": evidence_markdown(document)}
    for name, text in texts.items():
        path = out / name
        with publishing(path) as staging:
            staging.write_text(text, encoding="utf-8")
        click.echo(str(path.resolve()))
