"""The pages in a real browser over a real server: live stages, keyboard, themes, no complaints, no foreign requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import render_html
from service.jobs.model import JobError, JobRecord
from service.jobs.requests import Finished
from tests.helpers import fake_artifacts
from tests.helpers.browser import UNFOLD, UNREADABLE, WatchedPage
from tests.helpers.http_world import edit_line, payloads
from tests.helpers.live_service import LiveService, live_service
from tests.helpers.servers import wait_until

pytestmark = [pytest.mark.full, pytest.mark.browser]


def until(page: Any, expression: str) -> None:
    """Wait for an expression to hold: the pages' policy forbids waiting for a text of script inside of them."""
    wait_until(lambda: bool(page.evaluate(expression)), expression)


class Site:
    """A server with jobs in every state."""

    def __init__(self, service: LiveService, folder: Path) -> None:
        self.url = service.url
        self.world = world = service.world
        audit = fake_artifacts.build(folder)
        document = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))
        contents = payloads()
        contents["report"] = {"report.html": render_html(document).encode(), "report.json": document.model_dump_json().encode()}
        edits = document.edits
        assert edits is not None
        lines = [edit_line(pair.pair_id, pair.action or "review", float(pair.suspicion)) for pair in edits.pairs]
        contents["edits"] = {"edits.jsonl": "".join(f"{line}\n" for line in map(_json, lines)).encode()}
        self.done = world.finish(world.submit(labels={"team": "safety", "long": "x" * 150}), contents)
        self.failed = world.submit()
        world.services.jobs.fail(
            world.lease(self.failed), JobError("model_refused", "the head is freshly initialised", "train it")
        )

    def running(self) -> JobRecord:
        """A job that a worker is at."""
        return self.world.submit(labels={"team": "safety"})


def _json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with live_service() as service:
        yield Site(service, tmp_path_factory.mktemp("fake"))


class Visit(WatchedPage):
    """A page of somebody who has logged in, with what it complained about and what it asked the network for."""

    def __init__(
        self, browser: Any, site: Site, *, role: str = "admin", width: int = 1280, scheme: str = "light", **given: Any
    ) -> None:
        super().__init__(browser, width=width, scheme=scheme, **given)
        self.site = site
        site.world.services.logins._buckets.clear()
        self.go("/login")
        self.page.fill("#key", site.world.keys["default", role])
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(f"{site.url}/")

    def go(self, path: str) -> Any:
        self.page.goto(f"{self.site.url}{path}")
        return self.page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaint_no_foreign_request_and_readable(browser: Any, site: Site, scheme: str) -> None:
    job = site.running()
    lease = site.world.lease(job)
    site.world.services.jobs.progress(lease, 1, 4, "rows")
    with Visit(browser, site, scheme=scheme) as visit:
        for path in (
            "/",
            f"/audits/{job.id}",
            f"/audits/{site.done.id}",
            f"/audits/{site.failed.id}",
            f"/audits/{site.done.id}/edits",
        ):
            page = visit.go(path)
            page.evaluate(UNFOLD)
            assert page.evaluate(UNREADABLE) == [], path
        frame = visit.go(f"/audits/{site.done.id}/report").frame_locator("iframe")
        frame.locator("h1").wait_for()
        assert frame.locator("#theme").get_attribute("aria-pressed") == ("true" if scheme == "dark" else "false")
        told = [text for text in visit.complaints if "Password forms should have" not in text]
        assert told == []
        assert [url for url in visit.requests if not url.startswith((site.url, "data:"))] == []


@pytest.mark.parametrize("path", ["/", "/audits/{done}", "/audits/{done}/edits", "/audits/{failed}"])
def test_narrow_screens_scroll_one_way(browser: Any, site: Site, path: str) -> None:
    with Visit(browser, site, width=360) as visit:
        page = visit.go(path.format(done=site.done.id, failed=site.failed.id))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_job_is_seen_to_run_and_end(browser: Any, site: Site) -> None:
    job = site.running()
    with Visit(browser, site) as visit:
        page = visit.go(f"/audits/{job.id}")
        assert "queued" in page.inner_text(".status")
        lease = site.world.lease(job)
        until(page, "document.querySelector('.status').textContent.includes('running')")
        site.world.services.jobs.progress(lease, 1, 4, "rows")
        until(page, "document.querySelector('progress')?.value === 1")
        site.world.services.jobs.finish(lease, Finished())
        until(page, "document.querySelectorAll('.step.done').length === 1")
        site.world.services.jobs.fail(site.world.lease(job), JobError("dataset_refused", "no pairs", "look at the rows"))
        until(page, "document.querySelector('.problem')?.textContent.includes('no pairs')")
        assert "failed" in page.inner_text(".status")
        assert page.locator("button", has_text="Try again").is_visible()


