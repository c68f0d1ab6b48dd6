"""From names in a spec to files of this machine, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import ArtifactError, DatasetRefused, InputRefused, ModelRefused
from safer_engine.sources.models import resolve_model
from safer_engine.spec import AuditSpec, ModelSpec, RuntimeSpec
from safer_engine.spec_retraining import RetrainingSpec
from service.errors import NotFound, SourceNotAllowed
from service.infra.stores import Stores
from tests.helpers.hub_stand_in import HubStandIn, commit_of
from tests.helpers.servers import S3
from tests.helpers.tiny_model import build_reward_model
from tests.helpers.workplace import PROJECT, ROOT, Workplace
from workers.inputs import InputFinder, Names

ROWS = [{"chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("model") / "rm", "llama", width=16, blocks=2)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    found = Workplace(tmp_path / "place", allowed_sources=("upload:", "s3://", f"{tmp_path}/open/"))
    yield found
    found.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def rows_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def finder_of(place: Workplace, stack: ExitStack) -> InputFinder:
    return InputFinder(place.settings, Stores(place.settings), PROJECT, Names(place.settings.folder), stack)


def spec_of(model: str, dataset: str) -> AuditSpec:
    return AuditSpec.model_validate({"model": {"path": model}, "dataset": {"source": {"kind": "local", "path": dataset}}})


def pins_of(found: Any) -> dict[str, str]:
    return {"model": found.model.digest, "dataset": found.dataset.digest, "labels": "x"}


def test_uploads_are_opened_under_their_names(place: Workplace, stack: ExitStack, model: Path, tmp_path: Path) -> None:
    spec = spec_of(place.upload(model), place.upload(rows_file(tmp_path / "one")))
    finder = finder_of(place, stack)
    found = finder.audit(spec, {})
    assert found.model.digest == resolve_model(ModelSpec(path=str(model)), RuntimeSpec(), None).digest
    assert (found.model.origin, found.dataset.origin) == (spec.model.path, spec.dataset.source.path)  # type: ignore[union-attr]
    assert list(found.dataset.rows()) == ROWS
    assert found.model.path.is_relative_to(place.settings.folder / "cache" / "inputs")
    told = finder.names(f"in {found.model.path}/config.json and {place.settings.folder}/x")
    assert told == f"in {spec.model.path}/config.json and …/x"


def test_the_base_of_a_retraining_is_opened_where_it_is_asked_for(
    place: Workplace, stack: ExitStack, model: Path, tmp_path: Path
) -> None:
    spec = spec_of(place.upload(model), place.upload(rows_file(tmp_path / "one")))
    spec = spec.model_copy(update={"retraining": RetrainingSpec(base=spec.model.path)})
    found = finder_of(place, stack).audit(spec, {})
    assert found.base is not None
    assert found.base.origin == spec.model.path
    assert found.base.path.is_dir()
    pins = {**pins_of(found), "base": found.base.digest}
    recorded = finder_of(place, stack).audit(spec, pins, roles=("dataset",)).base
    assert recorded is not None
    assert (recorded.digest, str(recorded.path)) == (found.base.digest, "/nonexistent")
    with pytest.raises(ModelRefused, match="not the model that this job began with"):
        finder_of(place, stack).audit(spec, {**pins, "base": "0" * 64}, roles=("base",))


def test_only_what_is_asked_for_is_opened_and_the_rest_is_as_recorded(
    place: Workplace, stack: ExitStack, model: Path, tmp_path: Path
) -> None:
    spec = spec_of(place.upload(model), place.upload(rows_file(tmp_path / "one")))
    pins = pins_of(finder_of(place, stack).audit(spec, {}))
    nothing = spec_of(f"upload:{'0' * 64}", f"upload:{'1' * 64}")
    found = finder_of(place, stack).audit(nothing, pins, roles=())
    assert (found.model.digest, found.dataset.digest) == (pins["model"], pins["dataset"])
    with pytest.raises(ArtifactError, match="opens"):
        next(iter(found.dataset.rows()))
    with pytest.raises(NotFound):
        finder_of(place, stack).audit(nothing, pins, roles=("dataset",))


def test_what_changed_since_the_job_began_is_refused(place: Workplace, stack: ExitStack, model: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "open")
    spec = spec_of(place.upload(model), str(path))
    pins = pins_of(finder_of(place, stack).audit(spec, {}))
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DatasetRefused, match="began with"):
        finder_of(place, stack).audit(spec, pins)
    with pytest.raises(ModelRefused, match="began with"):
        finder_of(place, stack).audit(spec, {**pins, "model": "0" * 64}, roles=("model",))


def test_a_link_out_of_an_allowed_folder_is_refused(place: Workplace, stack: ExitStack, model: Path, tmp_path: Path) -> None:
    secret = rows_file(tmp_path / "secret")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link.jsonl").symlink_to(secret)
    with pytest.raises(SourceNotAllowed):
        finder_of(place, stack).audit(spec_of(place.upload(model), str(tmp_path / "open" / "link.jsonl")), {})


def test_an_upload_of_another_project_is_not_there(place: Workplace, stack: ExitStack, model: Path) -> None:
    name = place.upload(model)
    finder = InputFinder(place.settings, Stores(place.settings), "other", Names(place.settings.folder), stack)
    with pytest.raises(NotFound):
        finder.audit(spec_of(name, name), {}, roles=("model",))


def test_files_and_folders_of_a_bucket(s3_moto: S3, stack: ExitStack, model: Path, tmp_path: Path) -> None:
    import boto3

    place = Workplace(tmp_path / "place", **s3_moto.settings("store"))
    client = boto3.client(
        "s3", endpoint_url=place.settings.s3_endpoint, region_name="us-east-1",
        aws_access_key_id="test-access-key", aws_secret_access_key="test-secret-key",
    )  # fmt: skip
    for path in model.iterdir():
        client.put_object(Bucket=s3_moto.bucket, Key=f"in/rm/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket=s3_moto.bucket, Key="in/rows.jsonl", Body=rows_file(tmp_path / "one").read_bytes())
    client.put_object(Bucket=s3_moto.bucket, Key="in/rows.jsonl.old", Body=b"{}")
    spec = spec_of(f"s3://{s3_moto.bucket}/in/rm", f"s3://{s3_moto.bucket}/in/rows.jsonl")
    found = finder_of(place, stack).audit(spec, {})
    assert found.model.digest == resolve_model(ModelSpec(path=str(model)), RuntimeSpec(), None).digest
    assert list(found.dataset.rows()) == ROWS
    assert found.dataset.origin == f"s3://{s3_moto.bucket}/in/rows.jsonl"
    client.put_object(Bucket=s3_moto.bucket, Key="in/rows.jsonl", Body=b'{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DatasetRefused, match="began with"):
        finder_of(place, stack).audit(spec, pins_of(found))
    with pytest.raises(InputRefused, match="nothing at"):
        finder_of(place, stack).audit(spec_of(f"s3://{s3_moto.bucket}/in/r", f"s3://{s3_moto.bucket}/in/rows.jsonl"), {})
    place.close()


HUB = """
import json, sys
from contextlib import ExitStack
from service.infra.settings import load_settings
from service.infra.stores import Stores
from workers.inputs import InputFinder, Names
from safer_engine.spec import AuditSpec
spec, pins = (json.loads(text) for text in sys.argv[1:3])
settings = load_settings()
with ExitStack() as stack:
    finder = InputFinder(settings, Stores(settings), "default", Names(settings.folder), stack)
    found = finder.audit(AuditSpec.model_validate(spec), pins, ("model",) if pins else ("model", "dataset"))
    print(json.dumps([found.model.digest, found.model.revision, found.model.origin, found.dataset.revision]))
