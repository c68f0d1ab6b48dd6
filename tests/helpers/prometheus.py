"""A real Prometheus that scrapes a running service, with the rules and settings of deploy/prometheus."""

from __future__ import annotations

import json
import math
import shutil
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.embedded import free_port
from tests.helpers.servers import LOCAL, Server, missing, wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "safer-audit.json"
API, WORKERS = "safer-audit", "safer-audit-workers"


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, and points (seconds since the epoch, value) without those that are no number."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


@dataclass
class Prometheus(Server):
    """A private Prometheus."""

    def start(self, seconds: float = 120.0) -> None:
        """See `Server.start`; then wait until it answers queries."""
        super().start(seconds)
        wait_until(self._ready, "Prometheus is ready", seconds)

    def _ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://{LOCAL}:{self.port}/-/ready", timeout=10) as answer:
            return bool(answer.status == 200)
        return False

    def instant(self, query: str) -> list[Series]:
        """What a query gives now."""
        return [_series(each["metric"], [each["value"]]) for each in self._ask("query", query=query)["result"]]

    def over(self, query: str, start: float, end: float, step: float) -> list[Series]:
        """What a query gives over a time."""
        found = self._ask("query_range", query=query, start=start, end=end, step=step)["result"]
        return [_series(each["metric"], each["values"]) for each in found]

    def has(self, query: str) -> bool:
        """Whether a query gives a number now."""
        return any(series.points for series in self.instant(query))

    def names(self) -> set[str]:
        """Names of all series."""
        return set(self._ask("label/__name__/values"))

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {each["labels"]["alertname"] for each in self._ask("alerts")["alerts"] if each["state"] == "firing"}

    def _ask(self, path: str, **parameters: object) -> Any:
        url = f"http://{LOCAL}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]


def _series(labels: dict[str, str], values: Sequence[tuple[float, str]]) -> Series:
    points = ((float(at), float(value)) for at, value in values)
    return Series(labels, tuple(point for point in points if math.isfinite(point[1])))


def prometheus_server(folder: Path, targets: Mapping[str, Sequence[int]], seconds: float = 1.0) -> Prometheus:
    """A Prometheus with the settings of deploy/, but for its targets (job → ports here) and its pace; not started yet.

    Alerts fire at once: how long their expression must hold (`for`) is left out.
    """
    program = shutil.which("prometheus")
    if program is None:
        missing("prometheus")
    document = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    document["global"] = {
        "scrape_interval": f"{seconds:g}s",
        "scrape_timeout": f"{seconds:g}s",
        "evaluation_interval": f"{seconds:g}s",
    }
    assert {each["job_name"] for each in document["scrape_configs"]} == set(targets)
    for each in document["scrape_configs"]:
        each["static_configs"] = [{"targets": [f"{LOCAL}:{port}" for port in targets[each["job_name"]]]}]
    rules = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule.pop("for", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    port = free_port()
    options = [f"--web.listen-address={LOCAL}:{port}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    return Prometheus("prometheus", [program, f"--config.file={folder / 'prometheus.yml'}", *options], port, folder)


def alert_rules() -> list[dict[str, Any]]:
    """The alerts of deploy/."""
    return [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard of deploy/."""
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def dashboard_queries() -> list[tuple[str, str]]:
    """(title of the panel, query) for every query of the dashboard, its variables filled in."""
    document = dashboard()
    assert [each["name"] for each in document["templating"]["list"]] == ["datasource"]
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
