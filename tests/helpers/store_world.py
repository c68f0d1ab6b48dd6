"""Stores for tests: machines that share one, artifacts to put into it, databases beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safer_engine.store import ArtifactStore, Manifest, ManifestDraft
from service.infra.settings import Settings, load_settings
from service.infra.stores import ServiceStore, Stores
from tests.helpers.servers import S3

KEY, OTHER_KEY = "a" * 64, "b" * 64
_NUMBERS = itertools.count()


def fresh_prefix() -> str:
    """A prefix of a shared bucket that no other test has."""
    return f"test-{next(_NUMBERS)}"


class World:
    """One store, local or in S3, and machines that use it. A folder is shared by all machines, as by processes of one."""

    def __init__(self, folder: Path, s3: S3 | None, **given: Any) -> None:
        self.folder = folder
        place = {"store_url": str(folder / "store")} if s3 is None else s3.settings(fresh_prefix())
        self._given = {**place, **given}
        self._stores: dict[str, Stores] = {}

    def settings(self, machine: str = "one", **given: Any) -> Settings:
        """Settings of a machine."""
        return load_settings(home=self.folder / machine, **{**self._given, **given})

    def stores(self, machine: str = "one", engine: Any = None, **given: Any) -> Stores:
        """The store, as a machine sees it."""
        return Stores(self.settings(machine, **given), engine)

    def store(self, project: str = "default", machine: str = "one") -> ServiceStore:
        """The store of a project; a machine has one client."""
        if machine not in self._stores:
            self._stores[machine] = self.stores(machine)
        return self._stores[machine].project(project)

    def __getstate__(self) -> dict[str, Any]:
        """For child processes: clients stay behind."""
        return {**vars(self), "_stores": {}}


def draft(kind: str = "PairSet", inputs: Mapping[str, str] | None = None, **meta: Any) -> ManifestDraft:
    """A manifest but for its files."""
    return ManifestDraft(stage_version=1, artifact=kind, meta=meta, inputs=dict(inputs or {}))


def put(
    store: ArtifactStore, files: Mapping[str, bytes], key: str = KEY, stage: str = "pairs", drafted: ManifestDraft | None = None
) -> Manifest:
    """Publish files and commit them."""
    with store.open_work(stage, key) as work:
        for name, data in files.items():
            with work.publish(name) as path:
                path.write_bytes(data)
        manifest: Manifest = store.commit(stage, key, work, drafted or draft()).manifest
    return manifest
