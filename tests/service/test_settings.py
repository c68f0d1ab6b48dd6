"""Settings: wrong values are named before anything starts; the page in docs is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from safer_engine.errors import SpecError
from service.infra.settings import load_settings
from service.infra.settings_page import settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_that_of_the_settings() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAFER_PORT", "99999"),
        ("SAFER_QUEUES", "tpu"),
        ("SAFER_QUEUES", ""),
        ("SAFER_S3_PART_BYTES", "10"),
        ("SAFER_LEASE_SECONDS", "nan"),
        ("SAFER_LOG_LEVEL", "loud"),
        ("SAFER_LEASE_SECONDS", "5"),
    ],
)
def test_wrong_values_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=name):
        load_settings()


def test_a_wrong_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_PORT", "no-canary-here")
    monkeypatch.setenv("SAFER_S3_SECRET_KEY", "canary-secret")
    with pytest.raises(SpecError) as caught:
        load_settings()
    assert "canary" not in str(caught.value)


def test_lists_and_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFER_ALLOWED_SOURCES", "upload:, hub:org/ ,")
    monkeypatch.setenv("SAFER_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.allowed_sources == ("upload:", "hub:org/")
    assert settings.database == f"sqlite:///{tmp_path / 'service.db'}"
    assert not settings.on_s3
    assert load_settings(store_url="s3://bucket/x").on_s3
