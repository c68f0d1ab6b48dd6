"""What a request may be, and what every answer carries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from safer_engine import errors as engine_errors
from service import errors
from service.errors import Malformed, TooManyRequests
from service.http.auth import check_host
from service.http.errors import STATUS, status_of
from service.http.limits import MAX_DEPTH, RateLimit, strict_json
from service.schemas import Problem
from tests.helpers.http_world import SPEC, HttpWorld, http_world


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world(body_limit_bytes=4000, allowed_hosts="127.0.0.1,audit.example,[::1]") as made:
        yield made


class Raw:
    """A request as a server hands it to the application, however odd."""

    def __init__(self, world: HttpWorld) -> None:
        self.world = world
        self.read = 0

    def ask(
        self, method: str, path: str, chunks: list[bytes], headers: list[tuple[bytes, bytes]], scope: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        given = iter(chunks)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            chunk = next(given, None)
            if chunk is None:
                return {"type": "http.disconnect"}
            self.read += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        secret = self.world.keys["default", "admin"].encode()
        made = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
            "headers": [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer " + secret), *headers], "client": ("10.0.0.1", 1),
            "server": ("127.0.0.1", 80), "http_version": "1.1", "root_path": "",
        } | (scope or {})  # fmt: skip
        asyncio.run(self.world.app(made, receive, send))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


JSON_HEADER = (b"content-type", b"application/json")


@pytest.mark.parametrize("announced", [[], [(b"content-length", b"10")], [(b"content-length", b"x")]])
def test_a_body_is_counted_as_it_comes(world: HttpWorld, announced: list[tuple[bytes, bytes]]) -> None:
    raw = Raw(world)
    status, body = raw.ask("POST", "/v1/audits", [b"[" * 1000] * 1000, [JSON_HEADER, *announced])
    assert (status, json.loads(body)["code"]) == (413, "too_large")
    assert raw.read <= 5000


def test_a_body_that_announces_too_much_is_not_read(world: HttpWorld) -> None:
    raw = Raw(world)
    assert raw.ask("POST", "/v1/audits", [b"x"] * 10, [JSON_HEADER, (b"content-length", b"999999")])[0] == 413
    assert raw.read == 0


def test_a_client_that_leaves_mid_body_harms_nothing(world: HttpWorld) -> None:
    assert Raw(world).ask("POST", "/v1/audits", [b'{"spec"'], [JSON_HEADER])[0] == 400


@pytest.mark.parametrize(
    ("headers", "scope"),
    [
        ([(b"x-%d" % number, b"1") for number in range(200)], {}),
        ([(b"x-long", b"a" * 40_000)], {}),
        ([(b"x-odd", b"a\x00b")], {}),
        ([(b"x-odd", b"a\nb")], {}),
        ([(b"content-encoding", b"gzip")], {}),
        ([], {"query_string": b"label=a%00b"}),
        ([], {"query_string": b"a=" + b"b" * 9000}),
        ([], {"path": "/v1/audits/\0", "raw_path": b"/v1/audits/%00"}),
        ([], {"headers": [(b"host", b"127.0.0.1\xff")]}),
        ([], {"headers": []}),
    ],
)
def test_odd_heads_are_refused(world: HttpWorld, headers: list[tuple[bytes, bytes]], scope: dict[str, Any]) -> None:
    status, body = Raw(world).ask("GET", "/v1/audits", [], headers, scope)
    assert (status, json.loads(body)["code"]) == (400, "malformed")


@pytest.mark.parametrize(
    "body",
    [b"\xff\xfe", b"{", b"", b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"1e999", b"9" * 30, b"-9223372036854775809", b'"\\u0000"',
     b'{"\\u0000": 1}', b'"\\ud800"', b"[" * 100_000, b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), b"1 2", b"\xef\xbb\xbf1",
     b'{"a":' * 40 + b"1" + b"}" * 40, b"9" * 5000],
)  # fmt: skip
def test_json_that_cannot_be_kept_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        strict_json(body)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "é\U0001f600"]}, "x", 9223372036854775807, [[[]]], {}])
def test_json_that_can_be_kept_is_read(value: object) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b'{"spec": NaN}', "application/json", 400),
        (b"\xff", "application/json; charset=utf-8", 400),
        (b'{"a":1,"a":1}', "application/problem+json", 400),
        (json.dumps({"spec": SPEC}).encode(), "text/plain", 422),
        (json.dumps({"spec": SPEC}).encode(), "application/x-www-form-urlencoded", 422),
        (b"", "application/json", 422),
        (b"spec=1", "multipart/form-data", 422),
    ],
)
def test_bodies_of_other_kinds(world: HttpWorld, content: bytes, content_type: str, status: int) -> None:
    response = world.client("submit").post("/v1/audits", content=content, headers={"Content-Type": content_type})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")


def test_every_error_has_a_status_and_a_code_of_its_own() -> None:
    pending, found = [engine_errors.SaferError], set()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__ in (engine_errors.__name__, errors.__name__):
            found.add(kind)
    named = {kind for kind in found if kind.__name__ != "Unreachable"}
    assert named <= set(STATUS)
    assert len({kind.code for kind in named}) == len(named)
    assert all(400 <= status < 600 for status in STATUS.values())


class OwnConflict(errors.Conflict):
    """Has no row of its own."""

    code = "own_conflict"


@pytest.mark.parametrize(("kind", "status"), [(errors.NotFound, 404), (engine_errors.ModelRefused, 422), (OwnConflict, 409)])
def test_status_of_an_error_is_its_classes_or_its_bases(kind: type[engine_errors.SaferError], status: int) -> None:
    assert status_of(kind("x")) == status


def test_problems_are_complete_and_faults_tell_nothing(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/secret/path")

    problem = Problem.model_validate_json(world.client().get("/v1/audits/nothing").content)
    assert (problem.status, problem.title, problem.type) == (404, "Not Found", "urn:safer-audit:error:not_found")
    monkeypatch.setattr(world.services.jobs, "find", fail)
    response = world.client("read").get("/v1/audits")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "secret" not in response.text


@pytest.mark.parametrize("error", [OperationalError("q", {}, Exception("x")), errors.Unavailable("the database is away")])
def test_a_database_that_is_away_is_told_as_such(world: HttpWorld, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(world.services.jobs, "find", fail)
    response = world.client("read").get("/v1/audits")
    assert (response.status_code, response.json()["code"], response.json()["retryable"]) == (503, "unavailable", True)
    assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/v1/audits", 405), ("TRACE", "/v1/me", 405)]
)
def test_what_no_route_takes_is_a_problem_too(world: HttpWorld, method: str, path: str, status: int) -> None:
    response = world.client().request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert status == 404 or response.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/audits", "/v1/nothing", "/login", "/static/pages.css", "/v1/audits?limit=x", "/openapi.json"]
)
def test_security_headers_are_everywhere(world: HttpWorld, path: str) -> None:
    headers = world.client(None).get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "cache-control" in headers
    assert "server" not in headers


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8321", "AUDIT.example", "audit.example:443", "[::1]:80"])
def test_allowed_hosts(world: HttpWorld, host: str) -> None:
    assert world.client().get("/v1/me", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "audit.example.", "", "[::2]", "localhost", "audit.example@evil.example"]
)
def test_other_hosts_are_refused_but_for_probes(world: HttpWorld, host: str) -> None:
    for path in ("/v1/me", "/login", "/", "/openapi.json"):
        assert world.client().get(path, headers={"Host": host}).status_code == 400
    assert world.client(None).get("/healthz", headers={"Host": host}).status_code == 200


def test_any_host_where_the_operator_says_so() -> None:
    check_host("whatever.example:80", ("*",))
    with pytest.raises(Malformed):
        check_host("whatever.example", ())


def test_buckets_fill_up_with_time_and_are_bounded() -> None:
    now = [0.0]
    limit = RateLimit(2, names=3, clock=lambda: now[0])
    limit.take("a")
    limit.take("a")
    with pytest.raises(TooManyRequests) as refused:
        limit.take("a")
    assert refused.value.retry_after == pytest.approx(30)
    limit.take("b")
    now[0] += 30
    limit.take("a")
    with pytest.raises(TooManyRequests):
        limit.take("a")
    for name in "cdefg":
        limit.take(name)
    assert len(limit._buckets) == 3


def test_a_key_that_asks_too_often_is_told_when_to_come_back() -> None:
    with http_world(requests_per_minute=3) as world:
        client = world.client("read")
        assert [client.get("/v1/me").status_code for _ in range(4)] == [200, 200, 200, 429]
        response = client.get("/v1/me")
        assert (response.json()["code"], int(response.headers["retry-after"]) >= 1) == ("too_many_requests", True)
        assert world.client("submit").get("/v1/me").status_code == 200


def test_strangers_are_slowed_by_address(world: HttpWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.services.strangers, "_clock", lambda: 0.0)
    world.services.strangers._buckets.clear()
    client = world.client(None)
    codes = [client.get("/v1/me").status_code for _ in range(70)]
    assert codes[:60] == [401] * 60
    assert codes[-1] == 429
    assert world.client("read").get("/v1/me").status_code == 200
    world.services.strangers._buckets.clear()


def test_metrics_are_for_this_machine_and_its_operators(world: HttpWorld) -> None:
    from starlette.testclient import TestClient

    world.services.strangers._buckets.clear()
    assert world.client("read").get("/v1/audits").status_code == 200
    near = TestClient(world.app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    text = near.get("/metrics").text
    assert 'safer_jobs_total{state="queued"}' in text
    assert 'safer_queue_depth{queue="gpu"}' in text
    assert 'safer_http_seconds_count{method="GET",route="/v1/audits"' in text
    for proxied in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        assert near.get("/metrics", headers={proxied: "8.8.8.8"}).status_code == 401
    assert near.get("/metrics", headers={"Host": "evil.example"}).status_code == 400
    assert world.client(None).get("/metrics").status_code == 401
    assert world.client("admin").get("/metrics").status_code == 200
    with http_world(metrics_public=True) as public:
        assert public.client(None).get("/metrics").status_code == 200


def test_readiness_names_what_is_away(world: HttpWorld) -> None:
    response = world.client(None).get("/readyz")
    parts = response.json()["parts"]
    assert response.status_code == 503
    assert {name: part["ok"] for name, part in parts.items()} == {"database": True, "broker": False, "store": True}
    assert parts["store"]["detail"] == "first commit wins by link"


def test_the_schema_is_whole(world: HttpWorld) -> None:
    schema = world.client(None).get("/openapi.json").json()
    text = json.dumps(schema)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(schema["components"]["schemas"])
    assert {"AuditSpec", "TrainSpec", "Problem"} <= names
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            assert operation.get("summary"), (path, method)
            assert {"400", "401", "422", "429", "500", "503"} <= set(operation["responses"]), (path, method)
