"""A stand-in for the hub endpoint: serves a folder tree over HTTP on this machine.

Tree: `{models|datasets}/{org}/{name}/{files…}`. Every repository has one commit, named by its content (`commit_of`);
`main` and that commit are its only revisions. The routes are those that huggingface_hub and datasets call to look up a
repository, list it and fetch its files. The client reads HF_ENDPOINT when it is imported, so run it in a subprocess
with `environment()`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.local_http import LocalHttp, QuietHandler


def commit_of(repository: Path) -> str:
    """The 40 hex digits that name a repository's only commit: a digest of its files."""
    sha = hashlib.sha256()
    for path in sorted(repository.rglob("*")):
        if path.is_file():
            sha.update(path.relative_to(repository).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:40]


@dataclass(frozen=True)
class Found:
    """A repository and revision that a request names, and what follows them in its path."""

    kind: str
    name: str
    folder: Path
    commit: str
    rest: str


class _Handler(QuietHandler):
    """Answers one connection."""

    owner: HubStandIn

    def _answer(self) -> None:
        body = self.body()
        path = urlsplit(self.path).path
        self.owner.requests.append(f"{self.command} {path}")
        if path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), body)
        else:
            self._file(path)

    do_GET = do_HEAD = do_POST = _answer

    def _api(self, path: str, body: bytes) -> None:
        if path.count("/") == 2:
            path += "/revision/main"
        if found := self.owner.locate(path, "revision"):
            self._json(_info(found))
        elif found := self.owner.locate(path, "tree"):
            self._json(_entries(found, [found.rest]))
        elif found := self.owner.locate(path, "paths-info"):
            self._json(_entries(found, _wanted_paths(body), listed=False))
        else:
            self._missing("RepoNotFound" if "/revision/main" in path else "RevisionNotFound")

    def _file(self, path: str) -> None:
        found = self.owner.locate(path if path.startswith("/datasets/") else f"/models{path}", "resolve")
        if found is None:
            self._missing("RevisionNotFound")
            return
        target = found.folder / found.rest
        if not target.is_file():
            self._missing("EntryNotFound", found.commit)
            return
        data = target.read_bytes()
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": found.commit, "Accept-Ranges": "bytes"}
        self._send(200, data, "application/octet-stream", headers)

    def _missing(self, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "not found"}
        self._send(404, b'{"error":"not found"}', "application/json", {**headers, "X-Repo-Commit": commit} if commit else headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range", "")
        if status == 200 and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers = {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
            status, data = 206, data[int(first) : stop]
        self.reply(status, data, {**headers, "Content-Type": kind})


class HubStandIn(LocalHttp):
    """The server, while it is open; `requests` holds "METHOD path" of each request so far."""

    handler = _Handler

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []

    def environment(self, home: Path) -> dict[str, str]:
        """Environment for a subprocess that uses this endpoint and keeps its cache in `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        repository = str(Path(__file__).resolve().parents[2])
        return {**kept, **settings, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": repository}

    def locate(self, path: str, after: str) -> Found | None:
        """Take apart `{kind}s/{org}/{name}/{after}/{revision}[/rest]`; None when it names nothing here."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if len(parts) < 5 or parts[0] not in ("models", "datasets") or parts[3] != after:
            return None
        folder = self.root / parts[0] / parts[1] / parts[2]
        if not folder.is_dir():
            return None
        commit = commit_of(folder)
        found = Found(parts[0], f"{parts[1]}/{parts[2]}", folder, commit, "/".join(parts[5:]))
        return found if parts[4] in ("main", commit) else None


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _info(found: Found) -> dict[str, Any]:
    files = [path for path in sorted(found.folder.rglob("*")) if path.is_file()]
    siblings = [{"rfilename": path.relative_to(found.folder).as_posix(), "size": path.stat().st_size} for path in files]
    common = {"_id": found.commit[:24], "id": found.name, "sha": found.commit, "siblings": siblings, "tags": []}
    times = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
    return {**common, **times, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}


def _entries(found: Found, paths: list[str], listed: bool = True) -> list[dict[str, Any]]:
    entries = []
    for name in paths:
        top = found.folder / name
        for path in sorted(top.rglob("*")) if listed and top.is_dir() else [top]:
            relative = path.relative_to(found.folder).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": relative, "oid": _oid(relative.encode()), "size": 0})
            elif path.is_file():
                data = path.read_bytes()
                entries.append({"type": "file", "path": relative, "oid": _oid(data), "size": len(data)})
    return entries


def _wanted_paths(body: bytes) -> list[str]:
    document = json.loads(body)
    paths = document["paths"]
    return [paths] if isinstance(paths, str) else list(paths)
