"""Getting a job's files: shown as bars on a terminal, as lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cli.inputs import showing_transfer
from cli.output import console
from safer_engine.errors import Interrupted
from safer_engine.out_folder import EDITS_FILE
from safer_engine.publishing import keep_aside
from safer_engine.store import digest_file
from service.client import target_of

if TYPE_CHECKING:
    from service.client import AuditClient
    from service.schemas import ArtifactView


Wanted = tuple["ArtifactView", Path]


def into(folder: Path, artifacts: Iterable[ArtifactView]) -> list[Wanted]:
    """Files of a job, each to go below a folder under its name. Raises ArtifactError for a name that would leave it."""
    return [(artifact, target_of(folder, artifact.name)) for artifact in artifacts]


def fetch(client: AuditClient, job_id: str, wanted: list[Wanted], shown: Console | None) -> list[Path]:
    """Download files; one that is there already is left.

    Raises:
        Interrupted: Ctrl-C; the same command goes on where it stopped.
    """
    try:
        for artifact, target in wanted:
            with showing_transfer(shown, artifact.name) as observer:
                if artifact.name == EDITS_FILE and target.is_file() and digest_file(target) != artifact.digest:
                    kept = keep_aside(target)  # decisions may have been written into it
                    console(err=True).print(f"{target} is not as the job made it; it is kept as {kept.name}", markup=False)
                client.download(job_id, artifact, target, observer)
    except KeyboardInterrupt:
        raise Interrupted("the download was stopped", "the same command goes on where it stopped") from None
    return [target for _, target in wanted]
