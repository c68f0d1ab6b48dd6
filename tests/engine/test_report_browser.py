"""The report in a real browser: no errors, no requests, keyboard, themes, contrast, narrow screens, print."""

from pathlib import Path
from typing import Any

import pytest

from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import MAX_BYTES, render_html
from safer_engine.report.model import Text
from tests.helpers import fake_artifacts
from tests.helpers.browser import UNFOLD, UNREADABLE, WatchedPage

pytestmark = [pytest.mark.full, pytest.mark.browser]

EVALUATION: dict[str, Any] = {"evaluation": {"source": {"kind": "local", "path": "data/eval.jsonl"}}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    written = {}
    for name, options in {
        "plain": EVALUATION,
        "hostile": {"hostile": True, "long_text": 100_000},
        "bare": {"report": {"text": False}},
    }.items():
        audit = fake_artifacts.build(folder / name, **options)
        report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))
        written[name] = folder / f"{name}.html"
        written[name].write_text(render_html(report), encoding="utf-8")
    return written


class Visit(WatchedPage):
    """A report that is open."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1440, scheme: str = "light") -> None:
        super().__init__(browser, width=width, scheme=scheme)
        self.page.goto(path.as_uri())


@pytest.mark.parametrize("name", ["plain", "hostile", "bare"])
def test_no_complaint_no_request_and_small(browser: Any, files: dict[str, Path], name: str) -> None:
    with Visit(browser, files[name]) as visit:
        if visit.page.query_selector("#reveal-all"):
            visit.page.click("#reveal-all")
        visit.page.evaluate(UNFOLD)
        visit.page.mouse.wheel(0, 5_000)
        visit.page.hover(".plot.wide-only .dot >> nth=0", force=True)
        assert visit.complaints == []
        outside = [url for url in visit.requests if url != files[name].as_uri() and not url.startswith("data:")]
        assert outside == []
        assert files[name].stat().st_size <= MAX_BYTES


def test_texts_are_hidden_until_asked_for_by_keyboard(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        veil = page.locator(".veil").first
        body = veil.locator(".veil-body")
        assert "blur" in body.evaluate("(node) => getComputedStyle(node).filter")
        assert body.evaluate("(node) => node.inert")
        for _ in range(200):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.className") == "veil-button":
                break
        assert page.evaluate("document.activeElement.textContent") == "Show text"
        page.keyboard.press("Enter")
        assert body.evaluate("(node) => getComputedStyle(node).filter") == "none"
        assert not body.evaluate("(node) => node.inert")
        assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        page.keyboard.press("Space")
        assert "blur" in body.evaluate("(node) => getComputedStyle(node).filter")


def test_hidden_texts_cannot_be_reached_or_selected(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        assert visit.page.evaluate("[...document.querySelectorAll('.veil-body')].every((node) => node.inert)")
        visit.page.keyboard.press("Control+a")
        assert "Nobody ever checks" not in visit.page.evaluate("String(getSelection())")


def test_harsh_words_are_shown_with_the_texts_of_their_card(browser: Any, tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path / "store")
    report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "2026-01-02T03:04:05Z"))
    changes = {"direction": "harmful_content", "explanation": None, "terms": [Text(text="knife"), Text(text="stab")]}
    features = [feature.model_copy(update=changes) if n < 2 else feature for n, feature in enumerate(report.features or [])]
    (tmp_path / "report.html").write_text(render_html(report.model_copy(update={"features": features})))
    with Visit(browser, tmp_path / "report.html") as visit:
        page = visit.page
        total = page.locator(".harsh").count()
        assert page.locator(".harsh > [inert]").count() == total > 0
        card = page.locator(".card", has=page.locator(".harsh")).first
        word = card.locator(".harsh > span").first
        assert "blur" in word.evaluate("(node) => getComputedStyle(node).filter")
        page.emulate_media(media="print")
        assert not word.is_visible()
        page.emulate_media(media="screen")
        card.locator(".veil-button").first.click()
        assert card.locator(".harsh > [inert]").count() == 0
        assert page.locator(".harsh > [inert]").count() < total
        page.click("#reveal-all")
        assert page.locator(".harsh > [inert]").count() == 0


def test_all_texts_at_once(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        total = page.locator(".veil").count()
        assert total > 10
        page.click("#reveal-all")
        assert page.locator(".veil.open").count() == total
        assert page.text_content("#reveal-all") == "Hide all texts"
        page.locator(".veil-button").first.click()
        assert page.get_attribute("#reveal-all", "aria-pressed") == "false"
        page.click("#reveal-all")
        page.click("#reveal-all")
        assert page.locator(".veil.open").count() == 0


def test_theme_follows_the_system_and_the_button(browser: Any, files: dict[str, Path]) -> None:
    shade = "getComputedStyle(document.body).backgroundColor"
    with Visit(browser, files["plain"]) as light, Visit(browser, files["plain"], scheme="dark") as dark:
        day, night = light.page.evaluate(shade), dark.page.evaluate(shade)
        assert day != night
        light.page.click("#theme")
        assert light.page.evaluate(shade) == night
        assert light.page.get_attribute("#theme", "aria-pressed") == "true"
        dark.page.click("#theme")
        assert dark.page.evaluate(shade) == day


@pytest.mark.parametrize("width", [320, 375, 768, 1300, 1440])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_nothing_runs_off_the_side(browser: Any, files: dict[str, Path], width: int, name: str) -> None:
    with Visit(browser, files[name], width=width) as visit:
        visit.page.evaluate(UNFOLD)
        visit.page.click("#reveal-all")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1300, 1440])
def test_tables_fit_their_card_on_a_laptop(browser: Any, files: dict[str, Path], width: int) -> None:
    with Visit(browser, files["plain"], width=width) as visit:
        visit.page.evaluate(UNFOLD)
        wraps = "[...document.querySelectorAll('.table-wrap')]"
        assert visit.page.evaluate(f"{wraps}.filter((n) => n.scrollWidth > n.clientWidth).map((n) => n.ariaLabel)") == []


def test_narrow_and_wide_plots_take_turns(browser: Any, files: dict[str, Path]) -> None:
    for width, shown, hidden in ((1440, ".wide-only", ".narrow-only"), (375, ".narrow-only", ".wide-only")):
        with Visit(browser, files["plain"], width=width) as visit:
            assert visit.page.locator(shown).is_visible()
            assert not visit.page.locator(hidden).is_visible()


def test_the_table_sorts(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        page.evaluate(UNFOLD)
        cells = "[...document.querySelectorAll('.sortable tbody tr')].map((row) => Number(row.cells[5].dataset.v))"
        page.click(".sortable thead th:nth-child(6) button")
        assert page.evaluate(cells) == sorted(page.evaluate(cells), reverse=True)
        page.click(".sortable thead th:nth-child(6) button")
        assert page.evaluate(cells) == sorted(page.evaluate(cells))
        assert page.get_attribute(".sortable thead th:nth-child(6)", "aria-sort") == "ascending"
        page.click(".sortable thead th:nth-child(3) button")
        ratings = page.evaluate("[...document.querySelectorAll('.sortable tbody tr')].map((row) => row.cells[2].dataset.v)")
        known = [int(value) for value in ratings if value]
        assert known == sorted(known, reverse=True)
        assert ratings[len(known) :] == [""] * (len(ratings) - len(known))


def test_pairs_can_be_filtered(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        page.select_option("#pair-filters select[data-field=axis]", "chat")
        page.select_option("#pair-filters select[data-field=action]", "drop")
        assert page.text_content("#pair-matches") == "4 shown"
        visible = page.locator(".pair:visible")
        assert visible.count() == 4
        assert all(visible.nth(i).get_attribute("data-axis") == "chat" for i in range(4))


def test_a_link_to_a_folded_card_unfolds_it(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        folded = page.evaluate("document.querySelector('details.block .card').id")
        assert not page.locator(f"#{folded}").is_visible()
        page.evaluate(f"location.hash = '#{folded}'")
        page.wait_for_selector(f"#{folded}", state="visible")


def test_tooltips_show_on_hover_and_focus(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        dot = page.locator(".plot.wide-only .chosen-dot").first
        dot.scroll_into_view_if_needed()
        # Scrolling hides a tip, and the last scroll event may come after the pointer: hover until it rests.
        for _ in range(20):
            page.mouse.move(0, 0)
            dot.hover(force=True)
            page.wait_for_timeout(200)
            if page.locator("#tip.on").count():
                break
        page.wait_for_selector("#tip.on", timeout=1000)
        assert "salience +" in page.text_content("#tip")
        page.keyboard.press("Escape")
        last = page.locator(".plot.wide-only a[aria-label]").last
        last.scroll_into_view_if_needed()
        page.wait_for_timeout(200)
        last.focus()
        page.wait_for_selector("#tip.on")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_text_stands_out_from_its_ground(browser: Any, files: dict[str, Path], scheme: str, name: str) -> None:
    with Visit(browser, files[name], scheme=scheme) as visit:
        visit.page.click("#reveal-all")
        visit.page.evaluate(UNFOLD)
        assert visit.page.evaluate(UNREADABLE) == []


def test_hidden_texts_stay_hidden_on_paper(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"], scheme="dark") as visit:
        page = visit.page
        page.emulate_media(media="print")
        assert not page.locator(".veil-body").first.is_visible()
        assert page.locator(".print-note").first.is_visible()
        assert not page.locator(".bar-top").is_visible()
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_it_is_readable_by_structure(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
        named = "(n) => n.textContent.trim() || n.getAttribute('aria-label') || n.closest('label')"
        controls = "[...document.querySelectorAll('button, a, select, [role=img], [role=region]')]"
        unnamed = f"{controls}.filter((n) => !({named})(n)).length"
        assert page.evaluate(unnamed) == 0
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
