"""Retries, problems as errors, and addresses that nobody listens on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from safer_engine.errors import ModelRefused, SaferError, SpecError
from service import errors
from service.client.connection import Connection, Patience, make_error
from service.embedded import free_port
from tests.helpers.scripted_server import Reply, ScriptedServer

QUICK = Patience(attempts=4, first_pause=0.001)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def problem(status: int, code: str, **more: object) -> Reply:
    document = {
        "type": "about:blank",
        "title": "no",
        "status": status,
        "detail": "it is so",
        "code": code,
        "hint": "do this",
        **more,
    }
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/problem+json"})


def connect(server: ScriptedServer) -> Connection:
    return Connection(server.url, "sk-safer-test", patience=QUICK)


@pytest.mark.parametrize("failure", [Reply(503), Reply(502), Reply(504), Reply(cut=-1), problem(503, "unavailable")])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_what_does_no_harm_is_tried_again(server: ScriptedServer, failure: Reply, method: str) -> None:
    server.script = [failure, failure, Reply(200, b"{}")]
    assert connect(server).call(method, "/v1/x").status_code == 200
    assert [asked.method for asked in server.asked] == [method] * 3


@pytest.mark.parametrize(("failure", "kind"), [(Reply(503), errors.Unavailable), (Reply(cut=-1), errors.Unreachable)])
def test_a_post_is_sent_once_unless_it_may_be_repeated(server: ScriptedServer, failure: Reply, kind: type[SaferError]) -> None:
    server.otherwise = failure
    with pytest.raises(kind):
        connect(server).call("POST", "/v1/x", body={})
    assert len(server.asked) == 1
    with pytest.raises(kind):
        connect(server).call("POST", "/v1/x", body={}, repeatable=True)
    assert len(server.asked) == 1 + QUICK.attempts


def test_a_rate_limit_is_waited_for_even_by_a_post(server: ScriptedServer) -> None:
    limited = problem(429, "too_many_requests")
    server.script = [Reply(429, limited.body, {**limited.headers, "Retry-After": "0.01"}), Reply(200, b"{}")]
    assert connect(server).call("POST", "/v1/x", body={}).status_code == 200


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500])
def test_refusals_and_faults_are_not_repeated(server: ScriptedServer, status: int) -> None:
    server.otherwise = problem(status, "whatever")
    with pytest.raises(SaferError, match="it is so"):
        connect(server).call("GET", "/v1/x")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not_found", errors.NotFound),
        ("conflict", errors.Conflict),
        ("not_authenticated", errors.NotAuthenticated),
        ("quota_exceeded", errors.QuotaExceeded),
        ("spec_invalid", SpecError),
        ("model_refused", ModelRefused),
    ],
)
def test_problems_become_the_error_they_were(server: ScriptedServer, code: str, kind: type[SaferError]) -> None:
    server.otherwise = problem(422, code)
    with pytest.raises(kind) as raised:
        connect(server).call("GET", "/v1/x")
    assert type(raised.value) is kind
    assert (raised.value.message, raised.value.hint) == ("it is so", "do this")


def test_wrong_fields_are_named(server: ScriptedServer) -> None:
    server.otherwise = problem(422, "request_invalid", errors=[{"path": "spec.sae.k", "message": "must be above 0"}])
    with pytest.raises(errors.RequestInvalid, match=r"fields are wrong: spec\.sae\.k: must be above 0"):
        connect(server).call("GET", "/v1/x")


def test_a_code_from_the_future_keeps_its_name(server: ScriptedServer) -> None:
    server.otherwise = problem(418, "is_a_teapot")
    with pytest.raises(SaferError, match="it is so") as raised:
        connect(server).call("GET", "/v1/x")
    assert raised.value.code == "is_a_teapot"
    assert make_error("not_found", "x").code == "not_found"


@pytest.mark.parametrize(("status", "kind"), [(404, SaferError), (502, errors.Unavailable)])
def test_a_page_of_a_proxy_is_an_error_too(server: ScriptedServer, status: int, kind: type[SaferError]) -> None:
    server.otherwise = Reply(status, b"<html>no</html>", {"Content-Type": "text/html"})
    with pytest.raises(kind, match=f"HTTP {status}"):
        connect(server).call("POST", "/v1/x")


def test_nobody_listens() -> None:
    connection = Connection(f"http://127.0.0.1:{free_port()}", "t", patience=QUICK)
    with pytest.raises(errors.Unreachable, match="cannot be reached") as raised:
        connection.call("POST", "/v1/x")
    assert "safer-audit up" in raised.value.hint


def test_the_key_goes_to_the_service_alone(server: ScriptedServer) -> None:
    with ScriptedServer(otherwise=Reply(200, b"part of the bucket")) as elsewhere:
        server.otherwise = Reply(
            307, headers={"Location": f"{elsewhere.url.replace('127.0.0.1', 'localhost')}/bucket?signature=s"}
        )
        with connect(server).stream("/v1/file") as response:
            assert response.read() == b"part of the bucket"
        connect(server).put_elsewhere(f"{elsewhere.url}/put", b"x", {})
        assert server.asked[0].headers["authorization"] == "Bearer sk-safer-test"
        assert [("authorization" in asked.headers) for asked in elsewhere.asked] == [False, False]


def test_presigned_addresses_are_not_told_in_errors() -> None:
    with ScriptedServer(otherwise=Reply(403)) as store:
        with pytest.raises(errors.Unreachable) as raised:
            connect(store).put_elsewhere(f"{store.url}/b?signature=secret", b"x", {})
        assert "secret" not in str(raised.value)
        assert len(store.asked) == 1


def test_a_proxy_is_not_asked_for_this_machine(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    server.otherwise = Reply(200, b"{}")
    assert connect(server).call("GET", "/v1/x").status_code == 200


def test_importing_the_client_loads_no_http_library() -> None:
    script = (
        "import sys, service.client, cli.submit, cli.watch\n"
        "print([name for name in ('httpx', 'torch', 'numpy', 'sqlalchemy', 'fastapi', 'celery') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
