"""Uploads over HTTP: declared, sent in parts, checked, named."""

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.errors import NotFound, RequestInvalid, TooLarge
from service.http.uploads import MAX_PARTS, given_digest, part_bytes
from service.infra.upload_files import UploadFiles
from service.upload_names import UploadFile
from tests.helpers.http_world import SPEC, HttpWorld, http_world
from tests.helpers.servers import S3
from tests.helpers.store_world import fresh_prefix

MiB = 1 << 20
BIG, SMALL = bytes(range(256)) * (9 * 4096), b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with http_world(s3_part_bytes=5 * MiB, upload_part_limit_bytes=6 * MiB, upload_limit_bytes=50 * MiB) as made:
        yield made


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def declared(**files: bytes) -> dict[str, Any]:
    named = {name.replace("__", "/"): data for name, data in files.items()}
    return {"kind": "dataset", "files": [{"path": path, "size": len(data), "sha256": sha(data)} for path, data in named.items()]}


def put(world: HttpWorld, upload: str, index: int, number: int, data: bytes, **headers: str) -> Any:
    given = headers or {"X-Content-SHA256": sha(data)}
    named = {name.replace("_", "-"): value for name, value in given.items()}
    return world.client("submit").put(f"/v1/uploads/{upload}/files/{index}/parts/{number}", content=data, headers=named)


def test_an_upload_goes_up_in_parts_and_is_named_by_its_content(world: HttpWorld) -> None:
    client = world.client("submit")
    created = client.post("/v1/uploads", json=declared(big=BIG, sub__small=SMALL, empty=b""))
    upload = created.json()
    path = f"/v1/uploads/{upload['id']}"
    assert (created.status_code, created.headers["location"], upload["state"]) == (201, path, "open")
    assert (upload["part_bytes"], [file["parts"] for file in upload["files"]]) == (5 * MiB, [2, 1, 0])
    assert put(world, upload["id"], 0, 1, BIG[5 * MiB :]).status_code == 200
    assert client.post(f"{path}/complete").status_code == 409
    assert put(world, upload["id"], 1, 0, SMALL).json() == {"part": 0, "size": len(SMALL), "digest": sha(SMALL)}
    again = client.post("/v1/uploads", json=declared(big=BIG, sub__small=SMALL, empty=b"")).json()
    assert again["id"] == upload["id"]
    assert [[part["part"] for part in file["received"]] for file in again["files"]] == [[1], [0], []]
    put(world, upload["id"], 0, 0, BIG[: 5 * MiB])
    done = client.post(f"{path}/complete").json()
    assert (done["state"], done["name"]) == ("complete", f"upload:{done['digest']}")
    assert client.post(f"{path}/complete").json() == done
    assert client.get(path).json() == done
    there = client.post("/v1/uploads", json=declared(empty=b"", sub__small=SMALL, big=BIG))
    assert (there.status_code, there.json()["id"]) == (200, upload["id"])
    files = UploadFiles(world.services.stores, "default")
    assert b"".join(files.stream(done["digest"], "big")) == BIG
    spec = {**SPEC, "dataset": {"source": {"kind": "local", "path": done["name"]}}}
    assert client.post("/v1/audits", json={"spec": spec}).status_code == 201
    foreign = world.client("submit", "other").post("/v1/audits", json={"spec": spec})
    assert (foreign.status_code, foreign.json()["code"]) == (422, "source_not_allowed")
    assert client.delete(path).status_code == 409
    assert (
        world.client("submit", "other").post("/v1/uploads", json=declared(big=BIG, sub__small=SMALL, empty=b"")).json()["state"]
        == "open"
    )


