"""Dockerfiles: what their text must say. tests/e2e/test_image_steps.py runs their install steps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from deploy.images import healthy
from deploy.images.dockerfile import Stage, read_stages
from service.embedded import free_port
from service.infra.settings import Settings
from tests.helpers.local_http import LocalHttp, QuietHandler

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile.service", "Dockerfile.gpu")
DIGEST = "${BASE_DIGEST:+@${BASE_DIGEST}}"


def copied(stages: list[Stage]) -> set[str]:
    lines = [one.rest.split() for stage in stages for one in stage.instructions if one.word == "COPY"]
    return {name for words in lines if not words[0].startswith("--from=") for name in words[:-1]}


@pytest.mark.parametrize("name", FILES)
def test_bases_have_a_tag_and_take_a_digest_that_is_empty(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    stages = read_stages(ROOT / name)
    assert "\nARG BASE_DIGEST=\n" in text
    assert "sha256:" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    tags = {stage.base.removesuffix(DIGEST) for stage in stages}
    assert len(tags) == 1
    tag = tags.pop()
    assert ":" in tag
    assert not tag.endswith(":latest")
    assert all(stage.base.endswith(DIGEST) for stage in stages)
    assert f'base.name="{tag}"' in stages[-1].last("LABEL")


@pytest.mark.parametrize("name", FILES)
def test_the_last_stage_is_bare_and_not_root(name: str) -> None:
    builder, last = read_stages(ROOT / name)
    runs = [one.rest for one in last.instructions if one.word == "RUN"]
    assert runs[-1] == "/opt/install.sh bare"
    assert not any(word in " ".join(runs) for word in ("venv", "pip", "build-essential"))
    assert "COPY" in [one.word for one in last.instructions]
    assert builder.name == "builder"
    assert last.last("USER") == "10001:10001"
    assert last.last("STOPSIGNAL") == "SIGTERM"
    assert last.environment()["SAFER_HOME"] == last.last("WORKDIR") == "/var/lib/safer-audit"
    assert last.command()[0] == "safer-audit"
    assert last.health()[:2] == ["python", "/opt/healthy.py"]
    assert (
        last.last("EXPOSE")
        == last.health()[3]
        == str(Settings.model_fields[last.health()[2].removeprefix("SAFER_").lower()].default)
    )


@pytest.mark.parametrize("name", FILES)
def test_builds_are_sent_what_they_copy_and_no_more(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert copied(read_stages(ROOT / name)) == sent
    assert all((ROOT / path).exists() for path in sent)


def test_torch_comes_first_and_only_to_workers() -> None:
    service, gpu = (" ".join(one.rest for one in read_stages(ROOT / name)[0].instructions) for name in FILES)
    assert "torch" not in service
    assert gpu.index("install.sh torch") < gpu.index("install.sh product engine,service")
    assert "index-url" not in gpu + (ROOT / "deploy/images/install.sh").read_text(encoding="utf-8")
    asked = next(word for word in shlex.split(gpu) if word.startswith("TORCH="))
    assert f"TORCH ?= {asked.removeprefix('TORCH=')}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_an_instruction_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM scratch\nADD x y\n")
    with pytest.raises(ValueError, match="ADD"):
        read_stages(file)


class Answers(QuietHandler):
    def do_GET(self) -> None:
        self.reply(200 if self.path == "/healthz" else 503, b"")


class Server(LocalHttp):
    handler = Answers


def test_health_is_an_answer_of_200_at_the_port_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Server() as server:
        monkeypatch.setenv("SAFER_PORT", str(server.port))
        assert healthy.main("SAFER_PORT", "1", "/healthz") == 0
        assert healthy.main("SAFER_PORT", "1", "/readyz") == 1
        monkeypatch.delenv("SAFER_PORT")
        assert healthy.main("SAFER_PORT", str(server.port), "/healthz") == 0
    assert healthy.main("SAFER_PORT", str(free_port()), "/healthz") == 1
    monkeypatch.setenv("SAFER_METRICS_PORT", "0")
    assert healthy.main("SAFER_METRICS_PORT", "9464", "/metrics") == 0
