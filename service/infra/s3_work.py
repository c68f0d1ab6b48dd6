"""A work area that lives in a bucket and is mirrored on this machine.

What is published is in the bucket before it counts, so another machine goes on from it. A payload file is a blob (it will be
part of the artifact) and a small pointer in the area; state that is never committed lies in the area itself. On opening,
that state is fetched; payload files are fetched when they are first asked for.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safer_engine.errors import ArtifactError
from safer_engine.publishing import sync, write_failed
from safer_engine.store import PART_SCRATCH, FileEntry, canonical_json, digest_file
from service.infra.object_space import ObjectMissing
from service.infra.s3_blobs import DamagedBlob, S3Blobs

_TURNS = 3


@dataclass(frozen=True)
class _Local:
    """The area's folders on this machine. `tags`: entity tag of each scratch file that is the same in the bucket."""

    root: Path

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def tags(self) -> Path:
        return self.root / "tags"


class S3Work:
    """See `WorkArea`. Nothing but the SQL lease of the stage's key keeps two machines apart: see `S3ArtifactStore`."""

    def __init__(self, blobs: S3Blobs, prefix: str, root: Path, shared: bool = False) -> None:
        """Open the area.

        Args:
            prefix: of its objects, ending with `/`.
            root: its folder on this machine.
            shared: held together with others: what they made for themselves is not fetched.
        """
        self._client = blobs.client
        self._blobs = blobs
        self._prefix = prefix
        self._local = _Local(root)
        self._entries: dict[str, FileEntry] = {}
        self._lock = threading.Lock()
        for folder in (self._local.scratch, self._local.tags):
            folder.mkdir(parents=True, exist_ok=True)
        self._mirror(shared)

    @property
    def scratch(self) -> Path:
        """See `WorkArea.scratch`."""
        return self._local.scratch

    def has(self, name: str) -> bool:
        """See `WorkArea.has`."""
        return name in self._entries or self._entry(name) is not None

    def path(self, name: str) -> Path:
        """See `WorkArea.path`. Fetched when this machine does not have it; a name that was not published leads nowhere."""
        entry = self._entry(name)
        if entry is None:
            return self._local.root / "missing" / name
        try:
            return self._blobs.path(entry, name)
        except DamagedBlob as error:
            self.remove(name)
            raise DamagedBlob(f"{name} of a work area was lost: {error.message}", "run it again: it is made anew") from error

    @contextmanager
    def publish(self, name: str, *, scratch: bool = False) -> Iterator[Path]:
        """See `WorkArea.publish`. Raises ResourceError, and Unavailable while S3 cannot be reached."""
        temporary = self._local.root / f".{name.replace('/', '_')}.{uuid.uuid4().hex}"
        try:
            yield temporary
            if scratch:
                self._publish_scratch(name, temporary)
            else:
                self._publish_payload(name, temporary)
        except OSError as error:
            raise write_failed(self._local.root / name, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def fetch(self, name: str) -> Path | None:
        """See `WorkArea.fetch`. Raises Unavailable while S3 cannot be reached."""
        head = self._client.head(f"{self._prefix}scratch/{name}")
        path, tag = self._local.scratch / name, self._tag_path(name)
        if head is None:
            return None
        if not (path.is_file() and tag.is_file() and tag.read_text() == str(head["ETag"])):
            self._fetch_scratch(name)
        return path

    def remove(self, name: str, *, scratch: bool = False) -> None:
        """See `WorkArea.remove`."""
        if scratch:
            self._client.delete([f"{self._prefix}scratch/{name}"])
            (self._local.scratch / name).unlink(missing_ok=True)
            self._tag_path(name).unlink(missing_ok=True)
            return
        with self._lock:
            self._entries.pop(name, None)
        self._client.delete([self._pointer(name)])

    def entries(self) -> dict[str, FileEntry]:
        """Every published payload file, those of other machines included, by name. Raises ArtifactError."""
        prefix = self._pointer("")
        names = sorted(found.name.removeprefix(prefix) for found in self._client.listing(prefix))
        found = dict(zip(names, self._client.parallel(self._entry, names), strict=True))
        return {name: entry for name, entry in found.items() if entry is not None}

    def _publish_payload(self, name: str, path: Path) -> None:
        entry = self._blobs.keep(path)
        self._client.put(self._pointer(name), canonical_json(entry.model_dump()))
        with self._lock:
            self._entries[name] = entry

    def _publish_scratch(self, name: str, path: Path) -> None:
        tag = self._client.upload(f"{self._prefix}scratch/{name}", path, {"sha256": digest_file(path)})
        self._place(name, path, tag)

    def _place(self, name: str, path: Path, tag: str) -> None:
        """Put a scratch file where it belongs, with the tag that says it is the bucket's."""
        sync(path)
        target = self._local.scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        self._tag_path(name).write_text(tag)

    def _entry(self, name: str) -> FileEntry | None:
        with self._lock:
            if name in self._entries:
                return self._entries[name]
        try:
            entry = FileEntry.model_validate_json(self._client.get(self._pointer(name)))
        except ObjectMissing:
            return None
        except ValueError as error:
            raise ArtifactError(f"the record of {name} in a work area is damaged", "remove the work area") from error
        with self._lock:
            return self._entries.setdefault(name, entry)

    def _pointer(self, name: str) -> str:
        return f"{self._prefix}payload/{name}"

    def _tag_path(self, name: str) -> Path:
        return self._local.tags / name.replace("/", "%")

    def _mirror(self, shared: bool) -> None:
        """Make the scratch folder say what the bucket says. Files that were never published stay.

        In a shared area files of single parts are left where they are: every part would fetch those of all parts before it.
        """
        prefix = f"{self._prefix}scratch/"
        known = {path.name.replace("%", "/"): path.read_text() for path in self._local.tags.iterdir()}
        tags = {name.removeprefix(prefix): tag for name, tag in self._client.tags(prefix).items()}
        for name in known.keys() - tags.keys():
            (self._local.scratch / name).unlink(missing_ok=True)
            self._tag_path(name).unlink(missing_ok=True)
        needed = [name for name in tags if not (shared and name.startswith(PART_SCRATCH))]
        wanted = [name for name in needed if known.get(name) != tags[name] or not (self.scratch / name).is_file()]
        self._client.parallel(self._fetch_scratch, sorted(wanted))

    def _fetch_scratch(self, name: str) -> None:
        temporary = self._local.root / f".{name.replace('/', '_')}.{uuid.uuid4().hex}"
        remote = f"{self._prefix}scratch/{name}"
        try:
            for _ in range(_TURNS):
                head = self._client.head(remote)
                if head is None:
                    return  # withdrawn since it was listed
                self._client.fetch(remote, temporary, int(head["ContentLength"]))
                if digest_file(temporary) == head.get("Metadata", {}).get("sha256"):
                    self._place(name, temporary, str(head["ETag"]))
                    return
                temporary.unlink()  # another was put in its place meanwhile, or it is damaged
        finally:
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{name} of a work area is damaged: its digest differs", f"remove {json.dumps(remote)} from the bucket"
        )
