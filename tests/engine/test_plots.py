"""Plots: what is drawn where, and that nothing foreign gets out of its text."""

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from safer_engine.report.model import Estimate, Feature, Histogram, Text
from safer_engine.report.model_plots import Curve, Overview
from safer_engine.report.plots import (
    Bar,
    bars_plot,
    curve_plot,
    density_plot,
    interval_plot,
    margin_plot,
    salience_plot,
    salience_spark,
)
from safer_engine.report.svg import Scale, element, path, power_of_ten

OVERVIEW = Overview(
    log10_rate_edges=[-4, -3, -2, -1, 0], salience_edges=[-1, 0, 1], counts=[[0, 1], [50, 2], [0, 0], [3, 0]], silent=4
)


def _feature(latent: int, salience: float, rate: float = 1e-2, *, safety: bool = False, name: str = "refusal") -> Feature:
    return Feature(
        latent_id=latent,
        rank=latent + 1,
        safety_feature=safety,
        explanation=Text(text=name),
        fires_on="chosen" if salience >= 0 else "rejected",
        salience=salience,
        firing_rate=rate,
        responses=3,
    )


def _tree(markup: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def _classes(tree: ElementTree.Element, wanted: str) -> list[ElementTree.Element]:
    return [node for node in tree.iter() if wanted in (node.get("class") or "").split()]


def test_scale_maps_ends_and_gives_round_ticks() -> None:
    scale = Scale(0, 10, 100, 0)
    assert (scale(0), scale(10), scale(2.5)) == (100, 0, 75)
    assert Scale(-0.32, 0.32, 0, 1).ticks(6) == [-0.2, 0.0, 0.2]
    assert Scale(0, 9.8e6, 0, 1).ticks(4) == [0, 2.5e6, 5e6, 7.5e6]


def test_elements_escape_attributes_and_text() -> None:
    written = element("text", ["<&>\u202e"], class_='a" onload="x', data_tip="'\"<")
    assert str(written) == '<text class="a&#34; onload=&#34;x" data-tip="&#39;&#34;&lt;">&lt;&amp;&gt;⟦RLO⟧</text>'
    assert str(element("g", x=None, y=1.25)) == '<g y="1.25"/>'
    assert path([], "curve") == ""


def test_powers_of_ten() -> None:
    assert [power_of_ten(n) for n in (-4, 0, 2)] == ["10⁻⁴", "1", "10²"]


@pytest.mark.parametrize("narrow", [False, True])
def test_every_candidate_is_a_dot_at_its_place(narrow: bool) -> None:
    features = [_feature(0, 0.8, safety=True), _feature(1, -0.8, safety=True), _feature(2, 0.2, 1e-3)]
    tree = _tree(salience_plot(OVERVIEW, features, frozenset({0, 1}), narrow=narrow))
    dots = {node.get("data-tip", "").split()[0]: node for node in _classes(tree, "dot")}
    assert set(dots) == {"#0", "#1", "#2"}
    assert float(dots["#0"].get("cy", "0")) < float(dots["#2"].get("cy", "0")) < float(dots["#1"].get("cy", "0"))
    assert float(dots["#2"].get("cx", "0")) < float(dots["#0"].get("cx", "0"))
    assert "chosen-dot" in (dots["#0"].get("class") or "")
    assert "rejected-dot" in (dots["#1"].get("class") or "")
    links = [node.get("href") for node in tree.iter("a")]
    assert sorted(map(str, links)) == ["#latent-0", "#latent-1"]
    assert len(_classes(tree, "dot-name")) == (0 if narrow else 2)


def test_density_cells_count_latents_not_pixels() -> None:
    tree = _tree(salience_plot(OVERVIEW, [], frozenset(), narrow=False))
    cells = _classes(tree, "cell")
    assert sum(len(re.findall("M", node.get("d", ""))) for node in cells) == 4
    assert {node.get("class") for node in cells} == {"cell cell-1", "cell cell-5", "cell cell-2"}
    assert "56 latents" in (tree.get("aria-label") or "")


def test_names_do_not_cover_one_another() -> None:
    features = [_feature(i, 0.5 + i / 1000, 1e-2, safety=True, name=f"name {i}") for i in range(5)]
    tree = _tree(salience_plot(OVERVIEW, features, frozenset(), narrow=False))
    assert len(_classes(tree, "dot-name")) == 1


def test_a_hostile_name_stays_text() -> None:
    feature = _feature(0, 0.5, safety=True, name='"><script>alert(1)</script>')
    written = salience_plot(OVERVIEW, [feature], frozenset({0}), narrow=False)
    assert "<script" not in written
    assert "<script>" in "".join(_tree(written).itertext()) + (_classes(_tree(written), "dot")[0].get("data-tip") or "")


def test_silent_and_extreme_candidates_stay_inside() -> None:
    features = [_feature(0, 5.0, 0.0, safety=True), _feature(1, -5.0, 1.0)]
    tree = _tree(salience_plot(OVERVIEW, features, frozenset(), narrow=False))
    for dot in _classes(tree, "dot"):
        assert 0 <= float(dot.get("cx", "-1")) <= 1040
        assert 0 <= float(dot.get("cy", "-1")) <= 470


def test_curve_ends_at_its_last_loss() -> None:
    curve = Curve(positions=[0, 500_000, 1_000_000], loss=[1.0, 0.4, 0.25], dead_share=[None, 0.1, 0.2])
    tree = _tree(curve_plot(curve))
    assert "0.250" in "".join(tree.itertext())
    assert "1M" in "".join(tree.itertext())
    assert tree.get("aria-label") == "Training loss falls from 1.000 to 0.250"


def test_a_flat_curve_of_one_step_is_drawn() -> None:
    tree = _tree(curve_plot(Curve(positions=[0], loss=[0.0], dead_share=[None])))
    assert len(_classes(tree, "curve-end")) == 1


def test_bars_stay_within_their_track() -> None:
    bars = [Bar("kept", 0.5, reference=0.25, floor=0.5), Bar("worse than nothing", -3.0), Bar("all", 2.0)]
    tree = _tree(bars_plot(bars, "bars"))
    widths = [float(node.get("width", "0")) for node in _classes(tree, "bar")]
    track = float(_classes(tree, "bar-track")[0].get("width", "0"))
    assert widths == [track / 2, 0.0, track]
    assert float(_classes(tree, "reference")[0].get("x1", "0")) == track / 4
    assert len(_classes(tree, "floor")) == 1
    assert "−300.0" in "".join(tree.itertext())


def test_margins_below_zero_are_coloured_apart() -> None:
    histogram = Histogram(edges=[-2, -1, 0, 1, 2], counts=[1, 0, 5, 7])
    tree = _tree(margin_plot(histogram, "margins"))
    assert (len(_classes(tree, "against-bar")), len(_classes(tree, "for-bar"))) == (1, 2)
    heights = [float(node.get("height", "0")) for node in _classes(tree, "for-bar")]
    assert heights[0] / heights[1] == pytest.approx(5 / 7, abs=0.01)


def test_density_marks_silent_latents() -> None:
    tree = _tree(density_plot(Histogram(edges=[-3, -2, -1, 0], counts=[4, 2, 0])))
    assert len(_classes(tree, "dead-bar")) == 1
    assert len(_classes(tree, "bar")) == 2
    assert _tree(density_plot(Histogram(edges=[-1, 0], counts=[0]))).get("aria-label") == "Histogram of 0 latents by firing rate"


def test_interval_is_drawn_where_there_is_one() -> None:
    sure = _tree(interval_plot(Estimate(estimate=0.6, lo=0.5, hi=0.7, n=9, n_groups=3), (0.0, 1.0), 0.5))
    whisker = _classes(sure, "whisker")[0]
    middle = float(_classes(sure, "estimate")[0].get("cx", "0"))
    assert float(whisker.get("x1", "0")) < middle < float(whisker.get("x2", "0"))
    unsure = _tree(interval_plot(Estimate(estimate=0.6, n=1, n_groups=1), (0.0, 1.0), 0.5))
    assert _classes(unsure, "whisker") == []


def test_spark_starts_at_zero() -> None:
    positive = _classes(_tree(salience_spark(0.5, 0.4, 0.6, 1.0)), "chosen-bar")[0]
    negative = _classes(_tree(salience_spark(-0.5, None, None, 1.0)), "rejected-bar")[0]
    assert float(positive.get("x", "0")) == pytest.approx(float(negative.get("x", "0")) + float(negative.get("width", "0")))
