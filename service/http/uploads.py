"""Local models and datasets on their way to the service: declared, sent in parts, checked, and then named `upload:<digest>`.

An upload that broke off goes on: creating it again gives the same one, which says which parts have come.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request
from fastapi.responses import Response

from service.errors import Conflict, FieldProblem, NotFound, RequestInvalid, TooLarge
from service.http.auth import Submitter
from service.http.errors import Responses, responses
from service.http.parameters import ServicesDep, UploadId
from service.http.services import Services
from service.infra.settings import Settings
from service.infra.upload_files import PartReceipt, PartSink, UploadFiles, checked_files
from service.jobs.access import Principal
from service.jobs.uploads import UploadPart, UploadRecord, UploadState
from service.schemas import CreateUpload, PartDone, PartView, PresignedPart, UploadFileView, UploadView
from service.upload_names import UploadFile, upload_name

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])
MAX_PARTS = 10_000
PRESIGNED_SECONDS = 3600
_MiB = 1 << 20
_BUFFER = 4 * _MiB
_HEX = re.compile(r"^[0-9a-f]{64}$")
_RFC9530 = re.compile(r"(?:^|[,\s])sha-256=:([A-Za-z0-9+/=]+):")
_RFC3230 = re.compile(r"(?i)(?:^|[,\s])sha-256=([A-Za-z0-9+/=]+)")
_CREATED: Responses = {
    201: {"description": "New, or under way."},
    200: {"model": UploadView, "description": "It is here already."},
}
_BODY = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@dataclass(frozen=True)
class Place:
    """A part of a file of an upload, by numbers from 0."""

    upload_id: str
    index: int
    number: int


def _place(
    upload_id: UploadId,
    index: Annotated[int, Path(ge=0, lt=100_000, description="Index of the file in the upload.")],
    number: Annotated[int, Path(ge=0, lt=MAX_PARTS, description="Number of the part, from 0.")],
) -> Place:
    return Place(upload_id, index, number)


def given_digest(
    sha256: Annotated[
        str | None, Header(alias="X-Content-SHA256", max_length=200, description="sha256 of the part, in hex.")
    ] = None,
    content_digest: Annotated[
        str | None, Header(alias="Content-Digest", max_length=400, description="RFC 9530, in its place: `sha-256=:<base64>:`.")
    ] = None,
    digest: Annotated[
        str | None, Header(alias="Digest", max_length=400, description="RFC 3230, in its place: `sha-256=<base64>`.")
    ] = None,
) -> str:
    """The sha256 that a client gives for a part, in hex. Raises RequestInvalid where it gives none."""
    if sha256 is not None and _HEX.match(sha256.lower()):
        return sha256.lower()
    for header, pattern in ((content_digest, _RFC9530), (digest, _RFC3230)):
        match = pattern.search(header or "")
        if match and (raw := _decoded(match[1])) is not None:
            return raw.hex()
    problem = FieldProblem("header.X-Content-SHA256", "missing, or no sha256")
    raise RequestInvalid("the part's sha256 is missing", "send it in X-Content-SHA256, in hex", (problem,))


PartPlace = Annotated[Place, Depends(_place)]
PartDigest = Annotated[str, Depends(given_digest)]


@router.post("", status_code=201, response_model=UploadView, responses=responses(own=_CREATED))
def create_upload(asked: CreateUpload, who: Submitter, services: ServicesDep, response: Response) -> UploadView:
    """Declare the files of a model folder or a dataset. Files that the project has are not sent again."""
    files = [UploadFile(file.path, file.sha256, file.size) for file in asked.files]
    checked_files(files)
    size = sum(file.size for file in files)
    if size > services.settings.upload_limit_bytes:
        raise TooLarge(f"the upload has {size} bytes, over {services.settings.upload_limit_bytes}", "send a smaller sample")
    part_bytes(services.settings, files)
    started = services.uploads.create(who.project, asked.kind, files, who.key_id, asked.title)
    response.status_code = 200 if started.state is UploadState.COMPLETE else 201
    response.headers["Location"] = f"/v1/uploads/{started.id}"
    return _view(services, started)


@router.get("/{upload_id}", response_model=UploadView, responses=responses())
def get_upload(upload_id: UploadId, who: Submitter, services: ServicesDep) -> UploadView:
    """An upload, and the parts of it that have come."""
    return _view(services, services.uploads.get(who.project, upload_id))


@router.put(
    "/{upload_id}/files/{index}/parts/{number}",
    response_model=PartView,
    responses=responses(409),
    openapi_extra=_BODY,
)
async def put_part(place: PartPlace, digest: PartDigest, who: Submitter, services: ServicesDep, request: Request) -> PartView:
    """Send one part; one that is sent again replaces itself. Its sha256 is required and checked."""
    upload = await asyncio.to_thread(services.uploads.get, who.project, place.upload_id)
    size = _expected(services.settings, upload, place)
    files = UploadFiles(services.stores, upload.project)
    with files.receive(upload.id, place.index, place.number) as sink:
        await _receive(request, sink)
        receipt = await asyncio.to_thread(sink.finish, PartReceipt(size, digest))
    part = UploadPart(place.index, place.number, receipt.digest, receipt.size)
    await asyncio.to_thread(services.uploads.add_part, who.project, upload.id, part)
    return PartView(part=place.number, size=receipt.size, digest=receipt.digest)


@router.get("/{upload_id}/files/{index}/parts/{number}/presigned", response_model=PresignedPart, responses=responses(409))
def presign_part(place: PartPlace, who: Submitter, services: ServicesDep) -> PresignedPart:
    """Where a part may be put straight to the object store. Not found where there is no such store."""
    upload = services.uploads.get(who.project, place.upload_id)
    size = _expected(services.settings, upload, place)
    files = UploadFiles(services.stores, upload.project)
    url = files.presigned_part(upload.id, place.index, place.number, size, PRESIGNED_SECONDS)
    if url is None:
        raise NotFound("parts cannot go straight to the store here", "PUT them to this service")
    return PresignedPart(url=url, headers={"Content-Length": str(size)}, expires_seconds=PRESIGNED_SECONDS)


@router.post("/{upload_id}/files/{index}/parts/{number}", response_model=PartView, responses=responses(409))
def part_done(place: PartPlace, done: PartDone, who: Submitter, services: ServicesDep) -> PartView:
    """Say that a part was put straight to the object store. It is checked when the upload is completed."""
    upload = services.uploads.get(who.project, place.upload_id)
    size = _expected(services.settings, upload, place)
    if done.size != size:
        raise RequestInvalid(f"the part has {size} bytes", "", (FieldProblem("size", f"is to be {size}"),))
    services.uploads.add_part(who.project, upload.id, UploadPart(place.index, place.number, done.sha256, size, done.etag))
    return PartView(part=place.number, size=size, digest=done.sha256)


@router.post("/{upload_id}/complete", response_model=UploadView, responses=responses(409))
def complete_upload(upload_id: UploadId, who: Submitter, services: ServicesDep) -> UploadView:
    """Check every file against its sha256; from then on specs may name the upload. Doing it again is no error."""
    upload = services.uploads.get(who.project, upload_id)
    if upload.state is UploadState.OPEN:
        UploadFiles(services.stores, upload.project).complete(upload.id, upload.files)
        upload = services.uploads.complete(who.project, upload.id, who.key_id)
    return _view(services, upload)


@router.delete("/{upload_id}", status_code=204, response_class=Response, responses=responses(409))
def delete_upload(upload_id: UploadId, who: Submitter, services: ServicesDep) -> None:
    """Remove an upload, complete or not. One that a waiting or running job uses stays."""
    _remove(services, who, services.uploads.get(who.project, upload_id))


def part_bytes(settings: Settings, files: tuple[UploadFile, ...] | list[UploadFile]) -> int:
    """Size of the parts of an upload: as set, or more where a file would have over `MAX_PARTS`. Raises TooLarge."""
    largest = max((file.size for file in files), default=0)
    needed = -(-largest // MAX_PARTS)
    size = max(min(settings.s3_part_bytes, settings.upload_part_limit_bytes), -(-needed // _MiB) * _MiB)
    if size > settings.upload_part_limit_bytes:
        raise TooLarge(f"a file of {largest} bytes would have over {MAX_PARTS} parts", "split the file")
    return size


async def _receive(request: Request, sink: PartSink) -> None:
    """Write the body as it comes, in pieces that are worth a thread."""
    pending = bytearray()
    async for chunk in request.stream():
        pending += chunk
        if len(pending) >= _BUFFER:
            await asyncio.to_thread(sink.write, bytes(pending))
            pending.clear()
    await asyncio.to_thread(sink.write, bytes(pending))


def _remove(services: Services, who: Principal, upload: UploadRecord) -> None:
    services.uploads.remove(upload.project, upload.id, who.key_id)
    files = UploadFiles(services.stores, upload.project)
    files.abort(upload.id)
    if upload.state is UploadState.COMPLETE and services.uploads.find(upload.project, upload.digest) is None:
        files.remove(upload.digest)


def _decoded(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return raw if len(raw) == hashlib.sha256().digest_size else None


def _expected(settings: Settings, upload: UploadRecord, place: Place) -> int:
    """Bytes of a part. Raises NotFound where the upload has no such part, Conflict where it is complete."""
    if upload.state is not UploadState.OPEN:
        raise Conflict("the upload is complete", "start a new one for other content")
    each = part_bytes(settings, upload.files)
    begins = place.number * each
    if place.index >= len(upload.files) or begins >= upload.files[place.index].size:
        raise NotFound("the upload has no such part", "GET the upload: it says how many parts each file has")
    return min(each, upload.files[place.index].size - begins)


def _view(services: Services, upload: UploadRecord) -> UploadView:
    each = part_bytes(services.settings, upload.files)
    received: dict[int, list[PartView]] = {}
    for part in services.uploads.parts(upload.id):
        received.setdefault(part.file, []).append(PartView(part=part.part, size=part.size, digest=part.digest))
    complete = upload.state is UploadState.COMPLETE
    files = [
        UploadFileView(
            index=index,
            path=file.path,
            size=file.size,
            sha256=file.digest,
            parts=-(-file.size // each),
            received=received.get(index, []),
        )
        for index, file in enumerate(upload.files)
    ]
    return UploadView(
        id=upload.id,
        kind=upload.kind,
        state=upload.state,
        part_bytes=each,
        files=files,
        created=upload.created,
        expires=upload.expires,
        name=upload_name(upload.digest) if complete else None,
        digest=upload.digest if complete else None,
        presigned=services.stores.s3 is not None and services.settings.presign,
    )
