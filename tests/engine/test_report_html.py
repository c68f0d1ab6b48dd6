"""The page and the Markdown: escaping, self-containedness, size, what they show."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from safer_engine.artifacts import Absent, Activations, Artifact, Labels, PairScores, PairSet
from safer_engine.report import html as page
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import MAX_BYTES, render_html, token_markup
from safer_engine.report.markdown import code, escaped, render_markdown
from safer_engine.report.model import Context, Evidence, Feature, Health, ReportDocument, Text
from safer_engine.report.model_doubts import AxisDoubt, SaeAdds
from safer_engine.report.model_salience import SalienceTests
from safer_engine.report.summary import cautions, key_figures, paragraph
from safer_engine.report.text import (
    base_name,
    count,
    duration,
    fact,
    marked,
    name_of,
    number,
    percent,
    plain,
    shown,
    signed,
    size,
    small_percent,
    visible,
)
from safer_engine.spec_layers import Layer, build_spec
from tests.helpers import fake_artifacts
from tests.helpers.fake_pairs import HOSTILE

NOW = "2026-01-02T03:04:05Z"
EVALUATION: dict[str, Any] = {"evaluation": {"source": {"kind": "local", "path": "data/eval.jsonl"}}}


PHRASES = ("neighbour&#39;s", "neighbour's", "helpline", "snowball", "can't help", "can&#39;t help", "refuses and", "quietly")


class Page(HTMLParser):
    """Tags with their attributes, the text, and the sources of style and script."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            self.raw[self._open[-1]] = data
        else:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def _report(root: Path, found: dict[type[Artifact], Artifact | Absent] | None = None, **options: Any) -> ReportDocument:
    audit = fake_artifacts.build(root, **{**EVALUATION, **options})
    return build_report(ReportRequest(audit.spec, audit.sources, {**audit.found, **(found or {})}, NOW))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportDocument:
    return _report(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> ReportDocument:
    return _report(tmp_path_factory.mktemp("hostile"), hostile=True)


@pytest.fixture(scope="module", params=["plain", "hostile"])
def parsed(request: pytest.FixtureRequest, report: ReportDocument, hostile: ReportDocument) -> Page:
    return Page(render_html(report if request.param == "plain" else hostile))


def test_the_page_holds_one_script_one_style_and_nothing_from_elsewhere(parsed: Page) -> None:
    assert (parsed.count("script"), parsed.count("style"), parsed.count("html")) == (1, 1, 1)
    assert parsed.count("img") == parsed.count("iframe") == parsed.count("object") == parsed.count("form") == 0
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            assert name not in ("style", "src", "srcset", "action", "formaction", "xlink:href")
            if name == "href":
                assert value is not None
                assert value.startswith("#") or value in ("pair_scores.parquet", "data:,")
    assert "url(" not in parsed.raw["style"]
    assert "@import" not in parsed.raw["style"]


def test_the_policy_allows_our_style_and_script_by_digest_only(parsed: Page) -> None:
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(parsed.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_ids_are_unique_and_links_lead_somewhere(parsed: Page) -> None:
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for _, a in parsed.tags if (a.get("href") or "").startswith("#")}
    assert {target[1:] for target in targets if target} <= set(ids)
    assert {a["aria-controls"] for _, a in parsed.tags if a.get("aria-controls")} <= set(ids)


def test_hostile_texts_are_shown_as_what_they_are(hostile: ReportDocument) -> None:
    parsed = Page(render_html(hostile))
    assert "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>" in parsed.text
    assert "{{ 7*7 }} {% raw %} <!-- " in parsed.text
    assert "txt.exe" in parsed.text


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_no_hidden_character_reaches_a_reader(hostile: ReportDocument, render: Any) -> None:
    written = render(hostile)
    bad = [c for c in "\x00\x07\x1b\x85\u202e\u2066\u2028\ufeff" if c in written]
    assert bad == []
    assert "RLO" in written or render is render_markdown


def test_hidden_characters_are_named() -> None:
    assert visible("a\u202eb\x00c\U000e0041") == "a⟦RLO⟧b⟦NUL⟧c⟦U+E0041⟧"
    assert visible("tab\tline\nreturn\r\nfamily 👨\u200d👩") == "tab\tline\nreturn\nfamily 👨\u200d👩"
    assert str(marked("<\x1b>")) == '&lt;<span class="hidden-char">ESC</span>&gt;'


def test_markdown_escapes_what_a_renderer_would_read(hostile: ReportDocument) -> None:
    written = render_markdown(hostile)
    outside = re.sub(r"(`+).*?\1", "", written)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "](javascript" not in outside
    assert "@everyone" not in outside
    for line in written.splitlines():
        if line.startswith("| "):
            cells = re.sub(r"\\\|", "", line)
            assert cells.count("|") in (4, 5, 6, 7, 8, 13), line


def test_code_spans_hold_any_text() -> None:
    assert code("a`b``c") == "```a`b``c```"
    assert code("`") == "`` ` ``"
    assert code("a|b\nc") == "`a\\|b c`"
    assert code("") == "–"
    assert code("x" * 500).endswith("…`")
    assert len(code("x" * 500)) == 162


def test_escaped_sentences_hold_no_markup() -> None:
    assert escaped("<b>*x* [l](u) @me #1 https://a") == ("&lt;b&gt;\\*x\\* \\[l\\](u) &#64;\u200bme \\#1 https:&#47;&#47;a")


def test_without_text_no_text_is_on_the_page(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path, report={"text": False})
    report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, NOW))
    for written in (render_html(report), render_markdown(report)):
        text = written.split("<main", 1)[-1]
        for phrase in PHRASES:
            assert phrase not in text
        assert "pair-0008" in text
    parsed = Page(render_html(report))
    assert "This report was made without texts" in parsed.text
    assert "Shading shows" not in parsed.text
    assert "with their contexts" not in parsed.text
    assert not any("veil" in (a.get("class") or "").split() for _, a in parsed.tags)
    assert not any(a.get("id") == "reveal-all" for _, a in parsed.tags)


