"""Files of a job over HTTP: names, ranges, what a browser may do with them."""

import base64
import hashlib

import pytest

from safer_engine.report import write
from safer_engine.store import digest_bytes
from service.artifact_names import REPORT_FILES, SAE_FILES, flat_name, stage_of
from service.http.artifacts import report_policy
from service.http.streaming import ByteRange, RangeNotSatisfiable, parse_range
from service.jobs.attachments import Reference
from service.jobs.model import JobKind, JobRecord
from tests.helpers.http_world import REPORT, SCRIPT, STYLE, HttpWorld, payloads

WEIGHTS = payloads()["sae"]["sae.safetensors"]


@pytest.fixture(scope="module")
def job(world: HttpWorld) -> JobRecord:
    return world.finished()


def test_files_have_the_names_of_a_local_run(world: HttpWorld, job: JobRecord) -> None:
    items = world.client("read").get(f"/v1/audits/{job.id}/artifacts").json()["items"]
    assert [item["name"] for item in items] == [
        "edits.jsonl", "report.html", "report.json", "report.md", "sae/sae.json", "sae/sae.safetensors",
        "stages/activations/shard-00000.safetensors", "stages/sae/curve.arrow",
    ]  # fmt: skip
    weights = next(item for item in items if item["name"] == "sae/sae.safetensors")
    assert (weights["size"], weights["digest"]) == (len(WEIGHTS), digest_bytes(WEIGHTS))


def test_a_training_gives_a_model(world: HttpWorld) -> None:
    trained = world.finish(world.submit(kind=JobKind.TRAIN_RM), {"training": {"model.safetensors": b"w", "config.json": b"{}"}})
    items = world.client("read").get(f"/v1/audits/{trained.id}/artifacts").json()["items"]
    assert [item["name"] for item in items] == ["model/config.json", "model/model.safetensors"]


def test_what_was_removed_is_gone_and_says_by_what(world: HttpWorld) -> None:
    store, client = world.services.store("default"), world.client("admin")
    job = world.finished()
    rows = {stage.name: stage for stage in world.services.jobs.stages(job.id)}
    for name in ("report", "edits", "activations"):
        assert store.delete(name, str(rows[name].key))
    for path in ("artifacts/report.json", "report", "edits", "edits/p-0", "edits/export"):
        problem = client.get(f"/v1/audits/{job.id}/{path}").json()
        assert (problem["status"], problem["code"]) == (410, "gone"), path
        assert "garbage collection" in problem["detail"]
        assert problem["hint"].startswith("submit the job anew")
    shard = client.get(f"/v1/audits/{job.id}/artifacts/stages/activations/shard-00000.safetensors").json()
    assert (shard["status"], "retention, 7 days" in shard["detail"]) == (410, True)
    assert client.get(f"/v1/audits/{job.id}/artifacts/sae/sae.json").status_code == 200
    for never in ("nothing.txt", "sae/other", "stages/causal/effects.arrow", "job.log", "model/config.json"):
        assert client.get(f"/v1/audits/{job.id}/artifacts/{never}").status_code == 404, never
    world.services.jobs.add_event(job.id, "purged", None, {"decisions": 0})
    assert "a purge of someone's data on 20" in client.get(f"/v1/audits/{job.id}/report").json()["detail"]
    other = world.submit()
    assert client.get(f"/v1/audits/{other.id}/report").status_code == 404, "not made yet"


def test_the_stage_of_a_file_is_known_by_its_name() -> None:
    assert (REPORT_FILES, SAE_FILES) == (write.REPORT_FILES, write.SAE_FILES)
    for stage, files in {**payloads(), "training": {"a": b""}, "sae": {"sae.json": b"", "x": b""}}.items():
        for kind in JobKind:
            for file in files:
                assert stage_of(kind, flat_name(kind, stage, file)) == stage
    assert stage_of(JobKind.AUDIT, "job.log") is None


def test_what_is_attached_has_its_own_name_and_the_newest_counts(world: HttpWorld) -> None:
    job = world.submit()
    for content in (b"one\n", b"one\ntwo\n"):
        store, key = world.services.store("default"), digest_bytes(content)
        with store.open_work("log", key) as work:
            with work.publish("job.log") as path:
                path.write_bytes(content)
            from safer_engine.store import ManifestDraft

            store.commit("log", key, work, ManifestDraft(1, "Log", {}))
        world.services.attachments.attach("default", job.id, Reference("log", key), len(content))
    response = world.client("read").get(f"/v1/audits/{job.id}/artifacts/job.log")
    assert (response.content, response.headers["content-type"]) == (b"one\ntwo\n", "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    ("kind", "stage", "file", "name"),
    [
        (JobKind.AUDIT, "report", "features.parquet", "features.parquet"),
        (JobKind.AUDIT, "edits", "edits.jsonl", "edits.jsonl"),
        (JobKind.AUDIT, "edits", "other.json", "stages/edits/other.json"),
        (JobKind.AUDIT, "sae", "metrics.json", "sae/metrics.json"),
        (JobKind.AUDIT, "training", "x", "stages/training/x"),
        (JobKind.TRAIN_RM, "training", "x", "model/x"),
        (JobKind.TRAIN_RM, "log", "job.log", "job.log"),
        (JobKind.AUDIT, "decisions", "decisions.jsonl", "decisions.jsonl"),
    ],
)
def test_flat_names(kind: JobKind, stage: str, file: str, name: str) -> None:
    assert flat_name(kind, stage, file) == name


