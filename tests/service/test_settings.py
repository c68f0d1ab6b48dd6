"""Settings: wrong values are named before anything starts; the page in docs is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from safer_engine.errors import SpecError
from service.infra.settings import load_settings, unknown_settings
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
        ("SAFER_BROKER_URL", "banana"),
        ("SAFER_BROKER_URL", "http://127.0.0.1:6379"),
        ("SAFER_DATABASE_URL", "banana"),
        ("SAFER_DATABASE_URL", "mysql://root@localhost/x"),
        ("SAFER_STORE_URL", "ftp://x"),
        ("SAFER_STORE_URL", "s3://"),
        ("SAFER_STORE_URL", "relative/folder"),
        ("SAFER_S3_ENDPOINT", "127.0.0.1:9000"),
        ("SAFER_PUBLIC_URL", "audit.example.org"),
        ("SAFER_ALLOWED_NETWORKS", "10.0.0.0/8,banana"),
        ("SAFER_ALLOWED_SOURCES", "upload:,file:///"),
        ("SAFER_SECRET_PEPPER", "x"),
        ("SAFER_CALLBACK_SECRET", "x"),
        ("SAFER_MLFLOW_URL", "mlflow.example.org"),
        ("SAFER_MLFLOW_URL", "https://mlflow.example.org"),
        ("SAFER_MLFLOW_SECRET", "short"),
    ],
)
def test_wrong_values_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=name):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("SAFER_BROKER_URL", "rediss://:pw@cache.example:6380/1", SecretStr("rediss://:pw@cache.example:6380/1")),
        ("SAFER_BROKER_URL", "redis+socket:///run/r.sock?virtual_host=1", SecretStr("redis+socket:///run/r.sock?virtual_host=1")),
        ("SAFER_DATABASE_URL", "postgresql+psycopg:///s?host=/run/pg", SecretStr("postgresql+psycopg:///s?host=/run/pg")),
        ("SAFER_STORE_URL", "s3://bucket", "s3://bucket"),
        ("SAFER_ALLOWED_NETWORKS", "10.1.2.3/8,fd00::/8", ("10.1.2.3/8", "fd00::/8")),
        ("SAFER_ALLOWED_SOURCES", "upload:,hub:,s3://bucket/in/,/data/", ("upload:", "hub:", "s3://bucket/in/", "/data/")),
    ],
)
def test_right_values_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str, taken: object) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(load_settings(), name.removeprefix("SAFER_").lower()) == taken


def test_slips_of_the_pen_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_LEASE_SECOND", "5")
    monkeypatch.setenv("SAFER_REDIS_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("SAFER_AUDIT_URL", "http://127.0.0.1")
    assert unknown_settings() == [
        "SAFER_LEASE_SECOND is no setting; SAFER_LEASE_SECONDS is",
        "SAFER_REDIS_SERVICE_HOST is no setting",
    ]


def test_a_wrong_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_PORT", "no-canary-here")
    monkeypatch.setenv("SAFER_S3_SECRET_KEY", "canary-secret")
    monkeypatch.setenv("SAFER_BROKER_URL", "canary://:canary@host")
    monkeypatch.setenv("SAFER_DATABASE_URL", "canary://user:canary@host")
    monkeypatch.setenv("SAFER_SECRET_PEPPER", "canary")
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