def test_every_text_of_the_data_is_veiled(report: ReportDocument) -> None:
    written = render_html(report)
    bare = re.sub(r'<div class="veil-body".*?</button>', "", written.split("<main", 1)[1], flags=re.DOTALL)
    for phrase in ("neighbour&#39;s door", "local helpline", "snowball: the bigger", "Nobody ever checks"):
        assert phrase in written
        assert phrase not in bare
    assert all("inert" in a for _, a in Page(written).tags if a.get("class") == "veil-body")


def test_pages_of_identical_audits_differ_in_their_timing_only(tmp_path: Path) -> None:
    unplanned = ("pairs", "sae")
    audits = [
        fake_artifacts.build(tmp_path / "quick", seconds=1.0),
        fake_artifacts.build(tmp_path / "slow", seconds=50.0, unplanned=unplanned),
    ]
    reports = [build_report(ReportRequest(a.spec, a.sources, a.found, str(i))) for i, a in enumerate(audits)]
    for render, pattern in (
        (render_html, r"<!-- timing: .*?<!-- end of timing -->"),
        (render_markdown, r"<!-- timing -->.*?<!-- end of timing -->"),
    ):
        written = [render(report) for report in reports]
        assert written[0] != written[1]
        one, two = (re.sub(pattern, "", text, flags=re.DOTALL) for text in written)
        assert one == two


def test_the_plan_is_shown_beside_the_cost(tmp_path: Path) -> None:
    def shown(unplanned: tuple[str, ...]) -> list[str]:
        audit = fake_artifacts.build(tmp_path / f"{len(unplanned)}", unplanned=unplanned)
        report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "now"))
        costs = re.search(r'<section id="cost">.*?</section>', render_html(report), flags=re.DOTALL)
        assert costs is not None
        rows = re.findall(r"<tr.*?</tr>", costs.group(), flags=re.DOTALL)
        line = next(line for line in render_markdown(report).splitlines() if line.startswith("| sae | "))
        texts = [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in rows]
        return [next(text for text in texts if text.startswith("sae")), texts[-1], line, costs.group()]

    row, total, line, whole = (text.replace("\u202f", " ") for text in shown(()))
    assert row.startswith("sae 7.5 s 15.5 s 20.2 s 700.0 MB 536.9 MB 2.0 MB ")
    assert total.startswith("total 52.5 s 2 min 16 s 2 min 22 s 700.0 MB 536.9 MB 14.0 MB ")
    assert line.startswith("| sae | 7.5 s | 15.5 s | 700.0 MB | 536.9 MB | 2.0 MB | ")
    assert "Without a plan" not in whole
    row, total, line, whole = (text.replace("\u202f", " ") for text in shown(("sae",)))
    assert row.startswith("sae – 15.5 s 20.2 s – 536.9 MB – ")
    assert total.startswith("total – 2 min 16 s")
    assert line.startswith("| sae | – | 15.5 s | – | 536.9 MB | – | ")
    assert "Without a plan: sae (it was computed without a plan)." in whole


