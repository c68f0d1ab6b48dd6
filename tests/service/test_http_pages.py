"""Pages for people: logging in, what is shown to whom, and forms."""

import re
from html import unescape
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.http.auth import COOKIE
from service.http.pages.session import local_path
from service.jobs.model import JobError, JobKind, JobRecord
from tests.helpers.http_world import CANARY, HttpWorld, http_world


@pytest.fixture(scope="module")
def job(world: HttpWorld) -> JobRecord:
    return world.finished(labels={"team": "safety"})


def visit(world: HttpWorld, role: str = "admin", project: str = "default") -> TestClient:
    """Somebody who has logged in."""
    world.services.logins._buckets.clear()
    client = world.client(None)
    response = client.post("/login", data={"key": world.keys[project, role], "next": "/"})
    assert response.status_code == 303, response.text
    return client


def token(page: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found is not None
    return found[1]


def test_pages_ask_to_log_in_and_lead_back(world: HttpWorld, job: JobRecord) -> None:
    client = world.client(None)
    response = client.get(f"/audits/{job.id}/edits")
    assert (response.status_code, response.headers["location"]) == (303, f"/login?next=/audits/{job.id}/edits")
    page = client.get(response.headers["location"]).text
    assert f'value="/audits/{job.id}/edits"' in page
    begun = client.post("/login", data={"key": world.keys["default", "read"], "next": f"/audits/{job.id}/edits"})
    assert (begun.status_code, begun.headers["location"]) == (303, f"/audits/{job.id}/edits")
    cookie = begun.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("httponly", "samesite=strict", "path=/", "max-age="))
    assert "secure" not in cookie
    assert client.get(begun.headers["location"]).status_code == 200
    assert world.keys["default", "read"] not in begun.headers["set-cookie"]


def test_the_cookie_is_for_https_where_the_service_is_reached_so() -> None:
    with http_world(public_url="https://audit.example") as world:
        response = world.client(None).post("/login", data={"key": world.keys["default", "read"]})
        assert "secure" in response.headers["set-cookie"].lower()
        assert response.headers["strict-transport-security"] == "max-age=31536000"


@pytest.mark.parametrize("key", ["", "sk-safer-" + "A" * 43, "é", "x" * 500, "sk-safer-\0"])
def test_a_wrong_token_begins_nothing(world: HttpWorld, key: str) -> None:
    world.services.logins._buckets.clear()
    response = world.client(None).post("/login", data={"key": key})
    assert response.status_code in (400, 401)
    assert "set-cookie" not in response.headers


def test_guessing_tokens_is_slow(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.services.logins, "_clock", lambda: 0.0)
    world.services.logins._buckets.clear()
    client = world.client(None)
    codes = [client.post("/login", data={"key": "x"}).status_code for _ in range(12)]
    assert codes == [401] * 10 + [429] * 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}, 303),
    ],
)
def test_other_sites_cannot_log_anyone_in(world: HttpWorld, headers: dict[str, str], status: int) -> None:
    world.services.logins._buckets.clear()
    response = world.client(None).post("/login", data={"key": world.keys["default", "read"]}, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    "given",
    ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "", "x", "/a\nb", "\\\\x", "/a\\b"],
)
def test_logging_in_leads_nowhere_else(given: str) -> None:
    assert local_path(given) == "/"


def test_local_paths_are_kept() -> None:
    assert local_path("/audits/X/edits?action=drop#pair-3") == "/audits/X/edits?action=drop#pair-3"


def test_logging_out_ends_the_session(world: HttpWorld) -> None:
    client = visit(world)
    page = client.get("/").text
    assert client.post("/logout", data={"token": token(page)}).status_code == 303
    assert client.get("/").status_code == 303


def test_the_list_shows_the_projects_jobs(world: HttpWorld, job: JobRecord) -> None:
    page = visit(world).get("/").text
    assert job.id in page
    assert "team=safety" in page
    assert job.id in visit(world).get("/?state=succeeded").text
    assert job.id not in visit(world).get("/?state=failed").text
    assert job.id not in visit(world, project="other").get("/").text


