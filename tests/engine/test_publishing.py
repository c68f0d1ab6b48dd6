"""Files appear whole or not at all; what cannot be written says why."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from safer_engine.errors import ResourceError
from safer_engine.publishing import link, publishing, withdraw


def test_a_file_takes_its_place_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    final = tmp_path / "new" / "a.txt"
    with publishing(final) as path:
        path.write_text("first")
        assert not final.exists()
    with publishing(final) as path:
        path.write_text("second")
        assert final.read_text() == "first"
    assert final.read_text() == "second"
    assert [each.name for each in final.parent.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")
    with pytest.raises(ValueError, match="boom"), publishing(final) as path:
        path.write_text("half")
        raise ValueError("boom")
    assert final.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free disk space"), (errno.EROFS, "name another folder"), (errno.EIO, "check the disk")]
)
def test_what_cannot_be_written_says_what_to_do(tmp_path: Path, number: int, hint: str) -> None:
    with pytest.raises(ResourceError, match=r"cannot write .*a\.txt: no") as caught, publishing(tmp_path / "a.txt"):
        raise OSError(number, "no")
    assert hint in caught.value.hint


def test_a_folder_that_is_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"), publishing(tmp_path / "file" / "a.txt"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"), publishing(tmp_path / "folder") as path:
        path.write_text("x")


def test_with_a_staging_folder_the_folder_of_the_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write"), publishing(tmp_path / "gone" / "a.txt", staging=tmp_path) as path:
        path.write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_withdrawing_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    withdraw(tmp_path / "file" / "below")
    withdraw(tmp_path / "none")
    withdraw(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        withdraw(tmp_path / "folder")


def test_a_full_disk_is_known_whoever_writes(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    final = tmp_path / "weights.safetensors"
    with pytest.raises(ResourceError) as failed, publishing(final):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert failed.value.hint == "free disk space and run again"
    with pytest.raises(ValueError, match="unlike"), publishing(final):
        raise ValueError("unlike a full disk")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_meanwhile_is_linked_all_the_same(tmp_path: Path) -> None:
    """Without trying again some of the links fail here: the file that was found had lost its name."""
    path, done = tmp_path / "a.bin", threading.Event()
    path.write_bytes(b"0")

    def replace() -> None:
        number = 0
        while not done.is_set():
            number += 1
            (tmp_path / "next").write_bytes(str(number).encode())
            os.replace(tmp_path / "next", path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for number in range(2000):
            link(path, tmp_path / f"kept-{number}")
    finally:
        done.set()
        writer.join()
    seen = [int((tmp_path / f"kept-{number}").read_bytes()) for number in range(2000)]
    assert seen == sorted(seen)
    with pytest.raises(FileNotFoundError):
        link(tmp_path / "nothing", tmp_path / "other")
    with pytest.raises(FileExistsError):
        link(path, tmp_path / "kept-0")
