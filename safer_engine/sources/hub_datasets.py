"""Rows of a dataset on a Hugging Face hub, at a commit that is looked up once and recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from safer_engine.errors import DatasetRefused
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import HubSource
from safer_engine.store import canonical_json, digest_bytes

_LISTED = re.compile(r"(?P<what>Should be one of|available configs:|Available:) (?P<names>\[.*\])")
_QUOTED = re.compile(r"'([^']+)'")
_MOST_NAMED = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_hub(source: HubSource) -> ResolvedDataset:
    """Pin a hub dataset to a commit. Its rows are fetched when they are first read; code in it is never run.

    The digest stands for the commit, configuration and split. A revision that is a commit already needs no look-up, so
    that a dataset in the cache can be used without a network.

    Raises:
        DatasetRefused: the hub can't be reached, or has no such dataset, revision, configuration or split.
    """
    commit = source.revision if source.revision and _COMMIT.fullmatch(source.revision) else _look_up_commit(source)
    named = {"hub": source.path, "commit": commit, "name": source.name, "split": source.split}
    return ResolvedDataset(digest_bytes(canonical_json(named)), source.path, lambda: _read(source, commit), commit)


def _look_up_commit(source: HubSource) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    except RevisionNotFoundError as error:
        raise DatasetRefused(
            f"dataset {source.path} has no revision {source.revision!r}", "name a commit, tag or branch"
        ) from error
    except RepositoryNotFoundError as error:
        raise DatasetRefused(
            f"the hub has no dataset {source.path!r}, or it is not open to you", "check the id, or log in to the hub"
        ) from error
    except HFValidationError as error:
        raise DatasetRefused(f"{source.path!r} is not a dataset id", "give org/name, or the path of a local file") from error
    except (HTTPError, OSError) as error:
        raise DatasetRefused(f"the hub can't be asked for dataset {source.path}: {_cause(error)}", _OFFLINE) from error
    if commit is None:
        raise DatasetRefused(f"the hub names no commit for dataset {source.path}", "name a commit as revision")
    return str(commit)


_OFFLINE = (
    "check the network and HF_HUB_OFFLINE, name a full commit as revision to use what is in the cache, or give a local file"
)


def _read(source: HubSource, commit: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        dataset = load_dataset(source.path, source.name, split=source.split, revision=commit)
    except (ValueError, DatasetsError) as error:
        raise DatasetRefused(
            f"dataset {source.path} at {commit[:12]} can't be read: {_cause(error)}", _name_another(source, str(error))
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise DatasetRefused(f"dataset {source.path} can't be fetched: {_cause(error)}", _OFFLINE) from error
    yield from dataset


def _name_another(source: HubSource, said: str) -> str:
    """A hint: what to type for each split or configuration that the datasets library lists in its error."""
    listed = _LISTED.search(said)
    names = _QUOTED.findall(listed["names"]) if listed else []
    if not listed or not names:
        return "check dataset.source.name and split; datasets that need code of their own are not run"
    place = source.path + (f"@{source.revision}" if source.revision else "") + "#"
    if listed["what"].startswith("Should"):
        typed = [place + (f"{source.name}/" if source.name else "") + split for split in names]
    else:
        typed = [f"{place}{name}/{source.split}" for name in names]
    more = f" or {len(typed) - _MOST_NAMED} more" if len(typed) > _MOST_NAMED else ""
    return f"name one: {' or '.join(typed[:_MOST_NAMED])}{more} (in a spec file also as source.name, source.split)"


def _cause(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