def test_a_page_that_would_be_too_large_is_shortened_and_says_so(tmp_path: Path) -> None:
    report = _report(tmp_path, groups=150, report={"pairs": 300, "features": 48})
    assert report.edits is not None
    assert report.features is not None
    filler = Text(text="<&'\">" * 1_200)
    pairs = [p.model_copy(update={"prompt": filler, "chosen": filler, "rejected": filler}) for p in report.edits.pairs]
    large = report.model_copy(update={"edits": report.edits.model_copy(update={"pairs": pairs})})
    written = render_html(large)
    assert len(written.encode()) <= MAX_BYTES
    assert "Shortened to keep this file under 3 MB" in written
    assert "more characters" in written
    assert "Shortened" not in render_html(report)


def test_an_ordinary_page_is_far_below_its_limit(report: ReportDocument) -> None:
    assert len(render_html(report).encode()) < 600_000


def test_key_figures_come_first_and_are_the_planted_ones(report: ReportDocument) -> None:
    figures = {figure.name: figure for figure in key_figures(report)}
    assert list(figures) == [
        "Pairs", "Pair accuracy", "Variance explained", "Reward recovered", "Safety features", "Edits and reviews",
        "Recommended drops",
    ]  # fmt: skip
    assert figures["Pairs"].value == "180"
    assert "on evaluation pairs" in figures["Pair accuracy"].detail
    assert visible(figures["Variance explained"].value).startswith("81.2")
    assert figures["Reward recovered"].value.startswith("94.1")
    assert figures["Safety features"].value == "8"
    assert figures["Recommended drops"].detail == "chat 4 · safety 4"
    text = Page(render_html(report)).text
    assert text.index("Recommended drops") < text.index("Keep in mind") < text.index("The highest-ranked pairs of each axis")


def test_the_paragraph_says_the_findings_in_words(report: ReportDocument) -> None:
    said = paragraph(report)
    assert "of the 180 audited pairs, and of" in said
    assert "640 latents explains 81.2" in said
    assert "8 latents are rated as safety features, 4 firing more on chosen and 4 on rejected" in said
    assert "latent 0 (“refuses and offers a safer way”)" in said
    assert said.endswith("no retraining has tested that.")


def test_cautions_name_what_limits_the_figures(report: ReportDocument) -> None:
    texts = " ".join(caution.text for caution in cautions(report))
    for part in ("only 90 groups", "longer one in", "the other way round", "4 evaluation pairs were left out", "correlational",
                 "word list", "not a probability"):  # fmt: skip
        assert part in texts
    assert all(caution.level == "care" for caution in cautions(report))


def test_a_report_says_where_it_departs_from_its_preset(report: ReportDocument) -> None:
    paper = build_spec([Layer("test", {"model": "m", "dataset": "org/data", "preset": "paper", "sae": {"k": 32}})]).spec
    (said,) = [c.text for c in cautions(report.model_copy(update={"spec": paper.model_dump(mode="json")})) if "preset" in c.text]
    assert said == "The preset is paper, but these values were given otherwise: sae.k is 32 (preset: 64)."


def test_accuracies_differ_by_percentage_points(report: ReportDocument) -> None:
    assert report.reward_model is not None
    parts = report.reward_model.on_audited_pairs
    better = [part.model_copy(update={"accuracy": part.accuracy.model_copy(update={"estimate": 0.99})}) for part in parts]
    model = report.reward_model.model_copy(update={"on_audited_pairs": better})
    said = " ".join(caution.text for caution in cautions(report.model_copy(update={"reward_model": model})))
    assert re.search(r"Accuracy on the audited pairs is \d+ percentage points above that on evaluation pairs", said)


def _with_edits(report: ReportDocument, **changes: Any) -> ReportDocument:
    assert report.edits is not None
    return report.model_copy(update={"edits": report.edits.model_copy(update=changes)})


def test_the_figure_of_edits_counts_what_is_recommended_and_not_what_is_suspicious(report: ReportDocument) -> None:
    figures = {one.name: one for one in key_figures(_with_edits(report, actions={"drop": 2, "review": 3, "keep": 175}))}
    assert (figures["Edits and reviews"].value, figures["Recommended drops"].value) == ("5", "2")
    assert "Suspicious pairs" not in figures


