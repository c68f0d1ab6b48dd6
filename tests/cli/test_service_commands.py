"""The commands for a service, against a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from cli.live import wait_for
from cli.main import main, run_main
from safer_engine.store import canonical_json, digest_bytes
from service.client import AuditClient
from service.client.connection import Patience
from service.errors import TooManyRequests
from service.jobs.model import JobError, JobRecord
from tests.helpers.http_world import EDITS, REPORT
from tests.helpers.live_service import LiveService, live_service
from tests.helpers.servers import wait_until

ROOT = Path(__file__).parents[2]
Command = Callable[..., dict[str, Any]]
PAIR = b'{"prompt": "a question of some length, so that this is a row", "chosen": "%s", "rejected": "no"}\n'
AUDIT = ("-m", "org/rm", "-d", "org/pairs")


@pytest.fixture
def command(as_admin: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command with --json; its answer. The exit code must be as given."""

    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run_main([*arguments, "--json"]) == code, capsys.readouterr().err
        answer: dict[str, Any] = json.loads(capsys.readouterr().out or "{}")
        return answer

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a dataset on this machine."""
    folder = tmp_path_factory.mktemp("inputs")
    model_folder(folder / "rm")
    (folder / "rm" / "training_args.bin").write_bytes(b"not sent")
    (folder / "rm" / "checkpoint-1").mkdir()
    (folder / "rm" / "checkpoint-1" / "optimizer.pt").write_bytes(b"not sent")
    (folder / "pairs.jsonl").write_bytes(b"".join(PAIR % bytes([97 + index]) for index in range(26)))
    return folder


def model_folder(folder: Path) -> None:
    """What a model folder needs to be sent: settings, a tokenizer, weights that are not a pickle."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    header = b'{"score.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def test_a_job_from_submit_to_retry(command: Command) -> None:
    job = command("submit", *AUDIT, "--label", "team=red", "--priority", "3", "--gpu-hours", "0.5", "--set", "sae.k=16")
    assert (job["state"], job["priority"], job["labels"], job["gpu_seconds_budget"]) == ("queued", 3, {"team": "red"}, 1800.0)
    assert job["spec"]["sae"]["k"] == 16
    assert command("status", job["id"])["id"] == job["id"]
    assert [item["id"] for item in command("list", "--label", "team=red", "--state", "queued")["items"]] == [job["id"]]
    assert command("list", "--label", "team=blue")["items"] == []
    assert command("list", "--label", "team=red", "--stage", "pairs")["items"] == []
    assert command("list", "--label", "team=red", "--before", "2020-01-01")["items"] == []
    assert len(command("list", "--label", "team=red", "--since", "2020-01-01", "--stage", "prepare")["items"]) == 1
    assert command("list", "--stage", "nonsense", code=2) == {}
    assert command("cancel", job["id"])["state"] == "cancelled"
    assert command("cancel", job["id"])["state"] == "cancelled"
    again = command("retry", job["id"])
    assert (again["state"], again["attempt"]) == ("queued", 2)
    command("cancel", job["id"])


