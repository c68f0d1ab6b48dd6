"""How the first commit of an artifact wins on S3.

Where the server keeps conditions, the manifest is one PUT with `If-None-Match: *`. Where it does not, a row in the
database decides: each committer stages its manifest under its attempt's name, then inserts the row of the key. The row
names the winner, whose staged manifest anyone may put in place: a winner that dies between is finished by the next.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

from safer_engine.errors import SpecError
from safer_engine.store import Manifest, canonical_json
from service.errors import Unavailable
from service.infra.object_space import ObjectMissing
from service.infra.s3_client import S3Client

if TYPE_CHECKING:
    from sqlalchemy import Engine

_TURNS = 5


def manifest_name(project: str, stage: str, key: str) -> str:
    """Name of the object that makes an artifact exist."""
    return f"manifests/{project}/{stage}/{key}.json"


class ManifestWriter:
    """Creates manifests exclusively."""

    def __init__(self, client: S3Client, engine: Engine | None) -> None:
        self._client = client
        self._engine = engine
        self._lock = threading.Lock()
        self._mode: Literal["", "conditional-put", "sql"] = ""

    def decide(self) -> Literal["conditional-put", "sql"]:
        """What decides, found by trying once. Raises SpecError where nothing can; Unavailable while S3 cannot be asked."""
        with self._lock:
            if not self._mode:
                self._mode = "conditional-put" if self._client.keeps_conditions() else "sql"
            if self._mode == "sql" and self._engine is None:
                raise SpecError(
                    "this S3 server ignores `If-None-Match`, and no database was given to decide which commit is first",
                    "use a server with conditional writes, or the service's database",
                )
            return self._mode

    def create(self, manifest: Manifest) -> None:
        """Put a manifest in place unless there is one; the caller reads which."""
        name = manifest_name(manifest.project, manifest.stage, manifest.key)
        data = canonical_json(manifest.model_dump(mode="json"))
        if self.decide() == "conditional-put":
            self._client.put_exclusive(name, data)
            return
        staged = _staged_name(manifest, manifest.attempt)
        self._client.put(staged, data)
        try:
            for _ in range(_TURNS):
                if self._settle(name, manifest):
                    return
        finally:
            self._client.delete([staged])
        raise Unavailable(f"the commit of {manifest.stage} could not be settled", "try again")

    def _settle(self, name: str, manifest: Manifest) -> bool:
        """Put the winner's manifest in place; False when the row was left from an artifact that was removed: it is now gone."""
        winner = self._first(manifest)
        if winner is None:
            return False
        try:
            self._client.put(name, self._client.get(_staged_name(manifest, winner)))
        except ObjectMissing:
            if self._client.facts(name) is None:
                self._forget(manifest, winner)
                return False
        return True

    def _first(self, manifest: Manifest) -> str | None:
        """The attempt that came first, by the row of the key; None when that row was removed just now."""
        from sqlalchemy import insert, select
        from sqlalchemy.exc import IntegrityError

        from service.jobs.clock import UtcNow
        from service.jobs.database import reading, writing
        from service.jobs.tables import commits

        assert self._engine is not None
        key = {"project": manifest.project, "stage": manifest.stage, "key": manifest.key}
        try:
            with writing(self._engine) as connection:
                connection.execute(insert(commits).values(**key, attempt=manifest.attempt, at=UtcNow()))
            return manifest.attempt
        except IntegrityError:
            with reading(self._engine) as connection:
                found = connection.execute(select(commits.c.attempt).where(*(commits.c[k] == v for k, v in key.items())))
                return found.scalar()

    def _forget(self, manifest: Manifest, attempt: str) -> None:
        from sqlalchemy import delete

        from service.jobs.database import writing
        from service.jobs.tables import commits

        assert self._engine is not None
        key = (commits.c.project == manifest.project) & (commits.c.stage == manifest.stage) & (commits.c.key == manifest.key)
        with writing(self._engine) as connection:
            connection.execute(delete(commits).where(key, commits.c.attempt == attempt))


def _staged_name(manifest: Manifest, attempt: str) -> str:
    return f"staged/{manifest.project}/{manifest.stage}/{manifest.key}.{attempt}.json"
