"""deploy/ci/github: its steps run by bash as a runner would, the real command line, good, bad and hostile inputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.embedded import free_port
from tests.deploy import github_runner as github
from tests.helpers import gate_reports as made
from tests.helpers.live_service import LiveService, live_service

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/ci/github"
ACTION = github.load(FOLDER / "action.yml")
EXAMPLES = {path.stem: github.load(path) for path in sorted((FOLDER / "examples").glob("*.yml"))}
INSTALL, GATE, UPLOAD = ACTION["runs"]["steps"]
SHELL_STEPS = {
    f"{name}: {step.get('name')}": step["run"]
    for name, steps in {
        "action": ACTION["runs"]["steps"],
        **{name: step for name, document in EXAMPLES.items() for step in [job["steps"] for job in document["jobs"].values()]},
    }.items()
    for step in steps
    if "run" in step
}
KNOWN = {"actions/checkout@v6.0.2", "actions/setup-python@v6.2.0", "actions/upload-artifact@v7.0.0"}
OURS = "your-org/safer-audit/deploy/ci/github@v0.1.0"
ROWS = made.pairs(0.9, 300)
WORSE = made.pairs(0.7, 300)
TOKEN = "a-key-that-nobody-should-read"
SIGN = "somebody-was-here"
HOSTILE = f"""x"; touch {SIGN}; '$(touch {SIGN})' `touch {SIGN}` && touch {SIGN}
$(touch {SIGN})
verdict=pass
verdict<<EOF
pass
EOF
::set-output name=verdict::pass"""


@pytest.fixture
def runner(tmp_path: Path) -> github.Runner:
    """A runner whose workspace holds a good, a worse, an unmeasured and a broken audit."""
    at = github.Runner(tmp_path, FOLDER)
    made.write(at.workspace / "good", made.report(ROWS), ROWS)
    made.write(at.workspace / "worse", made.report(WORSE), WORSE)
    made.write(at.workspace / "unmeasured", made.report(None))
    made.write(at.workspace / "broken", {"schema_version": 1})
    return at


def gate(runner: github.Runner, environment: dict[str, str] | None = None, **inputs: str) -> github.Done:
    """Run the step "Gate" with these inputs beside the defaults."""
    known = ACTION["inputs"]
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    assert set(given) <= set(known)
    values = {f"inputs.{name}": given.get(name, str(each.get("default", ""))) for name, each in known.items()}
    if "install" not in given:
        values["inputs.install"] = "none"
    return runner.run(GATE, values, **environment or {})


def verdict(done: github.Done) -> tuple[int, str, str]:
    """Exit code of the step, verdict, exit code of the gate."""
    return done.code, done.outputs["verdict"], done.outputs["exit-code"]


@pytest.mark.parametrize(
    ("inputs", "ended", "level"),
    [
        ({"report": "good"}, (0, "pass", "0"), "notice"),
        ({"report": "good/report.json", "baseline": "worse", "policy": "default"}, (0, "pass", "0"), "notice"),
        ({"report": "worse", "baseline": "good"}, (1, "fail", "1"), "error"),
        ({"report": "worse", "baseline": "good", "inconclusive": "warn"}, (1, "fail", "1"), "error"),
        ({"report": "unmeasured"}, (3, "inconclusive", "3"), "error"),
        ({"report": "unmeasured", "inconclusive": "warn"}, (0, "inconclusive", "3"), "warning"),
    ],
)
def test_a_verdict_becomes_outputs_a_summary_and_an_exit_code(
    runner: github.Runner, inputs: dict[str, str], ended: tuple[int, str, str], level: str
) -> None:
    done = gate(runner, **inputs)
    assert verdict(done) == ended, done.log
    assert [name for name, _ in done.commands] == ["stop-commands", level]
    assert done.said(level) == [ended[1]]
    files = {name: Path(done.outputs[name]) for name in ("json", "junit", "markdown")}
    assert json.loads(files["json"].read_text())["verdict"] == ended[1]
    assert files["junit"].read_text().startswith("<?xml")
    assert done.summary == files["markdown"].read_text(encoding="utf-8")
    assert done.summary in done.log
    assert all(path.is_relative_to(runner.temporary) for path in files.values())
    assert done.outputs["audit"] == done.outputs["gate"] == ""


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({}, 2),
        ({"report": "broken"}, 2),
        ({"report": "nowhere"}, 2),
        ({"report": "good", "audit": "abc"}, 2),
        ({"report": "good", "policy": "nowhere.yaml"}, 2),
        ({"report": "good", "policy": ""}, 2),
        ({"report": "worse", "baseline": ""}, 2),
        ({"report": "good", "inconclusive": "pass"}, 2),
        ({"report": "good", "wait": "maybe"}, 2),
        ({"report": "good", "args": "plan"}, 2),
        ({"report": "good", "python": "no-python"}, 4),
        ({"report": "good", "install": "some.whl"}, 127),
        ({"args": "--help"}, 4),
        ({"audit": "abc", "url": f"http://127.0.0.1:{free_port()}", "token": TOKEN}, 5),
    ],
)
def test_what_goes_wrong_is_an_error_and_never_a_pass(runner: github.Runner, inputs: dict[str, str], code: int) -> None:
    done = gate(runner, inconclusive=inputs.pop("inconclusive", "warn"), **inputs)
    assert verdict(done) == (code, "error", str(code)), done.log
    assert set(done.outputs) == {"verdict", "exit-code", "audit", "gate"}
    assert "no verdict" in done.summary
    assert len(done.said("error")) == 1


@pytest.mark.parametrize("name", sorted(set(ACTION["inputs"]) - {"artifact", "install", "eval-dataset", "dataset"}))
def test_an_input_is_never_run_nor_forges_an_output(runner: github.Runner, name: str) -> None:
    done = gate(runner, **{"report": "worse", "baseline": "good", name.replace("-", "_"): HOSTILE})
    assert done.code != 0
    assert done.outputs["verdict"] in ("error", "fail")
    assert done.outputs.keys() <= {"verdict", "exit-code", "audit", "gate", "json", "junit", "markdown"}
    assert "::set-output" not in json.dumps(done.outputs)
    assert not done.said("set-output")
    assert not [path for path in runner.folder.rglob("*") if path.name == SIGN]


def test_names_in_a_report_are_no_commands_to_the_runner(runner: github.Runner) -> None:
    forged = "x\n::error::forged\n::set-output name=verdict::pass\n"
    rows = made.pairs(0.9, 300, axis=forged, subset=forged)
    made.write(runner.workspace / "forged", made.report(rows), rows)
    done = gate(runner, report="forged")
    assert not done.said("set-output")
    assert "forged" not in done.said("error")
    assert done.outputs["verdict"] in ("pass", "inconclusive")


def test_modules_of_the_workspace_are_not_imported(runner: github.Runner) -> None:
    for name in ("json", "venv", "pip", "cli", "click", "sitecustomize"):
        (runner.workspace / f"{name}.py").write_text(f"open({SIGN!r}, 'w')\nraise SystemExit(0)\n")
    assert verdict(gate(runner, report="good")) == (0, "pass", "0")
    assert not (runner.workspace / SIGN).exists()


@pytest.mark.parametrize("by_input", [True, False])
def test_the_token_is_masked_first_and_told_to_nobody(runner: github.Runner, by_input: bool) -> None:
    token = f"{TOKEN}%0A::warning::x"
    given: dict[str, Any] = {"token": token} if by_input else {"environment": {"SAFER_AUDIT_TOKEN": token}}
    done = gate(runner, audit="abc", url=f"http://127.0.0.1:{free_port()}", **given)
    first, _, rest = done.log.partition("\n")
    assert first == f"::add-mask::{token.replace('%', '%25')}"
    assert TOKEN not in rest + done.summary + json.dumps(done.outputs)
    refused = gate(runner, report="good", token=f"{TOKEN}\nsecond line")
    assert verdict(refused) == (2, "error", "2")
    assert TOKEN not in refused.log
    assert "second" not in refused.log


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    with live_service() as running:
        yield running


def test_audits_of_a_service(runner: github.Runner, service: LiveService) -> None:
    report = {"report.json": json.dumps(made.report(ROWS)).encode(), "evaluation.jsonl": made.lines(ROWS)}
    good = service.world.finish(service.world.submit(labels={"alias": "production"}), {"report": report}).id
    reach = {"url": service.url, "token": service.key("admin")}
    done = gate(runner, audit=good, **reach)
    assert (verdict(done), done.outputs["audit"]) == ((0, "pass", "0"), good)
    assert verdict(gate(runner, report="worse", baseline="label:production", **reach)) == (1, "fail", "1")
    data = {"model": "org/rm", "dataset": "org/pairs", "eval_dataset": "org/eval"}
    left = gate(runner, wait="false", labels="team=red\r\n\nwhere=a b; $(c)\n", args="--set=sae.k=16", **data, **reach)
    assert verdict(left) == (3, "inconclusive", "3")
    job = service.world.services.jobs.job(left.outputs["audit"])
    assert job.labels == {"team": "red", "where": "a b; $(c)"}
    assert "json" not in left.outputs
    posted = left.outputs["gate"]
    assert service.world.services.gates.record(posted).job_id == job.id
    pending = gate(runner, gate=posted, wait="false", inconclusive="warn", **reach)
    assert verdict(pending) == (0, "inconclusive", "3")
    assert pending.outputs["gate"] == posted
    assert verdict(gate(runner, gate=posted, policy="strict", **reach)) == (2, "error", "2")


def test_inputs_reach_scripts_as_variables_only() -> None:
    for script in SHELL_STEPS.values():
        assert not github.expressions(script)
    for step in (INSTALL, GATE):
        assert all(github.expressions(text) == [text[4:-3]] for text in step["env"].values())
    asked = {text for step in (INSTALL, GATE) for text in step["env"].values()} | {UPLOAD["with"]["name"]}
    assert asked == {f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]}
    for name, output in ACTION["outputs"].items():
        assert output["value"] == f"${{{{ steps.gate.outputs.{name} }}}}"
        assert name in (FOLDER / "gate.sh").read_text()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_use_what_exists(name: str) -> None:
    (job,) = EXAMPLES[name]["jobs"].values()
    assert EXAMPLES[name]["permissions"]["contents"] == "read"
    assert set(EXAMPLES[name]["permissions"].values()) <= {"read", "write"}
    assert job["timeout-minutes"] <= 360
    used = {step["uses"]: step.get("with", {}) for step in job["steps"] if "uses" in step}
    assert set(used) <= KNOWN | {OURS}
    assert UPLOAD["uses"] in KNOWN
    assert set(used[OURS]) <= set(ACTION["inputs"])
    assert used["actions/checkout@v6.0.2"]["persist-credentials"] is False
    identified = {step.get("id") for step in job["steps"]}
    for expression in github.expressions((FOLDER / f"examples/{name}.yml").read_text()):
        if expression.startswith("steps."):
            _, step, kind, *output = expression.split(".")
            assert (step, kind) in {(each, "outputs") for each in identified}
            assert step != "gate" or output[0] in ACTION["outputs"]


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-actions", [FOLDER / "action.yml"]),
        ("vendor.github-workflows", sorted((FOLDER / "examples").glob("*.yml"))),
    ],
)
def test_github_would_read_them(schema: str, paths: list[Path]) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([tool, "--builtin-schema", schema, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(SHELL_STEPS))
def test_shell_steps_are_sound(name: str) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([tool, "--shell=bash", "-"], input=SHELL_STEPS[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def steps_of(name: str) -> dict[str, Any]:
    (job,) = EXAMPLES[name]["jobs"].values()
    return {step["name"]: step for step in job["steps"] if "run" in step}


def test_a_pull_request_is_looked_at_for_a_change_of_the_model(runner: github.Runner) -> None:
    (step,) = steps_of("pre-merge").values()
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")

    def git(*arguments: str) -> None:
        subprocess.run(["git", *who, *arguments], cwd=runner.workspace, check=True, capture_output=True)

    (runner.workspace / "reward-model").mkdir()
    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert runner.run(step, {}).code != 0  # no merge to look at
    for path, changed in (("readme", "false"), ("reward-model/audit.yaml", "true")):
        git("checkout", "-q", "-b", f"to-{changed}", "main")
        (runner.workspace / path).write_text("new")
        git("add", path)
        git("commit", "-q", "-m", path)
        git("checkout", "-q", "--detach", "main")
        git("merge", "-q", "--no-ff", "-m", "merge", f"to-{changed}")
        assert runner.run(step, {}).outputs == {"changed": changed}


_GH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
for word; do case $word in */issue.md) cat "$word" >> "$CALLS" ;; esac; done
if [ "$1 $2" = "issue list" ]; then printf '%s' "$OPEN"; fi
"""


