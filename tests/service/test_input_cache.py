"""The cache on disk: entries whole, pinned while in use, least recently used out, safe between processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from safer_engine.errors import ResourceError, SpecError
from service.infra.input_cache import InputCache

Make = Callable[[Path], None]
CONTEXT = multiprocessing.get_context("spawn")


def file_of(size: int) -> Make:
    return lambda path: path.write_bytes(b"x" * size) and None


def folder_of(**files: bytes) -> Make:
    def make(path: Path) -> None:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)

    return make


def never(path: Path) -> None:
    raise AssertionError("it is there already")


def kept(cache: InputCache) -> list[str]:
    return [each.digest for each in cache.entries()]


def age(cache: InputCache, digest: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.folder / ".facts" / digest, (then, then))


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, 100)
    with cache.entry("d1", folder_of(a=b"12", b=b"345")) as path:
        assert {each.name: each.read_bytes() for each in path.iterdir()} == {"a": b"12", "b": b"345"}
    with InputCache(tmp_path, 100).entry("d1", never) as path:
        assert (path / "a").read_bytes() == b"12"
    assert [(each.digest, each.size) for each in cache.entries()] == [("d1", 5)]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, 100)
    for number in range(3):
        with cache.entry(f"d{number}", file_of(30), 30):
            pass
        age(cache, f"d{number}", 100 - number)
    with cache.entry("d0", never):
        pass
    with cache.entry("d3", file_of(40), 40):
        assert kept(cache) == ["d2", "d0", "d3"]
    with cache.entry("d4", file_of(90)):
        pass
    assert kept(cache) == ["d4"]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["d4"]


def test_what_is_in_use_stays_beyond_the_limit(tmp_path: Path) -> None:
    cache, other = InputCache(tmp_path, 50), InputCache(tmp_path, 50)
    with cache.entry("used", file_of(40)) as path:
        age(cache, "used", 1000)
        with other.entry("d1", file_of(40)), other.entry("d2", file_of(200)):
            assert set(kept(cache)) == {"used", "d1", "d2"}
        assert path.stat().st_size == 40
        other.shrink()
        assert kept(cache) == ["used"]
    with cache.entry("used", never), cache.entry("used", never):
        pass
    other.shrink(room=20)
    assert kept(cache) == []


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, 100)

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"), cache.entry("d1", fails):
        pass
    assert [
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != ".pins" and path.name != ".index"
    ] == []
    with cache.entry("d1", file_of(1)) as path:
        assert path.read_bytes() == b"x"


@pytest.mark.parametrize("damage", ["shorter", "other", "lost file", "lost folder", "no facts"])
def test_a_torn_entry_is_made_anew(tmp_path: Path, damage: str) -> None:
    cache = InputCache(tmp_path, 1000)
    with cache.entry("d1", folder_of(a=b"1234", b=b"5")) as path:
        pass
    if damage == "shorter":
        os.truncate(path / "a", 2)
    elif damage == "other":
        (path / "a").write_bytes(b"4321")
    elif damage == "lost file":
        (path / "b").unlink()
    elif damage == "lost folder":
        path.rename(tmp_path / ".gone")
    else:
        (tmp_path / ".facts" / "d1").unlink()
    with InputCache(tmp_path, 1000).entry("d1", folder_of(a=b"1234", b=b"5")) as path:
        assert {each.name: each.read_bytes() for each in path.iterdir()} == {"a": b"1234", "b": b"5"}


def test_a_damaged_entry_can_be_dropped(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, 100)
    with cache.entry("d1", file_of(3)):
        cache.drop("d1")
        cache.drop("d2")
    with cache.entry("d1", file_of(4)) as path:
        assert path.stat().st_size == 4


def test_a_finished_file_is_taken_over(tmp_path: Path) -> None:
    cache = InputCache(tmp_path / "cache", 100)
    (tmp_path / "file").write_bytes(b"12")
    assert cache.adopt("d1", tmp_path / "file").read_bytes() == b"12"
    assert not (tmp_path / "file").exists()
    cache.shrink(1000)
    assert kept(cache) == ["d1"]
    cache.unpin("d1")
    cache.shrink(1000)
    assert kept(cache) == []


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no plain name"):
        InputCache(tmp_path, 100).pin("../d1", file_of(1))


def test_many_threads_make_it_once(tmp_path: Path) -> None:
    cache = InputCache(tmp_path, 1000)
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        path.write_bytes(b"1")

    def use(number: int) -> bytes:
        with cache.entry(f"d{number % 2}", make) as path:
            return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(16))) == [b"1"] * 16
    assert len(made) == 2


def _count_up(folder: Path, rounds: int) -> None:
    cache = InputCache(folder, 25)
    for number in range(rounds):
        digest = f"d{number % 5}"
        with cache.entry(digest, file_of(10), 10) as path:
            assert path.read_bytes() == b"x" * 10


def _hold(folder: Path, making: bool, began: Event) -> None:
    def make(path: Path) -> None:
        path.write_bytes(b"half")
        if making:
            began.set()
            time.sleep(60)

    with InputCache(folder, 100).entry("d1", make):
        began.set()
        time.sleep(60)


def test_processes_share_a_cache(tmp_path: Path) -> None:
    children = [CONTEXT.Process(target=_count_up, args=(tmp_path, 60)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    cache = InputCache(tmp_path, 25)
    cache.shrink()
    assert sum(each.size for each in cache.entries()) <= 25


@pytest.mark.parametrize("making", [False, True])
def test_a_killed_process_holds_nothing(tmp_path: Path, making: bool) -> None:
    began = CONTEXT.Event()
    child = CONTEXT.Process(target=_hold, args=(tmp_path, making, began))
    child.start()
    assert began.wait(30)
    cache = InputCache(tmp_path, 100)
    unfinished = [path for path in (tmp_path / ".making").iterdir() if path.name.startswith("d1.") and path.suffix != ".lock"]
    assert len(unfinished) == (1 if making else 0)
    cache.shrink(1000)
    assert kept(cache) == ([] if making else ["d1"])
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    cache = InputCache(tmp_path, 100)
    assert [path.name for path in (tmp_path / ".making").iterdir() if path.name != ".index"] == []
    cache.shrink(1000)
    assert kept(cache) == []
    with cache.entry("d1", file_of(3)) as path:
        assert path.stat().st_size == 3


def test_a_cache_is_opened_by_many_at_once(tmp_path: Path) -> None:
    def open_often(_: int) -> int:
        return sum(len(InputCache(tmp_path, 1000).shrink()) for _ in range(100))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(open_often, range(8))) == 0


def test_a_folder_that_cannot_be_written_may_be_another_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ResourceError, match="the cache folder") as caught:
        InputCache(tmp_path / "cache", 1000)
    assert caught.value.retryable