def test_markdown_says_what_the_sae_adds_and_escapes_the_axis(report: ReportDocument) -> None:
    found = SaeAdds(bits=0.05, lo=0.01, hi=0.09, agree_with=0.8, agree_without=0.7, fair=True)
    axis = AxisDoubt(axis="a|b<i>", kind="rank", reason=None, doubtful_share=None, sae=found)
    written = render_markdown(_with_edits(report, axes=[axis]))
    assert "- On a\\|b&lt;i&gt; the SAE adds +0.050 \\[+0.010, +0.090\\] bits a pair" in written
    assert "the SAE adds" not in render_markdown(_with_edits(report, axes=[]))


def test_where_no_latent_could_be_tested_no_count_of_flips_is_given(report: ReportDocument) -> None:
    tests = SalienceTests(
        fdr=0.05, n_tests=0, n_draws=0, smallest_p=1.0, n_tested=0, n_discoveries=0, n_discoveries_by=0,
        n_discoveries_max_t=0, n_replicated=0, replicated_share=None,
    )  # fmt: skip
    assert report.sae is not None
    assert report.sae.latents is not None
    latents = report.sae.latents.model_copy(update={"tests": tests})
    changed = report.model_copy(update={"sae": report.sae.model_copy(update={"latents": latents})})
    text = " ".join(Page(render_html(changed)).text.split())
    assert "No latent was tested against chance: none fires differently" in text
    assert "sign flips of whole groups" not in text


def test_pairs_that_no_signal_doubts_are_marked_and_counted(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path)
    scores = audit.found[PairScores]
    assert isinstance(scores, PairScores)
    table = scores.scores
    values = {name: table.column(name).to_pylist() for name in ("signal_latents", "signal_margin")}
    before = build_report(ReportRequest(audit.spec, audit.sources, audit.found, NOW)).edits
    assert before is not None
    first = table.column("pair_id").to_pylist().index(before.pairs[0].pair_id)
    values["signal_latents"][first], values["signal_margin"][first] = 0.0, float("nan")
    for name, column in values.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(column, pa.float64()))

    class Changed(PairScores):
        scores = table

    report = build_report(ReportRequest(audit.spec, audit.sources, {**audit.found, PairScores: Changed(scores.stored)}, NOW))
    assert report.edits is not None
    assert (report.edits.n_removed, report.edits.n_removed_undoubted) == (8, 1)
    assert [pair.undoubted for pair in report.edits.pairs[:3]] == [True, False, False]
    text = Page(render_html(report)).text
    assert (
        text.count("No signal speaks against this label; it is here because the budget takes the top 4\u202f% of its axis.") == 1
    )
    assert "1 of 8 recommended drops has no signal against their label." in [caution.text for caution in cautions(report)]
    assert render_markdown(report).count("(no signal against the label)") == 1
    assert (before.n_removed_undoubted, "no signal against" in paragraph(report)) == (0, False)


def test_facts_are_not_signals_and_evidence_has_two_sides(report: ReportDocument) -> None:
    assert report.edits is not None
    parts = [
        Evidence(latent_id=3, contribution=0.25),
        Evidence(latent_id=0, contribution=-0.5),
        Evidence(latent_id=4, contribution=0.5),
    ]
    first = report.edits.pairs[0].model_copy(update={"evidence": parts, "annotators": [1, -1, 1]})
    text = " ".join(Page(render_html(_with_edits(report, pairs=[first]))).text.split())
    signals, rest = text.split("Signals (higher = more doubtful)")[1].split("Facts about the pair")
    facts, latents = rest.split("Latents for the label")
    assert "reward margin" not in signals
    assert all(name in facts for name in ("reward margin", "pair score of the paper", "annotators for the label"))
    speaking, against = latents.split("Latents against the label")
    assert speaking.index("#4") < speaking.index("#3")
    assert "sum of those listed+0.750" in speaking
    assert "sum of those listed−0.500" in against.split("Prompt")[0]
    written = render_markdown(_with_edits(report, pairs=[first]))
    assert "| latent 0 (−0.50) | latent 4 (+0.50), latent 3 (+0.25) |" in written


def test_one_is_singular_and_none_is_said_in_words(report: ReportDocument) -> None:
    assert "1 pair (0.56\u202f%) is recommended for dropping" in paragraph(_with_edits(report, actions={"drop": 1, "review": 2}))
    assert report.sae is not None
    worse = report.model_copy(update={"sae": report.sae.model_copy(update={"fvu": 6.19})})
    assert "explains none of the variance" in paragraph(worse)
    assert {figure.name: figure.value for figure in key_figures(worse)}["Variance explained"] == "none"
    assert any("less of the activations than their mean does (FVU 6.19)" in caution.text for caution in cautions(worse))
    assert report.reward_model is not None
    rows = [
        row.model_copy(update={"accuracy": row.accuracy.model_copy(update={"lo": None, "hi": None})})
        for row in report.reward_model.on_audited_pairs
    ]
    model = report.reward_model.model_copy(update={"on_audited_pairs": rows})
    single = report.model_copy(update={"reward_model": model, "evaluation": None})
    assert {figure.name: figure.detail for figure in key_figures(single)}["Pair accuracy"] == "on the audited pairs"


