"""How an upload is named: by what its files are, so that client and service come to one name for the same files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safer_engine.store import canonical_json, digest_bytes

UPLOAD = "upload:"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class UploadFile:
    """One file of an upload. `path`: relative, with `/`; `digest`: sha256 of its bytes."""

    path: str
    digest: str
    size: int


def texts_of(value: object) -> frozenset[str]:
    """Every text value of a JSON document, such as a spec."""
    if isinstance(value, str):
        return frozenset((value,))
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return frozenset(text for each in inner for text in texts_of(each))


def uploads_in(spec: object) -> frozenset[str]:
    """Every `upload:<digest>` that a spec names."""
    return frozenset(text for text in texts_of(spec) if text.startswith(UPLOAD))


def file_list(files: Iterable[UploadFile]) -> bytes:
    """Canonical JSON of [[path, sha256, size] …], by path."""
    return canonical_json([[file.path, file.digest, file.size] for file in sorted(files)])


def upload_digest(files: Iterable[UploadFile]) -> str:
    """sha256 of the files' list."""
    return digest_bytes(file_list(files))


def upload_name(digest: str) -> str:
    """What specs name an upload: `upload:<digest>`."""
    return f"{UPLOAD}{digest}"


def named_upload(name: str) -> str | None:
    """The digest in a name like `upload:<digest>`; None for any other name."""
    digest = name.removeprefix(UPLOAD)
    return digest if name.startswith(UPLOAD) and _DIGEST.fullmatch(digest) else None