"""


def test_a_hub_model_is_pinned_and_not_asked_for_again(model: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    (hub / "models" / "org").mkdir(parents=True)
    (hub / "models" / "org" / "rm").symlink_to(model)
    rows_file(hub / "datasets" / "org" / "pairs")
    commit = commit_of(hub / "models" / "org" / "rm")
    document = {"model": {"path": "org/rm"}, "dataset": {"source": {"kind": "hub", "path": "org/pairs"}}}

    def finder(pins: dict[str, str]) -> list[Any]:
        environment = {**stand_in.environment(tmp_path / "hf"), "SAFER_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", HUB, json.dumps(document), json.dumps(pins)]
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answer: list[Any] = json.loads(done.stdout)
        return answer

    with HubStandIn(hub) as stand_in:
        digest, revision, origin, dataset = finder({})
        assert (revision, origin) == (commit, "org/rm")
        assert len(dataset) == 40
        before = len(stand_in.requests)
        pins = {"model": digest, "model.revision": revision, "dataset": "d", "dataset.revision": dataset, "labels": "x"}
        assert finder(pins) == [digest, commit, "org/rm", dataset]
        assert stand_in.requests[before:] == []
        (blob,) = [path for path in (tmp_path / "hf").rglob("model.safetensors") if path.is_symlink()]
        blob.unlink()  # a cache that has a part only is completed
        assert finder(pins) == [digest, commit, "org/rm", dataset]
        assert stand_in.requests[before:]
