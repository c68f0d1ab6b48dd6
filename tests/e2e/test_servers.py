"""The servers that other tests rely on really are what they say."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.helpers.servers import S3, Postgres, accepts, redis_server, wait_until


def test_redis_stops_flushes_and_comes_back_on_its_port(tmp_path: Path) -> None:
    import redis

    server = redis_server(tmp_path)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "1")
        server.flush()
        assert client.get("kept") is None
    server.stop(signal.SIGKILL)
    assert not accepts(server.port)
    server.start()
    assert accepts(server.port)
    server.stop()


@pytest.mark.full
def test_postgres_gives_databases_apart_and_restarts(postgres: Postgres) -> None:
    import sqlalchemy

    one, two = postgres.fresh("one"), postgres.fresh("two")
    engine = sqlalchemy.create_engine(one)
    with engine.begin() as connection:
        connection.exec_driver_sql("create table t (i int)")
    engine.dispose()
    postgres.stop(signal.SIGINT)
    assert not postgres.answers()
    postgres.start()
    wait_until(postgres.answers, "PostgreSQL answers")
    assert sqlalchemy.inspect(sqlalchemy.create_engine(one)).get_table_names() == ["t"]
    assert sqlalchemy.inspect(sqlalchemy.create_engine(two)).get_table_names() == []


def test_s3_has_its_bucket(s3_moto: S3) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=s3_moto.endpoint,
        aws_access_key_id=s3_moto.access_key,
        aws_secret_access_key=s3_moto.secret_key,
        region_name="us-east-1",
    )
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == [s3_moto.bucket]
