"""Records of artifacts that were found damaged and set aside: `damaged/<project>/<stage>/<key>.<id>.json`, as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safer_engine.store import Manifest
from service.infra.object_space import ObjectMissing
from service.infra.retention_records import Place
from service.infra.stores import Stores


@dataclass(frozen=True)
class DamagedRecord:
    """One record.

    Attributes:
        name: of its object.
        changed: when it was set aside, in seconds since the epoch by the store's clock.
        manifest: None where the record itself is no manifest.
    """

    name: str
    place: Place
    changed: float
    manifest: Manifest | None


def damaged_records(stores: Stores, project: str) -> Iterator[DamagedRecord]:
    """What was set aside of a project."""
    for found in list(stores.space.listing(f"damaged/{project}/")):
        _, _, stage, file = found.name.split("/")
        try:
            content = stores.space.get(found.name)
        except ObjectMissing:
            continue  # removed meanwhile
        yield DamagedRecord(found.name, (stage, file.partition(".")[0]), found.changed, _manifest(content))


def _manifest(content: bytes) -> Manifest | None:
    try:
        return Manifest.model_validate_json(content)
    except ValueError:
        return None
