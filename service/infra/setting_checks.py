"""What the values of settings must look like; each check raises ValueError with what is wrong, and never shows a secret."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

_BROKERS = ("redis", "rediss", "redis+socket")
_SOURCES = ("hub:", "s3://", "/")
_DATABASES = ("postgresql+psycopg", "sqlite")
_OTHER_PREFIXES = ("SAFER_AUDIT_", "SAFER_REQUIRE_ALL")
"""Variables of the command line and of the tests."""


def broker(url: str) -> None:
    """A Redis, over TCP, TLS or a socket."""
    parts = urlsplit(url)
    if parts.scheme not in _BROKERS or not (parts.netloc or parts.path):
        raise ValueError("must be redis://HOST:PORT/N, rediss://… or redis+socket:///PATH")


def database(url: str) -> None:
    """PostgreSQL through psycopg, or SQLite."""
    if urlsplit(url).scheme not in _DATABASES:
        raise ValueError("must be postgresql+psycopg://USER:PASSWORD@HOST/NAME or sqlite:////PATH")


def store(place: str) -> None:
    """A bucket or a folder."""
    parts = urlsplit(place)
    if not (parts.scheme == "s3" and parts.netloc) and not place.startswith(("/", "~")):
        raise ValueError("must be s3://BUCKET/PREFIX or an absolute folder")


def web_address(url: str) -> None:
    """HTTP or HTTPS."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http or https address")


def networks(values: Iterable[str]) -> None:
    """Each a network in CIDR notation."""
    for value in values:
        try:
            ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ValueError(f"{value!r} is no network like 10.0.0.0/8") from None


def sources(values: Iterable[str]) -> None:
    """Each a prefix that the policy knows."""
    for value in values:
        if value != "upload:" and not value.startswith(_SOURCES):
            raise ValueError(f"{value!r} is neither upload:, hub:…, s3://… nor a folder /…")


def pepper(value: str) -> None:
    """Long enough that it cannot be guessed; empty counts as not set."""
    if value and len(value) < 16:
        raise ValueError("must have at least 16 characters; `openssl rand -hex 32` makes one")


def webhook_secret(value: str) -> None:
    """Long enough that it cannot be guessed."""
    if len(value) < 16:
        raise ValueError("must have at least 16 characters; `openssl rand -hex 32` makes one")


def mlflow(url: str | None, needed: Mapping[str, object]) -> None:
    """All that the hook needs, where there is to be one: a secret alone may be given to processes that do not serve it."""
    absent = [f"SAFER_{name.upper()}" for name, value in needed.items() if value is None]
    if url is not None and absent:
        raise ValueError(f"SAFER_MLFLOW_URL needs {' and '.join(absent)} too (docs/mlflow.md)")


def unknown(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """What to say of variables that begin like settings and are none: likely slips of the pen."""
    names = {f"SAFER_{name.upper()}" for name in known}
    found = []
    for name in sorted(given):
        if name.startswith("SAFER_") and name not in names and not name.startswith(_OTHER_PREFIXES):
            near = difflib.get_close_matches(name, names, 1, 0.8)
            found.append(f"{name} is no setting" + (f"; {near[0]} is" if near else ""))
    return found
