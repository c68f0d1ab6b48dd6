"""Which service the commands speak to."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import run_main
from cli.profile import find_profile
from safer_engine.errors import SpecError
from service.embedded import free_port

TWO = '[default]\nurl = "https://a.example"\ntoken = "key-a"\n[lab]\nurl = "http://lab:8321"\ntoken = "key-b"\n'


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def profiles(home: Path) -> Path:
    return home / ".config" / "safer-audit" / "profiles.toml"


def test_the_environment_comes_first_then_the_file_then_this_machine(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="no audit service is known"):
        find_profile()
    write(at_home / ".local/share/safer-audit/client.toml", '[default]\nurl = "http://127.0.0.1:1"\ntoken = "local"\n')
    assert find_profile().token == "local"
    write(profiles(at_home), TWO)
    assert (find_profile().url, find_profile().token) == ("https://a.example", "key-a")
    monkeypatch.setenv("SAFER_AUDIT_PROFILE", "lab")
    assert find_profile().token == "key-b"
    monkeypatch.setenv("SAFER_AUDIT_URL", "https://env.example")
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", "key-c")
    assert (find_profile().url, find_profile().token) == ("https://env.example", "key-c")


@pytest.mark.parametrize("token", ["sk-safer-a\nb", "sk-safer-é", "sk safer"])
def test_a_key_that_was_copied_wrongly_is_refused_and_not_told(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("SAFER_AUDIT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", f" {token}\n")
    with pytest.raises(SpecError, match="characters that no key has") as raised:
        find_profile()
    assert "safer" not in raised.value.message
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", "sk-safer-good\n")
    assert find_profile().token == "sk-safer-good"


def test_a_key_is_not_sent_to_another_address(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(profiles(at_home), TWO)
    monkeypatch.setenv("SAFER_AUDIT_URL", "https://elsewhere.example")
    with pytest.raises(SpecError, match="without SAFER_AUDIT_TOKEN"):
        find_profile()
    monkeypatch.setenv("SAFER_AUDIT_URL", "https://a.example/")
    assert find_profile().token == "key-a"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604])
def test_a_file_that_others_can_read_is_refused(at_home: Path, mode: int) -> None:
    path = write(profiles(at_home), TWO, mode)
    with pytest.raises(SpecError, match="can be read by others") as raised:
        find_profile()
    assert raised.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "not valid TOML"),
        ('[default]\nurl = "https://a"\n', "has no url and token"),
        ('[default]\nurl = "https://a"\ntoken = "x"\ntimeout = 3\n', "unknown keys: timeout"),
        ('[default]\nurl = "ftp://a"\ntoken = "x"\n', "not an http or https URL"),
        ('[default]\nurl = "https://me:secret@a"\ntoken = "x"\n', "has a password in it"),
    ],
)
def test_files_that_are_wrong_are_named(at_home: Path, text: str, said: str) -> None:
    write(profiles(at_home), text)
    with pytest.raises(SpecError, match=said) as raised:
        find_profile()
    assert "secret" not in str(raised.value)


def test_a_profile_that_is_not_there(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_AUDIT_PROFILE", "prod")
    with pytest.raises(SpecError, match="does not exist"):
        find_profile()
    write(profiles(at_home), TWO)
    with pytest.raises(SpecError, match="has no profile 'prod'") as raised:
        find_profile()
    assert raised.value.hint == "known: default, lab"


def test_exit_codes(at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["list"]) == 2
    assert "safer-audit up" in capsys.readouterr().err
    monkeypatch.setenv("SAFER_AUDIT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", "sk-safer-x")
    monkeypatch.setattr("service.client.connection.Patience.pause", lambda *_: 0.0)
    assert run_main(["list"]) == 5
    assert "cannot be reached" in capsys.readouterr().err
