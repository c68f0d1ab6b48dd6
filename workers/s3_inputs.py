"""Models and datasets at `s3://` addresses that the operator allows, brought to this machine's cache."""

from __future__ import annotations

import posixpath
from contextlib import ExitStack
from pathlib import Path

from safer_engine.errors import InputRefused
from safer_engine.store import canonical_json, digest_bytes
from service.infra.input_cache import InputCache
from service.infra.s3_client import S3Client
from service.infra.settings import Settings

_S3 = "s3://"


def fetch_s3(address: str, settings: Settings, cache: InputCache, stack: ExitStack) -> Path:
    """The file or folder at an address, pinned in the cache until the stack closes.

    It is kept by the names and entity tags of its objects, so that what was replaced since is fetched again.

    Raises:
        InputRefused: there is nothing.
        Unavailable, ResourceError: S3 cannot be reached, or the disk is full.
    """
    parent, name = posixpath.split(address.removeprefix(_S3).rstrip("/"))
    if not parent:
        raise InputRefused(f"{address} is a whole bucket", "name a file or folder in it")
    client = S3Client(settings.model_copy(update={"store_url": f"{_S3}{parent}"}))
    alone = client.facts(name) is not None
    wanted = {name: client.tags(name)[name]} if alone else client.tags(f"{name}/")
    if not wanted:
        raise InputRefused(f"there is nothing at {address}", "check the address, and that the worker may read it")
    sizes = {found.name: found.size for found in client.listing(name) if found.name in wanted}
    digest = digest_bytes(canonical_json([address, sorted(wanted.items()), sorted(sizes.items())]))

    def make(folder: Path) -> None:
        for each in sorted(wanted):
            path = folder / (name if alone else posixpath.relpath(each, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            client.fetch(each, path, sizes[each])

    folder = stack.enter_context(cache.entry(digest, make, sum(sizes.values())))
    return folder / name if alone else folder
