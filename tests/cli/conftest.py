"""A service for the commands, and a terminal that belongs to nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.live_service import LiveService, live_service


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    """A real API on a socket, a module's own, with parts of uploads small enough to be several."""
    with live_service(upload_part_limit_bytes=1 << 20) as running:
        yield running


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no service named by the environment."""
    for name in ("SAFER_AUDIT_URL", "SAFER_AUDIT_TOKEN", "SAFER_AUDIT_PROFILE", "XDG_CONFIG_HOME", "SAFER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def as_admin(at_home: Path, service: LiveService, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `at_home`, with an admin's key of the running service."""
    monkeypatch.setenv("SAFER_AUDIT_URL", service.url)
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", service.key("admin"))
    return at_home
