"""Getting a job's files: shown as bars on a terminal, as lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cli.inputs import showing_transfer
from safer_engine.errors import Interrupted
from service.client import target_of

if TYPE_CHECKING:
    from service.client import AuditClient
    from service.schemas import ArtifactView


def fetch(client: AuditClient, job_id: str, wanted: list[ArtifactView], folder: Path, shown: Console | None) -> list[Path]:
    """Download files into a folder, each under its name; one that is there already is left.

    Raises:
        Interrupted: Ctrl-C; the same command goes on where it stopped.
    """
    targets = [target_of(folder, artifact.name) for artifact in wanted]
    try:
        for artifact, target in zip(wanted, targets, strict=True):
            with showing_transfer(shown, artifact.name) as observer:
                observer.begin("receiving", artifact.size)
                client.download(job_id, artifact, target, observer)
    except KeyboardInterrupt:
        raise Interrupted("the download was stopped", "the same command goes on where it stopped") from None
    return targets
