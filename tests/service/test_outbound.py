"""Requests to addresses that clients name: which pass, and where they really go."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import SpecError
from service.callbacks import Callbacks, callback_document
from service.errors import SourceNotAllowed, Unavailable
from service.jobs.callbacks import CallbackStore
from service.jobs.model import JobError, JobState
from service.outbound import Outbound
from tests.helpers.databases import Database, database, memory_folder, settings_for
from tests.helpers.scripted_server import Asked, Reply, ScriptedServer

LOOPBACK = ("127.0.0.0/8",)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "240.0.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "fec0::1", "::127.0.0.1", "198.18.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not Outbound().permits(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert Outbound().permits(ipaddress.ip_address(address))


def test_the_operator_may_allow_a_network() -> None:
    allowed = Outbound(("10.0.0.0/8", "fd00::/8"))
    assert allowed.permits(ipaddress.ip_address("10.200.0.1"))
    assert allowed.permits(ipaddress.ip_address("::ffff:10.0.0.1"))
    assert allowed.permits(ipaddress.ip_address("fd12::1"))
    assert not allowed.permits(ipaddress.ip_address("192.168.0.1"))


@pytest.mark.parametrize(
    "url", ["ftp://example.com/", "file:///etc/passwd", "http://", "http:///x", "//example.com", "http://a:b@example.com/", "http://example.com:99999/",
            "http://exa mple.com/", "http://example.com/\r\nX: 1", "http://[::1", "gopher://x/", "http://@example.com/", "http://ex\u00e4mple.com/",
            "http://example.com/" + "a" * 2000],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    for check in (Outbound().check, Outbound().precheck):
        with pytest.raises(SourceNotAllowed):
            check(url)


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "0x7f.1", "2130706433", "127.1", "[::ffff:127.0.0.1]", "0"])
def test_other_ways_to_write_this_machine(host: str) -> None:
    with pytest.raises(SourceNotAllowed):
        Outbound().precheck(f"http://{host}/")


def test_names_are_looked_up_when_connecting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real, flags = socket.getaddrinfo, list[int]()

    def watched(*args: Any, **given: Any) -> Any:
        flags.append(given["flags"])
        return real(*args, **given)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    Outbound().precheck("https://a-name-that-is-not-there.invalid/hook")
    assert flags == [socket.AI_NUMERICHOST]


def receiver(*statuses: int) -> ScriptedServer:
    """A server that answers with these, each time with a way elsewhere, and then is content."""
    elsewhere = {"Location": "http://127.0.0.1:1/elsewhere"}
    return ScriptedServer([Reply(status, headers=elsewhere) for status in statuses], otherwise=Reply(200))


def test_it_connects_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as there:
        asked: list[str] = []
        real = socket.getaddrinfo

        def answers_otherwise_later(host: str, *args: Any, **kwargs: Any) -> Any:
            asked.append(host)
            target = "127.0.0.1" if asked.count(host) == 1 else "127.0.0.9"
            return real(target if host == "hook.example" else host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", answers_otherwise_later)
        status = Outbound(LOOPBACK).post(f"http://hook.example:{there.port}/a?b=c", {"x": "é"})
        got = there.asked[0]
        assert (status, got.path, got.query, json.loads(got.body)) == (200, "/a", {"b": ["c"]}, {"x": "é"})
        assert got.headers["host"] == f"hook.example:{there.port}"
        assert asked.count("hook.example") == 1
        with pytest.raises(SourceNotAllowed):
            Outbound().post(f"{there.url}/", {})
        assert len(there.asked) == 1


def test_one_bad_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_given: found)
    with pytest.raises(SourceNotAllowed):
        Outbound().check("http://two.example/")


def test_redirects_are_not_followed() -> None:
    with receiver(307) as there:
        assert Outbound(LOOPBACK).post(f"{there.url}/", {}) == 307
        assert len(there.asked) == 1


def test_who_does_not_answer_is_away() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(Unavailable):
            Outbound(LOOPBACK, seconds=0.1).post(f"http://127.0.0.1:{silent.getsockname()[1]}/", {})
    with pytest.raises(Unavailable):
        Outbound(LOOPBACK).post("http://127.0.0.1:1/", {})
    with pytest.raises(Unavailable):
        Outbound().post("http://a-name-that-is-not-there.invalid/", {})


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"])
def test_who_answers_drop_by_drop_is_not_heard_to_the_end(head: bytes) -> None:
    over, said_all = threading.Event(), threading.Event()

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(head)
            for _ in range(90):
                connection.sendall(b"a")
                if over.wait(0.1):
                    return
            said_all.set()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            with pytest.raises(Unavailable), Outbound(LOOPBACK, seconds=0.3).ask("GET", url, {}) as answer:
                answer.read(1 << 20)
            assert not said_all.is_set()
        finally:
            over.set()
            thread.join()


@pytest.fixture
def world() -> Iterator[Database]:
    with memory_folder() as folder, database(settings_for(Path(folder))) as made:
        yield made


def failed_job(world: Database, url: str) -> str:
    job = world.submit("prepare", callback_url=url, labels={"team": "a"})
    world.store.fail(world.take(), JobError("dataset_refused", "row 3 says: a text of the dataset", "mend it"))
    return job.id


def test_a_callback_tells_the_end_and_no_text(world: Database) -> None:
    with receiver() as there:
        job_id = failed_job(world, f"{there.url}/hook")
        sender = Callbacks(CallbackStore(world.engine), Outbound(LOOPBACK), world.settings)
        assert sender.step() == 1
        assert sender.step() == 0
        (got,) = there.asked
    body = json.loads(got.body)
    assert (body["job"], body["state"], body["error"], body["labels"]) == (job_id, "failed", "dataset_refused", {"team": "a"})
    assert "text of the dataset" not in json.dumps(body)
    assert set(body) == {"job", "attempt", "kind", "state", "labels", "error", "verdict", "finished", "url"}


def documented_verify() -> Callable[[str, dict[str, str], bytes], bool]:
    """The function that docs/api.md gives to receivers."""
    code = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {each.__name__: each for each in (base64, hashlib, hmac, time)} | {"Mapping": dict}
    exec(code, names)
    verify: Callable[[str, dict[str, str], bytes], bool] = names["verify"]
    return verify


def openssl_mac(key: bytes, signed: bytes) -> str:
    """HMAC-SHA256 by a program that shares nothing with ours."""
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}", "-binary"]
    return base64.b64encode(subprocess.run(command, input=signed, capture_output=True, check=True).stdout).decode()


def test_a_receiver_knows_who_calls(world: Database) -> None:
    key = bytes(range(32))
    secret = "whsec_" + base64.b64encode(key).decode()
    settings = settings_for(world.settings.home, callback_secret=secret)
    with receiver(500) as there:
        job_id = failed_job(world, f"{there.url}/hook")
        sender = Callbacks(CallbackStore(world.engine), Outbound(LOOPBACK), settings)
        sender.step()
        make_due(world)
        sender.step()
    first, second = there.asked
    headers, body = first.headers, first.body
    assert headers["webhook-id"] == second.headers["webhook-id"] == f"{job_id}-1"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    assert headers["webhook-signature"] == f"v1,{openssl_mac(key, signed)}"
    verify = documented_verify()
    assert verify(secret, headers, body)
    assert verify(secret, {**headers, "webhook-signature": "v1,AAAA " + headers["webhook-signature"]}, body)
    assert not verify(secret, headers, body.replace(b"failed", b"succeeded"))
    assert not verify(secret, {**headers, "webhook-id": "another"}, body)
    assert not verify(secret, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 400)}, body)
    assert not verify("whsec_" + base64.b64encode(bytes(32)).decode(), headers, body)


def test_the_time_of_a_signature_is_the_databases(world: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    failed_job(world, "http://127.0.0.1:9/hook")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    (owed,) = CallbackStore(world.engine).take()
    assert abs(owed.at.timestamp() - now) < 60


def test_without_a_secret_nothing_is_signed(world: Database) -> None:
    with receiver() as there:
        failed_job(world, f"{there.url}/hook")
        Callbacks(CallbackStore(world.engine), Outbound(LOOPBACK), world.settings).step()
        assert not any(name.startswith("webhook-") for name in there.asked[0].headers)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_c2hvcnQ=", "c2hvcnQ" * 8, "whsec_" + "ä" * 40, "whsec_" + "!" * 40])
def test_a_secret_that_is_none_stops_the_start(world: Database, secret: str) -> None:
    with pytest.raises(SpecError, match="SAFER_CALLBACK_SECRET") as refused:
        settings_for(world.settings.home, callback_secret=secret)
    assert len(secret) < 8 or secret not in str(refused.value)


def test_one_who_is_told_to_end_sends_no_more_of_what_is_due(world: Database) -> None:
    stop = threading.Event()

    def last(_asked: Asked) -> Reply:
        stop.set()
        return Reply(200)

    with ScriptedServer(otherwise=last) as there:
        for _ in range(3):
            failed_job(world, f"{there.url}/hook")
        Callbacks(CallbackStore(world.engine), Outbound(LOOPBACK), world.settings).run(stop)
        assert len(there.asked) == 1


def test_a_callback_that_was_refused_or_not_answered_is_tried_again(world: Database) -> None:
    with receiver(500, 302) as there:
        failed_job(world, f"{there.url}/hook")
        sender = Callbacks(CallbackStore(world.engine), Outbound(LOOPBACK), world.settings)
        tried = []
        for _ in range(4):
            tried.append(sender.step())
            make_due(world)
        assert (tried, len(there.asked)) == ([1, 1, 1, 0], 3)


def test_a_callback_to_a_forbidden_address_is_given_up(world: Database) -> None:
    failed_job(world, "http://127.0.0.1:9/hook")
    sender = Callbacks(CallbackStore(world.engine), Outbound(), world.settings)
    assert sender.step() == 1
    make_due(world)
    assert sender.step() == 0


def test_the_sender_stops_when_told(world: Database) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=Callbacks(CallbackStore(world.engine), Outbound(), world.settings).run, args=(stop,))
    thread.start()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_links_lead_to_the_public_address(world: Database) -> None:
    job = world.run(world.submit("prepare"))
    assert job.state is JobState.SUCCEEDED
    assert callback_document(job, "https://audit.example/")["url"] == f"https://audit.example/v1/audits/{job.id}"


def make_due(world: Database) -> None:
    from service.jobs.clock import utc_after
    from service.jobs.tables import jobs

    world.change(jobs, jobs.c.callback_url.is_not(None), callback_at=utc_after(-1.0))
