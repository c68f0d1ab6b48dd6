"""Files straight to and from an object store, and through the service where the store cannot be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import AuditClient, TransferObserver, read_files
from service.client.connection import Patience
from service.embedded import free_port
from tests.helpers.live_service import LiveService, live_service
from tests.helpers.servers import S3

QUICK = Patience(attempts=2, first_pause=0.01)


@pytest.fixture
def on_s3(s3_moto: S3) -> Iterator[LiveService]:
    with live_service(
        store_url=f"s3://{s3_moto.bucket}/client", s3_endpoint=s3_moto.endpoint, s3_access_key=s3_moto.access_key,
        s3_secret_key=s3_moto.secret_key, s3_part_bytes=5 << 20,
    ) as running:  # fmt: skip
        yield running


@pytest.mark.parametrize("reachable", [True, False])
def test_files_go_straight_to_the_store_where_it_can_be_reached(
    on_s3: LiveService, reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.client.connection import Connection

    real, sent = Connection.put_elsewhere, []

    def put(self: Connection, url: str, content: bytes, headers: dict[str, str]) -> object:
        sent.append(len(content))
        target = url if reachable else f"http://127.0.0.1:{free_port()}/"
        return real(self, target, content, headers)

    monkeypatch.setattr(Connection, "put_elsewhere", put)
    (tmp_path / "a.jsonl").write_bytes(os.urandom(6 << 20))
    files = read_files(tmp_path, [tmp_path / "a.jsonl"], TransferObserver())
    with AuditClient(on_s3.url, on_s3.key("submit"), patience=QUICK) as client:
        assert client.upload(files, "dataset").name == files.name
    assert sent[0] <= 5 << 20
    assert not reachable or sum(sent) == files.size


def test_results_come_from_the_store(on_s3: LiveService, tmp_path: Path) -> None:
    job = on_s3.world.finished()
    with AuditClient(on_s3.url, on_s3.key("read"), patience=QUICK) as client:
        artifact = client.artifact(job.id, "sae/sae.safetensors")
        assert client.download(job.id, artifact, tmp_path / "w")
        assert (tmp_path / "w").stat().st_size == artifact.size
        assert client.read(job.id, client.artifact(job.id, "report.html")).startswith(b"<!doctype html>")
