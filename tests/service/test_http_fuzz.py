"""The API under what nobody would send: malformed specs, uploads, JSON, JSONL rows and headers; and every route by schema."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from safer_engine.errors import SaferError
from safer_engine.science.pair_formats import read_pairs, recognise
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.spec import DatasetSpec, LocalSource
from tests.helpers.http_world import HOST, SPEC, TRAINING, HttpWorld, http_world
from tests.helpers.servers import Redis

pytestmark = pytest.mark.full
ROUNDS = {"specs": 4000, "json": 2500, "uploads": 2000, "headers": 2000, "rows": 2000}


@dataclass
class Prober:
    """Asks the application without a server, many times a second."""

    world: HttpWorld
    job_id: str
    upload_id: str
    counts: Counter[str] = field(default_factory=Counter)
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def ask(self, method: str, path: str, headers: Any = None, **given: Any) -> httpx.Response:
        key = self.world.keys["default", "admin"].encode()
        named = [(b"authorization", b"Bearer " + key), *(headers or [])]

        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(self.world.app, raise_app_exceptions=False, client=("10.1.1.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url=HOST) as client:
                return await client.request(method, path, headers=named, **given)

        return self.runner.run(once())

    def refuses(self, response: httpx.Response) -> dict[str, Any]:
        """A clear 4xx: a problem with a code and words."""
        assert 400 <= response.status_code < 500, (response.status_code, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        problem: dict[str, Any] = response.json()
        assert problem["code"]
        assert problem["detail"]
        assert problem["status"] == response.status_code
        return problem


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    with http_world(default_max_queued=10**6, default_max_bytes=1 << 55) as world:
        job = world.finished()
        made = Prober(world, job.id, "")
        files = [{"path": "a", "size": 100, "sha256": "0" * 64}]
        made.upload_id = made.ask("POST", "/v1/uploads", json={"kind": "dataset", "files": files}).json()["id"]
        yield made
        made.runner.close()


@pytest.fixture(autouse=True)
def enough_was_tried(request: pytest.FixtureRequest, prober: Prober) -> Iterator[None]:
    """After a subject's test: what it made was mostly malformed, and nothing of it a fault of the service."""
    yield
    subject = next((name for name in ROUNDS if request.node.originalname.startswith(f"test_malformed_{name}")), None)
    if subject is not None:
        tried = {name: number for name, number in prober.counts.items() if name.startswith(subject)}
        assert sum(tried.values()) > ROUNDS[subject] * 0.3, tried
        assert not [name for name in tried if name.split()[-1].startswith("5")]


def rounds(name: str) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=ROUNDS[name], deadline=None, database=None, suppress_health_check=checks, derandomize=True)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", "\0", "a" * 3000, "../..", "NaN", "\u202e"]
)
numbers = (
    st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([-1, 0, 2**63, 2**64, 1e308, -0.0])
)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all places of a document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in places(inner, (*path, key))]


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@pytest.fixture(scope="module")
def full_specs(prober: Prober) -> list[tuple[str, dict[str, Any]]]:
    """Every knob of all kinds of spec, as the service itself writes them."""
    audit = prober.ask("POST", "/v1/audits", json={"spec": SPEC}).json()["spec"]
    training = prober.ask("POST", "/v1/trainings", json={"spec": TRAINING}).json()["spec"]
    verified = {**audit, "retraining": {"base": "org/base"}, "evaluation": {"source": SPEC["dataset"]["source"]}}
    verification = prober.ask("POST", "/v1/verifications", json={"spec": {**verified, "verification": {}}}).json()["spec"]
    return [("/v1/audits", audit), ("/v1/verifications", verification), ("/v1/trainings", training)]


WRONG = st.sampled_from(
    [-1e300, -5, "x\0", [], [[]], {}, {"kind": "x"}, {"": 1}, "é" * 500, True, 10**15 + 0.5, ["a"], {"path": {}}, 2**65]
)  # fmt: skip


@rounds("specs")
@given(data=st.data())
def test_malformed_specs(prober: Prober, full_specs: list[tuple[str, dict[str, Any]]], data: st.DataObject) -> None:
    route, spec = data.draw(st.sampled_from(full_specs))
    where = data.draw(st.sampled_from(places(spec)))
    how = data.draw(st.sampled_from(["unknown", "wrong", "any", "document"]))
    if how == "unknown":
        spec = put(spec, (*where[:-1], data.draw(texts.filter(lambda name: name not in ("spec",))) + "?"), 1)
    elif how == "wrong":
        spec = put(spec, where, data.draw(WRONG))
    elif how == "any":
        spec = put(spec, where, data.draw(values))
    else:
        spec = data.draw(st.dictionaries(texts, values, max_size=3))
    others = st.sampled_from(["priority", "labels", "callback_url", "gpu_seconds_budget", "x"])
    body = {**(data.draw(st.dictionaries(others, values)) if how == "any" else {}), "spec": spec}
    response = prober.ask("POST", route, content=json.dumps(body).encode(), headers=[(b"content-type", b"application/json")])
    prober.counts[f"specs {response.status_code}"] += 1
    if response.status_code in (200, 201) and how in ("wrong", "any"):
        return  # what was put there happens to be a value that the spec takes
    problem = prober.refuses(response)
    assert problem["status"] in (400, 422)
    if problem["code"] == "request_invalid":
        assert problem["errors"]


