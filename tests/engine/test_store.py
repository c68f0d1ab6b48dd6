"""The local artifact store: committed once, whole, verified, resumable."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError, DamagedArtifact, ResourceError, SpecError, WorkBusy
from safer_engine.publishing import require_writable
from safer_engine.store import (
    ArtifactStore,
    LocalArtifactStore,
    LocalWork,
    Manifest,
    ManifestDraft,
    MendingStore,
    canonical_json,
    digest_bytes,
    digest_file,
)

KEY = "k" * 64


def draft(**meta: object) -> ManifestDraft:
    return ManifestDraft(stage_version=1, artifact="PairSet", meta=dict(meta))


def put(store: LocalArtifactStore, data: bytes, key: str = KEY, **meta: object) -> Manifest:
    with store.open_work("pairs", key) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(data)
        return store.commit("pairs", key, work, draft(**meta)).manifest


def test_a_committed_artifact_is_read_back_verified(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    assert isinstance(store, ArtifactStore)
    manifest = put(store, b"hello", n=3)
    stored = store.read("pairs", KEY)
    assert stored.path("a.bin").read_bytes() == b"hello"
    assert stored.manifest == manifest
    assert manifest.meta == {"n": 3}
    assert manifest.files["a.bin"].digest == digest_bytes(b"hello")


def test_no_manifest_means_no_artifact(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    with store.open_work("pairs", KEY) as work, work.publish("a.bin") as path:
        path.write_bytes(b"x")
    assert not store.has("pairs", KEY)
    with pytest.raises(ArtifactError, match="no artifact"):
        store.read("pairs", KEY)


def test_work_survives_and_is_removed_at_commit(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    with store.open_work("pairs", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"unit 1")
        with work.publish("state", scratch=True) as path:
            path.write_bytes(b"s")
    with store.open_work("pairs", KEY) as work:
        assert work.has("a.bin")
        assert (work.scratch / "state").read_bytes() == b"s"
        stored = store.commit("pairs", KEY, work, draft())
        assert set(stored.manifest.files) == {"a.bin"}
    assert list((tmp_path / "work" / "default").iterdir()) == []


def test_a_failed_write_publishes_nothing(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    with store.open_work("pairs", KEY) as work:
        with pytest.raises(ValueError, match="boom"), work.publish("a.bin") as path:
            path.write_bytes(b"half")
            raise ValueError("boom")
        assert not work.has("a.bin")
        assert {path.name for path in work.root.rglob("*")} == {"payload", "scratch"}


def test_an_os_error_in_a_write_says_what_to_do(tmp_path: Path) -> None:
    with LocalArtifactStore(tmp_path).open_work("pairs", KEY) as work:
        with pytest.raises(ResourceError, match="free disk space"), work.publish("a.bin"):
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS])
def test_a_write_that_is_not_allowed_is_no_matter_of_space(tmp_path: Path, number: int) -> None:
    with LocalArtifactStore(tmp_path).open_work("pairs", KEY) as work:
        with pytest.raises(ResourceError) as caught, work.publish("a.bin"):
            raise OSError(number, "no")
    assert "let this user write" in caught.value.hint


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/store"])
def test_a_store_that_cannot_be_is_a_wrong_argument(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / place
    with pytest.raises(SpecError, match="no folder|cannot be written") as caught:
        require_writable(folder, "the store")
    assert "folder" in caught.value.hint
    with pytest.raises(SpecError), LocalArtifactStore(folder).open_work("pairs", KEY):
        pass


def test_a_store_that_breaks_while_committing_is_no_fault_of_the_program(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    (tmp_path / "blobs").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        put(store, b"one")


def test_the_first_commit_wins(tmp_path: Path) -> None:
    first = put(LocalArtifactStore(tmp_path), b"one")
    second = put(LocalArtifactStore(tmp_path), b"two")
    assert second == first
    assert LocalArtifactStore(tmp_path).read("pairs", KEY).path("a.bin").read_bytes() == b"one"


def blob_of(root: Path) -> Path:
    return next(path for path in (root / "blobs").rglob("*") if path.is_file())


def manifest_of(root: Path) -> Path:
    return root / "manifests" / "default" / "pairs" / f"{KEY}.json"


def flip(blob: Path) -> None:
    blob.write_bytes(b"hellO")


def cut(blob: Path) -> None:
    blob.write_bytes(b"hell")


@pytest.mark.parametrize(("spoil", "said"), [(flip, "not as it was written"), (cut, "not as it was"), (Path.unlink, "missing")])
def test_damage_is_found_set_aside_and_computed_anew(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    first = put(LocalArtifactStore(tmp_path), b"hello")
    spoil(blob_of(tmp_path))
    store = LocalArtifactStore(tmp_path)
    assert store.has("pairs", KEY) == (spoil is flip), "a size is seen at once, a bit when it is read"
    with pytest.raises(DamagedArtifact, match=f"stage pairs is damaged: its file a.bin is .*{said}") as raised:
        store.read("pairs", KEY).path("a.bin")
    assert (raised.value.stage, raised.value.key) == ("pairs", KEY)
    assert "run the same command again" in raised.value.hint
    assert not manifest_of(tmp_path).exists()
    (aside,) = (tmp_path / "damaged" / "default" / "pairs").iterdir()
    assert Manifest.model_validate_json(aside.read_bytes()) == first
    second = put(store, b"hello")
    assert second.attempt != first.attempt
    assert store.read("pairs", KEY).path("a.bin").read_bytes() == b"hello"
    assert store.set_aside("pairs", KEY) == ""


def test_what_is_no_file_of_an_artifact_is_no_damage(tmp_path: Path) -> None:
    put(LocalArtifactStore(tmp_path), b"hello")
    with pytest.raises(ArtifactError, match="no file 'b.bin'"):
        LocalArtifactStore(tmp_path).read("pairs", KEY).path("b.bin")
    assert LocalArtifactStore(tmp_path).set_aside("pairs", KEY) == ""
    assert LocalArtifactStore(tmp_path).set_aside("pairs", "m" * 64) == ""
    assert isinstance(LocalArtifactStore(tmp_path), MendingStore)


@pytest.mark.parametrize("text", ["{", "", '{"manifest_version": 1}', '{"of": "another version"}'])
def test_a_damaged_manifest_is_never_trusted(tmp_path: Path, text: str) -> None:
    store = LocalArtifactStore(tmp_path)
    put(store, b"hello")
    manifest_of(tmp_path).write_text(text)
    assert not store.has("pairs", KEY)
    with pytest.raises(DamagedArtifact, match="manifest of stage pairs is damaged: it is no record") as raised:
        store.read("pairs", KEY)
    assert "http" not in str(raised.value)
    assert put(store, b"two").files["a.bin"].digest == digest_bytes(b"two")
    assert next((tmp_path / "damaged").rglob("*.json")).read_text() == text


def test_a_store_that_is_only_read_reports_its_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(LocalArtifactStore(tmp_path), b"hello")
    flip(blob_of(tmp_path))

    def refuse(_source: object, _target: object) -> None:
        raise PermissionError(1, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        with pytest.raises(DamagedArtifact, match=r"a\.bin is not as it was written"):
            LocalArtifactStore(tmp_path).read("pairs", KEY).path("a.bin")


def _mend(root: str, start: object, number: int, told: object) -> None:
    store = LocalArtifactStore(root)
    stored = store.read("pairs", KEY)
    start.wait()  # type: ignore[attr-defined]
    try:
        stored.path("a.bin")
    except DamagedArtifact:
        if not store.has("pairs", KEY):
            work = LocalWork(Path(root) / f"own-{number}")
            work.payload.mkdir(parents=True)
            work.scratch.mkdir()
            with work.publish("a.bin") as path:
                path.write_bytes(f"new {number}".encode())
            store.commit("pairs", KEY, work, draft(number=number))
    told.put(store.read("pairs", KEY).manifest.attempt)  # type: ignore[attr-defined]


def test_many_processes_that_find_damage_end_with_one_artifact(tmp_path: Path) -> None:
    put(LocalArtifactStore(tmp_path), b"hello")
    flip(blob_of(tmp_path))
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(8), context.Queue()
    racers = [context.Process(target=_mend, args=(str(tmp_path), start, i, told)) for i in range(8)]
    for racer in racers:
        racer.start()
    attempts = {told.get(timeout=30) for _ in racers}
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    assert len(attempts) == 1, "the first commit after the damage won, and all read it"
    assert len(list((tmp_path / "damaged").rglob("*.json"))) == 1


def test_a_damaged_blob_is_replaced_by_a_new_commit_of_the_same_content(tmp_path: Path) -> None:
    put(LocalArtifactStore(tmp_path), b"hello")
    blob = next(p for p in (tmp_path / "blobs").rglob("*") if p.is_file())
    blob.write_bytes(b"hellO")
    put(LocalArtifactStore(tmp_path), b"hello", key="m" * 64)
    assert digest_file(blob) == digest_bytes(b"hello")


def test_projects_do_not_see_each_other(tmp_path: Path) -> None:
    put(LocalArtifactStore(tmp_path, project="a"), b"x")
    assert LocalArtifactStore(tmp_path, project="a").has("pairs", KEY)
    assert not LocalArtifactStore(tmp_path, project="b").has("pairs", KEY)


def test_the_content_digest_ignores_who_computed_it(tmp_path: Path) -> None:
    one = put(LocalArtifactStore(tmp_path / "1"), b"x", n=1)
    two = put(LocalArtifactStore(tmp_path / "2"), b"x", n=1)
    other = put(LocalArtifactStore(tmp_path / "3"), b"x", n=2)
    assert one.attempt != two.attempt
    assert one.content_digest == two.content_digest
    assert one.content_digest != other.content_digest


def test_canonical_json_refuses_non_finite_numbers() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def _hold(root: str, ready: object) -> None:
    with LocalArtifactStore(root).open_work("pairs", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"from the dead")
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_work_area_is_exclusive_and_survives_kill_9(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    try:
        assert ready.wait(30)
        store = LocalArtifactStore(tmp_path)
        with pytest.raises(WorkBusy, match="another process"), store.open_work("pairs", KEY):
            pass
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join(10)
        with store.open_work("pairs", KEY) as work:
            assert work.path("a.bin").read_bytes() == b"from the dead"
    finally:
        holder.kill()


def _race(root: str, start: object, number: int) -> None:
    store = LocalArtifactStore(root)
    start.wait()  # type: ignore[attr-defined]
    work_root = Path(root) / f"own-{number}"
    work = LocalWork(work_root)
    work.payload.mkdir(parents=True)
    work.scratch.mkdir()
    with work.publish("a.bin") as path:
        path.write_bytes(str(number).encode())
    store.commit("pairs", KEY, work, draft(number=number))


def test_many_commits_at_once_have_one_winner(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    racers = [context.Process(target=_race, args=(str(tmp_path), start, i)) for i in range(8)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    stored = LocalArtifactStore(tmp_path).read("pairs", KEY)
    assert stored.path("a.bin").read_bytes() == str(stored.manifest.meta["number"]).encode()