def test_a_file_is_sent_whole_with_its_digest_as_etag(world: HttpWorld, job: JobRecord) -> None:
    response = world.client("read").get(f"/v1/audits/{job.id}/artifacts/sae/sae.safetensors")
    assert response.content == WEIGHTS
    assert response.headers["etag"] == f'"{digest_bytes(WEIGHTS)}"'
    assert response.headers["content-disposition"].startswith('attachment; filename="sae.safetensors"')
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_what_a_client_has_is_not_sent_again(world: HttpWorld, job: JobRecord) -> None:
    client, path = world.client("read"), f"/v1/audits/{job.id}/artifacts/report.md"
    etag = client.get(path).headers["etag"]
    for header in (etag, f'"x", {etag}', f"W/{etag}"):
        response = client.get(path, headers={"If-None-Match": header})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("header", "start", "stop"), [("bytes=0-0", 0, 1), ("bytes=100-199", 100, 200), ("bytes=16000-", 16000, 16384),
                                  ("bytes=-10", 16374, 16384), ("bytes=5-99999999", 5, 16384), ("bytes=-99999999", 0, 16384)],
)  # fmt: skip
def test_one_range(world: HttpWorld, job: JobRecord, header: str, start: int, stop: int) -> None:
    response = world.client("read").get(f"/v1/audits/{job.id}/artifacts/sae/sae.safetensors", headers={"Range": header})
    assert response.status_code == 206
    assert response.content == WEIGHTS[start:stop]
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(WEIGHTS)}"
    assert response.headers["content-length"] == str(stop - start)


def test_a_range_behind_the_end_and_ranges_that_are_not_served(world: HttpWorld, job: JobRecord) -> None:
    client, path = world.client("read"), f"/v1/audits/{job.id}/artifacts/sae/sae.safetensors"
    behind = client.get(path, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{len(WEIGHTS)}")
    assert client.get(path, headers={"Range": "bytes=-0"}).status_code == 416
    for header in ("bytes=0-1,4-5", "bytes=9-3", "lines=0-1", "bytes=a-b", "bytes=-"):
        response = client.get(path, headers={"Range": header})
        assert (response.status_code, len(response.content)) == (200, len(WEIGHTS))
    etag = f'"{digest_bytes(WEIGHTS)}"'
    assert client.get(path, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert client.get(path, headers={"Range": "bytes=0-1", "If-Range": '"old"'}).status_code == 200


def test_ranges_of_any_size_of_file() -> None:
    assert parse_range("bytes=0-", 1) == ByteRange(0, 1)
    assert parse_range(None, 5) is None
    for header in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        with pytest.raises(RangeNotSatisfiable):
            parse_range(header, 0)


def test_head_tells_the_size_and_sends_nothing(world: HttpWorld, job: JobRecord) -> None:
    response = world.client("read").head(f"/v1/audits/{job.id}/artifacts/sae/sae.safetensors")
    assert (response.status_code, response.headers["content-length"], response.content) == (200, str(len(WEIGHTS)), b"")


@pytest.mark.parametrize(
    "name",
    ["nothing", "../report.html", "sae/%2e%2e/report.html", "..%2f..%2fservice.db", "%2e%2e/x", "stages/sae/../../x", "sae", ""],
)
def test_only_names_that_are_listed_lead_anywhere(world: HttpWorld, job: JobRecord, name: str) -> None:
    assert world.client("read").get(f"/v1/audits/{job.id}/artifacts/{name}").status_code == 404


def test_a_file_that_retention_removed_is_not_listed(world: HttpWorld) -> None:
    job = world.finished()
    stage = next(stage for stage in world.services.jobs.stages(job.id) if stage.name == "activations")
    world.services.store("default").delete("activations", str(stage.key))
    client = world.client("read")
    assert client.get(f"/v1/audits/{job.id}/artifacts/stages/activations/shard-00000.safetensors").status_code == 410
    assert client.get(f"/v1/audits/{job.id}/artifacts/report.md").status_code == 200


def test_a_redirect_is_made_only_where_there_is_an_object_store(world: HttpWorld, job: JobRecord) -> None:
    response = world.client("read").get(f"/v1/audits/{job.id}/artifacts/report.md?redirect=1")
    assert (response.status_code, response.content) == (200, b"# R\n")


def source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_report_may_run_its_own_script_and_nothing_else(world: HttpWorld, job: JobRecord) -> None:
    response = world.client("read").get(f"/v1/audits/{job.id}/report")
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert response.text == REPORT
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"]) == (source(SCRIPT), source(STYLE))
    assert "allow-same-origin" not in policy["sandbox"]
    assert "connect-src" not in policy
    assert policy["frame-ancestors"] == "'self'"


@pytest.mark.parametrize(
    "page", [REPORT.replace("report<", "<script>evil()</script><"), "<script>a</script><script>a</script>", "no script at all"]
)
def test_a_page_with_another_number_of_scripts_may_run_none(page: str) -> None:
    assert "script-src 'none'" in report_policy(page)


def test_the_engines_own_report_keeps_its_script_and_style() -> None:
    from safer_engine.report.html import asset

    page = f"<style>{asset('report.css')}</style><p>x</p><script>{asset('report.js')}</script>"
    assert source(asset("report.js")) in report_policy(page)
    assert source(asset("report.css")) in report_policy(page)


def test_a_job_without_a_report_says_so(world: HttpWorld) -> None:
    response = world.client("read").get(f"/v1/audits/{world.submit().id}/report")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
