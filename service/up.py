"""`python -m service.up`: the whole service on this machine, in the foreground, for one person. Started by `safer-audit up`.

Broker, API with dispatcher, and workers are the programs of production as child processes; this process makes what they
need (folder, pepper, key, database), keeps them running, and stops them in order: workers first, which give their units
back, then the API, then the broker.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from safer_engine.errors import SaferError, SpecError
from service.embedded import (
    CLIENT_FILE,
    PEPPER_FILE,
    Broker,
    HomeLock,
    broker_program,
    free_port,
    keep_token,
    kept_pepper,
    kept_token,
    make_home,
    require_free,
)
from service.errors import Conflict, Unavailable
from service.infra.settings import Settings, load_settings, unknown_settings
from service.jobs.access import DEFAULT_PROJECT, AccessStore, Role
from service.jobs.database import migrate, open_database
from service.jobs.queue import Sender
from service.processes import Child, Program, Supervisor, ending

_READY_SECONDS = 90.0
_BROKER_SECONDS = 20.0
_BROKER, _API = "broker", "api"


@dataclass(frozen=True)
class Options:
    """What `up` was asked for. `port` None: as the settings say."""

    home: Path | None = None
    port: int | None = None
    workers: int = 1
    as_json: bool = False


class Up:
    """One run of the service.

    Args:
        tell: shows a line to the person at the terminal.
    """

    def __init__(self, options: Options, tell: Callable[[str], None]) -> None:
        self._options = options
        self._tell = tell
        self._stopping = threading.Event()
        self._signals = 0

    def run(self, announce: Callable[[dict[str, str]], None]) -> None:
        """Start everything, call `announce` when it answers, keep it running until a signal comes, stop it.

        Raises:
            SaferError: something that has to be there is not, or a process could not be started.
        """
        broker = None if "SAFER_BROKER_URL" in os.environ else Broker(free_port(), secrets.token_urlsafe(24))
        settings = self._settings(broker)
        lock = HomeLock(settings.folder)
        try:
            lock.take(self._tell)
            self._handle_signals()
            settings = self._with_address(settings)
            url = url_of(settings.host, settings.port)
            lock.describe(url)
            token = prepare(settings, url)
            supervisor = Supervisor(self._programs(settings, broker, lock.descriptor), self._tell)
            try:
                self._start(supervisor, settings, broker)
                if not self._stopping.is_set():
                    self._warn(settings, broker)
                    announce({"url": url, "login": f"{url}/login", "token": token, "home": str(settings.folder)})
                while not self._stopping.wait(0.2):
                    supervisor.watch()
            finally:
                self._stop(supervisor)
        finally:
            lock.close()

    def _warn(self, settings: Settings, broker: Broker | None) -> None:
        """Tell of what lets the service start and will hold it up."""
        for line in unknown_settings():
            self._tell(f"warning: {line}")
        if broker is None:
            sender = Sender(settings)
            try:
                sender.ping()
            except Unavailable as error:
                self._tell(f"warning: {error.message}: jobs wait until it does ({error.hint})")
            finally:
                sender.close()

    def _settings(self, broker: Broker | None) -> Settings:
        given: dict[str, object] = {}
        if self._options.home is not None:
            given["home"] = self._options.home
        if self._options.port is not None:
            given["port"] = self._options.port
        folder = load_settings(**given).folder
        make_home(folder)
        if "SAFER_SECRET_PEPPER" not in os.environ:
            if (folder / "service.db").exists() and not (folder / PEPPER_FILE).exists():
                self._tell(f"warning: {folder / PEPPER_FILE} is gone; with the new one, no API key made before is valid any more")
            given["secret_pepper"] = kept_pepper(folder)
        if broker is not None:
            given["broker_url"] = broker.url
        if "SAFER_METRICS_PORT" not in os.environ:
            given["metrics_port"] = 0
        settings = load_settings(**given)
        near, hosts = _reachable(settings.host), settings.allowed_hosts
        if "*" in hosts or near in hosts:
            return settings
        return settings.model_copy(update={"allowed_hosts": (*hosts, near)})  # whoever sits here reaches it by this name

    def _with_address(self, settings: Settings) -> Settings:
        if settings.port:
            require_free(settings.host, settings.port)
            return settings
        return settings.model_copy(update={"port": free_port(settings.host)})

    def _programs(self, settings: Settings, broker: Broker | None, lock: int) -> list[Program]:
        """What is to run, in the order of starting."""
        environment = {**os.environ, **as_environment(settings)}
        logs = settings.folder / "logs"
        programs = []
        if broker is not None:
            bare = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
            feed = broker.settings(settings.folder)
            programs.append(Program(_BROKER, (broker_program(), "-"), bare, logs / "broker.log", feed=feed, pass_fds=(lock,)))
        api = (sys.executable, "-m", "service")
        programs.append(Program(_API, api, environment, logs / "api.log", stop_seconds=20.0, pass_fds=(lock,)))
        for number in range(1, self._options.workers + 1):
            name, command = f"worker-{number}", (sys.executable, "-m", "workers")
            seconds = settings.terminate_seconds + 15.0
            programs.append(Program(name, command, environment, logs / f"{name}.log", stop_seconds=seconds, pass_fds=(lock,)))
        return programs

    def _start(self, supervisor: Supervisor, settings: Settings, broker: Broker | None) -> None:
        if broker is not None:
            self._wait(supervisor.start(_BROKER), _BROKER_SECONDS, broker.answers)
        for name in supervisor.children:
            if name != _BROKER:
                supervisor.start(name)
        self._wait(supervisor.children[_API], _READY_SECONDS, lambda: _answers(settings.host, settings.port))

    def _wait(self, child: Child, seconds: float, there: Callable[[], bool]) -> None:
        """Wait until a child answers. Raises SpecError or Unavailable with its last lines where it ends, or does not answer."""
        until = time.monotonic() + seconds
        while not self._stopping.is_set() and not there():
            name, log = child.program.name, child.program.log
            if child.code is not None:
                kind = SpecError if child.code == 2 else Unavailable
                raise kind(f"the {name} did not start ({ending(child.code)})", f"it said:\n{_indented(child.said())}")
            if time.monotonic() > until:
                raise Unavailable(f"the {name} does not answer after {seconds:.0f} s", f"see {log}")
            self._stopping.wait(0.05)

    def _stop(self, supervisor: Supervisor) -> None:
        if any(child.code is None and child.process for child in supervisor.children.values()):
            self._tell("stopping; what is unfinished goes on at the next `up` (Ctrl-C again: at once)")
        asked = self._signals
        killed = supervisor.stop(lambda: self._signals > max(1, asked))
        self._tell("stopped" + (f"; had to kill: {', '.join(killed)}" if killed else ""))

    def _handle_signals(self) -> None:
        def heard(_number: int, _frame: FrameType | None) -> None:
            self._signals += 1
            self._stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, heard)


def prepare(settings: Settings, url: str) -> str:
    """Bring the database up to date; make the default project and the key of this machine. Returns the key."""
    engine = open_database(settings)
    try:
        migrate(engine)
        access = AccessStore(engine, settings)
        access.ensure_project(DEFAULT_PROJECT)
        token = kept_token(settings.folder)
        if token is None or access.authenticate(token) is None:
            token = access.create_key(DEFAULT_PROJECT, "this machine", [Role.ADMIN], "up").secret
        keep_token(settings.folder, url, token)
        return token
    finally:
        engine.dispose()


def as_environment(settings: Settings) -> dict[str, str]:
    """What the children must know beyond the environment that they inherit."""
    assert settings.secret_pepper is not None
    return {
        "SAFER_HOME": str(settings.folder),
        "SAFER_PORT": str(settings.port),
        "SAFER_BROKER_URL": settings.broker_url.get_secret_value(),
        "SAFER_SECRET_PEPPER": settings.secret_pepper.get_secret_value(),
        "SAFER_METRICS_PORT": str(settings.metrics_port),
        "SAFER_ALLOWED_HOSTS": ",".join(settings.allowed_hosts),
    }


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=5)
    try:
        connection.request("GET", "/healthz", headers={"Host": f"127.0.0.1:{port}"})
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def url_of(host: str, port: int) -> str:
    """What a browser on this machine types to reach a server that listens on `host`."""
    name = _reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _reachable(host: str) -> str:
    """Where a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    nothing"


def main(arguments: list[str] | None = None) -> int:
    """Run until a signal comes. Returns the exit code: 0 stopped, 2 refused, 4 failed."""
    parser = argparse.ArgumentParser(prog="python -m service.up")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = Options(**vars(parser.parse_args(arguments)))
    try:
        Up(options, _say).run(_announce_json if options.as_json else _announce)
    except SaferError as error:
        _say(f"error [{error.code}]: {error.message}")
        if error.hint:
            _say(f"  hint: {error.hint}")
        return 2 if isinstance(error, (SpecError, Conflict)) else 4
    return 0


def _announce(facts: dict[str, str]) -> None:
    _say(
        "safer-audit is running on this machine.\n"
        f"  pages     {facts['login']}\n"
        f"  key       {facts['token']}   (paste it there; kept in {facts['home']}/{CLIENT_FILE})\n"
        "  commands  safer-audit submit --model MODEL --dataset DATA --wait   (they find this service by themselves)\n"
        f"  logs      {facts['home']}/logs\n"
        "Ctrl-C stops it."
    )


def _announce_json(facts: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
