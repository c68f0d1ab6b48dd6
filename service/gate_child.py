"""Judges one gate in a process of its own, so that a large report takes neither the API's interpreter nor its memory.

Standard input: a line of JSON (`Task`), then the files it names, one after the other, in their full length. Standard output: a
line of JSON, either `verdict`, `reason` and `decision`, or `error` for input that cannot be judged.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from datetime import date
from typing import IO, Any

from safer_engine.errors import ArtifactError, SaferError
from safer_engine.gate.documents import Audit, read_audit
from safer_engine.gate.judge import judge
from safer_engine.gate.outputs import as_json, reason_of
from safer_engine.gate.policy import Policy


@dataclass(frozen=True)
class Blob:
    """A file that follows: its length and sha256."""

    size: int
    digest: str


@dataclass(frozen=True)
class Side:
    """The files of an audit. `name` it is called by in messages; `evaluation` is None where it has no such file."""

    name: str
    report: Blob
    evaluation: Blob | None


@dataclass(frozen=True)
class Task:
    """What to judge, by which policy, on which day (UTC). The files follow in the order audit, baseline; report, evaluation."""

    policy: dict[str, Any]
    today: str
    audit: Side
    baseline: Side | None


def main() -> int:
    """Judge what comes in; the exit code is 0 where something was said."""
    source = sys.stdin.buffer
    task = json.loads(source.readline())
    try:
        audit = _audit(source, task["audit"])
        baseline = _audit(source, task["baseline"]) if task["baseline"] else None
        decision = judge(Policy.model_validate(task["policy"]), audit, baseline, date.fromisoformat(task["today"]))
        said: dict[str, Any] = {
            "verdict": decision.verdict, "reason": reason_of(decision), "decision": as_json(decision)
        }  # fmt: skip
    except SaferError as error:
        said = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


def _audit(source: IO[bytes], side: dict[str, Any]) -> Audit:
    report, evaluation = (_file(source, side[part], side["name"]) for part in ("report", "evaluation"))
    assert report is not None
    return read_audit(report, evaluation, side["name"])


def _file(source: IO[bytes], blob: dict[str, Any] | None, name: str) -> bytes | None:
    if blob is None:
        return None
    content = source.read(blob["size"])
    if hashlib.sha256(content).hexdigest() != blob["digest"]:
        raise ArtifactError(f"a file of {name} is damaged: its content is not what was committed", "have the audit done again")
    return content


if __name__ == "__main__":
    sys.exit(main())
