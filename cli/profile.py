"""Which service the commands speak to, and as whom: flags of the environment, a profile file, or the service of this machine.

`SAFER_AUDIT_URL` and `SAFER_AUDIT_TOKEN` come first. Then the profile file `~/.config/safer-audit/profiles.toml`::

    [default]
    url = "https://audit.example.org"
    token = "sk-safer-…"

of which `SAFER_AUDIT_PROFILE` picks the table. Then what `safer-audit up` left in its folder (`SAFER_HOME`).
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from service.client import AuditClient

DEFAULT_HOME = "~/.local/share/safer-audit"
CLIENT_FILE = "client.toml"
_EXAMPLE = '[default]\nurl = "https://…"\ntoken = "sk-safer-…"'


@dataclass(frozen=True)
class Profile:
    """Where the service is, and the key to use there. `origin` says where both were found."""

    url: str
    token: str = field(repr=False)
    origin: str = ""


def find_profile() -> Profile:
    """The profile in force.

    Raises:
        SpecError: none is given, one is incomplete, or a file with a key in it can be read by others.
    """
    url, token = os.environ.get("SAFER_AUDIT_URL", "").strip(), os.environ.get("SAFER_AUDIT_TOKEN", "").strip()
    named = os.environ.get("SAFER_AUDIT_PROFILE")
    if url and token:
        return _checked(Profile(url, token, "the environment"))
    found = _from_files(named)
    if found is None:
        missing = "SAFER_AUDIT_TOKEN" if url else "SAFER_AUDIT_URL"
        raise SpecError(
            f"no audit service is known: {missing} is not set, {profile_path()} does not exist, and no service was started here",
            "start one on this machine with `safer-audit up`, or set SAFER_AUDIT_URL and SAFER_AUDIT_TOKEN",
        )
    if url and url.rstrip("/") != found.url.rstrip("/"):  # a key is never sent to an address it was not made for
        raise SpecError("SAFER_AUDIT_URL is set without SAFER_AUDIT_TOKEN", f"set both, or neither to use {found.origin}")
    return _checked(Profile(found.url, token or found.token, found.origin))


def connect() -> AuditClient:
    """A client of the service in force. Raises SpecError."""
    from service.client import AuditClient

    profile = find_profile()
    return AuditClient(profile.url, profile.token)


def profile_path() -> Path:
    """The profile file."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "safer-audit" / "profiles.toml"


def home_path() -> Path:
    """The folder of the service that `up` starts."""
    return Path(os.environ.get("SAFER_HOME") or DEFAULT_HOME).expanduser()


def _from_files(named: str | None) -> Profile | None:
    path, left_by_up = profile_path(), home_path() / CLIENT_FILE
    if path.exists():
        tables = _read(path)
        name = named or "default"
        if name in tables:
            return _checked(_profile(tables[name], f"profile {name!r} of {path}"))
        if named:
            raise SpecError(f"{path} has no profile {named!r}", f"known: {', '.join(sorted(tables)) or 'none'}")
    elif named:
        raise SpecError(f"SAFER_AUDIT_PROFILE is {named!r}, but {path} does not exist", f"write it:\n{_EXAMPLE}")
    if left_by_up.exists():
        return _checked(_profile(_read(left_by_up).get("default"), str(left_by_up)))
    return None


def _read(path: Path) -> dict[str, object]:
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SpecError(f"{path} holds a key and can be read by others (mode {mode & 0o777:04o})", f"chmod 600 {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}", f"write it like this:\n{_EXAMPLE}") from None
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None


def _profile(table: object, origin: str) -> Profile:
    values = table if isinstance(table, dict) else {}
    url, token = values.get("url"), values.get("token")
    if not isinstance(url, str) or not isinstance(token, str) or not url or not token:
        raise SpecError(f"{origin} has no url and token", f"write it like this:\n{_EXAMPLE}")
    if unknown := sorted(set(values) - {"url", "token"}):
        raise SpecError(f"{origin} has unknown keys: {', '.join(unknown)}", "known: url, token")
    return Profile(url, token, origin)


def _checked(profile: Profile) -> Profile:
    parts = urlsplit(profile.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"the service's address {profile.url!r} (from {profile.origin}) is not an http or https URL")
    if parts.username or parts.password:
        raise SpecError(f"the address from {profile.origin} has a password in it", "put the key into SAFER_AUDIT_TOKEN")
    if not profile.token.isascii() or not profile.token.isprintable() or " " in profile.token:
        raise SpecError(
            f"the API key from {profile.origin} has characters that no key has", "copy it once more, without line breaks"
        )
    return profile
