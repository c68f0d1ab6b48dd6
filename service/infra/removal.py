"""Payload files that nothing names any more, and how they are removed while others write.

A file is named by a manifest, by a complete upload, by the work area it was published in, or by an upload that is being
completed; a record of a damaged artifact names nothing. In a folder, whoever writes a file and then names it holds a lock
(`Stores.naming`), so under the lock of `Stores.collecting` whatever has no name may go, however young. In a bucket nothing
holds writers off: a file is written first and named within moments, so one that was written lately is left, unless the caller
knows it from what was just removed; and one that was written again since it was listed always is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from safer_engine.errors import ArtifactError
from service.errors import NotFound
from service.infra.object_space import ObjectFacts, ObjectMissing
from service.infra.stores import Stores
from service.infra.upload_files import UploadFiles

UNDER_WAY_SECONDS = 3600.0
"""A file in a bucket that was written longer ago has its name by now, or will never have one."""


@dataclass(frozen=True)
class Removed:
    """One thing that was removed, or would be.

    Attributes:
        kind: `artifact`, `damaged`, `work`, `upload`, `blob` or `unfinished`.
        name: stage and key, id or digest of the upload, or name of the object.
        size: bytes; of an artifact 0, since its blobs are counted by themselves.
    """

    kind: str
    project: str
    name: str
    reason: str
    size: int = 0


def long_written(stores: Stores) -> float:
    """The time before which a file was written that has no name: nobody is about to give it one."""
    return math.inf if stores.s3 is None else stores.space.now() - UNDER_WAY_SECONDS


def remove_blobs(
    stores: Stores,
    before: float,
    at_once: frozenset[str] = frozenset(),
    dry_run: bool = False,
    gone: frozenset[tuple[str, str]] = frozenset(),
) -> list[Removed]:
    """Remove blobs that no manifest, work area or upload of any project names.

    Args:
        before: those last written before this time, in seconds since the epoch by the store's clock.
        at_once: digests of blobs that go however young they are: what had named them was just removed.
        gone: project and `stage/key` of artifacts that are not to count.
    """
    with stores.collecting():
        listed = [each for each in stores.space.listing("blobs/") if each.changed < before or digest_of(each) in at_once]
        named = _named(stores, gone) if listed else frozenset()
        loose = [each for each in listed if digest_of(each) not in named]
        if not dry_run:
            fresh = ((each, stores.space.facts(each.name)) for each in loose)
            stores.space.delete([each.name for each, now in fresh if now is not None and not _written_since(each, now)])
    return [Removed("blob", "", digest_of(each), "nothing names it", each.size) for each in loose]


def digest_of(found: ObjectFacts) -> str:
    """sha256 of a blob in a listing."""
    return found.name.rpartition("/")[2]


def pointed(stores: Stores, project: str, area: str = "") -> Iterator[str]:
    """Digests of the blobs that the work areas of a project point to, or one of them (`stage-key`); only in a bucket do they."""
    if stores.s3 is None:
        return
    for found in list(stores.space.listing(f"work/{project}/{area}/" if area else f"work/{project}/")):
        if "/payload/" in found.name:
            try:
                yield str(json.loads(stores.space.get(found.name))["digest"])
            except ObjectMissing:
                continue  # committed or withdrawn meanwhile


def _written_since(listed: ObjectFacts, now: ObjectFacts) -> bool:
    """Whether an object was written again since it was listed. An answer of its own may count whole seconds, a listing parts."""
    return int(now.changed) > int(listed.changed)


def _named(stores: Stores, gone: frozenset[tuple[str, str]]) -> frozenset[str]:
    """Digests of every blob that an artifact, a work area or an upload names."""
    named: set[str] = set()
    for project in stores.projects():
        # What names a file for a while comes first: when that is over, the file is in a manifest or list, which is read later.
        named.update(pointed(stores, project))
        uploads = UploadFiles(stores, project)
        named.update(uploads.received())
        store = stores.project(project)
        for each in store.committed():
            if (project, f"{each.stage}/{each.key}") not in gone:
                try:
                    named.update(entry.digest for entry in store.manifest(each.stage, each.key).files.values())
                except ArtifactError:
                    continue  # removed meanwhile, or damaged: then it names nothing that could be read
        for upload in uploads.complete_uploads():
            try:
                named.update(file.digest for file in uploads.files(upload.name))
            except NotFound:
                continue  # removed meanwhile
    return frozenset(named)