def test_the_list_goes_on_to_older_jobs(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.pages.routes._JOBS_PAGE", 1)
    older, newer = world.submit(), world.submit()
    client = visit(world)
    first = client.get("/").text
    following = re.search(r'href="(/\?cursor=[^"]+)" rel="next"', first)
    assert following is not None
    second = client.get(unescape(following[1])).text
    assert (newer.id in first, older.id in first, older.id in second, newer.id in second) == (True, False, True, False)


def test_a_job_shows_steps_files_and_ways_on(world: HttpWorld, job: JobRecord) -> None:
    page = visit(world).get(f"/audits/{job.id}").text
    for expected in (
        "computed",
        f"/audits/{job.id}/report",
        f"/audits/{job.id}/edits",
        "artifacts/sae/sae.json",
        "state: succeeded",
    ):
        assert expected in page
    assert "data-live" not in page


def test_a_running_job_lives_with_and_without_a_script(world: HttpWorld) -> None:
    job = world.submit()
    lease = world.lease(job)
    world.services.jobs.progress(lease, 3, 4, "rows")
    client = visit(world)
    page = client.get(f"/audits/{job.id}").text
    assert f'data-live="/audits/{job.id}/live"' in page
    assert f"/v1/audits/{job.id}/events?after=" in page
    assert '<noscript><meta http-equiv="refresh"' in page
    fragment = client.get(f"/audits/{job.id}/live").text
    assert '<progress max="4.0" value="3.0"' in fragment
    assert "<html" not in fragment
    assert "75 %" in fragment


def test_an_error_is_shown_with_its_hint_and_escaped(world: HttpWorld) -> None:
    job = world.submit()
    world.services.jobs.fail(world.lease(job), JobError("model_refused", "<script>alert(1)</script>", "train & retry"))
    page = visit(world).get(f"/audits/{job.id}").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "train &amp; retry" in page
    assert "<script>alert" not in page


def test_roles_decide_what_a_page_shows(world: HttpWorld, job: JobRecord) -> None:
    submitter = visit(world, "submit").get(f"/audits/{job.id}").text
    reader = visit(world, "read").get(f"/audits/{job.id}").text
    assert ("artifacts/" in submitter, "Delete" in submitter) == (False, True)
    assert ("artifacts/" in reader, "Delete" in reader) == (True, False)
    assert 'class="decide"' not in visit(world, "read").get(f"/audits/{job.id}/edits").text
    assert 'class="decide"' in visit(world, "review").get(f"/audits/{job.id}/edits").text
    for role, path, status in (
        ("submit", "edits", 403), ("submit", "report", 403), ("review", "report", 403), ("redteam", "live", 403),
        ("read", "report", 200),
    ):  # fmt: skip
        assert visit(world, role).get(f"/audits/{job.id}/{path}").status_code == status, (role, path)
    assert visit(world, "redteam").get("/").status_code == 403


@pytest.mark.parametrize("path", ["", "/live", "/report", "/edits"])
def test_pages_of_another_project_are_not_there(world: HttpWorld, job: JobRecord, path: str) -> None:
    response = visit(world, project="other").get(f"/audits/{job.id}{path}")
    assert (response.status_code, response.headers["content-type"]) == (404, "text/html; charset=utf-8")


def test_buttons_do_what_they_say_and_only_for_this_session(world: HttpWorld) -> None:
    job = world.submit()
    client, other = visit(world, "submit"), visit(world, "admin")
    mine, theirs = token(client.get("/").text), token(other.get("/").text)
    path = f"/audits/{job.id}"
    for given in ({"x": "y"}, {"token": theirs}, {"token": ""}, {"token": mine[:-1]}):
        assert client.post(f"{path}/cancel", data=given).status_code == 403
    foreign = {"Origin": "http://evil.example"}
    assert client.post(f"{path}/cancel", data={"token": mine}, headers=foreign).status_code == 403
    assert client.post(f"{path}/cancel", json={"token": mine}).status_code == 400
    assert world.services.jobs.job(job.id).state == "queued"
    assert client.post(f"{path}/cancel", data={"token": mine}).headers["location"] == path
    assert world.services.jobs.job(job.id).state == "cancelled"
    assert client.post(f"{path}/retry", data={"token": mine}).status_code == 303
    assert world.services.jobs.job(job.id).state == "queued"
    assert client.post(f"{path}/delete", data={"token": mine}).status_code == 409
    client.post(f"{path}/cancel", data={"token": mine})
    assert client.post(f"{path}/delete", data={"token": mine}).headers["location"] == "/"
    assert client.get(path).status_code == 404
    assert client.post(f"{path}/explode", data={"token": mine}).status_code == 422


def test_errors_are_pages_where_a_browser_asks(world: HttpWorld) -> None:
    browser = {"Accept": "text/html,*/*;q=0.8"}
    client = visit(world, "read")
    wrong = client.get("/?state=zzz", headers=browser)
    assert (wrong.status_code, wrong.headers["content-type"]) == (422, "text/html; charset=utf-8")
    assert "query.state" in wrong.text
    missing = client.get("/nope", headers=browser)
    assert (missing.status_code, "there is no such page" in missing.text) == (404, True)
    assert client.get("/v1/nope", headers=browser).json()["code"] == "not_found"
    assert client.get("/nope").json()["code"] == "not_found"
    stranger = world.client(None).get("/?state=failed&kind=audit", follow_redirects=False)
    assert stranger.headers["location"] == "/login?next=/%3Fstate%3Dfailed%26kind%3Daudit"


def test_a_form_that_leads_elsewhere_decides_nothing(world: HttpWorld) -> None:
    job, client = world.finished(), visit(world, "review")
    fields = {"token": token(client.get("/").text), "pair_id": "p-0", "action": "drop", "back": "//evil.example/"}
    assert client.post(f"/audits/{job.id}/edits", data=fields).status_code == 403
    assert world.services.reviews.latest(job.id) == {}


def test_a_reader_has_no_buttons_to_press(world: HttpWorld, job: JobRecord) -> None:
    client = visit(world, "read")
    fields = {"token": token(client.get("/").text), "pair_id": "p-0", "action": "drop", "back": f"/audits/{job.id}/edits"}
    for deed in ("cancel", "retry", "delete", "edits", "export"):
        assert client.post(f"/audits/{job.id}/{deed}", data=fields).status_code == 403, deed


def test_edits_are_shown_with_their_texts_and_decided_on(world: HttpWorld) -> None:
    job, client = world.finished(), visit(world, "review")
    path = f"/audits/{job.id}/edits"
    page = client.get(path).text
    order = re.findall(r'<h2 id="pair-\d+-title"><code>(.*?)</code>', page)
    assert [unescape(each) for each in order] == ["p/1", "p-4", "é ✓", '"suspicion": 1']
    assert f"{CANARY} &lt;b&gt;chosen&lt;/b&gt;" in page
    assert "6 characters are left out here" in page
    fields = {"token": token(page), "pair_id": "p/1", "action": "keep", "note": "fine", "back": f"{path}?action=drop#pair-2"}
    decided = client.post(path, data=fields)
    assert (decided.status_code, decided.headers["location"]) == (303, f"{path}?action=drop#pair-2")
    after = client.get(path).text
    assert "decided by review of default" in after
    assert "“fine”" in after
    assert "p/1" not in re.findall(r"<code>(.*?)</code>", client.get(f"{path}?decided=no").text)
    for wrong, status in (
        ({"action": "burn"}, 422),
        ({"pair_id": "p-9"}, 404),
        ({"back": "https://evil.example"}, 403),
        ({"note": "x" * 2001}, 422),
    ):
        assert client.post(path, data=fields | wrong).status_code == status, wrong
    exported = client.post(f"/audits/{job.id}/export", data={"token": token(page)})
    assert exported.headers["location"] == f"/v1/audits/{job.id}/artifacts/decisions.jsonl"


def test_the_report_is_framed_in_a_sandbox(world: HttpWorld, job: JobRecord) -> None:
    client = visit(world, "read")
    page = client.get(f"/audits/{job.id}/report")
    assert "allow-same-origin" not in page.text
    assert "frame-src 'self'" in page.headers["content-security-policy"]
    framed = client.get(f"/v1/audits/{job.id}/report")
    assert "frame-ancestors 'self'" in framed.headers["content-security-policy"]
    assert "x-frame-options" not in framed.headers


@pytest.mark.parametrize(
    "path", ["/", "/login", "/audits/{job}", "/audits/{job}/edits", "/audits/{job}/report", "/audits/nothing"]
)
def test_pages_hold_no_inline_script_or_style_and_nothing_from_elsewhere(world: HttpWorld, job: JobRecord, path: str) -> None:
    response = visit(world).get(path.format(job=job.id))
    assert "'unsafe" not in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert not re.findall(r"<style|style=|\son\w+=|<script(?! src=\"/static/)", response.text)
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', response.text)
    assert all(address.startswith(("/", "data:,", "#")) and not address.startswith("//") for address in addresses)


def test_static_files_are_ours_and_kept(world: HttpWorld) -> None:
    client: Any = world.client(None)
    response = client.get("/static/pages.js")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert "immutable" in response.headers["cache-control"]
    for name in ("nothing", "..%2froutes.py", "%2e%2e", "__init__.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_a_fault_of_a_page_is_a_page(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/secret/path")

    client = visit(world)
    monkeypatch.setattr(world.services.jobs, "find", fail)
    response = client.get("/")
    assert (response.status_code, response.headers["content-type"]) == (500, "text/html; charset=utf-8")
    assert "secret" not in response.text


def test_a_verification_is_shown_as_one(world: HttpWorld) -> None:
    job = world.submit(kind=JobKind.VERIFY)
    assert "Verification of org/rm" in visit(world).get(f"/audits/{job.id}").text
    assert "verification of" in visit(world).get("/").text


def test_a_training_is_shown_too(world: HttpWorld) -> None:
    job = world.submit(kind=JobKind.TRAIN_RM)
    assert "Training of org/base" in visit(world).get(f"/audits/{job.id}").text
    assert visit(world).get(f"/audits/{job.id}/edits").status_code == 404
    assert COOKIE in visit(world).cookies