@rounds("json")
@given(data=st.data())
def test_malformed_json(prober: Prober, data: st.DataObject) -> None:
    good = json.dumps({"spec": SPEC, "labels": {"a": "b"}}).encode()
    how = data.draw(st.sampled_from(["bytes", "cut", "flip", "deep", "number", "text"]))
    if how == "bytes":
        body = data.draw(st.binary(max_size=200))
    elif how == "cut":
        body = good[: data.draw(st.integers(0, len(good) - 1))]
    elif how == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        body = good[:at] + bytes([data.draw(st.integers(0x80, 0xFF))]) + good[at + 1 :]
    elif how == "deep":
        depth = data.draw(st.integers(40, 20_000))
        body = b'{"spec":' * depth + b"1" + b"}" * data.draw(st.sampled_from([0, depth]))
    elif how == "number":
        number = data.draw(
            st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-", b"01", b"0x1", b"1_0"])
        )
        body = b'{"spec": {"seed": ' + number + b"}}"
    else:
        text = data.draw(st.sampled_from([b"\\u0000", b"\\ud800", b"\\udfff\\ud800", b"\\x", b"\n", b"\\u12"]))
        body = b'{"spec": {}, "labels": {"a": "' + text + b'"}}'
    route = data.draw(
        st.sampled_from(
            [
                "/v1/audits",
                "/v1/verifications",
                "/v1/trainings",
                "/v1/comparisons",
                "/v1/drills",
                "/v1/uploads",
                "/v1/keys",
                "/v1/projects",
            ]
        )
    )
    kind = data.draw(
        st.sampled_from([b"application/json", b"application/json; charset=utf-16", b"text/json", b"", b"application/x+json"])
    )
    response = prober.ask("POST", route, content=body, headers=[(b"content-type", kind)])
    prober.refuses(response)
    prober.counts[f"json {response.status_code}"] += 1


@rounds("uploads")
@given(data=st.data())
def test_malformed_uploads(prober: Prober, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["declare", "part", "done", "place"]))
    path = f"/v1/uploads/{prober.upload_id}"
    if how == "declare":
        good: dict[str, Any] = {"kind": "dataset", "files": [{"path": "a", "size": 1, "sha256": "0" * 64}]}
        body = put(good, data.draw(st.sampled_from(places(good))), data.draw(values))
        response = prober.ask("POST", "/v1/uploads", json=body)
        if response.status_code == 201:
            return  # another size, or a plain name
    elif how == "part":
        digest = data.draw(st.text("0123456789abcdefg:=,/-sha", max_size=80)).encode()
        name = data.draw(st.sampled_from([b"x-content-sha256", b"content-digest", b"digest", b"x-other"]))
        response = prober.ask(
            "PUT", f"{path}/files/0/parts/0", content=data.draw(st.binary(max_size=300)), headers=[(name, digest)]
        )
    elif how == "done":
        good = {"etag": "x", "size": 100, "sha256": "0" * 64}
        body = put(
            good, data.draw(st.sampled_from(places(good))), data.draw(values.filter(lambda value: not isinstance(value, str)))
        )
        response = prober.ask("POST", f"{path}/files/0/parts/0", json=body)
        if response.status_code == 200:
            assert body["size"] == 100
            return
    else:
        numbers = st.sampled_from(["-1", "1", "99999", "100000", "x", "1e3", "0x0", "٣", "9" * 30, "%00", ""])
        where = f"files/{data.draw(numbers)}/parts/{data.draw(numbers)}"
        response = prober.ask("PUT", f"{path}/{where}", content=b"x", headers=[(b"x-content-sha256", b"0" * 64)])
    prober.refuses(response)
    prober.counts[f"uploads {response.status_code}"] += 1


HEADERS = (
    "authorization", "idempotency-key", "range", "if-none-match", "if-range", "last-event-id", "cookie", "host", "content-type",
    "content-length", "content-encoding", "x-content-sha256", "digest", "origin", "accept", "x-forwarded-for",
    "transfer-encoding",
)  # fmt: skip
ODD = (
    b"", b"\x00", b"\xff\xfe", b"a" * 50_000, b"bytes=", b"bytes=0-0,1-1", b"bytes=9-1", b"bytes=-" + b"9" * 40, b"Bearer",
    b"Bearer \xff", b"Bearer " + b"A" * 5000, b"-1", b"9" * 40, b'"', b'W/"', b"safer_session=.", b"null",
    b"safer_session=" + b"A" * 500 + b"." + b"0" * 64, b"gzip", b"[::1", b"127.0.0.1:", b"application/json;charset=\xe9",
    b"a\nb", b";;",
)  # fmt: skip


