"""What each page shows. A page reads through the same functions as the API, under the same roles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from service.artifact_names import page_of
from service.errors import Gone, NotAllowed, NotFound, RequestInvalid
from service.http.audits import view_of
from service.http.auth import allow, authenticate, client_of
from service.http.edit_rows import EditFilter
from service.http.edits import decide, decision_view, edit_rows, export_decisions
from service.http.job_files import job_file, job_files
from service.http.pages.pair_texts import pair_texts
from service.http.pages.render import STATIC, render, static_file
from service.http.pages.session import Form, PageRoute, SessionForm, Visitor, VisitorDep, begin, end, local_path
from service.http.parameters import JobId, ServicesDep
from service.http.services import Services
from service.http.views import Subject, subject_of, summary, upload_names
from service.jobs.model import FINAL_JOB_STATES, JobRecord, JobState
from service.jobs.requests import JobQuery
from service.schemas import Decide
from service.upload_names import UPLOAD

router = APIRouter(include_in_schema=False, route_class=PageRoute)
_JOBS_PAGE, _EDITS_PAGE, _EVENTS = 50, 20, 100
_ACTIONS = ("keep", "review", "drop", "flip")
_WATCH, _READ, _EDITS = ("submit", "read", "review"), ("read",), ("read", "review")
_CACHED = {"Cache-Control": "public, max-age=31536000, immutable"}


@router.get("/static/{name}")
def static(name: Annotated[str, Path(max_length=40)]) -> Response:
    """Our own stylesheet and script."""
    if name not in STATIC:
        raise NotFound("there is no such file")
    return Response(static_file(name), media_type=STATIC[name], headers=_CACHED)


@router.get("/login")
def login_page(after: Annotated[str, Query(alias="next", max_length=500)] = "/") -> Response:
    """Asks for a token."""
    return render("login.html.j2", {"after": local_path(after), "wrong": False, "visitor": None})


@router.post("/login")
def login(request: Request, services: ServicesDep, fields: Form) -> Response:
    """Begins a session, if the token is one."""
    services.logins.take(client_of(request))
    after = local_path(fields.get("next", "/"))
    who = authenticate(services, fields.get("key", "").strip())
    if who is None:
        return render("login.html.j2", {"after": after, "wrong": True, "visitor": None}, 401)
    return begin(request, services, who, after)


@router.post("/logout")
def logout(_fields: SessionForm) -> Response:
    """Ends the session."""
    return end()


@router.get("/")
def jobs_page(
    seen: VisitorDep,
    services: ServicesDep,
    state: JobState | None = None,
    cursor: Annotated[str | None, Query(max_length=400, pattern=r"^[A-Za-z0-9_=-]+$")] = None,
) -> Response:
    """The project's jobs."""
    allow(seen.who, *_WATCH)
    query = JobQuery(states=(state,) if state else ())
    page = services.jobs.find(seen.who.project, query, cursor, _JOBS_PAGE)
    names = upload_names(services.uploads, seen.who.project, (job.spec for job in page.items))
    rows = [{"job": summary(job, names), "subject": _subject(job, names)} for job in page.items]
    live = any(job.state not in FINAL_JOB_STATES for job in page.items)
    context = {"rows": rows, "next": page.next, "state": state, "states": list(JobState), "live": live, "first": cursor is None}
    return render("jobs.html.j2", {"visitor": seen, **context})


@router.get("/audits/{job_id}")
def job_page(job_id: JobId, seen: VisitorDep, services: ServicesDep) -> Response:
    """One job."""
    return render("job.html.j2", _job_context(services, seen, job_id))


@router.get("/audits/{job_id}/live")
def job_fragment(job_id: JobId, seen: VisitorDep, services: ServicesDep) -> Response:
    """The part of a job's page that changes while it runs."""
    return render("live.html.j2", _job_context(services, seen, job_id))


@router.post("/audits/{job_id}/{deed}")
def act(
    job_id: JobId,
    deed: Annotated[str, Path(pattern="^(cancel|retry|delete|export|edits)$")],
    seen: VisitorDep,
    services: ServicesDep,
    fields: SessionForm,
) -> Response:
    """What the buttons of a job's pages do."""
    if deed in ("export", "edits"):
        return _review(services, seen, job_id, deed, fields)
    allow(seen.who, "submit")
    project, actor = seen.who.project, seen.who.key_id
    if deed == "delete":
        services.jobs.delete(project, job_id, actor)
        return RedirectResponse("/", 303)
    if deed == "cancel":
        services.jobs.request_cancel(project, job_id, actor)
    else:
        services.jobs.retry(project, job_id, actor)
        services.sender.wake()
    return RedirectResponse(f"/audits/{job_id}", 303)