def test_without_any_suspicion_the_report_says_what_to_do(report: ReportDocument) -> None:
    assert report.features is not None
    features = [feature.model_copy(update={"safety_feature": False}) for feature in report.features]
    spec = {**report.spec, "suspicion": {**report.spec["suspicion"], "estimator": "paper"}}
    nothing = _with_edits(report, n_scored=0, pairs=[], actions={"keep": 180})
    paper = nothing.model_copy(update={"features": features, "spec": spec})
    first = cautions(paper)[0]
    assert first.level == "stop"
    assert "or lower labels.min_rating or labels.detection_floor" in first.text
    assert "No pair has a suspicion, so nothing is recommended." in paragraph(paper)
    assert "No pair has a suspicion: see which signals" in cautions(nothing)[0].text
    assert "for what to do" in Page(render_html(paper)).text


def test_grave_findings_come_first(report: ReportDocument) -> None:
    assert report.sae is not None
    assert report.reward_model is not None
    assert report.dataset is not None
    weak = report.sae.model_copy(update={"interpretable": False, "dead_share": 0.6})
    moved = report.reward_model.model_copy(update={"invariance": {"status": "warning", "batch_drift": 0.07}})
    sparse = Health(n_in=100, n_kept=60, dropped={"sampled_out": 20, "malformed": 20})
    data = report.dataset.model_copy(update={"health": sparse})
    found = cautions(report.model_copy(update={"sae": weak, "reward_model": moved, "dataset": data}))
    assert found[0].level == "stop"
    assert "do not interpret its features" in found[0].text
    texts = " ".join(caution.text for caution in found)
    assert "dead" in texts
    assert "0.070 SD" in texts
    assert "20 of 100 pairs could not be used" in texts


def test_sections_that_are_missing_say_why(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path)
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations)}
    early = build_report(ReportRequest(audit.spec, audit.sources, found, NOW))
    text = Page(render_html(early)).text
    assert "Unfinished audit: 2 of 13 stages are finished" in text
    assert text.count("Not in this report: not computed yet.") >= 4
    assert "On the audited pairs" in text
    assert {figure.value for figure in key_figures(early)} >= {"–", "180"}
    assert "Unfinished audit: 2 of 13 stages are finished" in render_markdown(early)


def test_unlabelled_features_are_shown_as_latents(tmp_path: Path) -> None:
    report = _report(tmp_path, {Labels: Absent("no labeller was given")})
    text = Page(render_html(report)).text
    assert "no labeller was given" in text
    assert "Latent 0" in text
    assert report.provenance.not_computed["features[].safety_feature"] == "no labeller was given"


def test_evidence_links_to_the_card_that_explains_it(report: ReportDocument) -> None:
    written = render_html(report)
    assert 'href="#latent-3">#3</a> step-by-step instructions for something harmful' in written


def test_the_health_equation_is_printed(report: ReportDocument) -> None:
    text = " ".join(Page(render_html(report)).text.split())
    assert "192 read = 180 kept + 7 duplicate + 3 identical sides + 2 over long" in text
    assert "192 read = 180 kept + 7 duplicate + 3 identical sides + 2 over long" in render_markdown(report)


def test_the_whole_spec_is_printed(report: ReportDocument) -> None:
    found = re.search(r'<pre class="spec"[^>]*>(.*?)</pre>', render_html(report), re.DOTALL)
    assert found is not None
    assert json.loads(Page(found.group(1)).text) == report.spec


def test_tokens_are_shaded_by_strength_and_the_focus_is_marked() -> None:
    context = Context(
        pair_id="a", side="chosen", position=2, activation=4.0, tokens=["a", " <b>", " c", " d"],
        activations=[0.0, 1.0, 4.0, None], focus=2,
    )  # fmt: skip
    feature = Feature(
        latent_id=1,
        rank=1,
        safety_feature=True,
        fires_on="chosen",
        salience=0.1,
        firing_rate=0.1,
        responses=2,
        contexts=[context],
    )
    written = str(token_markup(context, feature))
    assert written == 'a<b class="a2" data-tip="1.00"> &lt;b&gt;</b><b class="a6 focus" data-tip="4.00"> c</b> d'


