"""Judging gates whose audit has ended. Every process of the API does this; the database decides who judges which, and once.

A process that is killed at any instant leaves a gate that is due again later. What an audit cannot be judged for is decided
`inconclusive`, with an error that says why; what may pass (store or database away) is tried until it does.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from safer_engine.errors import ArtifactError, SaferError
from safer_engine.gate.documents import EVALUATION, REPORT
from safer_engine.store import FileEntry
from service.errors import NotFound, TooLarge, Unavailable
from service.gate_child import Blob, Side, Task
from service.infra.settings import Settings
from service.infra.stores import ServiceStore, Stores
from service.jobs.gate_model import Outcome, TakenGate
from service.jobs.gates import GateStore
from service.jobs.model import JobError, JobRecord, JobState
from service.jobs.store import JobStore
from service.tether import command_line

MAX_ATTEMPTS = 3
CHILD_SECONDS = 120.0
_POLL_SECONDS, _AGAIN_SECONDS, _LOOK_SECONDS = 2.0, 15.0, 0.2
_STAGE = "report"
_CHILD = (sys.executable, "-m", "service.gate_child")
_LOG = logging.getLogger(__name__)


class JudgeDied(Exception):
    """The judging process ended without a word, or took too long."""


class Stopping(Exception):
    """This process is asked to end."""


@dataclass(frozen=True)
class _File:
    """A file of a finished audit in the store."""

    key: str
    name: str
    entry: FileEntry

    @property
    def blob(self) -> Blob:
        return Blob(self.entry.size, self.entry.digest)


@dataclass(frozen=True)
class _Audit:
    """The files of a finished audit; evaluation is None where it has none."""

    name: str
    report: _File
    evaluation: _File | None

    @property
    def side(self) -> Side:
        return Side(self.name, self.report.blob, self.evaluation.blob if self.evaluation else None)

    @property
    def files(self) -> list[_File]:
        return [self.report, *([self.evaluation] if self.evaluation else [])]


class GateJudge:
    """Judges the gates that are due, one at a time.

    Args:
        child: the command of the judging process.
    """

    def __init__(
        self, gates: GateStore, jobs: JobStore, stores: Stores, settings: Settings, child: tuple[str, ...] = _CHILD
    ) -> None:  # fmt: skip
        self._gates = gates
        self._jobs = jobs
        self._stores = stores
        self._settings = settings
        self._child = child

    def run(self, stop: threading.Event) -> None:
        """Judge until told to stop; what is under way then is put back."""
        while not stop.is_set():
            try:
                found = self.step(stop)
            except Unavailable as error:
                _LOG.warning("gates wait: %s", error.message)
                found = False
            if not found:
                stop.wait(_POLL_SECONDS)

    def step(self, stop: threading.Event | None = None) -> bool:
        """Judge one gate, if one is due; whether there was one. Raises Unavailable: the database is away."""
        taken = self._gates.take()
        if taken is None:
            return False
        told = {"gate_id": taken.gate.id, "audit_id": taken.job.id}
        try:
            outcome = self._outcome(taken, stop or threading.Event())
        except Stopping:
            self._gates.put_back(taken, 0.0)
            return True
        except Unavailable as error:
            _LOG.warning("a gate cannot be judged now: %s", error.message, extra=told)
            self._gates.put_back(taken, _AGAIN_SECONDS)
            return True
        except (JudgeDied, OSError) as error:
            _LOG.warning("a gate was not judged: %s", error, extra=told)
            self._gates.put_back(taken, _AGAIN_SECONDS, counts=True)
            return True
        if self._gates.decide(taken, outcome):
            _LOG.info("a gate is decided: %s", outcome.verdict, extra=told)
        return True

    def _outcome(self, taken: TakenGate, stop: threading.Event) -> Outcome:
        """What the gate comes to. Raises Unavailable, OSError, JudgeDied, Stopping."""
        if taken.attempts > MAX_ATTEMPTS:
            return _unjudged("judging_failed", f"judging it failed {MAX_ATTEMPTS} times", "ask the operator what the log says")
        try:
            job = self._present(taken, taken.job.id, "audit")
            if job.state is not JobState.SUCCEEDED:
                return _not_succeeded(job)
            audit = self._audit(job, "the audit")
            baseline = None
            if taken.gate.baseline is not None:
                baseline = self._audit(self._present(taken, taken.gate.baseline_job_id, "baseline"), "the baseline")
            return self._judged(taken, audit, baseline, stop)
        except (Unavailable, Stopping):
            raise
        except SaferError as error:
            return _unjudged(error.code, error.message, error.hint)

    def _present(self, taken: TakenGate, job_id: str | None, what: str) -> JobRecord:
        """A job of the gate's project. Raises NotFound where it was deleted since the gate was made."""
        try:
            return self._jobs.get(taken.gate.project, job_id or "")
        except NotFound:
            raise NotFound(f"the {what} was deleted before the gate was judged", "post another gate") from None

    def _audit(self, job: JobRecord, what: str) -> _Audit:
        """Its files. Raises ArtifactError where they are gone, TooLarge over the limit."""
        key = next((stage.key for stage in self._jobs.stages(job.id) if stage.name == _STAGE and stage.key), None)
        if key is None:
            raise ArtifactError(f"{what} {job.id} has no report", "post a gate on an audit that has one")
        files = self._store(job).manifest(_STAGE, key).files
        if REPORT not in files:
            raise ArtifactError(f"{what} {job.id} has no {REPORT}", "post a gate on an audit that has one")
        found = {name: _File(key, name, files[name]) for name in (REPORT, EVALUATION) if name in files}
        limit = self._settings.gate_file_bytes
        for file in found.values():
            if file.entry.size > limit:
                raise TooLarge(
                    f"{file.name} of {what} has {file.entry.size} bytes, more than {limit}",
                    f"judge it with `safer-audit gate --audit {job.id}`, or ask the operator for a larger SAFER_GATE_FILE_BYTES",
                )
        return _Audit(f"job {job.id}", found[REPORT], found.get(EVALUATION))

    def _store(self, job: JobRecord) -> ServiceStore:
        return self._stores.project(job.project)

    def _judged(self, taken: TakenGate, audit: _Audit, baseline: _Audit | None, stop: threading.Event) -> Outcome:
        task = Task(taken.policy, taken.at.date().isoformat(), audit.side, baseline.side if baseline else None)
        files = [*audit.files, *(baseline.files if baseline else [])]
        said = self._ask(task, self._contents(self._stores.project(taken.gate.project), files), stop)
        if "error" in said:
            return _unjudged(**said["error"])
        return Outcome(said["verdict"], said["reason"], said["decision"])

    def _contents(self, store: ServiceStore, files: list[_File]) -> Iterator[bytes]:
        for file in files:
            yield from store.open_range(_STAGE, file.key, file.name)

    def _ask(self, task: Task, contents: Iterator[bytes], stop: threading.Event) -> dict[str, Any]:
        """Have a process judge; what it says. Raises JudgeDied, Stopping, and what reading from the store raises."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(command_line(self._child), stdin=pipe, stdout=pipe, stderr=pipe)  # noqa: S603 - our own program
        killer = threading.Timer(CHILD_SECONDS, process.kill)
        killer.start()
        try:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
                for chunk in contents:
                    process.stdin.write(chunk)
            except BrokenPipeError:  # it has seen enough, or has died: what it said tells
                pass
            return _said(process, *_answer(process, stop))
        finally:
            killer.cancel()
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    _close(stream)


def _answer(process: subprocess.Popen[bytes], stop: threading.Event) -> tuple[bytes, bytes]:
    """Its output in full. Raises Stopping."""
    while True:
        try:
            return process.communicate(timeout=_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                raise Stopping from None


def _close(stream: Any) -> None:
    with suppress(BrokenPipeError):
        stream.close()


def _said(process: subprocess.Popen[bytes], output: bytes, errors: bytes) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(output)
    except ValueError:
        # Of an exception only its kind: its text may quote what was read.
        kind = errors.decode("utf-8", "replace").strip().rpartition("\n")[2].partition(":")[0][:100]
        raise JudgeDied(f"the judging process ended with code {process.returncode}: {kind}") from None
    return said


def _not_succeeded(job: JobRecord) -> Outcome:
    said = f"the audit failed ({job.error.code})" if job.error else f"the audit was {job.state}"
    return _unjudged(f"audit_{job.state}", said, "see the audit; when it has been tried again, post another gate")


def _unjudged(code: str, message: str, hint: str) -> Outcome:
    """Nothing is known of the model, so it has not passed."""
    return Outcome("inconclusive", message, None, JobError(code, message, hint))
