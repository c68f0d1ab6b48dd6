"""docs/kubernetes.md and the chart's README name values, objects, secrets and settings that exist."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from service.infra.settings import Settings
from tests.deploy.generate import value_at
from tests.deploy.rendering import CHART, RELEASE, ROOT, SETS, objects_of

PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def test_values_that_the_page_names_exist() -> None:
    spans = set(re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z_]+)+)(?:\[\])?(?:\.to)?[:`]", PAGE))
    named = {each for each in spans if each.split(".")[0] in VALUES and not each.endswith((".yaml", ".md"))}
    assert len(named) > 10
    for path in named:
        section, _, name = path.partition(".")
        if section == "settings":
            assert name in Settings.model_fields
        else:
            value_at(VALUES, path)


def test_objects_that_the_page_names_exist() -> None:
    kinds = {"deploy": "Deployment", "job": "Job", "service": "Service", "scaledjob": "ScaledJob"}
    there = {(each["kind"], each["metadata"]["name"]) for name in SETS for each in objects_of(name)}
    named = re.findall(rf"\b(deploy|job|service|scaledjob)/({RELEASE}[a-z-]*)", PAGE.replace("deploy/helm/", ""))
    assert len(named) >= 5
    for kind, name in named:
        assert (kinds[kind], name) in there, f"{kind}/{name}"


def test_the_secret_that_the_page_makes_has_every_key_that_the_values_want() -> None:
    made = set(re.findall(r"--from-literal=([a-z0-9-]+)=", PAGE))
    wanted = {VALUES[each]["secretKey"] for each in ("database", "broker", "pepper")} | {VALUES["monitoring"]["key"]["secretKey"]}
    credentials = VALUES["store"]["credentials"]
    assert made == wanted | {credentials["accessKey"], credentials["secretKey"]}
    assert f"create secret generic {VALUES['database']['secretName']} " in PAGE


def test_the_page_says_what_was_not_done() -> None:
    assert "No cluster has run it" in PAGE
    assert "No cluster has run" in (CHART / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [ROOT / "docs" / "kubernetes.md", CHART / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Any) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