@rounds("headers")
@given(data=st.data())
def test_malformed_headers(prober: Prober, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(ODD) | st.binary(max_size=60))
    name = data.draw(st.sampled_from(HEADERS))
    count = data.draw(st.sampled_from([1, 1, 1, 2, 150]))
    job = f"/v1/audits/{prober.job_id}"
    paths = ["/v1/audits", f"{job}/artifacts/report.md", f"{job}/events", f"{job}/report", "/v1/me", "/", "/login", "/metrics"]
    method, path = data.draw(st.sampled_from([*(("GET", each) for each in paths), ("POST", "/v1/audits"), ("POST", "/login")]))
    body = json.dumps({"spec": SPEC}).encode() if method == "POST" else None
    response = prober.ask(method, path, headers=[(name.encode(), value)] * count, content=body)
    assert response.status_code < 500, response.text
    if count > 100 or b"\x00" in value or b"\n" in value or len(value) > 40_000:
        assert prober.refuses(response)["code"] == "malformed"
    prober.counts[f"headers {response.status_code}"] += 1


ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


@rounds("rows")
@given(data=st.data())
def test_malformed_rows_of_a_dataset(prober: Prober, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    how = data.draw(st.sampled_from(["value", "bytes", "document", "cut"]))
    good = [json.dumps(ROW | {"id": str(number)}).encode() for number in range(3)]
    if how == "value":
        odd = json.dumps(put(ROW, (data.draw(st.sampled_from(list(ROW))),), data.draw(values))).encode()
    elif how == "bytes":
        odd = data.draw(st.binary(max_size=80))
    elif how == "document":
        odd = json.dumps(data.draw(values)).encode()
    else:
        odd = good[0][: data.draw(st.integers(0, len(good[0]) - 1))]
    lines = [*good, odd]
    random.Random(len(odd)).shuffle(lines)
    path: Path = prober.world.services.settings.folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    error = _read_rows(path)
    prober.counts["rows read" if error is None else "rows refused"] += 1
    assert error is None or (error.message and error.code in ("dataset_refused", "input_refused"))


def _read_rows(path: Path) -> SaferError | None:
    """Read a dataset's pairs, as workers do; why it was refused."""
    try:
        found = list(resolve_dataset(DatasetSpec(source=LocalSource(path=str(path)))).rows())
        pairs = list(read_pairs(found, recognise(found, "auto", {}, "safer", {})))
    except SaferError as error:
        return error
    assert len(pairs) >= 3
    return None


def test_enough_is_tried() -> None:
    assert sum(ROUNDS.values()) >= 10_000


CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def schema_world(redis: Redis) -> Iterator[HttpWorld]:
    with http_world(default_max_queued=10**6, default_max_bytes=1 << 55, broker_url=redis.url) as world:
        yield world


@pytest.mark.timeout(1200)
def test_every_route_by_schema(schema_world: HttpWorld) -> None:
    """What the schema allows and what it forbids, for each route; half of the cases name things that are there."""
    api = schemathesis.openapi.from_asgi("/openapi.json", schema_world.app, headers={"Host": "127.0.0.1"})
    headers = {"Authorization": f"Bearer {schema_world.keys['default', 'admin']}", "Host": "127.0.0.1"}
    client = schema_world.client("admin")
    files = [{"path": "a", "size": 100, "sha256": "0" * 64}]
    upload = client.post("/v1/uploads", json={"kind": "dataset", "files": files}).json()["id"]
    job_id = schema_world.finished().id
    gate_id = client.post("/v1/gates", json={"audit": job_id}).json()["id"]
    known = {"job_id": job_id, "gate_id": gate_id, "upload_id": upload, "name": "report.md", "pair_id": "p-0"}
    asked: Counter[str] = Counter()
    for found in api.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            _try(operation, mode, headers, {} if operation.method == "delete" else known, asked)
    assert len(asked) >= 60
    assert min(asked.values()) >= 1


def _try(operation: Any, mode: Any, headers: dict[str, str], known: dict[str, str], asked: Counter[str]) -> None:
    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def probe(case: Any, real: bool) -> None:
        if real and case.path_parameters:
            case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}
        if case.path.endswith("/events"):
            case.query = {**(case.query or {}), "follow": "false"}
        asked[f"{operation.label} {mode}"] += 1
        case.validate_response(case.call(headers=headers), checks=CHECKS)

    try:
        probe()
    except Unsatisfiable:
        return  # a route without parameters cannot be asked wrongly
