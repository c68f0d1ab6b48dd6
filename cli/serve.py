"""`safer-audit serve`: the API and the dispatcher."""

from __future__ import annotations

import click

from cli.programs import become


@click.command("serve")
@click.option("--host", help="Address to listen on; SAFER_HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; SAFER_PORT.")
def serve_command(host: str | None, port: int | None) -> None:
    """Run the API and the dispatcher, as in production. Settings are environment variables: docs/settings.md."""
    given = {"SAFER_HOST": host, "SAFER_PORT": None if port is None else str(port)}
    become("service", [], {name: value for name, value in given.items() if value is not None})