def test_a_verification_is_submitted_whole_or_on_an_audit(
    command: Command, as_admin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = command("submit", *AUDIT, "--set", "sae.k=7")
    more = ["--kind", "verify", "--base", "org/base", "-e", "org/held", "--set", "verification.seeds=6"]
    on = command("submit", *more, "--audit", audit["id"], "--set", "retraining.recipe.epochs=2")
    assert (on["kind"], on["spec"]["model"], on["spec"]["sae"]["k"]) == ("verify", audit["spec"]["model"], 7)
    assert (on["spec"]["verification"]["seeds"], on["spec"]["retraining"]["recipe"]["epochs"]) == (6, 2)
    assert (on["spec"]["retraining"]["base"], on["spec"]["retraining"]["folds"]) == ("org/base", 0)
    assert on["spec"]["evaluation"]["source"]["path"] == "org/held"
    whole = command("submit", *AUDIT, *more, "--set", "sae.k=7")
    assert (whole["kind"], whole["spec"]["sae"]) == ("verify", on["spec"]["sae"])
    assert {job["id"] for job in command("list", "--kind", "verify")["items"]} == {on["id"], whole["id"]}
    capsys.readouterr()
    for wrong in (["--kind", "verify", *AUDIT], [*AUDIT, "--audit", audit["id"]], [*more, "--audit", "nothing"]):
        assert run_main(["submit", *wrong]) == 2
        assert capsys.readouterr().err
    for each in (audit, on, whole):
        command("cancel", each["id"])


def test_a_comparison_names_two_finished_audits(command: Command, as_admin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = command("submit", *AUDIT, "--seed", "1"), command("submit", *AUDIT, "--seed", "2")
    asked = ["submit", "--kind", "compare", "--audit", one["id"], "--against", other["id"]]
    capsys.readouterr()
    assert run_main(asked) == 2
    assert "it has no report" in capsys.readouterr().err
    for wrong, words in (
        (["--kind", "compare", "--audit", one["id"]], "two finished audits"),
        ([*asked[1:], "--seed", "3"], "no flags of an audit"),
        ([*AUDIT, "--against", one["id"]], "--against belongs to"),
        ([*asked[1:-1], one["id"]], "are both"),
    ):
        assert run_main(["submit", *wrong]) == 2
        assert words in capsys.readouterr().err
    for each in (one, other):
        command("cancel", each["id"])


def test_training_is_submitted_the_same_way(command: Command, as_admin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (as_admin / "train.yaml").write_text("recipe: {epochs: 3}\nlora: {rank: 4}\n")
    job = command("submit", "--kind", "train-rm", "--base", "org/base", "-d", "org/pairs", "--spec", "train.yaml", "--seed", "7")
    assert (job["kind"], job["spec"]["recipe"]["epochs"], job["spec"]["lora"]["rank"], job["spec"]["seed"]) == (
        "train-rm",
        3,
        4,
        7,
    )
    assert command("list", "--kind", "train-rm")["items"][0]["id"] == job["id"]
    command("cancel", job["id"])
    for wrong in (
        ["-m", "org/rm", "--base", "b", "-d", "o/d"],
        ["-d", "o/d"],
        ["--base", "b", "-d", "o/d", "--set", "recipe.no=1"],
    ):
        assert run_main(["submit", "--kind", "train-rm", *wrong]) == 2
    assert run_main(["submit", *AUDIT, "--base", "b"]) == 2
    assert "--kind train-rm" in capsys.readouterr().err


def test_the_same_idempotency_key_gives_the_same_job(command: Command) -> None:
    first = command("submit", *AUDIT, "--idempotency-key", "k1")
    assert command("submit", *AUDIT, "--idempotency-key", "k1")["id"] == first["id"]
    command("submit", *AUDIT, "--seed", "5", "--idempotency-key", "k1", code=2)
    other = command("submit", *AUDIT)["id"]
    assert other != first["id"]
    for job in (first["id"], other):
        command("cancel", job)


def test_local_inputs_are_uploaded_once(command: Command, service: LiveService, inputs: Path) -> None:
    arguments = ["submit", "-m", str(inputs / "rm"), "-d", str(inputs / "pairs.jsonl"), "-e", str(inputs / "pairs.jsonl")]
    spec = command(*arguments)["spec"]
    data = inputs / "pairs.jsonl"
    listed = [["pairs.jsonl", digest_bytes(data.read_bytes()), data.stat().st_size]]
    assert (
        spec["dataset"]["source"]["path"]
        == spec["evaluation"]["source"]["path"]
        == f"upload:{digest_bytes(canonical_json(listed))}"
    )
    sent = service.world.services.uploads.find("default", spec["model"]["path"].removeprefix("upload:"))
    assert sent is not None
    assert "model.safetensors" in [file.path for file in sent.files]
    assert not [file.path for file in sent.files if file.path.endswith((".bin", ".pt"))]
    assert command(*arguments)["spec"] == spec
    assert command("submit", "-m", spec["model"]["path"], "--set", "dataset.source.kind=local", "--set",
                   f"dataset.source.path={spec['dataset']['source']['path']}")["spec"]["model"] == spec["model"]  # fmt: skip


def test_an_upload_goes_on_where_it_stopped(
    command: Command, service: LiveService, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.client import AuditClient, TransferObserver, read_files

    data = inputs / "other.jsonl"
    data.write_bytes(os.urandom(12 << 20))

    class Stopping(TransferObserver):
        def advance(self, count: int) -> None:
            if count == 1 << 20:
                raise KeyboardInterrupt

    class Counting(TransferObserver):
        sent = 0

        def begin(self, what: str, total: int) -> None:
            self.sent = total

    files = read_files(inputs, [data], TransferObserver())
    with AuditClient(service.url, service.key("submit")) as client:
        with pytest.raises(KeyboardInterrupt):
            client.upload(files, "dataset", Stopping())
        counting = Counting()
        assert client.upload(files, "dataset", counting).name == files.name
        assert 0 < counting.sent < files.size
        assert client.upload(files, "dataset", again := Counting()).name == files.name
        assert again.sent == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "org/rm", "-d", "missing.jsonl"), "does not exist"),
        (("-m", "EMPTY", "-d", "org/pairs"), "config.json"),
        (("-m", "org/rm", "-d", "org/pairs", "--set", "labels.rubric=RUBRIC"), "title: Field required"),
        (("-m", "/srv/rm", "-d", "org/pairs"), "not among the allowed sources"),
        (("-m", "org/rm", "-d", "org/pairs", "--label", "x"), "KEY=VALUE"),
        (("-m", "org/rm", "-d", "org/pairs", "--label", "b@d=x"), "labels"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    as_admin: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    (as_admin / "EMPTY").mkdir()
    (as_admin / "RUBRIC").write_text("name: x\n")
    assert run_main(["submit", *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "hint:" in shown.err or "missing" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("finish", 0, ["[pairs] two rows were dropped", "succeeded", "see: safer-audit report"]),
        ("fail", 2, ["failed: org/rm has no head", "hint: train one"]),
        ("cancel", 4, ["was cancelled", "safer-audit retry"]),
    ],
)
def test_waiting_shows_the_end_and_takes_its_code(  # noqa: PLR0917 - fixtures and cases
    as_admin: Path,
    service: LiveService,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    code: int,
    said: list[str],
) -> None:
    monkeypatch.setattr("cli.live._POLL_SECONDS", 0.05)
    world, jobs = service.world, service.world.services.jobs

    def bring_about() -> None:
        wait_until(lambda: bool(found()), "the job is there")
        job = found()[0]
        if end == "finish":
            jobs.add_event(job.id, "note", "pairs", {"message": "two rows were dropped"})
            world.finish(job)
        elif end == "fail":
            jobs.fail(world.lease(job), JobError("model_refused", "org/rm has no head", "train one"))
        else:
            jobs.request_cancel("default", job.id, "test")

    def found() -> list[JobRecord]:
        return [job for job in jobs.find("default").items if job.labels == {"end": end}]

    thread = threading.Thread(target=bring_about)
    thread.start()
    assert run_main(["submit", *AUDIT, "--wait", "--label", f"end={end}"]) == code
    thread.join()
    shown = capsys.readouterr().err
    assert [line for line in said if line not in shown] == []


def test_a_rate_limit_does_not_end_the_watching(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_POLL_SECONDS", 0.01), ("_LONGEST_PAUSE", 0.3)):
        monkeypatch.setattr(f"cli.live.{name}", seconds)
    with live_service(requests_per_minute=40) as slow:
        job = slow.world.submit()
        ending = threading.Timer(2.0, slow.world.finish, (job,))
        ending.start()
        with AuditClient(slow.url, slow.key("read"), patience=Patience(1, 0.01)) as client:
            with pytest.raises(TooManyRequests, match="too many"):
                for _ in range(60):
                    client.job(job.id)
            assert wait_for(client, job.id, None).state == "succeeded"
        ending.join()


def test_ctrl_c_leaves_the_job_running(as_admin: Path, service: LiveService) -> None:
    running = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-m", "cli.main", "submit", *AUDIT, "--wait"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stderr is not None
    job_id = running.stderr.readline().split()[-1]
    assert "waiting" in running.stderr.readline()
    running.send_signal(2)
    rest = running.communicate()[1]
    assert running.returncode == 130
    assert f"come back with: safer-audit watch {job_id}" in rest
    assert service.world.services.jobs.job(job_id).state == "queued"
    service.world.services.jobs.request_cancel("default", job_id, "test")


def test_a_wrong_label_is_refused_before_anything_is_read(
    command: Command, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("submit", "-m", str(inputs / "rm"), "-d", str(inputs / "pairs.jsonl"), "--label", "a b=c", code=2)
    assert run_main(["submit", "-m", str(inputs / "rm"), "-d", "org/pairs", "--label", "a b=c"]) == 2
    said = capsys.readouterr().err
    assert said.count("labels.a b:") == 1
    assert "reading" not in said


def test_what_is_no_amount_is_refused_before_anything_is_sent(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_AUDIT_URL", "http://127.0.0.1:1")  # to speak to it would be exit code 5
    for wrong in ("nan", "inf", "0", "-1", "soon"):
        assert command("submit", *AUDIT, "--gpu-hours", wrong, code=2) == {}, wrong


def test_a_model_that_is_not_here_is_said_to_be_the_hubs(
    as_admin: Path, service: LiveService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["submit", "-m", "my-modle", "-d", "org/pairs"]) == 0
    shown = capsys.readouterr()
    assert "my-modle: no folder here has this name" in shown.err
    assert run_main(["submit", "-m", "./my-modle", "-d", "org/pairs"]) == 2
    assert "./my-modle does not exist on this machine" in capsys.readouterr().err
    service.world.services.jobs.request_cancel("default", shown.out.strip(), "test")


def test_report_and_files(as_admin: Path, service: LiveService, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    job = service.world.finished()
    assert run_main(["report", job.id]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text() == REPORT
    assert run_main(["report", job.id, "--out", "here/mine.html"]) == 0
    assert (as_admin / "here" / "mine.html").read_text() == REPORT
    assert "edits" in command("report", job.id)
    found = command("download", job.id, "--out", "all")["files"]
    assert {Path(path).relative_to(as_admin / "all").as_posix() for path in found} >= {
        "report.html",
        "edits.jsonl",
        "sae/sae.json",
    }
    assert not (as_admin / "all" / "stages").exists()
    assert len(command("download", job.id, "stages/*", "--out", "all")["files"]) > 0
    assert [item["name"] for item in command("download", job.id, "sae/*", "--list")["items"]] == [
        "sae/sae.json",
        "sae/sae.safetensors",
    ]
    command("download", job.id, "nothing", code=2)
    mine = as_admin / "all" / "edits.jsonl"
    mine.write_text("decided by hand\n")
    command("download", job.id, "--out", "all")
    assert mine.with_name("edits.jsonl.bak").read_text() == "decided by hand\n"
    assert "decided by hand" not in mine.read_text()
    command("download", job.id, "--out", "all")
    assert not mine.with_name("edits.jsonl.bak2").exists()
    command("download", job.id, "--out", str(mine), code=2)
    command("report", service.world.submit().id, code=2)
    gone = service.world.finished()
    key = next(stage.key for stage in service.world.services.jobs.stages(gone.id) if stage.name == "report")
    assert service.world.services.store("default").delete("report", str(key))
    capsys.readouterr()
    assert run_main(["report", gone.id]) == 2
    told = capsys.readouterr().err
    assert "was removed by" in told
    assert "submit the job anew" in told


def test_events_are_shown_and_followed(
    as_admin: Path, service: LiveService, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    job = service.world.submit()
    assert run_main(["logs", job.id]) == 0
    assert "state=queued" in capsys.readouterr().out
    thread = threading.Thread(target=lambda: service.world.finish(job))
    thread.start()
    assert run_main(["logs", job.id, "--follow", "--json"]) == 0
    thread.join()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == sorted({line["id"] for line in lines})
    assert (lines[-1]["kind"], lines[-1]["data"]["state"]) == ("job", "succeeded")
    assert run_main(["watch", job.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "succeeded"


def test_reviewers_decide(as_admin: Path, service: LiveService, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    job = service.world.finished()
    listed = command("edits", job.id, "list")["items"]
    assert [item["pair_id"] for item in listed] == ["p/1", "p-4", "é ✓", '"suspicion": 1']
    assert command("edits", job.id, "decide", "p/1", "keep", "--note", "ironic")["decision"]["note"] == "ironic"
    assert command("edits", job.id, "decide", "é ✓", "drop")["action"] == "flip"
    assert len(command("edits", job.id, "show", "p/1")["history"]) == 1
    assert [item["pair_id"] for item in command("edits", job.id, "list", "--open", "--action", "drop")["items"]] == ["p-4"]
    assert run_main(["edits", job.id]) == 0
    assert "keep by admin of default" in capsys.readouterr().out
    exported = command("edits", job.id, "export", "--out", "decided")
    lines = [json.loads(line) for line in Path(exported["path"]).read_text().splitlines()]
    assert len(lines) == len(EDITS)
    assert {line["pair_id"]: line["action"] for line in lines}["p/1"] == "keep"
    command("edits", job.id, "show", "no such pair", code=2)
    assert command("edits", job.id)["items"] == command("edits", job.id, "list")["items"]
    assert [item["pair_id"] for item in command("edits", job.id, "--open", "--action", "drop")["items"]] == ["p-4"]
    for each in ("p-4", '"suspicion": 1'):
        command("edits", job.id, "decide", each, "keep")
    capsys.readouterr()
    assert run_main(["edits", job.id, "--open"]) == 0
    assert "--action keep" in capsys.readouterr().err


def test_a_key_may_do_what_its_roles_say(
    as_admin: Path, service: LiveService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = service.world.finished()
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", service.key("read"))
    assert run_main(["submit", *AUDIT]) == 2
    assert "needs the role submit" in capsys.readouterr().err
    assert run_main(["status", job.id]) == 0
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", service.key("admin", "other"))
    assert run_main(["status", job.id]) == 2
    assert "there is no job" in capsys.readouterr().err
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", "sk-safer-wrong")
    assert run_main(["status", job.id]) == 2
    assert "not_authenticated" in capsys.readouterr().err


def test_tables_for_people(as_admin: Path, service: LiveService, capsys: pytest.CaptureFixture[str]) -> None:
    job = service.world.finished(labels={"a": "[red]b[/red]"})
    assert run_main(["status", job.id]) == 0
    assert "a=[red]b[/red]" in capsys.readouterr().out
    assert run_main(["list", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert job.id in shown
    assert "1 job" in shown
    assert run_main(["download", job.id, "--list"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_the_base_install_runs_the_client_commands(at_home: Path) -> None:
    model_folder(at_home / "rm")
    (at_home / "pairs.jsonl").write_text("{}\n")
    script = """
import sys
class Base:
    absent = set(
        "torch numpy pandas pyarrow scipy sklearn transformers datasets huggingface_hub safetensors jinja2 peft accelerate "
        "sqlalchemy alembic fastapi starlette uvicorn celery redis boto3 prometheus_client pydantic_settings".split()
    )
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Base())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in Base.absent else real(name, package)
from cli.main import main, run_main
names = "submit status watch list cancel retry logs report download edits up serve worker migrate admin".split()
codes = [run_main([name, "--help"]) for name in names]
codes.append(run_main(["submit", "-m", "rm", "-d", "pairs.jsonl"]))
codes.append(run_main(["up"]))
print("RESULT", codes)
"""
    environment = {**os.environ, "SAFER_AUDIT_URL": "http://127.0.0.1:9", "SAFER_AUDIT_TOKEN": "sk-safer-x"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=at_home, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == f"RESULT {[0] * 15 + [5, 2]}", done.stderr
    assert "install torch, then: pip install 'safer-audit[all]'" in done.stderr


def test_shells_complete_commands_and_options() -> None:
    def complete(words: list[str], begun: str) -> list[str]:
        shell = ShellComplete(main, {}, "safer-audit", "_SAFER_AUDIT_COMPLETE")
        return [item.value for item in shell.get_completions(words, begun)]

    assert complete([], "sub") == ["submit"]
    assert complete(["submit"], "--prio") == ["--priority"]
    assert complete(["list", "--state"], "su") == ["succeeded"]
    assert complete(["admin", "keys"], "") == ["create", "list", "revoke"]
