"""deploy/: what can be checked of it without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.infra.settings import Settings
from tests.helpers.metric_samples import base, labels_of_metrics
from tests.helpers.servers import missing

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_compose_fits_its_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_names_settings_that_exist_and_files_that_are_there() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    variables = {
        name for service in document["services"].values() for name in service.get("environment", {}) if name.startswith("SAFER_")
    }
    assert variables
    assert variables <= {f"SAFER_{name.upper()}" for name in Settings.model_fields}
    for service in document["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    offered = set(re.findall(r"^(\w+)=", (DEPLOY / "compose.env.example").read_text(), re.MULTILINE))
    assert asked == offered


def test_alerts_use_metrics_that_exist() -> None:
    for rule in rules():
        assert {base(name) for name in re.findall(r"\bsafer_\w+", rule["expr"])} <= set(labels_of_metrics()), rule["alert"]


def test_every_alert_has_its_section_in_operations() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in rules():
        section = re.search(r'See "(.+)" in docs/operations.md', rule["annotations"]["description"])
        assert section, rule["alert"]
        assert f"### {section.group(1)}\n" in page, rule["alert"]


@pytest.mark.full
def test_prometheus_accepts_rules_and_settings() -> None:
    if shutil.which("promtool") is None:
        missing("promtool (Debian: prometheus)")
    for kind, path in (("rules", ALERTS), ("config", DEPLOY / "prometheus" / "prometheus.yml")):
        done = subprocess.run(["promtool", "check", kind, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