def test_people_see_names_beside_digests_and_nothing_in_them_is_markup(world: HttpWorld) -> None:
    client, named = world.client("admin"), {}
    for title, data in (("<b>my & model", b"one"), ("", b"two")):
        body = {**declared(train=data), "title": title}
        upload = client.post("/v1/uploads", json=body).json()
        put(world, upload["id"], 0, 0, data)
        named[title] = client.post(f"/v1/uploads/{upload['id']}/complete").json()["name"]
    source = {"kind": "local", "path": named[""]}
    spec = {**SPEC, "model": {"path": named["<b>my & model"]}, "dataset": {"source": source}}
    job = client.post("/v1/audits", json={"spec": spec}).json()
    assert (job["model"], job["dataset"]) == (named["<b>my & model"], named[""])
    assert job["names"] == {named["<b>my & model"]: "<b>my & model", named[""]: "train"}
    assert client.get("/v1/audits").json()["items"][0]["names"] == job["names"]
    assert job["spec"]["model"]["path"] == named["<b>my & model"], "specs keep digests"
    browser = world.client(None)
    answer = browser.post("/login", data={"key": world.keys["default", "admin"]}, headers={"Origin": str(browser.base_url)})
    assert answer.status_code == 303
    for page in ("/", f"/audits/{job['id']}"):
        html = browser.get(page).text
        assert "&lt;b&gt;my &amp; model" in html
        assert "<b>my" not in html
    for wrong in ("a\nb", "x" * 201):
        assert client.post("/v1/uploads", json={**declared(train=b"three"), "title": wrong}).status_code == 422


def test_parts_that_are_not_what_they_should_be(world: HttpWorld) -> None:
    client = world.client("submit")
    upload = client.post("/v1/uploads", json=declared(a=SMALL)).json()["id"]
    assert put(world, upload, 0, 0, SMALL, X_Content_SHA256=sha(b"other")).status_code == 422
    assert put(world, upload, 0, 0, SMALL[:-1]).status_code == 422
    assert put(world, upload, 0, 0, SMALL + b"x").status_code == 422
    assert put(world, upload, 0, 0, b"x" * (6 * MiB + 1)).status_code == 413
    assert put(world, upload, 0, 0, SMALL, X_Nothing="1").status_code == 422
    assert [put(world, upload, *place, SMALL).status_code for place in ((0, 1), (1, 0), (0, 9999))] == [404, 404, 404]
    assert [put(world, upload, *place, SMALL).status_code for place in ((-1, 0), (0, 10_000), (0, -1))] == [422, 422, 422]
    assert client.get(f"/v1/uploads/{upload}").json()["files"][0]["received"] == []


def test_content_that_was_not_declared_is_found_when_completing(world: HttpWorld) -> None:
    client = world.client("submit")
    other = bytes(reversed(SMALL))
    upload = client.post("/v1/uploads", json=declared(a=SMALL)).json()["id"]
    assert put(world, upload, 0, 0, other).status_code == 200
    refused = client.post(f"/v1/uploads/{upload}/complete")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    put(world, upload, 0, 0, SMALL)
    assert client.post(f"/v1/uploads/{upload}/complete").status_code == 200
    assert put(world, upload, 0, 0, SMALL).status_code == 409


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a/../b", ".hidden", "a//b", "a\\b", "a\nb", "a/", " a", "x" * 501, "c:d", "a/.git/b", "\u202ex"]
)
def test_names_that_may_not_be(world: HttpWorld, path: str) -> None:
    body = {"kind": "model", "files": [{"path": path, "size": 1, "sha256": "0" * 64}]}
    assert world.client("submit").post("/v1/uploads", json=body).status_code == 422


@pytest.mark.parametrize(
    "change", [{"kind": "other"}, {"files": []}, {"files": [{"path": "a", "size": -1, "sha256": "0" * 64}]},
               {"files": [{"path": "a", "size": 1, "sha256": "0" * 63}]},
               {"files": [{"path": "a", "size": "1", "sha256": "0" * 64}]},
               {"files": [{"path": name, "size": 1, "sha256": "0" * 64} for name in ("a", "A")]},
               {"files": [{"path": name, "size": 1, "sha256": "0" * 64} for name in ("a", "a/b")]}],
)  # fmt: skip
def test_declarations_that_cannot_be(world: HttpWorld, change: dict[str, Any]) -> None:
    body = {"kind": "model", "files": [{"path": "a", "size": 1, "sha256": "0" * 64}]} | change
    assert world.client("submit").post("/v1/uploads", json=body).status_code == 422


def test_limits_of_uploads(world: HttpWorld) -> None:
    body = {"kind": "model", "files": [{"path": "a", "size": 50 * MiB + 1, "sha256": "0" * 64}]}
    assert world.client("submit").post("/v1/uploads", json=body).status_code == 413
    with http_world(default_max_bytes=10) as small:
        response = small.client("submit").post("/v1/uploads", json=declared(a=SMALL))
        assert (response.status_code, response.json()["code"]) == (429, "quota_exceeded")
    files = [UploadFile("a", "0" * 64, 7 * MiB * MAX_PARTS)]
    assert part_bytes(world.services.settings.model_copy(update={"upload_part_limit_bytes": 64 * MiB}), files) == 7 * MiB
    with pytest.raises(TooLarge):
        part_bytes(world.services.settings, files)


