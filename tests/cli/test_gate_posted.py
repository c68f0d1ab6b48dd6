"""`gate --detach` and `gate --gate`: the service judges, and the command tells its verdict as its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from service.gate_judge import GateJudge
from service.jobs.model import JobError
from tests.helpers import gate_reports as made
from tests.helpers.http_world import SPEC
from tests.helpers.live_service import LiveService

ROWS, WORSE = made.pairs(0.95, 300), made.pairs(0.7, 300)
SUBMITTED = ("-m", "org/rm", "-d", "org/pairs", "-e", "org/eval")
Gate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gate(as_admin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Run `safer-audit gate` with an admin's key: exit code, stdout and stderr."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for module in ("cli.live", "cli.gate_posted"):
        monkeypatch.setattr(f"{module}._POLL_SECONDS", 0.05)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(["gate", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def judges(service: LiveService) -> Iterator[None]:
    """The service judges, as its processes do."""
    services, stop = service.world.services, threading.Event()
    judge = GateJudge(services.gates, services.jobs, services.stores, services.settings)
    thread = threading.Thread(target=judge.run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join()


def finish(service: LiveService, job_id: str, rows: list[made.Pair]) -> None:
    report = {"report.json": json.dumps(made.report(rows)).encode(), "evaluation.jsonl": made.lines(rows)}
    service.world.finish(service.world.services.jobs.job(job_id), {"report": report})


def audited(service: LiveService, rows: list[made.Pair], **given: Any) -> str:
    job = service.world.submit(**given)
    finish(service, job.id, rows)
    return job.id


def test_a_detached_submission_is_judged_by_the_service(gate: Gate, service: LiveService, judges: None, at_home: Path) -> None:
    baseline = audited(service, ROWS, labels={"alias": "posted"})
    (at_home / "mine.yaml").write_text(
        "version: 1\nname: mine\nrules:\n  - {name: right, fact: 'evaluation.groups[axis=*].accuracy', min: 0.8}\n"
    )
    code, out, told = gate(
        *SUBMITTED, "--policy", "mine.yaml", "--baseline", "label:posted", "--label", "team=red", "--detach", "--callback",
        "https://example.org/x",
    )  # fmt: skip
    gate_id, job_id = out.split()
    assert code == 3
    assert f"safer-audit gate --gate {gate_id}" in told
    stored = service.world.services.gates.get("default", gate_id)
    assert (stored.job_id, stored.policy_name, stored.baseline_job_id) == (job_id, "mine", baseline)
    job = service.world.services.jobs.job(job_id)
    assert (job.labels, job.callback_url) == ({"team": "red"}, None)
    assert gate("--gate", gate_id, "--detach")[:2] == (3, "pending\n")
    thread = threading.Thread(target=finish, args=(service, job_id, WORSE))
    thread.start()
    assert gate("--gate", gate_id, "-q")[:2] == (1, "fail\n")
    thread.join()
    assert gate("--gate", gate_id, "-q", "--detach")[0] == 1
    assert run_main(["status", job_id]) == 0


@pytest.mark.parametrize(("rows", "code"), [(ROWS, 0), (WORSE, 1)])
def test_outputs_are_those_of_judging_here(
    gate: Gate, service: LiveService, judges: None, rows: list[made.Pair], code: int, at_home: Path
) -> None:
    job_id, baseline = audited(service, rows), audited(service, ROWS)
    policy = at_home / "waived.yaml"
    policy.write_text(
        "version: 1\nrules:\n  - {name: right, fact: 'evaluation.groups[axis=*].accuracy', min: 0.8}\n"
        "  - {name: drop, fact: 'evaluation.groups[axis=*].accuracy', max_drop: 0.2, on_inconclusive: pass}\n"
        "  - {name: longer, fact: dataset.longer_chosen, max: 0.1}\n"
        "waivers:\n  - {rule: longer, owner: me, reason: 'known', expires: 2999-01-01}\n"
    )
    posted = gate("--audit", job_id, "--policy", str(policy), "--baseline", baseline, "--detach", "-q")[1].split()[0]
    given = (["--audit", job_id, "--policy", str(policy), "--baseline", baseline], ["--gate", posted])
    outputs = []
    for number, arguments in enumerate(given):
        junit, markdown = at_home / f"{number}.xml", at_home / f"{number}.md"
        found, text, _ = gate(*arguments, "--json", "--junit", str(junit), "--markdown", str(markdown))
        assert found == code
        outputs.append((text, junit.read_text(), markdown.read_text(), gate(*arguments)[1]))
    assert outputs[0] == outputs[1]


def test_what_the_service_could_not_judge_ends_as_it_would_here(gate: Gate, service: LiveService, judges: None) -> None:
    services = service.world.services
    failed = gate(*SUBMITTED, "--detach", "-q")[1].split()
    services.jobs.fail(service.world.lease(services.jobs.job(failed[1])), JobError("resource_exhausted", "no memory", ""))
    code, out, told = gate("--gate", failed[0])
    assert (code, out) == (4, "")
    assert "the audit failed (resource_exhausted)" in told
    damaged = service.world.finish(service.world.submit(), {"report": {"report.json": b"{}"}})
    assert gate("--gate", gate("--audit", damaged.id, "--detach", "-q")[1].split()[0])[0] == 2


def test_commands_that_would_be_misread_are_refused(gate: Gate, service: LiveService, at_home: Path) -> None:
    made.write(at_home / "good", made.report(ROWS), ROWS)
    posted = gate(*SUBMITTED, "--detach", "--json")
    gate_id = json.loads(posted[1])["id"]
    jobs = len(service.world.services.jobs.find("default").items)
    for arguments, said in (
        ((*SUBMITTED, "--detach", "--baseline", "good"), "cannot read good"),
        (("--gate", gate_id, "--policy", "strict"), "--policy"),
        (("--gate", gate_id, "--baseline", "label:x"), "--baseline"),
        (("--gate", gate_id, "--label", "a=b"), "--label"),
        (("--gate", gate_id, "--audit", "x"), "more than one audit"),
        (("--gate", "nothing"), "no gate"),
        ((*SUBMITTED, "--detach", "--baseline", "label:absent"), "no finished audit has the label"),
    ):
        code, _, told = gate(*arguments)
        assert (code, said in told) == (2, True), told
    assert len(service.world.services.jobs.find("default").items) == jobs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--report", "audit", "--detach"), "--detach has the service judge"),
        (("--report", "audit", "--label", "a=b"), "for an audit to be made"),
        (("--audit", "x", "--set", "sae.k=3"), "for an audit to be made"),
        (("--audit", "x", "--seed", "0"), "for an audit to be made"),
        (("--gate", "x", "--no-text"), "for an audit to be made"),
        (("--audit", "x", "--callback", "https://ci.example.org"), "--callback is told by the service"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_would_be_left_aside_are_refused(gate: Gate, arguments: tuple[str, ...], said: str) -> None:
    code, _, told = gate(*arguments)
    assert (code, said in told) == (2, True), told


def test_the_client_lists_gates(gate: Gate, service: LiveService) -> None:
    from service.client import AuditClient, GateRequest, Submission

    with AuditClient(service.url, service.key("submit")) as client:
        posted = client.post_gate(GateRequest(Submission(SPEC), policy="strict", idempotency_key="of-the-client"))
        again = client.post_gate(GateRequest(Submission(SPEC), policy="strict", idempotency_key="of-the-client"))
        assert again.id == posted.id
        assert [each.id for each in client.gates(audit=posted.audit, states=["pending"])] == [posted.id]
        assert list(client.gates(audit=posted.audit, verdicts=["pass"])) == []
        assert client.gate(posted.id).policy == "strict"
