"""Objects in a bucket, by boto3: retried within a limit of time, in parallel parts, and checked.

A request that fails with a passing error is repeated until the time lost on its object exceeds `s3_deadline_seconds`. A body
that breaks off is continued where it broke. Off AWS, checksums are only sent where S3 requires them (older servers
refuse the newer kinds), and each body carries its MD5 instead.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from safer_engine.errors import ArtifactError, SaferError, SpecError
from safer_engine.publishing import write_failed
from service.infra.object_space import CHUNK, ObjectFacts, ObjectMissing
from service.infra.s3_clock import EndpointClock
from service.infra.s3_retry import Exists, NotSupported, Patience
from service.infra.settings import Settings

if TYPE_CHECKING:
    from service.infra.stores import OnTransfer

T = TypeVar("T")
R = TypeVar("R")
LEAST_PART = 5 << 20
"""S3's smallest part, the last one of an object aside."""
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0
_MOST_PARTS = 10_000
_COPIED_AT_ONCE = 1 << 30


class S3Client:
    """One bucket, under one prefix. See `ObjectSpace`; may be used by many threads."""

    def __init__(self, settings: Settings, on_transfer: OnTransfer | None = None) -> None:
        """Make a client; nothing is asked of the server yet. Raises SpecError for a URL that names no bucket."""
        url = urlsplit(settings.store)
        if not url.netloc or url.query or url.fragment:
            raise SpecError("SAFER_STORE_URL names no bucket", "write s3://bucket/prefix")
        self.settings = settings
        self.bucket = url.netloc
        self.prefix = f"{url.path.strip('/')}/" if url.path.strip("/") else ""
        self._on_transfer = on_transfer
        self._api = _connect(settings)
        self._clock = EndpointClock()
        self._clock.attach(self._api)
        self._md5 = _off_aws(settings)

    def now(self) -> float:
        """See `ObjectSpace.now`."""
        if not self._clock.fresh:
            self.check()
        return self._clock.now()

    def facts(self, name: str) -> ObjectFacts | None:
        """See `ObjectSpace.facts`."""
        head = self.head(name)
        return None if head is None else ObjectFacts(name, int(head["ContentLength"]), head["LastModified"].timestamp())

    def head(self, name: str) -> dict[str, Any] | None:
        """S3's answer to HEAD; None where there is no object."""
        try:
            return dict(self._call(lambda: self._api.head_object(**self._at(name)), name))
        except ObjectMissing:
            return None

    def get(self, name: str) -> bytes:
        """See `ObjectSpace.get`."""
        return self._timed("get", lambda: self._call(lambda: bytes(self._api.get_object(**self._at(name))["Body"].read()), name))

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """See `ObjectSpace.stream`. Goes on where the connection broke."""
        if stop is None:
            found = self.facts(name)
            if found is None:
                raise ObjectMissing(f"{name} is not in the store")
            stop = found.size
        return self._stream(name, start, stop, self._patience())

    def _stream(self, name: str, start: int, stop: int, patience: Patience) -> Iterator[bytes]:
        failures = 0
        while start < stop:
            began, came = time.monotonic(), start
            try:
                body = self._api.get_object(**self._at(name), Range=f"bytes={start}-{stop - 1}")["Body"]
                while chunk := body.read(CHUNK):
                    start += len(chunk)
                    yield chunk
                if start == came:
                    raise ArtifactError(f"{name} in the store is damaged: it is too short")
                failures = 0
            except (ClientError, BotoCoreError) as error:
                patience.wait(error, began, failures, name)
                failures += 1

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectSpace.put`."""
        self._put(name, data, self._patience())

    def put_exclusive(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; False where there was.

        An answer that was lost may have been a success: after False, read the object and see whether it is one's own.
        """
        try:
            self._call(lambda: self._api.put_object(**self._body(name, data), IfNoneMatch="*"), name)
        except Exists:
            return False
        return True

    def put_file(self, name: str, path: Path) -> None:
        """See `ObjectSpace.put_file`."""
        self.upload(name, path, {})

    def upload(self, name: str, path: Path, metadata: dict[str, str]) -> str:
        """Write an object from a file, in parallel parts where it is large; its entity tag."""
        size = path.stat().st_size

        def send() -> str:
            if size <= self.settings.s3_part_bytes:
                return self._put(name, path.read_bytes(), self._patience(), metadata)
            return self._put_parts(name, path, size, metadata)

        return self._timed("put", send, size)

    def fetch(self, name: str, path: Path, size: int) -> None:
        """See `ObjectSpace.fetch`. Parts come in parallel; a broken file is not left behind."""
        patience = self._patience()
        try:
            self._timed("get", lambda: self._fetch(name, path, size, patience), size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise write_failed(path, error) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def listing(self, prefix: str) -> Iterator[ObjectFacts]:
        """See `ObjectSpace.listing`."""
        for page in self._pages(prefix):
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(self.prefix)
                yield ObjectFacts(name, int(found["Size"]), found["LastModified"].timestamp())

    def tags(self, prefix: str) -> dict[str, str]:
        """Name → entity tag of the objects under a prefix."""
        return {
            found["Key"].removeprefix(self.prefix): str(found["ETag"])
            for page in self._pages(prefix)
            for found in page.get("Contents", ())
        }

    def folders(self, prefix: str) -> list[str]:
        """See `ObjectSpace.folders`."""
        pages = self._pages(prefix, Delimiter="/")
        found = (each["Prefix"] for page in pages for each in page.get("CommonPrefixes", ()))
        return sorted(name.removeprefix(self.prefix + prefix).rstrip("/") for name in found)

    def delete(self, names: Iterable[str]) -> None:
        """See `ObjectSpace.delete`."""
        self.parallel(lambda name: self._call(lambda: self._api.delete_object(**self._at(name)), name), names)

    def join(self, sources: list[ObjectFacts], name: str) -> None:
        """Join objects to one without moving their bytes here. All but the last have at least `LEAST_PART` bytes."""
        patience = self._patience()

        def copy(upload: dict[str, Any], number: int) -> str:
            given = {**upload, "PartNumber": number + 1, "CopySource": self._at(sources[number].name)}
            answer = patience.bear(lambda: self._api.upload_part_copy(**given), sources[number].name)
            return str(answer["CopyPartResult"]["ETag"])

        self._multipart(name, len(sources), copy, {}, patience)

    def copy(self, source: ObjectFacts, name: str) -> None:
        """Copy an object within the bucket without moving its bytes here."""
        patience = self._patience()
        given = {"CopySource": self._at(source.name)}
        if source.size <= _COPIED_AT_ONCE:
            patience.bear(lambda: self._api.copy_object(**self._at(name), **given, **self._encryption()), source.name)
            return

        def piece(upload: dict[str, Any], number: int) -> str:
            start = number * _COPIED_AT_ONCE
            part = {"PartNumber": number + 1, "CopySourceRange": f"bytes={start}-{min(start + _COPIED_AT_ONCE, source.size) - 1}"}
            answer = patience.bear(lambda: self._api.upload_part_copy(**upload, **given, **part), source.name)
            return str(answer["CopyPartResult"]["ETag"])

        self._multipart(name, -(-source.size // _COPIED_AT_ONCE), piece, {}, patience)

    def presigned_get(self, name: str, seconds: int, filename: str, content_type: str) -> str:
        """A URL that gives the object to whoever has it. Never log it."""
        named = {"ResponseContentDisposition": f'attachment; filename="{filename}"', "ResponseContentType": content_type}
        return self._presigned("get_object", {**self._at(name), **named}, seconds)

    def presigned_put(self, name: str, seconds: int, size: int) -> str:
        """A URL under which whoever has it may write exactly `size` bytes to the object. Never log it."""
        return self._presigned("put_object", {**self._at(name), "ContentLength": size}, seconds)

    def _presigned(self, operation: str, given: dict[str, Any], seconds: int) -> str:
        """A URL that is good from now on by the server's clock, where that can be asked for."""
        with suppress(SaferError):
            self.now()
        return str(self._api.generate_presigned_url(operation, Params=given, ExpiresIn=seconds))

    def check(self) -> None:
        """See that the bucket answers. Raises SaferError."""
        try:
            Patience(0).bear(lambda: self._api.head_bucket(Bucket=self.bucket), f"bucket {self.bucket}")
        except ObjectMissing:
            raise SpecError(f"bucket {self.bucket} does not exist", "make it, or name another in SAFER_STORE_URL") from None

    def keeps_conditions(self) -> bool:
        """Whether the server refuses to overwrite an object when asked to (`If-None-Match: *`). Raises SaferError."""
        name = f"probe/{uuid.uuid4().hex}"
        try:
            return not self.put_exclusive(name, b"1") or not self.put_exclusive(name, b"2")
        except NotSupported:
            return False
        finally:
            with suppress(SaferError):
                self.delete([name])

    def abort_uploads(self, older_than: float) -> int:
        """Remove unfinished multipart uploads begun before a time (seconds since the epoch); how many."""
        count = 0
        pages = self._api.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix)
        for page in self._call(lambda: list(pages), "multipart uploads"):
            for found in page.get("Uploads", ()):
                if found["Initiated"].timestamp() < older_than:
                    self._abort({"Bucket": self.bucket, "Key": found["Key"], "UploadId": found["UploadId"]})
                    count += 1
        return count

    def parallel(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of the work on each item, some at once; after an error, which is raised, no more are begun."""
        pool = ThreadPoolExecutor(self.settings.s3_parallel)
        try:
            return [future.result() for future in [pool.submit(work, item) for item in items]]
        finally:
            pool.shutdown(cancel_futures=True)

    def _put(self, name: str, data: bytes, patience: Patience, metadata: dict[str, str] | None = None) -> str:
        given = {**self._body(name, data), "Metadata": metadata or {}}
        return str(patience.bear(lambda: self._api.put_object(**given), name)["ETag"])

    def _put_parts(self, name: str, path: Path, size: int, metadata: dict[str, str]) -> str:
        patience = self._patience()
        length = max(self.settings.s3_part_bytes, -(-size // _MOST_PARTS))

        def send(upload: dict[str, Any], number: int) -> str:
            with path.open("rb") as handle:
                handle.seek(number * length)
                data = handle.read(length)
            given = {**upload, "PartNumber": number + 1, "Body": data, **self._checked(data)}
            return str(patience.bear(lambda: self._api.upload_part(**given), name)["ETag"])

        return self._multipart(name, -(-size // length), send, metadata, patience)

    def _multipart(
        self, name: str, count: int, send: Callable[[dict[str, Any], int], str], metadata: dict[str, str], patience: Patience
    ) -> str:
        """Write an object in `count` parts; what a failure leaves is removed. Its entity tag."""
        given = {**self._at(name), **self._encryption(), "Metadata": metadata}
        begun = patience.bear(lambda: self._api.create_multipart_upload(**given), name)
        upload = {**self._at(name), "UploadId": begun["UploadId"]}
        try:
            tags = self.parallel(lambda number: send(upload, number), range(count))
            parts = [{"PartNumber": number + 1, "ETag": tag} for number, tag in enumerate(tags)]
            return self._complete(name, upload, parts, patience)
        except BaseException:
            self._abort(upload)
            raise

    def _complete(self, name: str, upload: dict[str, Any], parts: list[dict[str, Any]], patience: Patience) -> str:
        try:
            call = self._api.complete_multipart_upload
            return str(patience.bear(lambda: call(**upload, MultipartUpload={"Parts": parts}), name)["ETag"])
        except ObjectMissing:  # the answer to a first request, which had succeeded, was lost
            head = self.head(name)
            if head is None:
                raise
            return str(head["ETag"])

    def _abort(self, upload: dict[str, Any]) -> None:
        with suppress(ClientError, BotoCoreError):
            self._api.abort_multipart_upload(**upload)

    def _fetch(self, name: str, path: Path, size: int, patience: Patience) -> None:
        length = self.settings.s3_part_bytes
        with path.open("xb") as handle:
            handle.truncate(size)
            descriptor = handle.fileno()

            def fill(start: int) -> None:
                at = start
                for chunk in self._stream(name, start, min(start + length, size), patience):
                    os.pwrite(descriptor, chunk, at)
                    at += len(chunk)

            self.parallel(fill, range(0, size, length))

    def _pages(self, prefix: str, **given: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            asked = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, **given, **token}
            page = self._call(lambda asked=asked: self._api.list_objects_v2(**asked), f"list of {prefix}")  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, work: Callable[[], T], what: str) -> T:
        return self._patience().bear(work, what)

    def _patience(self) -> Patience:
        return Patience(self.settings.s3_deadline_seconds)

    def _timed(self, op: str, work: Callable[[], T], size: int | None = None) -> T:
        began = time.monotonic()
        result = work()
        if self._on_transfer is not None:
            moved = len(result) if size is None and isinstance(result, bytes) else size or 0
            self._on_transfer(op, moved, time.monotonic() - began)
        return result

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def _body(self, name: str, data: bytes) -> dict[str, Any]:
        return {**self._at(name), "Body": data, **self._encryption(), **self._checked(data)}

    def _checked(self, data: bytes) -> dict[str, str]:
        if not self._md5:
            return {}
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}

    def _encryption(self) -> dict[str, str]:
        settings = self.settings
        if not settings.s3_sse:
            return {}
        key = {"SSEKMSKeyId": settings.s3_kms_key} if settings.s3_kms_key else {}
        return {"ServerSideEncryption": settings.s3_sse, **key}


def _off_aws(settings: Settings) -> bool:
    host = urlsplit(settings.s3_endpoint or "").hostname
    return host is not None and not host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _connect(settings: Settings) -> Any:
    off = _off_aws(settings)
    config = Config(
        connect_timeout=min(_CONNECT_SECONDS, settings.s3_deadline_seconds),
        read_timeout=min(_READ_SECONDS, settings.s3_deadline_seconds),
        retries={"mode": "adaptive", "total_max_attempts": 2},
        max_pool_connections=max(10, 2 * settings.s3_parallel),
        request_checksum_calculation="when_required" if off else "when_supported",
        response_checksum_validation="when_required" if off else "when_supported",
        s3={"addressing_style": "path" if off else "auto"},
        signature_version="s3v4",
    )
    access, secret = settings.s3_access_key, settings.s3_secret_key
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=access.get_secret_value() if access else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=config,
    )
