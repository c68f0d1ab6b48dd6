from __future__ import annotations

import os
from pathlib import Path

from workers.hub_cache import hub_in_use, shrink_hub_cache


def repository(hub: Path, name: str, size: int, used: float) -> Path:
    """A model in the layout of the hub library's cache, last read at a time."""
    folder = hub / f"models--org--{name}"
    commit = name[0] * 40
    blob = folder / "blobs" / (name[0] * 64)
    snapshot = folder / "snapshots" / commit
    for each in (blob.parent, snapshot, folder / "refs"):
        each.mkdir(parents=True)
    blob.write_bytes(b"x" * size)
    os.utime(blob, (used, used))
    (snapshot / "model.safetensors").symlink_to(blob)
    (folder / "refs" / "main").write_text(commit)
    return folder


def test_what_was_used_longest_ago_goes_until_the_rest_fits(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    old, middle, new = (repository(hub, name, 1000, 1e9 + day) for day, name in enumerate(("aged", "between", "current")))
    assert shrink_hub_cache(tmp_path, hub, 3000) == 0
    assert shrink_hub_cache(tmp_path, hub, 2000) == 1000
    assert (old.exists(), middle.exists(), new.exists()) == (False, True, True)
    assert shrink_hub_cache(tmp_path, hub, 1) == 2000


def test_nothing_goes_while_somebody_uses_the_cache(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    kept = repository(hub, "aged", 1000, 1e9)
    with hub_in_use(tmp_path), hub_in_use(tmp_path):
        assert shrink_hub_cache(tmp_path, hub, 1) == 0
        assert kept.exists()
    assert shrink_hub_cache(tmp_path, hub, 1) == 1000
    assert shrink_hub_cache(tmp_path, tmp_path / "none", 1) == 0
