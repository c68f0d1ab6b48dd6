"""The folder of a report: what an audit wrote there it may replace, what a person made or changed there it never loses.

`.safer-audit.json` in the folder holds the digests of the files as they were written. Before an audit computes anything, a file
under one of its names that is not in the record is refused. A file that was changed since it was written is moved aside to
`NAME.bak`, `NAME.bak2`, …, or stays where it is when it would be replaced by the very file it was made from.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from safer_engine.errors import SpecError
from safer_engine.labellers.rubric import is_text
from safer_engine.publishing import keep_aside, publishing, sync, withdraw, write_failed
from safer_engine.report.write import REPORT_FILES, SAE_FILES
from safer_engine.spec import AuditSpec, LocalSource
from safer_engine.store import digest_file

RECORD = ".safer-audit.json"
EDITS_FILE = "edits.jsonl"
OUT_FILES = (*REPORT_FILES, EDITS_FILE, *(f"sae/{name}" for name in SAE_FILES))
"""Every file that an audit may write, or remove because it is another audit's."""
_ELSEWHERE = "name another folder with --out, or move the file away"


class OutRecord(BaseModel):
    """What `.safer-audit.json` says: digests that each file may have, the newest last."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    record_version: Literal[1] = 1
    files: dict[str, tuple[str, ...]] = {}


def _silent(_message: str) -> None:
    """Where nobody is to be told."""


@dataclass(frozen=True)
class OutFolder:
    """A folder that audits write their files into, several processes at once if need be.

    Attributes:
        note: is told, in a sentence, where a file that a person changed went.
    """

    root: Path
    note: Callable[[str], None] = field(default=_silent, compare=False)

    def check(self, spec: AuditSpec) -> None:
        """See that nothing would be written over that an audit did not write itself.

        Raises:
            SpecError: an input of the audit lies where its files would, or a file there is not known.
        """
        if self.root.exists() and not self.root.is_dir():
            raise SpecError(f"--out {self.root} is a file", "name a folder")
        for section, path in _inputs(spec):
            self._check_input(section, path)
        known = self._record_or_refuse()
        for name in OUT_FILES:
            path = self.root / name
            if os.path.lexists(path) and (name not in known.files or path.is_dir()):
                raise SpecError(f"--out {self.root} holds {name}, which no audit wrote there", _ELSEWHERE)
        if os.path.lexists(self.root / "sae") and not (self.root / "sae").is_dir():
            raise SpecError(f"--out {self.root} holds a file named sae, where the folder of the SAE would be", _ELSEWHERE)

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Yields a temporary path; on a clean exit the file written there takes its place at once. Raises ResourceError."""
        final = self.root / name
        staged = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            yield staged
            sync(staged)
            with self._locked():
                self._place(name, staged)
        except OSError as error:
            raise write_failed(final, error) from error
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def copy(self, name: str, source: Path, digest: str) -> None:
        """Publish a copy of a file whose sha256 is `digest`, unless it is there already. Raises ResourceError."""
        record, path = self._record(), self.root / name
        with suppress(OSError):
            if record.files.get(name, ())[-1:] == (digest,) and path.is_file() and digest_file(path) == digest:
                return
        with self.publish(name) as temporary:
            shutil.copyfile(source, temporary)

    def withdraw(self, name: str) -> None:
        """Remove a file of an earlier audit, if it is there; one that a person changed is kept beside. Raises ResourceError."""
        path = self.root / name
        try:
            if not path.is_file():
                return
            with self._locked():
                files = dict(self._record().files)
                known = files.pop(name, None)
                if known is None:
                    return
                if digest_file(path) not in known:
                    self._keep(path)
                withdraw(path)
                self._write(OutRecord(files=files))
        except OSError as error:
            raise write_failed(path, error) from error

    def _place(self, name: str, staged: Path) -> None:
        """The record first: a file that it does not name would be refused if this process were killed in between."""
        final, fresh, record = self.root / name, digest_file(staged), self._record()
        known, standing = record.files.get(name, ()), None
        if os.path.lexists(final):
            standing = digest_file(final) if final.is_file() else ""
        if standing is not None and standing not in (*known, fresh):
            if known[-1:] == (fresh,):
                self.note(f"{final} was changed since it was written; it stays as it is")
                return
            self._keep(final)
            standing = None
        digests = [digest for digest in known if digest == standing and digest != fresh]
        self._write(OutRecord(files={**record.files, name: (*digests, fresh)}))
        os.replace(staged, final)
        sync(final.parent)

    def _keep(self, path: Path) -> None:
        kept = keep_aside(path)
        self.note(f"{path} is not as an audit wrote it; it is kept as {kept.name}")

    def _write(self, record: OutRecord) -> None:
        with publishing(self.root / RECORD) as temporary:
            temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def _record(self) -> OutRecord:
        """What is known of the folder; nothing, where the record cannot be read: files are then moved aside, not replaced."""
        try:
            return OutRecord.model_validate_json((self.root / RECORD).read_bytes())
        except (OSError, ValueError):
            return OutRecord()

    def _record_or_refuse(self) -> OutRecord:
        path = self.root / RECORD
        try:
            return OutRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return OutRecord()
        except NotADirectoryError:
            raise SpecError(
                f"--out {self.root} lies below a file and is no folder", "name a folder elsewhere with --out"
            ) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no record of an audit's files"
            raise SpecError(f"{path} cannot be read: {reason}", "name another folder with --out") from error

    def _check_input(self, section: str, path: Path) -> None:
        if section in ("dataset", "evaluation", "corpus") and path.is_dir():
            if path.resolve() in (self.root.resolve(), *self.root.resolve().parents):
                raise SpecError(f"--out {self.root} lies in the {section}'s folder {path}", "name a folder outside of it")
            return
        for name in OUT_FILES:
            target = self.root / name
            if path.is_file() and (target.absolute() == path.absolute() or target.resolve() == path.resolve()):
                raise SpecError(
                    f"--out {self.root} would write over the {section} {path}", "name another folder, such as one not there yet"
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes the record; where folders cannot be locked, none is."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _inputs(spec: AuditSpec) -> Iterator[tuple[str, Path]]:
    """What a spec names on this machine, each with the name of its part."""
    named: list[tuple[str, str | None]] = [("model", spec.model.path), ("adapter", spec.model.adapter)]
    sources = [("dataset", spec.dataset.source), ("evaluation", spec.evaluation.source if spec.evaluation else None)]
    sources.append(("corpus", spec.sae.pretrain.corpus if spec.sae.pretrain else None))
    named += [(section, source.path) for section, source in sources if isinstance(source, LocalSource)]
    named.append(("base", spec.retraining.base if spec.retraining else None))
    if not is_text(spec.labels.rubric):
        named.append(("rubric", spec.labels.rubric))
    for section, value in named:
        if value is not None and (path := Path(value).expanduser()).exists():
            yield section, path
