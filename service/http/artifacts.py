"""Files of a job: listed, streamed with ranges, or fetched straight from the object store; and its report as a page."""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import RedirectResponse, Response

from service.artifact_names import DECISIONS_NAME, page_of
from service.http.auth import EditReader, Reader, allow
from service.http.errors import Responses, responses
from service.http.job_files import job_file, job_files, read_file, send_file
from service.http.parameters import JobId, ServicesDep
from service.http.streaming import attachment
from service.schemas import ArtifactList, ArtifactView

router = APIRouter(prefix="/v1/audits/{job_id}", tags=["artifacts"])
_BINARY = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
_FILE: Responses = {
    200: {"description": "The file.", **_BINARY},
    206: {"description": "The range of it that was asked for.", **_BINARY},
    304: {"description": "It is what the client has."},
    307: {"description": "To the object store, where `redirect=1` was asked for and it can."},
}
_HTML: Responses = {200: {"description": "The page.", "content": {"text/html": {"schema": {"type": "string"}}}}, 304: _FILE[304]}
Range = Annotated[str | None, Header(alias="Range", description="One range: `bytes=0-99`. Several give the whole file.")]


@router.get("/artifacts", response_model=ArtifactList, responses=responses())
def list_artifacts(job_id: JobId, who: Reader, services: ServicesDep) -> ArtifactList:
    """What the job has made so far."""
    found = job_files(services, services.jobs.get(who.project, job_id)).values()
    return ArtifactList(
        items=[ArtifactView(name=file.name, size=file.size, digest=file.digest, media_type=file.media_type) for file in found]
    )


@router.api_route("/artifacts/{name:path}", methods=["HEAD"], include_in_schema=False)
@router.get("/artifacts/{name:path}", response_class=Response, responses=responses(410, 416, own=_FILE))
def get_artifact(
    job_id: JobId,
    name: Annotated[str, Path(max_length=500, description="As listed; may hold `/`.")],
    who: EditReader,
    services: ServicesDep,
    request: Request,
    redirect: Annotated[bool, Query(description="Answer with a presigned address, where there is one.")] = False,
    _range: Range = None,
) -> Response:
    """One file. Its ETag is its sha256. A reviewer gets the exported decisions alone."""
    if name != DECISIONS_NAME:
        allow(who, "read")
    job = services.jobs.get(who.project, job_id)
    file = job_file(services, job, name)
    if redirect and services.settings.presign:
        url = services.store(job.project).presigned(file.stage, file.key, file.file, file.media_type)
        if url is not None:
            return RedirectResponse(url, 307, {"Cache-Control": "no-store"})
    return send_file(services, request, job, file, attachment(file.name))


@router.get("/report", response_class=Response, responses=responses(410, 416, own=_HTML))
def get_report(job_id: JobId, who: Reader, services: ServicesDep, request: Request) -> Response:
    """The report as a page that may run its own script and nothing else, and reach no network."""
    job = services.jobs.get(who.project, job_id)
    file = job_file(services, job, page_of(job.kind))
    page = read_file(services, job, file).decode("utf-8", errors="strict")
    return send_file(services, request, job, file, {"Content-Security-Policy": report_policy(page)})


def report_policy(page: str) -> str:
    """Content-Security-Policy of a report: exactly its one style and one script, by digest, in a sandbox of its own origin.

    A page with several of either gets none: a script that found its way in does not become allowed by being there.
    """
    reader = _Inline()
    reader.feed(page)
    reader.close()
    style, script = (_source(reader.found[tag]) for tag in ("style", "script"))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'; sandbox allow-scripts allow-popups allow-modals allow-downloads"
    )


def _source(texts: list[str]) -> str:
    if len(texts) != 1:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()}'"


class _Inline(HTMLParser):
    """Collects the content of style and script elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.found: dict[str, list[str]] = {"style": [], "script": []}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        if tag in self.found:
            self.found[tag].append("")
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        """Called by the parser."""
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        if self._inside:
            self.found[self._inside][-1] += data