@pytest.mark.parametrize(
    ("opened", "calls"),
    [("", ["issue list", "label create", "issue create"]), ("7", ["issue list", "issue comment 7"])],
)
def test_a_night_that_did_not_pass_is_an_issue(runner: github.Runner, opened: str, calls: list[str]) -> None:
    (step,) = steps_of("nightly").values()
    (runner.folder / "gh").write_text(_GH)
    (runner.folder / "gh").chmod(0o755)
    runner.environment = {
        "PATH": f"{runner.folder}:{os.environ['PATH']}", "CALLS": str(runner.folder / "calls"), "OPEN": opened,
    }  # fmt: skip
    summary = runner.folder / "gate.md"
    summary.write_text("| the table |\n")
    values = {
        "github.token": TOKEN,
        "github.repository": "o/r",
        "github.server_url": "https://example.org",
        "github.run_id": "1",
        "steps.gate.outputs.verdict": "fail",
        "steps.gate.outputs.markdown": str(summary),
    }
    done = runner.run(step, values)
    assert done.code == 0, done.log
    told = (runner.folder / "calls").read_text()
    assert [line for line in told.splitlines() if line.startswith(("issue", "label"))] == [
        next(line for line in told.splitlines() if line.startswith(call)) for call in calls
    ]
    assert "ended with **fail**: https://example.org/o/r/actions/runs/1\n\n| the table |" in told
    nothing = {**values, "steps.gate.outputs.verdict": "", "steps.gate.outputs.markdown": ""}
    assert runner.run(step, nothing).code == 0
    assert "ended with **error**" in (runner.folder / "calls").read_text()
    assert TOKEN not in (runner.folder / "calls").read_text()


@pytest.mark.full
def test_the_version_beside_the_action_is_installed_without_torch_and_gates(runner: github.Runner, tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    for name in ("cli", "safer_engine", "service", "workers", "deploy/ci"):
        shutil.copytree(ROOT / name, fetched / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, fetched / name)
    runner.action = fetched / "deploy/ci/github"
    (runner.workspace / "pip.py").write_text("raise SystemExit('not this one')")
    python = Path(sys.executable).resolve()
    done = runner.run(INSTALL, {"inputs.install": "", "inputs.python": str(python)})
    if done.code and "No matching distribution" in done.log and os.environ.get("SAFER_REQUIRE_ALL") != "1":
        pytest.skip("no package index answers")
    assert done.code == 0, done.log
    installed = runner.temporary / "safer-audit"
    assert list(installed.glob("lib/*/site-packages/click"))
    assert not list(installed.glob("lib/*/site-packages/torch"))
    ended = gate(runner, report="worse", baseline="good", install="", python=str(python))
    assert verdict(ended) == (1, "fail", "1"), ended.log
    refused = runner.run(INSTALL, {"inputs.install": f"$(touch {SIGN})", "inputs.python": str(python)})
    assert refused.code != 0
    assert not (runner.workspace / SIGN).exists()
