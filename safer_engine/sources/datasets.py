"""Find and fingerprint a dataset, of whatever kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safer_engine.sources.hub_datasets import resolve_hub
from safer_engine.sources.local_files import resolve_local
from safer_engine.sources.memory import resolve_memory
from safer_engine.sources.poison_guard import guarded
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec, HubSource, LocalSource


def resolve_dataset(spec: DatasetSpec, rows: Sequence[dict[str, Any]] | None = None) -> ResolvedDataset:
    """The dataset a spec names, ready to be read.

    Args:
        rows: the rows of a `memory` source.

    Raises:
        DatasetRefused: it can't be found or read; the hint says what to do. Rows raise it too, where one is marked as poisoned.
    """
    source = spec.source
    if isinstance(source, LocalSource):
        found = resolve_local(source)
    elif isinstance(source, HubSource):
        found = resolve_hub(source)
    else:
        found = resolve_memory(rows)
    return guarded(found, allowed=spec.allow_poisoned)
