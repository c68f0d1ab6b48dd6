"""What every artifact store keeps: the engine's local one, the service's in a folder, and S3 on two servers."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from safer_engine.errors import ArtifactError, DamagedArtifact, SpecError, WorkBusy
from safer_engine.store import PART_SCRATCH, ArtifactStore, LocalArtifactStore, MendingStore, digest_bytes
from service.errors import Unavailable
from tests.helpers.servers import S3
from tests.helpers.store_world import KEY, OTHER_KEY, World, draft, put

MakeStore = Callable[..., ArtifactStore]
S3_SERVERS = ["s3_moto", pytest.param("s3_rgw", marks=pytest.mark.full)]


@pytest.fixture(params=["engine", "folder", *S3_SERVERS])
def make_store(request: pytest.FixtureRequest, folder: Path) -> MakeStore:
    """Makes a store of a project, each call as another process would; S3 also as another machine."""
    if request.param == "engine":
        return lambda project="default", machine="one": LocalArtifactStore(folder, project)
    s3 = None if request.param == "folder" else request.getfixturevalue(request.param)
    return World(folder, s3, s3_part_bytes=5 << 20).store


@pytest.fixture(params=["folder", *S3_SERVERS])
def world(request: pytest.FixtureRequest, folder: Path) -> World:
    """A store of the service."""
    return World(folder, None if request.param == "folder" else request.getfixturevalue(request.param))


@pytest.fixture(params=S3_SERVERS)
def s3_world(request: pytest.FixtureRequest, folder: Path) -> World:
    """A store in S3, with parts of the smallest size."""
    return World(folder, request.getfixturevalue(request.param), s3_part_bytes=5 << 20)


def test_a_committed_artifact_is_read_back(make_store: MakeStore) -> None:
    store = make_store()
    assert isinstance(store, ArtifactStore)
    assert not store.has("pairs", KEY)
    manifest = put(store, {"a.bin": b"hello", "b.bin": b"", "c.bin": b"hello"}, drafted=draft(n=3))
    for reader in (store, make_store(machine="two")):
        stored = reader.read("pairs", KEY)
        assert reader.has("pairs", KEY)
        assert {name: stored.path(name).read_bytes() for name in manifest.files} == {
            "a.bin": b"hello",
            "b.bin": b"",
            "c.bin": b"hello",
        }
        assert stored.manifest == manifest
    assert manifest.meta == {"n": 3}
    assert manifest.files["a.bin"].digest == digest_bytes(b"hello")
    with pytest.raises(ArtifactError, match=r"no file 'd\.bin'"):
        store.read("pairs", KEY).path("d.bin")


def test_no_manifest_means_no_artifact(make_store: MakeStore) -> None:
    store = make_store()
    with store.open_work("pairs", KEY) as work, work.publish("a.bin") as path:
        path.write_bytes(b"x")
    assert not store.has("pairs", KEY)
    with pytest.raises(ArtifactError, match="no artifact"):
        store.read("pairs", KEY)


def test_projects_do_not_see_each_other(make_store: MakeStore) -> None:
    put(make_store("mine"), {"a.bin": b"secret"})
    assert make_store("mine").has("pairs", KEY)
    assert not make_store("yours").has("pairs", KEY)


def test_the_first_commit_wins(make_store: MakeStore) -> None:
    first = put(make_store(), {"a.bin": b"first"})
    again = make_store(machine="two")
    with again.open_work("pairs", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"second")
        second = again.commit("pairs", KEY, work, draft()).manifest
    assert second == first
    assert again.read("pairs", KEY).path("a.bin").read_bytes() == b"first"


def test_of_32_commits_at_once_one_wins(make_store: MakeStore) -> None:
    machines = [make_store(machine=f"m{number}") for number in range(4)]

    def commit(number: int) -> str:
        store = machines[number % 4]
        with store.open_work("pairs", KEY, shared=True) as work:
            with work.publish("a.bin") as path:
                path.write_bytes(str(number).encode())
            return str(store.commit("pairs", KEY, work, draft(by=number)).manifest.attempt)

    with ThreadPoolExecutor(32) as pool:
        attempts = list(pool.map(commit, range(32)))
    assert len(attempts) == 32
    assert len(set(attempts)) == 1
    winner = make_store(machine="reader").read("pairs", KEY)
    assert winner.manifest.attempt == attempts[0]
    assert int(winner.path("a.bin").read_bytes()) in range(32)


def test_work_goes_on_where_it_was_left(make_store: MakeStore) -> None:
    first = make_store()
    with first.open_work("sae", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"unit 1")
        with work.publish("gone.bin") as path:
            path.write_bytes(b"x")
        work.remove("gone.bin")
        for state in (b"step 1", b"step 2"):
            with work.publish("state", scratch=True) as path:
                path.write_bytes(state)
    second = make_store(machine="two")
    with second.open_work("sae", KEY) as work:
        assert work.has("a.bin")
        assert not work.has("gone.bin")
        assert not work.has("b.bin")
        assert work.path("a.bin").read_bytes() == b"unit 1"
        assert (work.scratch / "state").read_bytes() == b"step 2"
        with work.publish("state", scratch=True) as path:
            path.write_bytes(b"step 3")
    with first.open_work("sae", KEY) as work:
        assert (work.scratch / "state").read_bytes() == b"step 3"
        assert set(first.commit("sae", KEY, work, draft()).manifest.files) == {"a.bin"}
    with make_store(machine="three").open_work("sae", KEY) as work:
        assert not work.has("a.bin")
        assert list(work.scratch.iterdir()) == []


def test_a_failed_write_publishes_nothing(make_store: MakeStore) -> None:
    store = make_store()
    with store.open_work("pairs", KEY) as work:
        for scratch in (False, True):
            with pytest.raises(ValueError, match="boom"), work.publish("a.bin", scratch=scratch) as path:
                path.write_bytes(b"half")
                raise ValueError("boom")
        assert not work.has("a.bin")
        assert list(work.scratch.iterdir()) == []


def test_a_work_area_is_exclusive_unless_it_is_shared(make_store: MakeStore) -> None:
    with make_store().open_work("activations", KEY) as _, pytest.raises(WorkBusy):
        with make_store().open_work("activations", KEY):
            pass
    with make_store().open_work("activations", KEY, shared=True), pytest.raises(WorkBusy):
        with make_store().open_work("activations", KEY):
            pass
    with make_store().open_work("activations", KEY), make_store().open_work("activations", OTHER_KEY):
        pass


def test_parts_are_made_side_by_side_and_joined_elsewhere(make_store: MakeStore) -> None:
    parts = [make_store(machine=name) for name in ("one", "two", "one")]

    def part(number: int) -> None:
        with parts[number].open_work("activations", KEY, shared=True) as work:
            for name, scratch in ((f"shard-{number}", False), (f"rewards-{number}", True)):
                with work.publish(name, scratch=scratch) as path:
                    path.write_bytes(str(number).encode())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(part, range(3)))
    join = make_store(machine="three")
    with join.open_work("activations", KEY, shared=True) as work:
        assert all(work.has(f"shard-{number}") for number in range(3))
        assert b"".join((work.scratch / f"rewards-{number}").read_bytes() for number in range(3)) == b"012"
        files = join.commit("activations", KEY, work, draft()).manifest.files
    assert set(files) == {"shard-0", "shard-1", "shard-2"}
    with make_store(machine="four").open_work("activations", KEY) as work:
        assert not work.has("shard-0")


def test_a_part_goes_on_elsewhere_and_withdraws_its_state(make_store: MakeStore) -> None:
    state = f"{PART_SCRATCH}state"
    first, second = make_store(machine="one"), make_store(machine="two")
    for store, content in ((first, b"step 1"), (second, b"step 2")):
        with store.open_work("activations", KEY, shared=True) as work:
            found = work.fetch(state)
            assert (found and found.read_bytes()) == (None if content == b"step 1" else b"step 1")
            with work.publish(state, scratch=True) as path:
                path.write_bytes(content)
    with first.open_work("activations", KEY, shared=True) as work:
        found = work.fetch(state)  # this machine has an older one
        assert found is not None
        assert found.read_bytes() == b"step 2"
        work.remove(state, scratch=True)
        assert work.fetch(state) is None
        work.remove(state, scratch=True)
    for store in (first, second):
        with store.open_work("activations", KEY) as work:
            assert list(work.scratch.iterdir()) == []


def test_what_a_part_keeps_for_the_join_is_fetched_by_the_join_alone(s3_world: World) -> None:
    facts, own = "norm.json", f"{PART_SCRATCH}rewards"
    with s3_world.store(machine="one").open_work("activations", KEY, shared=True) as work:
        for name in (facts, own):
            with work.publish(name, scratch=True) as path:
                path.write_bytes(name.encode())
    for machine, expected in (("one", {facts, own}), ("two", {facts})):
        with s3_world.store(machine=machine).open_work("activations", KEY, shared=True) as work:
            assert {path.name for path in work.scratch.iterdir()} == expected
    for machine in ("two", "three"):
        with s3_world.store(machine=machine).open_work("activations", KEY) as work:
            assert (work.scratch / own).read_bytes() == own.encode()


def test_a_large_file_survives_whole(make_store: MakeStore) -> None:
    data = bytes(range(256)) * 43_001
    put(make_store(), {"big.bin": data})
    assert make_store(machine="two").read("pairs", KEY).path("big.bin").read_bytes() == data


def test_ranges_are_streamed(world: World) -> None:
    data = bytes(range(256)) * 12_000
    put(world.store(), {"a.bin": data})
    store = world.store(machine="two")
    for start, stop in ((0, None), (5, 1_500_000), (len(data) - 1, len(data)), (7, 7), (0, len(data) + 9)):
        assert b"".join(store.open_range("pairs", KEY, "a.bin", start, stop)) == data[start:stop]
    with pytest.raises(ArtifactError, match="b.bin"):
        b"".join(store.open_range("pairs", KEY, "b.bin"))
    with pytest.raises(ArtifactError, match="pairs"):
        b"".join(store.open_range("pairs", OTHER_KEY, "a.bin"))


def test_listing_usage_and_removal(world: World) -> None:
    store = world.store()
    put(store, {"a.bin": b"12345"})
    put(store, {"b.bin": b"123", "c.bin": b"4567"}, OTHER_KEY, "sae")
    with store.open_work("latents", KEY) as work, work.publish("state", scratch=True) as path:
        path.write_bytes(b"123456")
    put(world.store("other"), {"a.bin": b"12345"})
    assert {(each.stage, each.key) for each in store.committed()} == {("pairs", KEY), ("sae", OTHER_KEY)}
    usage = store.usage()
    assert (usage.artifacts, usage.artifact_bytes, usage.stages) == (2, 12, {"pairs": 5, "sae": 7})
    assert usage.work_bytes >= 6
    assert [(area.stage, area.key) for area in store.work_areas()] == [("latents", KEY)]
    assert store.remove_work("latents", KEY)
    assert list(store.work_areas()) == []
    assert store.delete("pairs", KEY)
    assert not store.delete("pairs", KEY)
    assert not store.has("pairs", KEY)
    assert world.store("other").read("pairs", KEY).path("a.bin").read_bytes() == b"12345"
    assert world.stores().projects() == ["default", "other"]
    put(store, {"a.bin": b"anew"})
    assert store.read("pairs", KEY).path("a.bin").read_bytes() == b"anew"


def test_work_that_is_held_is_not_removed(world: World) -> None:
    with world.store().open_work("sae", KEY):
        assert not world.store().remove_work("sae", KEY)
    assert world.store().remove_work("sae", KEY)


@pytest.mark.parametrize("name", ["../default", "a/b", "", ".", "a\0b", "x" * 101])
def test_names_lead_nowhere_else(world: World, name: str) -> None:
    store = world.store()
    with pytest.raises(SpecError, match="no plain name"):
        world.store(name)
    for call in (store.has, store.read, store.manifest, store.delete):
        with pytest.raises(SpecError, match="no plain name"):
            call(name, KEY)
        with pytest.raises(SpecError, match="no plain name"):
            call("pairs", name)


def test_readiness_says_what_decides(world: World) -> None:
    found = world.stores().readiness()
    assert found.ok
    assert found.exclusive == ("conditional-put" if world.settings().on_s3 else "link")


def test_a_store_that_cannot_be_used_is_not_ready(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = (
        {"s3_endpoint": "http://127.0.0.1:9", "s3_deadline_seconds": 1}
        if world.settings().on_s3
        else {"store_url": str(tmp_path / "file")}
    )
    found = world.stores(**wrong).readiness()
    assert not found.ok
    assert found.detail


def test_presigned_urls_give_the_file_for_a_while(s3_world: World) -> None:
    put(s3_world.store(), {"report.html": b"<p>hello"})
    url = s3_world.store().presigned("pairs", KEY, "report.html", "text/html")
    assert url is not None
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"<p>hello"
        assert answer.headers["Content-Type"] == "text/html"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="report.html"'
    assert s3_world.stores(presign=False).project("default").presigned("pairs", KEY, "report.html") is None


@pytest.mark.full
def test_a_real_server_refuses_a_presigned_url_that_was_changed(s3_rgw: S3, folder: Path) -> None:
    world = World(folder, s3_rgw)
    put(world.store(), {"a.bin": b"1"})
    url = world.store().presigned("pairs", KEY, "a.bin")
    assert url is not None
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace("X-Amz-Expires=300", "X-Amz-Expires=301"))


def blob_of(data: bytes) -> str:
    return f"blobs/{digest_bytes(data)[:2]}/{digest_bytes(data)}"


@pytest.mark.parametrize("damage", [b"wrong", b"shor", b"longer", None], ids=["other", "short", "long", "gone"])
def test_damage_in_the_store_is_found_and_mended(world: World, damage: bytes | None) -> None:
    first = put(world.store(), {"a.bin": b"right", "b.bin": b"sound"})
    space = world.stores().space
    if damage is None:
        space.delete([blob_of(b"right")])
    else:
        space.put(blob_of(b"right"), damage)
    reader = world.store(machine="two")
    with pytest.raises(DamagedArtifact, match=r"a\.bin"):
        reader.read("pairs", KEY).path("a.bin")
    cache = world.folder / "two" / "cache" / "blobs"
    assert [path for path in cache.glob("[!.]*") if path.read_bytes() != b"sound"] == []
    assert not reader.has("pairs", KEY)
    assert len(list(space.listing("damaged/default/pairs/"))) == 1
    second = put(reader, {"a.bin": b"right", "b.bin": b"sound"})
    assert second.attempt != first.attempt
    assert world.store(machine="three").read("pairs", KEY).path("a.bin").read_bytes() == b"right"


def test_a_damaged_manifest_is_found_and_mended(world: World) -> None:
    put(world.store(), {"a.bin": b"right"})
    world.stores().space.put(f"manifests/default/pairs/{KEY}.json", b"{half")
    store = world.store(machine="two")
    assert isinstance(store, MendingStore)
    with pytest.raises(DamagedArtifact, match="manifest"):
        store.read("pairs", KEY)
    assert "manifest" in store.set_aside("pairs", KEY)
    assert store.set_aside("pairs", KEY) == ""
    put(store, {"a.bin": b"right"})
    assert store.set_aside("pairs", KEY) == ""
    assert store.read("pairs", KEY).path("a.bin").read_bytes() == b"right"


def test_a_lost_work_file_is_made_anew(s3_world: World) -> None:
    with s3_world.store().open_work("sae", KEY) as work, work.publish("a.bin") as path:
        path.write_bytes(b"unit")
    s3_world.stores().space.delete([blob_of(b"unit")])
    with s3_world.store(machine="two").open_work("sae", KEY) as work:
        assert work.has("a.bin")
        with pytest.raises(ArtifactError, match=r"a\.bin"):
            work.path("a.bin")
        assert not work.has("a.bin")


@pytest.mark.parametrize("damage", [b"wrong", b"torn"])
def test_damage_in_the_cache_is_mended(s3_world: World, damage: bytes) -> None:
    put(s3_world.store(), {"a.bin": b"right"})
    path = s3_world.store(machine="two").read("pairs", KEY).path("a.bin")
    facts = path.stat()
    path.write_bytes(damage)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert s3_world.store(machine="two").read("pairs", KEY).path("a.bin").read_bytes() == b"right"


def test_a_payload_that_vanished_is_not_committed(s3_world: World) -> None:
    store = s3_world.store()
    with store.open_work("pairs", KEY) as work:
        with work.publish("a.bin") as path:
            path.write_bytes(b"x")
        s3_world.stores().space.delete([blob_of(b"x")])
        with pytest.raises(Unavailable, match=r"a\.bin"):
            store.commit("pairs", KEY, work, draft())
        assert not work.has("a.bin")
    assert not store.has("pairs", KEY)
