"""What is asked of an MLflow server, and the files that are fetched from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import NotFound, TooLarge, Unavailable
from service.infra.upload_files import UploadFiles
from service.mlflow.fetching import Fetching
from service.mlflow.layout import ModelFile
from service.mlflow.registry import Registry, RegistryRefused
from service.outbound import Outbound
from tests.helpers.databases import settings_for
from tests.helpers.http_world import http_world
from tests.helpers.scripted_server import Reply, ScriptedServer
from tests.helpers.servers import LOCAL

SECRET = "a secret of tests, long enough"


@contextmanager
def registry(*script: Reply) -> Iterator[tuple[Registry, ScriptedServer]]:
    """A registry that answers as told."""
    with ScriptedServer(list(script)) as server:
        settings = settings_for(
            Path("/tmp"), mlflow_url=server.url, mlflow_secret=SECRET, mlflow_template="/x", mlflow_token="t0ken"
        )
        yield Registry(Outbound((f"{LOCAL}/32",)), settings), server


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(401), Unavailable),
        (Reply(403), Unavailable),
        (Reply(429), Unavailable),
        (Reply(500), Unavailable),
        (Reply(302, headers={"Location": "http://169.254.169.254/"}), Unavailable),
        (Reply(200, b"<html>"), Unavailable),
        (Reply(200, b'{"model_version": []}'), Unavailable),
        (Reply(200, b'{"model_version": {"tags": [{}]}}'), Unavailable),
        (Reply(200, b"{" + b" " * 100, cut=10), Unavailable),
        (Reply(cut=-1), Unavailable),
        (Reply(404, b'{"message": "no such"}'), NotFound),
        (Reply(400, b'{"message": "bad"}'), RegistryRefused),
    ],
)
def test_answers_that_are_no_version(reply: Reply, kind: type[Exception]) -> None:
    with registry(reply) as (asked, _), pytest.raises(kind):
        asked.version("rm", "1")


def test_what_is_asked_carries_our_token_and_names_as_they_are() -> None:
    found = {"model_version": {"source": "s3://b/k", "creation_timestamp": "17", "tags": [{"key": "a", "value": "b"}], "new": 1}}
    with registry(Reply(200, json.dumps(found).encode())) as (asked, server):
        version = asked.version("a b&c", "1")
    assert (version.source, version.created, version.tags) == ("s3://b/k", 17, {"a": "b"})
    assert server.asked[0].query == {"name": ["a b&c"], "version": ["1"]}
    assert server.asked[0].headers["authorization"] == "Bearer t0ken"


def test_a_registry_on_an_address_that_is_not_allowed_is_an_operators_matter() -> None:
    with registry() as (asked, server):
        forbidden = Registry(
            Outbound(), settings_for(Path("/tmp"), mlflow_url=asked.url, mlflow_secret=SECRET, mlflow_template="/x")
        )
        with pytest.raises(Unavailable, match="SAFER_MLFLOW_URL"):
            forbidden.version("rm", "1")
        assert not server.asked


def test_a_fetch_that_breaks_off_goes_on_with_the_parts_that_are_missing() -> None:
    each = 5 << 20
    content = bytes(range(256)) * (3 * each // 256) + b"end"
    replies = [Reply(200, content), Reply(200, content, cut=each + 100), Reply(200, content), Reply(200, content)]
    with registry(*replies) as (asked, server), http_world(s3_part_bytes=each) as world:
        fetching = Fetching(world.services, asked, "default", lambda: None)
        files = [ModelFile("model.safetensors", "0/run/model.safetensors", len(content))]
        with pytest.raises(Unavailable, match="broke off"):
            fetching.fetch(files, "rm 1")
        name = fetching.fetch(files, "rm 1")
        digest = name.removeprefix("upload:")
        found = world.services.uploads.find("default", digest)
        assert found is not None
        assert (found.created_by, found.title, found.bytes) == ("mlflow", "rm 1", len(content))
        kept = UploadFiles(world.services.stores, "default").stream(digest, "model.safetensors")
        assert b"".join(kept) == content
        server.script.append(Reply(200, content))
        assert fetching.fetch(files, "rm 1") == name
        assert len(server.asked) == 5, "what is here already is read once"


def test_files_that_are_too_large_or_shorter_than_listed_are_not_kept() -> None:
    with registry(Reply(200, b"abc")) as (asked, server), http_world(upload_limit_bytes=10) as world:
        fetching = Fetching(world.services, asked, "default", lambda: None)
        with pytest.raises(Unavailable, match="3 of the 4 bytes"):
            fetching.fetch([ModelFile("a", "0/a", 4)], "rm 1")
        with pytest.raises(TooLarge):
            fetching.fetch([ModelFile("a", "0/a", 11)], "rm 1")
        server.script.append(Reply(200, b"a" * 11))
        with pytest.raises(TooLarge):
            fetching.fetch([ModelFile("a", "0/a", None)], "rm 1")