def test_a_silent_context_still_marks_its_focus() -> None:
    context = Context(pair_id="a", side="chosen", position=0, activation=0.0, tokens=["x"], activations=[None], focus=0)
    feature = Feature(latent_id=1, rank=1, safety_feature=None, fires_on="chosen", salience=0, firing_rate=0, responses=0)
    assert 'class="a0 focus"' in str(token_markup(context, feature))


def test_slices_that_repeat_another_are_left_out(report: ReportDocument) -> None:
    assert report.evaluation is not None
    rows = report.evaluation.groups
    shown_rows = [(row.axis, row.subset) for row in page._slices(rows)]
    assert ("chat", "chat-easy") in [(row.axis, row.subset) for row in rows]
    assert ("chat", "chat-easy") not in shown_rows
    single = [row.model_copy(update={"axis": "all"}) if row.axis else row for row in rows if row.axis in (None, "safety")]
    assert [(row.axis, row.subset) for row in page._slices(single)] == [(None, None), ("all", "harmless"), ("all", "refusals")]


def test_clipped_texts_say_how_much_is_missing() -> None:
    assert "… 96\u202f000 more characters" in shown(Text(text="x" * 4_000, omitted=96_000))
    assert "… 3\u202f000 more characters" in shown(Text(text="x" * 4_000), 1_000)
    assert str(shown(Text(text="<i>"))) == "&lt;i&gt;"
    assert shown(None) == ""
    assert plain(Text(text="eager agreement at the start of an answer"), 20) == "eager agreement at…"
    assert plain(Text(text="short"), 20) == "short"


def test_names_are_short_whatever_the_labeller_wrote(report: ReportDocument) -> None:
    assert report.features is not None
    first = report.features[0]
    assert name_of(first) == "refuses and offers a safer way"
    long = first.model_copy(update={"explanation": Text(text="rubric terms " * 20), "direction": "safe_behaviour"})
    assert name_of(long) == "safe behaviour: can't help, safer, instead"
    assert name_of(long.model_copy(update={"terms": []})) == ""
    two = Text(text="Offers of help. " + "Then more is said of them, at length. " * 3)
    assert name_of(long.model_copy(update={"terms": [], "explanation": two})) == "Offers of help."
    assert name_of(long.model_copy(update={"terms": [Text(text="y" * 500)]})) == f"safe behaviour: {'y' * 29}…"
    assert name_of(first.model_copy(update={"status": "unparsed"})) == ""
    assert name_of(first.model_copy(update={"explanation": None, "terms": [], "status": None})) == ""


def test_figures_are_written_for_people() -> None:
    assert count(1234567) == "1\u202f234\u202f567"
    assert number(0.00001234) == "1.23e−05"
    assert (number(0), number(None), number(2.5, 2)) == ("0.000", "–", "2.50")
    assert (signed(-0.5, 2), signed(None)) == ("−0.50", "–")
    assert percent(0.8125) == "81.2\u202f%"
    assert (small_percent(0.00042), small_percent(0.5), small_percent(0.0)) == ("0.042\u202f%", "50.0\u202f%", "0.0\u202f%")
    assert (duration(3.21), duration(75), duration(7322)) == ("3.2\u202fs", "1\u202fmin 15\u202fs", "2:02:02")
    assert (duration(None), duration(59.97), duration(119.7)) == ("–", "1\u202fmin 00\u202fs", "2\u202fmin 00\u202fs")
    assert (size(None), size(999), size(2_500_000), size(3 * 10**12)) == ("–", "999\u202fB", "2.5\u202fMB", "3.0\u202fTB")
    assert [fact(v) for v in (True, 1200, 0.12345, None, "x")] == ["yes", "1\u202f200", "0.1235", "–", "x"]


def test_hostile_strings_are_hostile() -> None:
    assert any("</script>" in text for text in HOSTILE)
    assert any("\u202e" in text and "\x00" in text for text in HOSTILE)


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("upload:" + "0123456789abcdef" * 4, "upload:0123456789…"),
        ("/data/rm/", "rm"),
        ("org/name", "name"),
        ("upload:" + "0" * 63, "upload:" + "0" * 63),
    ],
)
def test_titles_have_names_and_the_beginnings_of_digests(origin: str, shown: str) -> None:
    assert base_name(origin) == shown
