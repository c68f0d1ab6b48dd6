"""Sending local files: known content is not sent again, parts go side by side, an interrupted upload goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from safer_engine.errors import ArtifactError, ResourceError
from service.client.connection import Connection
from service.client.files import LocalFile, LocalFiles, TransferObserver
from service.errors import Unreachable
from service.schemas import PresignedPart, UploadView

UPLOADS = "/v1/uploads"


@dataclass(frozen=True)
class _Part:
    file: LocalFile
    index: int
    number: int
    offset: int
    size: int


def send(connection: Connection, files: LocalFiles, kind: str, observer: TransferObserver, parallel: int) -> UploadView:
    """Upload files unless the service has them, and complete the upload.

    Raises:
        ArtifactError: a file changed while it was sent.
        SaferError: the service refused (size, quota, a digest that does not fit).
    """
    body = {
        "kind": kind,
        "title": files.title,
        "files": [{"path": file.name, "size": file.size, "sha256": file.digest} for file in files.files],
    }
    upload = UploadView.model_validate_json(connection.call("POST", UPLOADS, body=body, repeatable=True).content)
    if upload.state != "complete":
        _send_parts(connection, upload, files, observer, parallel)
        response = connection.call("POST", f"{UPLOADS}/{upload.id}/complete", repeatable=True)
        upload = UploadView.model_validate_json(response.content)
    if upload.name != files.name:
        raise ArtifactError(f"the service calls the upload {upload.name}, not {files.name}", "update client or service")
    return upload


def _send_parts(connection: Connection, upload: UploadView, files: LocalFiles, observer: TransferObserver, parallel: int) -> None:
    missing = list(_missing(upload, files))
    observer.begin("sending", sum(part.size for part in missing))
    stop = threading.Event()
    parts = _Parts(connection, upload)

    def put(part: _Part) -> None:
        if not stop.is_set():
            parts.put(part)
            observer.advance(part.size)

    with ThreadPoolExecutor(parallel, thread_name_prefix="upload") as pool:
        try:
            under_way = [pool.submit(put, part) for part in missing]
            done, _ = wait(under_way, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _missing(upload: UploadView, files: LocalFiles) -> Iterator[_Part]:
    by_name = {file.name: file for file in files.files}
    for view in upload.files:
        file = by_name[view.path]
        received = {part.part for part in view.received}
        for number in range(view.parts):
            offset = number * upload.part_bytes
            if number not in received:
                yield _Part(file, view.index, number, offset, min(upload.part_bytes, file.size - offset))


class _Parts:
    """Where parts go: straight to the object store where the service can say how, through the service where that fails."""

    def __init__(self, connection: Connection, upload: UploadView) -> None:
        self._connection = connection
        self._upload = upload
        self._direct = upload.presigned

    def put(self, part: _Part) -> None:
        """Send one part."""
        content = _content(part)
        digest = hashlib.sha256(content).hexdigest()
        path = f"{UPLOADS}/{self._upload.id}/files/{part.index}/parts/{part.number}"
        if self._direct:
            try:
                self._put_directly(path, content, digest)
            except Unreachable:  # the store's address may be one that only the service reaches
                self._direct = False
            else:
                return
        self._connection.call("PUT", path, body=content, headers={"X-Content-SHA256": digest})

    def _put_directly(self, path: str, content: bytes, digest: str) -> None:
        put = PresignedPart.model_validate_json(self._connection.call("GET", f"{path}/presigned").content)
        answer = self._connection.put_elsewhere(put.url, content, put.headers)
        done = {"etag": answer.headers.get("ETag", ""), "size": len(content), "sha256": digest}
        self._connection.call("POST", path, body=done, repeatable=True)


def _content(part: _Part) -> bytes:
    try:
        with Path(part.file.path).open("rb") as file:
            file.seek(part.offset)
            content = file.read(part.size)
    except OSError as error:
        raise ResourceError(f"cannot read {part.file.path}: {error.strerror}") from error
    if len(content) != part.size:
        raise ArtifactError(f"{part.file.path} changed while it was sent", "run the command again")
    return content
