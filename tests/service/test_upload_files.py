"""Bytes of uploads: parts in any order, files checked, names that lead nowhere, in a folder and in S3."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError, SpecError
from safer_engine.store import canonical_json, digest_bytes
from service.errors import Conflict, NotFound, TooLarge
from service.infra.input_cache import InputCache
from service.infra.upload_files import PartFacts, PartReceipt, UploadFiles, checked_files
from service.upload_names import UploadFile, upload_digest
from tests.helpers.store_world import World

ID = "01J0000000000000000000000A"
SMALL, LARGE = b'{"model_type": "x"}', os.urandom((6 << 20) + 7)


@pytest.fixture(params=["folder", "s3_moto", pytest.param("s3_rgw", marks=pytest.mark.full)])
def world(request: pytest.FixtureRequest, folder: Path) -> World:
    return World(folder, None if request.param == "folder" else request.getfixturevalue(request.param))


@pytest.fixture
def uploads(world: World) -> UploadFiles:
    return UploadFiles(world.stores(), "default")


def file_of(path: str, data: bytes) -> UploadFile:
    return UploadFile(path, digest_bytes(data), len(data))


def receipt(data: bytes) -> PartReceipt:
    return PartReceipt(len(data), digest_bytes(data))


def send(uploads: UploadFiles, file: int, part: int, data: bytes, upload_id: str = ID) -> None:
    chunks = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    assert uploads.put_part(upload_id, file, part, chunks, receipt(data)) == receipt(data)


FILES = [file_of("model/weights.safetensors", LARGE), file_of("config.json", SMALL), file_of("empty.txt", b"")]


def send_all(uploads: UploadFiles, part_bytes: int = 5 << 20) -> str:
    for number, start in reversed(list(enumerate(range(0, len(LARGE), part_bytes)))):
        send(uploads, 0, number, LARGE[start : start + part_bytes])
    send(uploads, 1, 0, SMALL)
    return uploads.complete(ID, FILES)


@pytest.mark.parametrize("part_bytes", [5 << 20, 4_000_000, 20 << 20])
def test_parts_become_the_files_that_were_declared(world: World, uploads: UploadFiles, tmp_path: Path, part_bytes: int) -> None:
    digest = send_all(uploads, part_bytes)
    assert digest == digest_bytes(canonical_json(sorted([f.path, f.digest, f.size] for f in FILES)))
    assert uploads.has(digest)
    assert uploads.files(digest) == tuple(sorted(FILES))
    assert uploads.parts(ID) == ()
    assert uploads.complete(ID, FILES) == digest
    worker = UploadFiles(world.stores("worker"), "default")
    worker.materialise(digest, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "weights.safetensors").read_bytes() == LARGE
    assert (tmp_path / "out" / "config.json").read_bytes() == SMALL
    assert (tmp_path / "out" / "empty.txt").read_bytes() == b""
    assert b"".join(worker.stream(digest, "config.json")) == SMALL
    assert [each.name for each in uploads.complete_uploads()] == [digest]
    assert list(world.stores().space.listing("staged/")) == []


def test_an_interrupted_upload_goes_on(world: World, uploads: UploadFiles) -> None:
    send(uploads, 0, 1, LARGE[5_000_000:])
    with pytest.raises(Conflict, match="weights"):
        uploads.complete(ID, FILES)
    again = UploadFiles(world.stores("two"), "default")
    assert again.parts(ID) == (PartFacts(0, 1, len(LARGE) - 5_000_000),)
    send(again, 0, 0, LARGE[:5_000_000])
    with pytest.raises(Conflict, match=r"config\.json has 0 of"):
        again.complete(ID, FILES)
    send(again, 1, 0, SMALL)
    assert again.has(again.complete(ID, FILES))


def test_a_part_that_is_not_what_was_claimed_is_not_kept(uploads: UploadFiles) -> None:
    send(uploads, 1, 0, SMALL)
    for claim in (PartReceipt(len(SMALL), digest_bytes(b"other")), PartReceipt(len(SMALL) + 1, digest_bytes(SMALL))):
        with pytest.raises(SpecError, match="send it again"):
            uploads.put_part(ID, 1, 0, [SMALL], claim)
    assert uploads.parts(ID) == (PartFacts(1, 0, len(SMALL)),)


def test_a_file_that_is_not_what_was_declared_is_refused(uploads: UploadFiles) -> None:
    wrong = b"x" * len(SMALL)
    send(uploads, 0, 0, wrong)
    with pytest.raises(Conflict, match="sha256"):
        uploads.complete(ID, [FILES[1]])
    assert uploads.parts(ID) == ()
    assert not uploads.has(upload_digest([FILES[1]]))
    send(uploads, 0, 0, SMALL)
    assert uploads.has(uploads.complete(ID, [FILES[1]]))


def test_parts_and_sizes_have_limits(world: World) -> None:
    uploads = UploadFiles(world.stores(upload_part_limit_bytes=10), "default")
    with pytest.raises(TooLarge, match="over the limit of 10 bytes"):
        uploads.put_part(ID, 0, 0, [b"123456", b"789012"], receipt(b"123456789012"))
    send(uploads, 0, 0, b"1234567890")
    assert uploads.parts(ID) == (PartFacts(0, 0, 10),)
    spool = world.folder / "one" / "cache" / "spool"
    assert list(spool.iterdir()) == []


def test_a_broken_off_part_leaves_nothing(world: World, uploads: UploadFiles) -> None:
    def chunks() -> object:
        yield b"123"
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError, match="went away"):
        uploads.put_part(ID, 0, 0, chunks(), receipt(b"123456"))  # type: ignore[arg-type]
    assert uploads.parts(ID) == ()
    assert list((world.folder / "one" / "cache" / "spool").iterdir()) == []


def test_abort_and_remove(uploads: UploadFiles, tmp_path: Path) -> None:
    send(uploads, 0, 0, SMALL)
    uploads.abort(ID)
    assert uploads.parts(ID) == ()
    digest = send_all(uploads)
    uploads.remove(digest)
    assert not uploads.has(digest)
    for call in (lambda: uploads.files(digest), lambda: uploads.materialise(digest, tmp_path / "out")):
        with pytest.raises(NotFound, match="there is no upload"):
            call()
    with pytest.raises(NotFound, match="no file 'nothing.json'"):
        uploads.stream(send_all(uploads), "nothing.json")


def test_projects_do_not_see_each_other(world: World, uploads: UploadFiles) -> None:
    digest = send_all(uploads)
    other = UploadFiles(world.stores(), "other")
    assert not other.has(digest)
    assert other.parts(ID) == ()
    with pytest.raises(NotFound, match="there is no upload"):
        other.files(digest)
    with pytest.raises(Conflict, match=" has 0 of "):
        other.complete(ID, FILES)


def test_damage_in_the_store_is_found(world: World, uploads: UploadFiles, tmp_path: Path) -> None:
    digest = send_all(uploads)
    space = world.stores().space
    blob = f"blobs/{FILES[1].digest[:2]}/{FILES[1].digest}"
    space.put(blob, b"x" * len(SMALL))
    cache = InputCache(tmp_path / "cache", 1 << 30)
    for damage in (lambda: None, lambda: space.put(blob, SMALL[:-1]), lambda: space.delete([blob])):
        damage()
        with pytest.raises(ArtifactError, match=r"damaged|missing"), uploads.on_disk(digest, cache):
            pass
        assert cache.entries() == []
    space.put(blob, SMALL)
    with uploads.on_disk(digest, cache) as folder:
        assert (folder / "config.json").read_bytes() == SMALL
    space.put(f"uploads/default/{digest}.json", canonical_json([["../x", FILES[1].digest, len(SMALL)]]))
    with pytest.raises(SpecError, match="no relative path"):
        uploads.materialise(digest, tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_a_file_that_was_collected_meanwhile_is_asked_for_again(world: World, uploads: UploadFiles) -> None:
    send(uploads, 0, 0, SMALL)
    with pytest.raises(Conflict, match=" has 0 of "):
        uploads.complete(ID, [FILES[1], FILES[0]])
    world.stores().space.delete([f"blobs/{FILES[1].digest[:2]}/{FILES[1].digest}"])
    send(uploads, 1, 0, LARGE)
    with pytest.raises(Conflict, match="too long ago"):
        uploads.complete(ID, [FILES[1], FILES[0]])
    send(uploads, 0, 0, SMALL)
    assert uploads.has(uploads.complete(ID, [FILES[1], FILES[0]]))


LEAD_ELSEWHERE = ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", ".", ".hidden", "a/.git/config"]
NOT_PORTABLE = ["a\\b", "a\0b", "a\nb", "C:x", "a ", " a/b", "x" * 501, "a/" + "y" * 256, "a\u202eb", "q?", "*"]


@pytest.mark.parametrize("path", [*LEAD_ELSEWHERE, *NOT_PORTABLE])
def test_names_that_may_not_be(path: str) -> None:
    with pytest.raises(SpecError, match="no relative path of plain names|letters that some machines|a file name has"):
        checked_files([file_of(path, b"")])


@pytest.mark.parametrize("paths", [("a", "a"), ("A/x", "a/X"), ("a", "a/b"), ("caf\u00e9", "cafe\u0301"), ("a/b", "a/b/c/d"), ()])
def test_names_that_may_not_be_together(paths: tuple[str, ...]) -> None:
    with pytest.raises(SpecError, match="one name on some machines|below a file of the same upload|has no files"):
        checked_files([file_of(path, path.encode()) for path in paths])


def test_names_that_may_be() -> None:
    paths = ("a", "b/c.json", "b/d e/ü-1_2.safetensors", "model-00001-of-00002.safetensors")
    assert [file.path for file in checked_files([file_of(path, b"") for path in reversed(paths)])] == sorted(paths)


@pytest.mark.parametrize(("file", "part"), [(-1, 0), (0, -1)])
def test_numbers_that_may_not_be(uploads: UploadFiles, file: int, part: int) -> None:
    with pytest.raises(SpecError, match="numbered from 0"):
        uploads.put_part(ID, file, part, [b""], receipt(b""))


@pytest.mark.parametrize("server", ["s3_moto", pytest.param("s3_rgw", marks=pytest.mark.full)])
def test_parts_go_straight_to_the_bucket(request: pytest.FixtureRequest, folder: Path, server: str) -> None:
    world = World(folder, request.getfixturevalue(server))
    uploads = UploadFiles(world.stores(), "default")
    for number, part in enumerate((LARGE[: 5 << 20], LARGE[5 << 20 :])):
        url = uploads.presigned_part(ID, 0, number, len(part))
        assert url is not None
        with urllib.request.urlopen(urllib.request.Request(url, data=part, method="PUT", headers={"Content-Type": ""})) as answer:
            assert answer.headers["ETag"].strip('"') == hashlib.md5(part).hexdigest()
    assert [part.size for part in uploads.parts(ID)] == [5 << 20, len(LARGE) - (5 << 20)]
    digest = uploads.complete(ID, FILES[:1])
    assert b"".join(uploads.stream(digest, FILES[0].path)) == LARGE
    with pytest.raises(TooLarge):
        uploads.presigned_part(ID, 0, 0, 1 << 40)
    assert UploadFiles(world.stores(presign=False), "default").presigned_part(ID, 0, 0, 5) is None


@pytest.mark.full
def test_a_real_server_refuses_a_part_of_another_size(request: pytest.FixtureRequest, folder: Path) -> None:
    uploads = UploadFiles(World(folder, request.getfixturevalue("s3_rgw")).stores(), "default")
    url = uploads.presigned_part(ID, 0, 0, 5)
    assert url is not None
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(url, data=b"123456", method="PUT", headers={"Content-Type": ""}))
    assert uploads.parts(ID) == ()
