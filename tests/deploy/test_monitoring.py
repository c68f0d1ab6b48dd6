"""Alerts fire when they should and only then; alerts and dashboard ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from tests.deploy.rendering import ROOT, Object, objects_of, of_kind
from tests.helpers.metric_samples import base, labels_of_metrics, named_in_code, sampled
from tests.helpers.servers import missing

HERE = Path(__file__).parent
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "safer-audit.json"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        missing("promtool (Debian: prometheus)")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def with_tests(tmp_path: Path) -> Path:
    """A folder with the rules and their tests, as promtool wants them."""
    shutil.copy(ALERTS, tmp_path / "alerts.rules.yml")
    shutil.copy(HERE / "alerts.yml", tmp_path / "alerts.test.yml")
    return tmp_path


def test_every_alert_fires_when_it_should_and_only_then(with_tests: Path) -> None:
    done = promtool("test", "rules", with_tests / "alerts.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    names = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    cases = [case for test in yaml.safe_load((HERE / "alerts.yml").read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


@pytest.mark.parametrize(
    ("rule", "weakened"),
    [
        ("> 900", "> 9000"),
        ("[1h])) > 5", "[1h])) > 1"),
        ("[15m])) > 5", "[15m])) > 50"),
        ("safer_worker_free[15m])) == 1", "safer_worker_free[15m])) >= 0"),
        ("[1h])) > 3", "[1h])) > 1"),
        ('status=~"5.."', 'status=~"4.."'),
        ("max by (stage, code)", "sum by (stage, code)"),
    ],
)
def test_the_tests_notice_a_changed_alert(with_tests: Path, rule: str, weakened: str) -> None:
    path = with_tests / "alerts.rules.yml"
    text = path.read_text()
    assert rule in text
    path.write_text(text.replace(rule, weakened))
    assert promtool("test", "rules", with_tests / "alerts.test.yml").returncode != 0


def test_the_rules_that_the_chart_renders_are_rules(tmp_path: Path) -> None:
    (rule,) = of_kind(objects_of("production"), "PrometheusRule")
    path = tmp_path / "rendered.yml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def panels() -> list[Object]:
    return [each for each in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if each["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def test_every_metric_of_the_code_has_a_sample_here() -> None:
    assert named_in_code() == set(labels_of_metrics())


def test_the_manual_has_every_metric_with_its_labels() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `safer_")]
    found = {
        base(name): set(re.findall(r"`(\w+)`", labels.partition(":")[0]))
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    assert found == labels_of_metrics()


def test_the_dashboard_asks_for_metrics_that_exist_and_for_all_of_them() -> None:
    assert {base(name) for _, query in queries() for name in re.findall(r"\bsafer_\w+", query)} == set(labels_of_metrics())


def test_promtool_finds_nothing_wrong_with_names_and_help() -> None:
    if shutil.which("promtool") is None:
        missing("promtool (Debian: prometheus)")
    text = generate_latest(sampled())
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    rules = [{"record": f"panel:query:{number}", "expr": query} for number, (_, query) in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_labels_in_queries_are_labels_of_the_metrics() -> None:
    own = {"le", "job", "instance"}
    labels = labels_of_metrics()
    assert labels
    for title, query in queries():
        asked = set(re.findall(r"by \(([^)]*)\)", query))
        names = {name.strip() for group in asked for name in group.split(",")}
        metrics = [base(name) for name in re.findall(r"\bsafer_\w+", query)]
        allowed = own.union(*(labels[name] for name in metrics))
        assert names <= allowed, title


def test_the_picture_in_the_docs_is_of_this_dashboard() -> None:
    drawn = (ROOT / "docs" / "images" / "dashboard.svg").read_text(encoding="utf-8")
    titles = [each["title"] for each in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]]
    assert [title for title in titles if f">{title}</text>" not in drawn] == []
    assert len(drawn.encode()) < 200_000


def test_panels_are_laid_out_within_the_grid_and_say_what_they_show() -> None:
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    places = [each["gridPos"] for each in document["panels"]]
    assert len({each["id"] for each in document["panels"]}) == len(places)
    taken: set[tuple[int, int]] = set()
    for place in places:
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
