"""What counts as a stage's memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from workers.supervisor import own_bytes

SIZE = 64 << 20


def test_mapped_files_do_not_count_and_held_memory_does(tmp_path: Path) -> None:
    path = tmp_path / "acts"
    path.write_bytes(bytes(SIZE))
    before = own_bytes(os.getpid())
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(mapped.sum()) == 0
    assert own_bytes(os.getpid()) - before < SIZE // 4
    held = np.ones(SIZE, dtype=np.uint8)
    assert own_bytes(os.getpid()) - before > SIZE * 3 // 4
    del held


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert own_bytes(None) == 0
