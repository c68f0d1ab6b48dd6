"""The install steps of both Dockerfiles in fresh roots, and the service they install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.images import roots

ROOT = Path(__file__).parents[2]


def package_index_answers(folder: Path) -> bool:
    asked = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "-d", str(folder), "click>=8.2"]
    return subprocess.run(asked, capture_output=True, check=False, timeout=120).returncode == 0


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_what_the_dockerfiles_install_runs_as_the_images_would(tmp_path: Path) -> None:
    if why := roots.why_not():
        pytest.skip(f"no debootstrap root here: {why}")
    if not package_index_answers(tmp_path):
        pytest.skip("no package index answers")
    command = [sys.executable, "-m", "deploy.images.check", "--how", "root"]
    made = tmp_path / "made"
    made.mkdir()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(made)}, capture_output=True, text=True, check=False, timeout=1450
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "the health check of Dockerfile.service: holds",
        "the health check of Dockerfile.gpu: holds",
        "--wait --quiet: 0",
        "safer-audit worker --once: 0",
        "Read-only file system",
        "worker: SIGTERM, then exit code 0",
        "api: SIGTERM, then exit code 0",
    ):
        assert line in done.stdout, done.stdout
    assert not list(made.iterdir())