@pytest.mark.parametrize(
    "headers",
    [
        {"sha256": sha(b"x")},
        {"sha256": sha(b"x").upper()},
        {"content_digest": f"sha-256=:{base64.b64encode(hashlib.sha256(b'x').digest()).decode()}:"},
        {"content_digest": f"sha-512=:AAAA:, sha-256=:{base64.b64encode(hashlib.sha256(b'x').digest()).decode()}:"},
        {"digest": f"SHA-256={base64.b64encode(hashlib.sha256(b'x').digest()).decode()}"},
    ],
)
def test_a_digest_may_be_given_in_any_of_three_headers(headers: dict[str, str]) -> None:
    assert given_digest(**headers) == sha(b"x")


@pytest.mark.parametrize(
    "headers", [{}, {"sha256": "x"}, {"content_digest": "sha-256=:AAAA:"}, {"digest": "md5=abc"}, {"digest": "sha-256=%%%"}]
)
def test_a_digest_must_be_given(headers: dict[str, str]) -> None:
    with pytest.raises(RequestInvalid, match="sha256 is missing"):
        given_digest(**headers)


def test_there_is_nothing_to_presign_without_an_object_store(world: HttpWorld) -> None:
    upload = world.client("submit").post("/v1/uploads", json=declared(a=SMALL + b"1")).json()
    assert upload["presigned"] is False
    response = world.client("submit").get(f"/v1/uploads/{upload['id']}/files/0/parts/0/presigned")
    assert response.status_code == 404


def test_an_upload_that_nobody_uses_is_removed(world: HttpWorld) -> None:
    client = world.client("submit")
    upload = client.post("/v1/uploads", json=declared(a=SMALL + b"2")).json()
    put(world, upload["id"], 0, 0, SMALL + b"2")
    digest = client.post(f"/v1/uploads/{upload['id']}/complete").json()["digest"]
    assert client.delete(f"/v1/uploads/{upload['id']}").status_code == 204
    assert client.get(f"/v1/uploads/{upload['id']}").status_code == 404
    with pytest.raises(NotFound, match="there is no upload"):
        UploadFiles(world.services.stores, "default").files(digest)
    assert client.post("/v1/uploads", json=declared(a=SMALL + b"2")).json()["state"] == "open"


def test_with_an_object_store_bytes_pass_the_service_by(s3_moto: S3) -> None:
    with http_world(**s3_moto.settings(fresh_prefix()), s3_part_bytes=5 * MiB) as world:
        client = world.client("submit")
        upload = client.post("/v1/uploads", json=declared(big=BIG)).json()
        path = f"/v1/uploads/{upload['id']}"
        assert upload["presigned"] is True
        for number, part in enumerate((BIG[: 5 * MiB], BIG[5 * MiB :])):
            where = client.get(f"{path}/files/0/parts/{number}/presigned").json()
            answer = httpx.put(where["url"], content=part, headers=where["headers"], trust_env=False)
            done = {"etag": answer.headers["etag"], "size": len(part), "sha256": sha(part)}
            assert client.post(f"{path}/files/0/parts/{number}", json=done).status_code == 200
            assert client.post(f"{path}/files/0/parts/{number}", json=done | {"size": 1}).status_code == 422
        assert client.post(f"{path}/complete").json()["state"] == "complete"
        job = world.finished()
        reader = world.client("read")
        redirected = reader.get(f"/v1/audits/{job.id}/artifacts/report.md?redirect=1")
        assert redirected.status_code == 307
        assert redirected.headers["cache-control"] == "no-store"
        assert httpx.get(redirected.headers["location"], trust_env=False).content == b"# R\n"
        assert reader.get(f"/v1/audits/{job.id}/artifacts/report.md", headers={"Range": "bytes=2-2"}).content == b"R"
        world.client("admin").get(f"/v1/audits/{job.id}/edits/export")
        assert len(reader.get(f"/v1/audits/{job.id}/artifacts/decisions.jsonl").content.splitlines()) == 6