@router.get("/audits/{job_id}/report")
def report_page(job_id: JobId, seen: VisitorDep, services: ServicesDep) -> Response:
    """The report, in a frame of its own origin."""
    allow(seen.who, *_READ)
    job = services.jobs.get(seen.who.project, job_id)
    job_file(services, job, page_of(job.kind))
    return render("report.html.j2", {"visitor": seen, **_heading(services, job)})


@router.get("/audits/{job_id}/edits")
def edits_page(
    job_id: JobId,
    seen: VisitorDep,
    services: ServicesDep,
    *,
    action: Annotated[str, Query(pattern="^(|keep|review|drop|flip)$")] = "",
    decided: Annotated[str, Query(pattern="^(|yes|no)$")] = "",
    cursor: Annotated[str | None, Query(max_length=400, pattern=r"^[A-Za-z0-9_=-]+$")] = None,
) -> Response:
    """Recommended edits, most suspicious first, with a form to decide on each."""
    allow(seen.who, *_EDITS)
    job = services.jobs.get(seen.who.project, job_id)
    decisions = services.reviews.latest(job.id)
    actions = frozenset((action,)) if action else frozenset(_ACTIONS[1:])
    wanted = EditFilter(actions, decided=None if not decided else decided == "yes")
    with edit_rows(services, job) as rows:
        page = rows.page(wanted, decisions, cursor, _EDITS_PAGE)
    texts = pair_texts(services, job)
    items = [
        {"line": line, "decision": decision_view(decisions.get(line["pair_id"])), "texts": texts.get(line["pair_id"])}
        for line in page.lines
    ]
    context = {
        "items": items,
        "next": page.next,
        "cursor": cursor or "",
        "action": action,
        "decided": decided,
        "actions": _ACTIONS,
    }
    count = {"n_decided": len(decisions), "may_decide": seen.may("review")}
    return render("edits.html.j2", {"visitor": seen, **_heading(services, job), **context, **count})


def _heading(services: Services, job: JobRecord) -> dict[str, Any]:
    names = upload_names(services.uploads, job.project, (job.spec,))
    return {"job": summary(job, names), "subject": _subject(job, names)}


def _subject(job: JobRecord, names: Mapping[str, str]) -> Subject:
    """What a job is about, as people call it: an upload by its file or folder, else by the beginning of its digest."""
    named = subject_of(job.spec)
    model, dataset = (names.get(name) or _short(name) for name in (named.model, named.dataset))
    return Subject(model, dataset, named.between)


def _short(name: str) -> str:
    return name[: len(UPLOAD) + 10] + "…" if name.startswith(UPLOAD) else name


def _job_context(services: Services, seen: Visitor, job_id: str) -> dict[str, Any]:
    allow(seen.who, *_WATCH)
    job = services.jobs.get(seen.who.project, job_id)
    files = job_files(services, job) if seen.may("read", "review") else {}
    shown = [file for name, file in files.items() if not name.startswith("stages/")]
    events = services.jobs.events(job.id)[-_EVENTS:]
    view = view_of(services, job)
    return {
        "visitor": seen,
        "job": view,
        "subject": _subject(job, view.names),
        "files": shown if seen.may("read") else [],
        "n_inner": len(files) - len(shown),
        "removed": _removed(services, job) if seen.may("read") and page_of(job.kind) not in files else "",
        "has_report": page_of(job.kind) in files and seen.may("read"),
        "has_edits": "edits.jsonl" in files,
        "events": [(event, _told(event.data)) for event in reversed(events)],
        "final": job.state in FINAL_JOB_STATES,
        "spec": json.dumps(job.spec, indent=2, ensure_ascii=False),
        "may_submit": seen.may("submit"),
    }


def _removed(services: Services, job: JobRecord) -> str:
    """That the report was removed, if it was."""
    try:
        job_file(services, job, page_of(job.kind))
    except Gone as gone:
        return f"{gone.message}. {gone.hint[0].upper()}{gone.hint[1:]}."
    except NotFound:
        pass
    return ""


def _told(data: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in data.items() if not isinstance(value, (dict, list)))


def _review(services: Services, seen: Visitor, job_id: str, deed: str, fields: dict[str, str]) -> Response:
    allow(seen.who, "review")
    job = services.jobs.get(seen.who.project, job_id)
    if deed == "export":
        export_decisions(services, seen.who, job)
        return RedirectResponse(f"/v1/audits/{job.id}/artifacts/decisions.jsonl", 303)
    action, note = fields.get("action", ""), fields.get("note", "")
    try:
        decided = Decide.model_validate({"action": action, "note": note})
    except ValidationError:
        raise RequestInvalid("the decision cannot be read", "choose a button; a note has at most 2000 characters") from None
    back = local_path(fields.get("back", ""))
    if not back.startswith(f"/audits/{job.id}/edits"):
        raise NotAllowed("the form leads elsewhere", "load the page again")
    decide(services, seen.who, job, fields.get("pair_id", ""), decided)
    return RedirectResponse(back, 303)
