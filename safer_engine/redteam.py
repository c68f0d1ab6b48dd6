"""Whether red-team functions are switched on, and the log of their uses."""

from __future__ import annotations

import getpass
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import SpecError
from safer_engine.publishing import require_writable, write_failed
from safer_engine.store import canonical_json, digest_bytes

if TYPE_CHECKING:
    from safer_engine.spec import AuditSpec
    from safer_engine.train_spec import TrainSpec

ENABLE = "SAFER_ENABLE_REDTEAM"
LOG = "redteam-log.jsonl"


def require_enabled() -> None:
    """Refuse where the operator has not switched red-team functions on. Raises SpecError."""
    if os.environ.get(ENABLE) != "1":
        raise SpecError(
            "the drill poisons data, so it is off unless the operator of this machine switches it on",
            f"set {ENABLE}=1 in the environment, and read docs/drill.md first",
        )


def log_use(folder: Path, action: str, digest: str, who: str | None = None, **more: str | int) -> None:
    """Append one use to the log of a folder: a line of JSON, on the disk before this returns.

    Args:
        action: such as `drill.start`. digest: of what is used.
        who: None: the user of this process.

    Raises:
        SpecError, ResourceError: it cannot be written; then nothing may be done.
    """
    require_writable(folder, "the folder of the red-team log")
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "who": who or _user(), "action": action, "digest": digest}
    path = folder / LOG
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, (json.dumps({**line, **more}) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise write_failed(path, error) from error


def log_forced(folder: Path, command: str, spec: AuditSpec | TrainSpec) -> None:
    """Log that a command is told to read marked data (`allow_poisoned`); nothing is written where it is not.

    Args:
        folder: as of `log_use`.
        spec: what is to be done; its digest is logged, and which sections allow marked data.

    Raises:
        SpecError, ResourceError: it cannot be logged; then nothing may be read.
    """
    sections = {"dataset": spec.dataset, "evaluation": spec.evaluation}
    if forced := [name for name, data in sections.items() if data is not None and data.allow_poisoned]:
        digest = digest_bytes(canonical_json(spec.model_dump(mode="json")))
        log_use(folder, "force", digest, command=command, sections=",".join(forced))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return f"uid {os.getuid()}"
