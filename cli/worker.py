"""`safer-audit worker`: one worker."""

from __future__ import annotations

import click

from cli.programs import become


@click.command("worker")
@click.option("--once", is_flag=True, help="Do one stage or part of one and exit, for Kubernetes Jobs and batch systems.")
@click.option("--wait", type=float, metavar="SECONDS", help="With --once: wait so long for one; exit code 75 where none came.")
@click.option("--queues", help="cpu, gpu or both, comma-separated; SAFER_QUEUES.")
@click.option("--device", help="auto, cpu, cuda or cuda:N; SAFER_DEVICE.")
def worker_command(once: bool, wait: float | None, queues: str | None, device: str | None) -> None:
    """Run a worker, as in production. Settings are environment variables: docs/settings.md."""
    given = {"SAFER_QUEUES": queues, "SAFER_DEVICE": device}
    arguments = [*(["--once"] if once else []), *([] if wait is None else [f"--wait={wait}"])]
    become("workers", arguments, {name: value for name, value in given.items() if value is not None})