def test_the_list_follows_along(browser: Any, site: Site) -> None:
    job = site.running()
    with Visit(browser, site) as visit:
        page = visit.go("/")
        site.world.services.jobs.request_cancel("default", job.id, "test")
        row = f"[...document.querySelectorAll('tr')].find((row) => row.textContent.includes('{job.id}'))"
        until(page, f"{row}?.textContent.includes('cancelled')")


def test_without_scripts_everything_is_there(browser: Any, site: Site) -> None:
    with Visit(browser, site, java_script_enabled=False) as visit:
        page = visit.go(f"/audits/{site.done.id}/edits")
        page.locator(".edit .choices button", has_text="drop").first.click()
        page.wait_for_url(f"{site.url}/audits/{site.done.id}/edits**")
        assert page.locator(".edit.decided").count() == 1
        job = site.running()
        page = visit.go(f"/audits/{job.id}")
        page.locator("button", has_text="Cancel").click()
        page.locator(".state.cancelled").first.wait_for()
        assert page.locator("#theme").is_hidden()


def test_edits_are_decided_on_by_keyboard_alone(browser: Any, site: Site) -> None:
    with Visit(browser, site, role="review") as visit:
        page = visit.go(f"/audits/{site.done.id}/edits?decided=no")
        first = page.locator(".edit h2").first.inner_text()
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.id") == "pair-1"
        page.keyboard.press("t")
        assert page.locator("#pair-1 .texts").get_attribute("open") is not None
        page.keyboard.press("j")
        page.keyboard.press("k")
        assert page.evaluate("document.activeElement.id") == "pair-1"
        with page.expect_navigation():
            page.keyboard.press("1")
        assert page.locator(".edit h2").first.inner_text() != first
        assert page.evaluate("document.activeElement.id") == "pair-1"
        history = site.world.services.reviews.history(site.done.id, first)
        assert [found.action for found in history] == ["keep"]
        page.focus("#pair-1 input[name=note]")
        page.keyboard.type("1 2 3")
        assert page.input_value("#pair-1 input[name=note]") == "1 2 3"


def test_the_theme_is_chosen_and_kept(browser: Any, site: Site) -> None:
    with Visit(browser, site) as visit:
        page = visit.go("/")
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        page = visit.go(f"/audits/{site.done.id}")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_login_link_logs_in_and_leaves_no_token_behind(browser: Any, site: Site) -> None:
    context = browser.new_context()
    page = context.new_page()
    site.world.services.logins._buckets.clear()
    page.goto(f"{site.url}/login#{site.world.keys['default', 'read']}")
    page.wait_for_url(f"{site.url}/")
    page.go_back()
    assert "sk-safer-" not in page.url
    context.close()


def test_the_report_cannot_reach_the_session(browser: Any, site: Site) -> None:
    with Visit(browser, site) as visit:
        page = visit.go(f"/v1/audits/{site.done.id}/report")
        assert page.evaluate("window.origin") == "null"
        for reach in ("document.cookie", "localStorage.length", f"fetch('{site.url}/v1/me').then((r) => r.text())"):
            with pytest.raises(Exception, match=r"Security|sandboxed|Failed to fetch|denied"):
                page.evaluate(reach)


def test_everything_is_reached_by_tab_with_a_visible_focus(browser: Any, site: Site) -> None:
    with Visit(browser, site) as visit:
        page = visit.go(f"/audits/{site.failed.id}")
        seen = []
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            seen.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
        assert seen[0] == "Skip to the page"
        assert {"Try again", "Delete", "Log out", "As it was validated"} <= set(seen)
