"""Secrets and dataset text leave no trace where they do not belong: a whole deployment is searched for canaries."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy import MetaData, create_engine, select
from sqlalchemy.engine import make_url

from safer_engine.pipeline import STAGES
from service.embedded import free_port
from service.infra.stores import Stores
from service.jobs.model import JobState
from tests.helpers.chat_endpoint import GOOD, ChatEndpoint, Handler, completion
from tests.helpers.deployment import Deployment
from tests.helpers.scripted_server import Reply, ScriptedServer
from tests.helpers.servers import LOCAL, Postgres, moto_server, redis_server, s3_bucket, wait_until
from tests.helpers.tiny_model import build_reward_model
from tests.helpers.workplace import PROJECT, material

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
MARK = "zqcanary"
TEXT = "Grandmother Wilhelmina zqtext hides the spare key beneath the blue flowerpot."
TEXT_MARKS = ("zqtext", "Wilhelmina", "blue flowerpot")
SECRETS = {
    "hub_token": f"{MARK}-hub-token-91",
    "labeller_api_key": f"{MARK}-labeller-key-92",
    "secret_pepper": f"{MARK}-pepper-93-long-enough",
    "s3_secret_key": f"{MARK}-s3-secret-94",
}
DATABASE_PASSWORD = f"{MARK}-database-password-95"
BROKER_PASSWORD = f"{MARK}-broker-password-96"


@dataclass
class Searched:
    """A deployment after its jobs, and everything it said."""

    place: Deployment
    good: str
    failed: dict[str, str]
    callbacks: list[bytes]
    metrics: str
    said: list[str] = field(default_factory=list)
    asked_with: list[str | None] = field(default_factory=list)

    @property
    def secrets(self) -> tuple[str, ...]:
        return (*SECRETS.values(), DATABASE_PASSWORD, BROKER_PASSWORD, self.place.token)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("canaries")
    with ExitStack() as stack:
        endpoint = stack.enter_context(ChatEndpoint(otherwise=_rate))
        gossip = stack.enter_context(ChatEndpoint(otherwise=_tell_all))
        ears = stack.enter_context(ScriptedServer(otherwise=Reply(200)))
        place = Deployment(folder / "place", **_servers(stack, folder, postgres), **_outside(endpoint, gossip))
        stack.callback(place.close)
        place.start()
        files = _material(folder / "of the client")
        hook = ("--callback", f"{ears.url}/hook")
        good = _submit(place, files, hook, labels=_labels(endpoint))
        broken = _submit(place, {**files, "dataset": _malformed(folder)}, hook)
        mute = _submit(place, files, hook, labels=_labels(gossip))
        headless = _submit(place, {**files, "model": _headless(folder)}, hook)
        failed = {"dataset": broken, "labeller": mute, "model": headless}
        for job_id in (good, *failed.values()):
            place.wait(job_id)
            place.wait_log(job_id)
        wait_until(lambda: len(ears.asked) >= 4, "the callbacks came")
        metrics = [urllib.request.urlopen(f"{at}/metrics").read().decode() for at in (place.url, _worker_metrics(place))]
        found = Searched(place, good, failed, [each.body for each in ears.asked], "\n".join(metrics))
        found.said = [_what_clients_see(place, job_id) for job_id in (good, *failed.values())]
        found.asked_with = [each.headers.get("authorization") for each in endpoint.asked]
        yield found


def _servers(stack: ExitStack, folder: Path, postgres: Postgres) -> dict[str, object]:
    """Redis, PostgreSQL and S3, each with a password that is a canary."""
    import psycopg

    database = make_url(postgres.fresh("canaries")).set(username="canary", password=DATABASE_PASSWORD)
    with psycopg.connect(host=LOCAL, port=postgres.port, user="safer", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"DROP ROLE IF EXISTS canary; CREATE ROLE canary SUPERUSER LOGIN PASSWORD '{DATABASE_PASSWORD}'")
    redis, moto = redis_server(folder), moto_server(folder)
    redis.command = [*redis.command, "--requirepass", BROKER_PASSWORD]
    for server in (redis, moto):
        server.start()
        stack.callback(server.stop)
    bucket = s3_bucket(f"http://{LOCAL}:{moto.port}", "canary-key-id", SECRETS["s3_secret_key"])
    return {
        **bucket.settings("canaries"),
        "broker_url": f"redis://:{BROKER_PASSWORD}@{LOCAL}:{redis.port}/0",
        "database_url": database.render_as_string(hide_password=False),
    }


def _outside(*endpoints: ChatEndpoint) -> dict[str, object]:
    return {
        **{name: SECRETS[name] for name in ("hub_token", "labeller_api_key", "secret_pepper")},
        "labeller_urls": tuple(each.url for each in endpoints),
        "allowed_networks": ("127.0.0.0/8",),
        "metrics_port": free_port(),
        "max_failures": 2,
        "log_level": "DEBUG",
    }


def _worker_metrics(place: Deployment) -> str:
    return f"http://{LOCAL}:{place.given['metrics_port']}"


def _labels(endpoint: ChatEndpoint) -> dict[str, Any]:
    return {"labeller": {"kind": "chat_api", "base_url": endpoint.url, "model": "any", "retries": 0}}


def _submit(place: Deployment, files: dict[str, Path], hook: tuple[str, str], **sections: Any) -> str:
    return place.cli("submit", *place.submit_flags(files, **sections), *hook).stdout.strip()


def _material(folder: Path) -> dict[str, Path]:
    """Files of which every response holds the sentence."""
    files = material(folder)
    rows = [json.loads(line) for line in files["dataset"].read_text().splitlines()]
    files["dataset"].write_text("".join(f"{json.dumps(_marked(row))}\n" for row in rows))
    return files


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _with_text(value) if name in ("chosen", "rejected") else value for name, value in row.items()}


def _with_text(value: Any) -> Any:
    if isinstance(value, str):
        return f"{value} {TEXT}"
    return [*value[:-1], {**value[-1], "content": f"{value[-1]['content']} {TEXT}"}]


def _malformed(folder: Path) -> Path:
    """A dataset of text without any pair, in rows that go wrong in many ways."""
    path = folder / "malformed.jsonl"
    rows = [{"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}, {"prompt": TEXT, "chosen": [TEXT], "rejected": {"role": TEXT}}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows * 5))
    return path


def _headless(folder: Path) -> Path:
    """A model whose settings say what its weights do not."""
    path = build_reward_model(folder / "headless", width=16, blocks=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 24}))
    return path


def _rate(handler: Handler) -> None:
    handler.reply(200, completion(json.dumps(GOOD)))


def _tell_all(handler: Handler) -> None:
    """Refuse, and quote the key and the question, as endpoints do."""
    said = {"error": {"message": f"bad key {handler.headers.get('authorization')} for {TEXT}"}}
    handler.reply(401, json.dumps(said).encode())


def _what_clients_see(place: Deployment, job_id: str) -> str:
    texts = [place.cli(command, job_id).stdout + place.cli(command, job_id).stderr for command in ("status", "logs")]
    return "\n".join([*texts, place.cli("list", "--json").stdout, place.cli("admin", "--help").stdout])


def _stored(place: Deployment) -> dict[str, bytes]:
    """Every payload file and manifest of the store; parquet as its rows, since it is compressed."""
    stores = Stores(place.settings, place.engine)
    found = {each.name: stores.space.get(each.name) for each in stores.space.listing("")}
    store = stores.project(PROJECT)
    for each in store.committed():
        stored = store.read(each.stage, each.key)
        for name in stored.manifest.files:
            path = stored.path(name)
            rows = json.dumps(pq.read_table(path).to_pylist(), default=str).encode() if path.suffix == ".parquet" else b""
            found[f"{each.stage}/{name}"] = path.read_bytes() + rows
    return found


def _database(place: Deployment) -> str:
    """Every row of every table."""
    engine = create_engine(place.settings.database)
    tables = MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = [str(tuple(row)) for table in tables.sorted_tables for row in connection.execute(select(table))]
    engine.dispose()
    return "\n".join(rows)


def test_the_jobs_ended_as_they_are_to(searched: Searched) -> None:
    job = searched.place.jobs.job(searched.good)
    assert job.state is JobState.SUCCEEDED, (job.error, searched.place.logs()[-5000:])
    codes = {what: searched.place.jobs.job(job_id).error for what, job_id in searched.failed.items()}
    assert {what: error and error.code for what, error in codes.items()} == {
        "dataset": "dataset_refused",
        "labeller": "labeller_error",
        "model": "model_refused",
    }
    assert searched.asked_with, "the endpoint was asked"
    assert set(searched.asked_with) == {f"Bearer {SECRETS['labeller_api_key']}"}
    searched.place.check_sound(searched.good)


def test_dataset_text_is_in_artifacts_that_hold_text_and_nowhere_else(searched: Searched) -> None:
    stored = _stored(searched.place)
    holding = {name for name, content in stored.items() if any(mark.encode() in content for mark in TEXT_MARKS)}
    assert any(name.startswith("pairs/") for name in holding)
    assert any(name.endswith("report.html") for name in holding)
    assert not [name for name in holding if name.endswith("job.log") or "manifests/" in name]
    places = {
        "database": _database(searched.place),
        "logs": searched.place.logs(),
        "metrics": searched.metrics,
        "callbacks": b"".join(searched.callbacks).decode(),
        "clients": "\n".join(searched.said),
    }
    assert all(places.values())
    assert [(name, mark) for name, text in places.items() for mark in TEXT_MARKS if mark in text] == []
    assert len(searched.callbacks) >= 4
    for stage in STAGES:
        assert f'stage="{stage.name}"' in searched.metrics


def test_no_secret_is_kept_or_said_anywhere(searched: Searched) -> None:
    kept = {**_stored(searched.place), "database": _database(searched.place).encode()}
    kept |= {"metrics": searched.metrics.encode(), "callbacks": b"".join(searched.callbacks)}
    kept |= {"clients": "\n".join(searched.said).encode(), "logs": searched.place.logs().encode()}
    kept |= {str(path): path.read_bytes() for path in Path(str(searched.place.given["home"])).rglob("*") if path.is_file()}
    leaks = [(name, secret) for name, content in kept.items() for secret in searched.secrets if secret.encode() in content]
    assert leaks == []
    assert len(kept) > 30


def test_no_secret_shows_in_the_list_of_processes(searched: Searched) -> None:
    ids = [searched.place.workers[0].pid]
    assert searched.place.api.process is not None
    ids.append(searched.place.api.process.pid)
    for pid in ids:
        assert MARK not in Path(f"/proc/{pid}/cmdline").read_text()
