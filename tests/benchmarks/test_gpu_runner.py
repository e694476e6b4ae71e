"""The steps of a GPU session: side by side, within a budget, with items, and when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_runner
from benchmarks.gpu_progress import DIED, FAILED, PASSED, STARTED, Progress
from benchmarks.gpu_runner import CUT, FAIL, PASS, Session, Step

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def states(session: Session) -> dict[str, str]:
    return {name: outcome.state for name, outcome in session.outcomes.items()}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# Steps


def test_steps_run_side_by_side_and_none_stops_the_others(tmp_path: Path) -> None:
    session = Session(tmp_path, budget=60)
    assert not session.run(
        Step("hangs", python("import time; time.sleep(60)"), 1.0),
        Step("fails", python("print('broken'); raise SystemExit(3)"), 30),
        Step("passes", python("print('fine')"), 30),
        Step("missing", ["/no/such/program"], 30),
    )
    assert states(session) == {"hangs": FAIL, "fails": FAIL, "passes": PASS, "missing": FAIL}
    details = {name: outcome.detail for name, outcome in session.outcomes.items()}
    assert details["hangs"] == "took too long and was stopped"
    assert (details["fails"], details["passes"]) == ("exit status 3", "fine")
    log = session.log.read_text()
    assert "fails| broken\n" in log and "passes| fine\n" in log
    assert sys.executable not in log and "python -c" in log
    assert sorted(os.listdir(tmp_path)) == ["session.json", "session.log"]


def test_what_a_step_prints_is_on_disk_at_once(tmp_path: Path) -> None:
    session = Session(tmp_path / "out", budget=60)
    go = tmp_path / "go"
    code = (
        f"print('begun'); import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(.01)"
    )
    run = threading.Thread(target=session.run, args=(Step("waits", python(code), 60),))
    run.start()
    wait_for(lambda: session.log.exists() and "begun\n" in session.log.read_text())
    (step,) = json.loads(session.state.read_text())["steps"]
    assert (step["name"], step["state"]) == ("waits", "running")
    go.touch()
    run.join()
    assert states(session) == {"waits": PASS}


def test_much_output_keeps_its_beginning_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "LOG_LIMIT", 1000)
    session = Session(tmp_path, budget=60)
    session.run(Step("talks", python("for i in range(10_000): print(i)"), 60))
    lines = session.log.read_text().splitlines()
    assert {"0", "100", "9999"} <= set(lines) and "5000" not in lines and len(lines) < 600
    assert any("lines, of which the last are" in line for line in lines)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    session = Session(tmp_path, budget=2)
    start = time.monotonic()
    sleeps = python("import time; time.sleep(60)")
    session.run(Step("too long for what is left", sleeps, 30, least=1))
    session.run(Step("no time for it", sleeps, 30, least=10))
    assert time.monotonic() - start < 20
    assert set(states(session).values()) == {CUT}
    assert session.ran == ["too long for what is left"]


def test_a_failure_is_tried_again_once_sources_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        Step("good", python("pass"), 30),
        Step("bad", python("exit(1)"), 30),
        Step("always", python("pass"), 30, always=True),
    ]

    def run(sources: str, **options: bool) -> list[str]:
        monkeypatch.setattr(gpu_runner, "digest", lambda *places: sources)
        session = Session(tmp_path, 60, **options)
        for step in steps:
            session.run(step)
        return session.ran

    assert run("1") == ["good", "bad", "always"]
    assert run("1", resumes=True) == ["always"]
    assert run("2", resumes=True) == ["bad", "always"]
    assert run("2") == ["good", "bad", "always"]


def test_the_digest_is_that_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    kernel = tmp_path / "csrc" / "cuda" / "scale.cu"
    kernel.write_text("one")
    before = gpu_runner.digest("csrc", "setup.py")
    (tmp_path / "csrc" / "notes.o").write_text("no source")
    assert gpu_runner.digest("csrc", "setup.py") == before
    kernel.write_text("two")
    assert gpu_runner.digest("csrc", "setup.py") != before


# Items

#: A program with the items a, b and c, of which b does something.
ITEMS = """
import os, sys, time
from benchmarks.gpu_progress import *
progress = Progress.of_environment()
settled = progress.settled()
for item in "abc":
    if item in settled:
        continue
    if progress.is_late:
        sys.exit(LEFT)
    progress.add(item, STARTED)
    if item == "b":
        {b}
    progress.add(item, PASSED, 0.5)
