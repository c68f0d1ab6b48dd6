"""Files come whole or not at all, and go on where they stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError, ResourceError
from service.client.connection import Connection, Patience
from service.client.downloads import read, receive, target_of
from service.client.files import TransferObserver
from service.errors import Unreachable
from service.schemas import ArtifactView
from tests.helpers.scripted_server import Asked, Reply, ScriptedServer

CONTENT = bytes(range(256)) * 2000
QUICK = Patience(attempts=3, first_pause=0.001)
VIEW = ArtifactView(name="report.html", size=len(CONTENT), digest=hashlib.sha256(CONTENT).hexdigest(), media_type="text/html")


class Counting(TransferObserver):
    def __init__(self) -> None:
        self.bytes = 0

    def advance(self, count: int) -> None:
        self.bytes += count


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def get(server: ScriptedServer, target: Path, view: ArtifactView = VIEW, observer: TransferObserver | None = None) -> bool:
    connection = Connection(server.url, "t", patience=QUICK)
    return receive(connection, "/file", view, target, observer or TransferObserver(), QUICK)


def ranged(asked: Asked, cut: int | None = None) -> Reply:
    start = int(asked.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    return Reply(206 if start else 200, CONTENT[start:], cut=cut)


def test_a_transfer_that_keeps_breaking_goes_on(server: ScriptedServer, tmp_path: Path) -> None:
    server.otherwise = lambda asked: ranged(asked, cut=100_000)
    counted = Counting()
    assert get(server, tmp_path / "deep" / "report.html", observer=counted)
    assert (tmp_path / "deep" / "report.html").read_bytes() == CONTENT
    starts = [asked.headers.get("range") for asked in server.asked]
    assert starts == [None, *(f"bytes={100_000 * n}-" for n in range(1, 6))]
    assert counted.bytes == len(CONTENT)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_second_command_goes_on_where_the_first_stopped(server: ScriptedServer, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    server.script = [lambda asked: ranged(asked, cut=70_000)]
    server.otherwise = Reply(cut=-1)
    with pytest.raises(Unreachable):
        get(server, target)
    assert not target.exists()
    server.otherwise = ranged
    assert get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked[-1].headers["range"] == "bytes=70000-"


def test_a_server_without_ranges_starts_over(server: ScriptedServer, tmp_path: Path) -> None:
    counted = Counting()
    server.script = [Reply(200, CONTENT, cut=70_000), Reply(200, CONTENT)]
    assert get(server, tmp_path / "r", observer=counted)
    assert (tmp_path / "r").read_bytes() == CONTENT
    assert counted.bytes == len(CONTENT)


def test_other_content_is_not_kept(server: ScriptedServer, tmp_path: Path) -> None:
    server.otherwise = Reply(200, CONTENT[:-1] + b"!")
    with pytest.raises(ArtifactError, match="other content"):
        get(server, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError, match="other content"):
        read(Connection(server.url, "t"), "/file", VIEW)


def test_what_is_there_is_not_fetched(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(CONTENT)
    assert not get(server, tmp_path / "r")
    assert server.asked == []
    (tmp_path / "r").write_bytes(CONTENT[::-1])
    server.otherwise = Reply(200, CONTENT)
    assert get(server, tmp_path / "r")
    assert (tmp_path / "r").read_bytes() == CONTENT


def test_an_empty_file(server: ScriptedServer, tmp_path: Path) -> None:
    empty = ArtifactView(name="e", size=0, digest=hashlib.sha256(b"").hexdigest(), media_type="text/plain")
    server.otherwise = Reply(200)
    assert get(server, tmp_path / "e", empty)
    assert (tmp_path / "e").read_bytes() == b""


def test_a_place_that_cannot_be_written(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write"):
        get(server, tmp_path / "file" / "report.html")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\\..\\x", "a/./../x", "x\0y"])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a relative path"):
        target_of(tmp_path, name)
    assert target_of(tmp_path, "sae/weights.safetensors") == tmp_path / "sae" / "weights.safetensors"
