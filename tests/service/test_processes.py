"""Children are kept running, stopped in order, and never outlive a parent that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from service.processes import Child, Program, Supervisor, ending
from tests.helpers.servers import wait_until
from tests.helpers.workplace import alive

SLEEP = "import time, signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('here', flush=True); time.sleep(60)"


def program(tmp_path: Path, code: str, name: str = "child", **more: object) -> Program:
    return Program(name, (sys.executable, "-c", code), dict(os.environ), tmp_path / f"{name}.log", **more)  # type: ignore[arg-type]


def test_a_child_runs_in_a_session_of_its_own_and_is_fed_by_standard_input(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read(), os.getsid(0) == os.getpid())"
    child = Child(program(tmp_path, code, feed=b"a secret"))
    child.start()
    wait_until(lambda: child.code is not None, "the child ends")
    assert (child.code, child.said()) == (0, "a secret True")
    assert "secret" not in repr(child.program)


def test_what_ends_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = Supervisor([program(tmp_path, "print('no luck'); raise SystemExit(3)")], told.append)
    child = supervisor.start("child")
    pauses = []
    for _ in range(3):
        wait_until(lambda: child.code is not None, "the child ends")
        assert not child.due(time.monotonic())
        pauses.append(child.pause)
        supervisor.watch()
        starts = child.starts
        child._not_before = 1e-9  # the pause is over
        supervisor.watch()
        assert child.starts == starts + 1
    assert pauses[0] < pauses[1] < pauses[2]
    assert told[0] == "child ended (exit code 3), starting it again in 0.5 s: no luck"


def test_stopping_goes_backwards_and_kills_only_what_does_not_listen(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    end = str(tmp_path / "end")
    noting = f"import sys, time, signal; signal.signal(15, lambda *_: (open({end!r}, 'a').write(NAME), sys.exit(0)))\n"
    noting += "print('here', flush=True); time.sleep(60)"
    programs = [
        program(tmp_path, noting.replace("NAME", "'first '"), "first"),
        program(tmp_path, deaf, "deaf", stop_seconds=0.3),
        program(tmp_path, noting.replace("NAME", "'last '"), "last"),
    ]
    supervisor = Supervisor(programs, lambda _: None)
    children = [supervisor.start(item.name) for item in programs]
    wait_until(lambda: all("here" in child.said() for child in children), "all are there")
    assert supervisor.stop(lambda: False) == ["deaf"]
    assert (tmp_path / "end").read_text() == "last first "
    assert [child.code for child in children] == [0, -signal.SIGKILL, 0]


def test_a_second_request_stops_at_once(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    supervisor = Supervisor([program(tmp_path, deaf, stop_seconds=1000)], lambda _: None)
    child = supervisor.start("child")
    wait_until(lambda: "here" in child.said(), "it is there")
    assert supervisor.stop(lambda: True) == ["child"]


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = textwrap.dedent(
        f"""
        import os, sys, time
        from pathlib import Path
        from service.processes import Child, Program
        child = Child(Program("child", (sys.executable, "-c", {SLEEP!r}), dict(os.environ), Path({str(tmp_path / "log")!r})))
        child.start()
        while "here" not in child.said():
            time.sleep(0.02)
        print(child.process.pid, flush=True)
        time.sleep(60)
        """
    )
    running = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    assert alive(pid)
    running.kill()
    running.wait()
    running.stdout.close()
    wait_until(lambda: not alive(pid), "the child ends")


def test_logs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.processes.LOG_BYTES", 100)
    child = Child(program(tmp_path, SLEEP))
    (tmp_path / "child.log").write_text("x" * 200)
    child.start()
    wait_until(lambda: "here" in child.said(), "it is there")
    child.rotate()
    assert (tmp_path / "child.log.1").read_text().startswith("xxx")
    assert (tmp_path / "child.log").stat().st_size == 0
    assert child.said() == ""
    child.stop()
    assert child.wait(lambda: False)


def test_endings_have_names() -> None:
    assert ending(-9) == "killed by SIGKILL"
    assert ending(2) == "exit code 2"
