"""The hub's own cache on this machine, kept under a limit of bytes: revisions used longest ago go first.

Whoever uses it holds its lock together with others; it is only shrunk while nobody does.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "in-use.lock"


@contextmanager
def hub_in_use(folder: Path) -> Iterator[None]:
    """Nothing is removed from the cache while this lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def shrink_hub_cache(folder: Path, hub: Path, limit: int) -> int:
    """Remove what is over the limit, unless somebody uses the cache. Returns the bytes that were freed.

    Args:
        folder: holds the lock; hub: the hub library's cache.
    """
    from huggingface_hub import scan_cache_dir

    if not hub.is_dir():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        found = scan_cache_dir(hub)
        over, gone = found.size_on_disk - limit, []
        for repository in sorted(found.repos, key=lambda each: each.last_accessed):
            if over > 0:
                gone += [revision.commit_hash for revision in repository.revisions]
                over -= repository.size_on_disk
        if not gone:
            return 0
        plan = found.delete_revisions(*gone)
        plan.execute()
        return int(plan.expected_freed_size)