"""


def items_step(b: str, seconds: float = 60) -> Step:
    return Step("items", python(ITEMS.format(b=b)), seconds, least=0.1, has_items=True)


def progress_of(session: Session) -> Progress:
    return Progress(str(session.progress), "items", session.sources)


@pytest.mark.parametrize(
    "b, outcome",
    [
        ("os._exit(3)", DIED),
        ("os.abort()", DIED),
        ("progress.add(item, FAILED); os._exit(LOST)", FAILED),
    ],
    ids=["exits", "aborts", "loses the device"],
)
def test_an_item_that_takes_the_process_with_it_does_not_take_the_others(
    tmp_path: Path, b: str, outcome: str
) -> None:
    session = Session(tmp_path, 120)
    assert not session.run(items_step(b))
    assert progress_of(session).settled() == {"a": PASSED, "b": outcome, "c": PASSED}
    assert session.outcomes["items"].state == FAIL
    assert session.outcomes["items"].detail == f"1 {outcome}, 2 passed: b"
    assert session.log.read_text().count("===== items: python") == 2


def test_an_item_that_hangs_is_told_from_one_that_time_ran_out_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "MARGIN", 0.0)
    session = Session(tmp_path, 120)
    hangs = items_step("time.sleep(60)", seconds=3)
    assert not session.run(hangs)
    assert session.outcomes["items"].state == CUT
    assert progress_of(session).settled() == {"a": PASSED}
    monkeypatch.setattr(gpu_runner, "HANGS", 1.0)
    session = Session(tmp_path, 120, resumes=True)
    session.run(hangs)
    assert session.outcomes["items"].state == CUT  # c is left
    assert progress_of(session).settled() == {"a": PASSED, "b": DIED}
    session = Session(tmp_path, 120, resumes=True)
    session.run(hangs)
    assert session.outcomes["items"].state == FAIL
    assert progress_of(session).settled() == {"a": PASSED, "b": DIED, "c": PASSED}


def test_a_step_is_told_when_its_time_is_up(tmp_path: Path) -> None:
    session = Session(tmp_path, 60)
    # Less than the margin: nothing is begun.
    session.run(items_step("pass", seconds=gpu_runner.MARGIN - 1))
    assert session.outcomes["items"].state == CUT and not progress_of(session).settled()
    assert session.outcomes["items"].detail == "nothing done; more is left"
    session.run(items_step("pass"))
    assert session.outcomes["items"].state == PASS
    assert session.outcomes["items"].detail == "3 passed"


def test_a_program_that_fails_before_its_first_item_has_failed(tmp_path: Path) -> None:
    session = Session(tmp_path, 60)
    session.run(Step("items", python("raise SystemExit('no such option')"), 60, has_items=True))
    assert session.outcomes["items"].state == FAIL
    assert "exit status 1" in session.outcomes["items"].detail
    session.run(Step("none", python("pass"), 60, has_items=True))
    assert session.outcomes["none"].state == FAIL


def test_progress_survives_a_torn_line_and_knows_what_counts(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    old = Progress(str(path), "tests", "old")
    for item, outcome in (("a[x, y]", PASSED), ("b", FAILED), ("c", DIED), ("d", STARTED)):
        old.add(item, outcome)
    Progress(str(path), "others", "old").add("e", PASSED)
    new = Progress(str(path), "tests", "new")
    assert old.settled() == {"a[x, y]": PASSED, "b": FAILED, "c": DIED}
    assert new.settled() == {"a[x, y]": PASSED}
    assert [line.item for line in new.begun()] == ["d"]
    assert not new.begun(since=time.time() + 10)
    with path.open("a") as file:
        file.write('tests,"b')
    assert new.settled() == {"a[x, y]": PASSED}
    assert not Progress(str(tmp_path / "none.csv"), "tests").settled()


# Killed

SCRIPT = """
import signal, sys
from pathlib import Path
from benchmarks.gpu_runner import Session, Step
signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(1))
out, items = Path(sys.argv[1]), sys.argv[3]
session = Session(out, 120, resumes=sys.argv[2] == "resumes")
def python(code):
    return [sys.executable, "-c", code]
note = "open(r'{}/ran', 'a').write('{} '); "
session.run(Step("first", python(note.format(out, "first")), 60))
session.run(Step("items", python(items), 60, least=0.1, has_items=True))
session.run(Step("last", python(note.format(out, "last")), 60))
print(session.ran)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_a_killed_session_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    """With what was not done, whatever ended it."""
    waits = f"os.path.exists({str(tmp_path / 'go')!r}) or time.sleep(100)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(resumes: str) -> list[str]:
        return [*python(SCRIPT), str(tmp_path), resumes, ITEMS.format(b=waits)]

    first = subprocess.Popen(command("anew"), cwd=ROOT, env=environment)
    progress = Progress(str(tmp_path / "progress.csv"), "items")
    wait_for(lambda: [line.item for line in progress.begun()] == ["b"])
    first.send_signal(how)
    first.wait(30)
    if how == signal.SIGTERM:
        steps = json.loads((tmp_path / "session.json").read_text())["steps"]
        assert {s["name"]: s["state"] for s in steps} == {"first": PASS, "items": CUT}
    (tmp_path / "go").touch()
    again = subprocess.run(
        command("resumes"), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.stdout.splitlines()[-1] == "['items', 'last']", again.stdout + again.stderr
    assert (tmp_path / "ran").read_text() == "first last "
    lines = [(line.item, line.outcome) for line in progress.lines()]
    assert lines.count(("a", STARTED)) == 1 and lines.count(("b", STARTED)) == 2
    assert set(progress.settled().values()) == {PASSED}
    assert (tmp_path / "session.log").read_text().count("===== first: python") == 1
