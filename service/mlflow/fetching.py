"""Bringing a model version's files from MLflow into the service's own store, as an upload of the project.

MLflow tells no digest of a file, and an upload is named by the digests of its files: so every file is read twice, once for
its sha256 and once into the store, in parts. No disk is needed for it, content that is here already is read only once, and
what broke off goes on with the parts that are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from service.errors import Conflict, TooLarge, Unavailable
from service.http.services import Services
from service.http.uploads import part_bytes
from service.infra.upload_files import PartReceipt, UploadFiles, checked_files
from service.jobs.uploads import UploadPart, UploadRecord, UploadState
from service.mlflow.layout import ModelFile
from service.mlflow.registry import Registry
from service.upload_names import UploadFile, upload_name

ACTOR = "mlflow"
"""In place of an API key, where jobs and uploads say who made them."""


class Fetching:
    """Fetches for one project.

    Args:
        beat: called every now and then while bytes come; raises to end it.
    """

    def __init__(self, services: Services, registry: Registry, project: str, beat: Callable[[], None]) -> None:
        self._services = services
        self._registry = registry
        self._project = project
        self._beat = beat

    def fetch(self, files: Sequence[ModelFile], title: str) -> str:
        """The name (`upload:<digest>`) of the upload that these files make.

        Raises:
            TooLarge: more than an upload, or a part of one, may have.
            SpecError: a file's name that may not be.
            Unavailable, NotFound, RegistryRefused: as the registry; or the files changed meanwhile.
            QuotaExceeded: as uploads.
        """
        settings, uploads = self._services.settings, self._services.uploads
        self._require_room(sum(file.size or 0 for file in files))
        listed = [self._described(file) for file in files]
        checked_files(listed)
        self._require_room(sum(file.size for file in listed))
        part_bytes(settings, listed)
        upload = uploads.create(self._project, "model", listed, ACTOR, title[:200])
        if upload.state is not UploadState.COMPLETE:
            self._receive(upload, {file.name: file for file in files})
        return upload_name(upload.digest)

    def _require_room(self, size: int) -> None:
        limit = self._services.settings.upload_limit_bytes
        if size > limit:
            raise TooLarge(f"the model has {size} bytes, over {limit}", "the operator may raise SAFER_UPLOAD_LIMIT_BYTES")

    def _described(self, file: ModelFile) -> UploadFile:
        sha, size = hashlib.sha256(), 0
        for chunk in self._bytes(file):
            sha.update(chunk)
            size += len(chunk)
            self._require_room(size)
        if file.size is not None and size != file.size:
            raise Unavailable(f"MLflow gave {size} of the {file.size} bytes of {file.name}")
        return UploadFile(file.name, sha.hexdigest(), size)

    def _receive(self, upload: UploadRecord, sources: dict[str, ModelFile]) -> None:
        uploads, files = self._services.uploads, UploadFiles(self._services.stores, self._project)
        each = part_bytes(self._services.settings, upload.files)
        whole, there = files.received(upload.id), {(part.file, part.part): part.size for part in files.parts(upload.id)}
        for index, file in enumerate(upload.files):
            got = sum(there.get((index, number), 0) for number in range(-(-file.size // each)))
            if file.digest in whole or got == file.size:
                continue
            for number, piece in enumerate(_pieces(self._bytes(sources[file.path]), each)):
                receipt = PartReceipt(len(piece), hashlib.sha256(piece).hexdigest())
                files.put_part(upload.id, index, number, [piece], receipt)
                uploads.add_part(self._project, upload.id, UploadPart(index, number, receipt.digest, receipt.size))
                self._beat()
        try:
            files.complete(upload.id, upload.files)
        except Conflict as error:  # the files were replaced between the two readings; what did not fit has been removed
            raise Unavailable(f"the version's files changed while they were read: {error.message}") from None
        uploads.complete(self._project, upload.id, ACTOR)

    def _bytes(self, file: ModelFile) -> Iterator[bytes]:
        with self._registry.open(file.source) as chunks:
            for chunk in chunks:
                self._beat()
                yield chunk


def _pieces(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of one size, the last of which may be shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
