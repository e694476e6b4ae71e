"""The session of `make gpu`: its plan, the program, what it does next; and all of it, rehearsed."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_report, gpu_session, gpu_steps
from benchmarks.gpu_progress import PASSED, STARTED
from benchmarks.gpu_runner import PASS, Session, Step
from benchmarks.gpu_steps import GPU, REHEARSAL, Plan

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# The plan


def names(stages: object) -> list[list[str]]:
    return [[step.name for step in stage] for stage in stages]  # type: ignore[attr-defined]


def test_the_plan_is_in_the_order_of_what_it_is_worth(tmp_path: Path) -> None:
    plan = gpu_steps.plan(GPU, tmp_path, prebuilt=True)
    assert (plan.extension.name, plan.build.name, plan.info.name) == ("prebuilt", "build", "info")
    assert all(step.always for step in (plan.extension, plan.build, plan.info))
    assert gpu_steps.plan(GPU, tmp_path, prebuilt=False).extension.name == "build"
    assert names(plan.stages) == [
        [f"tests, cuda, {i} of 4" for i in range(1, 5)],
        ["timings, spectral norm"],
        ["timings, training"],
        ["timings, kernels"],
        ["counters by ncu"],
        ["timings, launches apart"],
        ["timings, launches overlapped"],
        [f"tests, triton, {i} of 4" for i in range(1, 5)],
        ["timings, back-ends"],
        [f"compute-sanitizer {x}" for x in ("memcheck", "racecheck", "initcheck", "synccheck")],
        ["timings, the rest"],
        ["tests, compiled"],
    ]
    steps = [step for stage in plan.stages for step in stage]
    assert all(step.least <= step.seconds <= 300 for step in steps)
    tests = {f"tests/gpu/{path.name}" for path in ROOT.glob("tests/gpu/test_*.py")}
    assert all(tests <= set(s.command) for s in steps if s.name.startswith("tests"))
    measured = {w.split()[0] for s in steps if "timings" in s.name for w in s.command}
    assert set(gpu.PARTS) - {"copy"} <= measured
    assert sum(s.seconds for s in (plan.stages[0][0], *plan.stages[1])) <= gpu_session.SECONDS
    (overlapped,) = plan.stages[6]
    assert overlapped.environment == {"FASTSN_CUDA_PDL": "1"}
    assert "--report-api-errors no" in " ".join(plan.stages[9][0].command)


def test_every_task_of_the_plan_exists(tmp_path: Path) -> None:
    """Of the networks as they are, too, which no rehearsal runs."""
    from benchmarks.gpu_device import Device
    from benchmarks.gpu_sampling import Recorder

    for target, quick in ((GPU, False), (REHEARSAL, True)):
        tasks = gpu.Benchmarks(Device(), Recorder(tmp_path / "x", {}, Device()), quick).tasks()
        for stage in gpu_steps.plan(target, tmp_path, True).stages:
            for step in stage:
                if "--only" in step.command:
                    for name in step.command[step.command.index("--only") + 1 :]:
                        assert gpu.wanted([name], list(tasks)), name


def test_the_rehearsal_walks_the_same_way(tmp_path: Path) -> None:
    def common(stages: object) -> list[str]:
        words = {"cuda": "own", "cpp": "own", "triton": "other", "reference": "other"}
        first = [stage[0].name.split(" of ")[0] for stage in stages]  # type: ignore[attr-defined]
        return [" ".join(words.get(w.strip(","), w) for w in name.split()) for name in first]

    plans = [gpu_steps.plan(target, tmp_path, True) for target in (GPU, REHEARSAL)]
    assert common(plans[0].stages) == common(plans[1].stages)
    for real, rehearsed in zip(*(plan.stages for plan in plans), strict=True):
        assert real[0].has_items == rehearsed[0].has_items


SUMMARY = "all calls agree with the reference\n========= ERROR SUMMARY: {} errors\n"
RACES = "all calls agree with the reference\n========= RACECHECK SUMMARY: {} hazards displayed\n"


def test_judges() -> None:
    judge = gpu_steps.judge_sanitizer
    assert judge(0, SUMMARY.format(0)) is None and judge(0, RACES.format(0)) is None
    for status, output in [
        (9, SUMMARY.format(2)),
        (0, SUMMARY.format(2)),
        (9, SUMMARY.format(0)),
        (0, RACES.format(10)),
        (0, SUMMARY.format(0).replace("agree", "disagree")),
        (0, "all calls agree with the reference\n"),
        (0, ""),
    ]:
        assert judge(status, output)
    info = "back-end in use: auto\n  cuda       can run\n  triton     cannot run: none\n"
    assert gpu_steps.judge_info(0, info, "cuda") is None
    assert gpu_steps.judge_info(0, info, "triton") == "triton cannot run: none"
    assert gpu_steps.judge_info(1, info, "cuda") == "exit status 1"
    assert gpu_steps.judge_info(0, "", "cuda") == "it says nothing of the back-end cuda"


# The program


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Lets the session have other steps; returns the calls that its steps made so far."""
    calls = tmp_path / "calls"

    def step(name: str, code: str = "pass", **options: object) -> Step:
        note = f"open({str(calls)!r}, 'a').write({name + ' '!r}); "
        return Step(name, python(note + code), 30, **options)  # type: ignore[arg-type]

    def make(**codes: str) -> None:
        first = {
            n: step(n, codes.get(n, "pass"), always=True) for n in ("prebuilt", "build", "info")
        }
        one, two = step("one", codes.get("one", "pass")), step("two")
        plan = Plan(first["prebuilt"], first["build"], first["info"], [[one], [two]])
        monkeypatch.setattr(gpu_session, "plan", lambda *arguments: plan)

    def called(**codes: str) -> list[str]:
        if codes:
            make(**codes)
        found = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return found

    make()
    return called


def session_of(*arguments: object) -> int:
    return gpu_session.main(["--rehearse", *map(str, arguments)])


def test_info_decides(
    planned: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(info="print('cuda cannot run: too old'); exit(1)")
    assert session_of("--out", tmp_path / "out") == 2
    assert planned() == ["prebuilt", "info"]
    assert capsys.readouterr().out.splitlines()[-1] == "no further step: exit status 1"
    assert planned(info="pass") == [] and session_of("--out", tmp_path / "out") == 0
    assert planned() == ["prebuilt", "info", "one", "two"]


def test_what_cannot_be_carried_is_built(planned: Callable[..., list[str]], tmp_path: Path) -> None:
    planned(prebuilt="exit(1)")
    assert session_of("--out", tmp_path / "out", "--prebuilt") == 1
    assert planned() == ["prebuilt", "build", "info", "one", "two"]


def test_the_next_command_does_what_is_left(
    planned: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Session.run

    def out_of_time(self: Session, *steps: Step) -> bool:
        if steps[0].name == "two":
            self.deadline = 0.0
        return run(self, *steps)

    monkeypatch.setattr(Session, "run", out_of_time)
    assert session_of("--out", tmp_path / "out", "--prebuilt") == 3
    assert planned() == ["prebuilt", "info", "one"]
    monkeypatch.setattr(Session, "run", run)
    *_, last = capsys.readouterr().out.splitlines()
    program, _, module, *arguments = shlex.split(last.removeprefix("the next command: "))
    assert (program, module) == ("python", "benchmarks.gpu_session")
    assert {"--prebuilt", "--rehearse"} <= set(arguments) and "--seconds" not in arguments
    # The results may lie elsewhere by then, and not be ours to change.
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    for path in moved.iterdir():
        path.chmod(0o400)
    moved.chmod(0o500)
    arguments[arguments.index("--resume") + 1] = str(moved)
    assert gpu_session.main([*arguments, "--out", str(tmp_path / "new")]) == 0
    assert planned() == ["prebuilt", "info", "two"]
    assert gpu_session.main([*arguments, "--out", str(tmp_path / "new")]) == 0
    assert planned() == ["prebuilt", "info", "two"]  # moved was not changed
    record = json.loads((tmp_path / "new" / "session.json").read_text())
    assert {step["name"]: step["state"] for step in record["steps"]} == dict.fromkeys(
        ("prebuilt", "info", "one", "two"), PASS
    )
    assert record["python"] and record["summary"]
    log = (tmp_path / "new" / "session.log").read_text()
    assert log.count("===== one: python") == log.count("===== two: python") == 1


def test_nothing_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        session_of("--resume", tmp_path)
    assert "no session.json in" in capsys.readouterr().err


def test_a_call_has_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = gpu_session.parse(["--out", str(tmp_path)])
    session = gpu_session.begin(options, time.monotonic() - 40)
    assert session.seconds_left == pytest.approx(300 - 40 - gpu_session.REPORT, abs=5)


def test_without_a_gpu_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_session, "output_of", lambda *arguments: "")
    assert gpu_session.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().out and not (tmp_path / "out").exists()


# All of it


def test_a_rehearsal_does_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--rehearse", "--out", tmp_path]
    done = subprocess.run([*command, "--seconds", "900"], cwd=ROOT, capture_output=True, text=True)
    log = (tmp_path / "session.log").read_text()
    assert done.returncode == 0, done.stdout + log[-5000:]
    assert done.stdout.splitlines()[-1] == "everything passed"
    assert sorted(os.listdir(tmp_path)) == [
        *("measurements.csv", "progress.csv", "session.json", "session.log"),
        *("training.png", "weights.png"),
    ]
    record = json.loads((tmp_path / "session.json").read_text())
    stages = gpu_steps.plan(REHEARSAL, tmp_path, False).stages
    planned = ["prebuilt", "info", *(step.name for stage in stages for step in stage)]
    assert {step["name"]: step["state"] for step in record["steps"]} == dict.fromkeys(planned, PASS)
    alone = [name for name in planned if not name.startswith("compute-sanitizer")]
    places = [log.index(f"===== {name}: ") for name in alone]
    assert places == sorted(places)
    assert "compute-sanitizer racecheck| sanitize: all calls agree" in log
    assert "refused, as it should be: built from other sources" in log
    assert "\ntests/gpu/test_models.py::test_two_forwards" in log
    rows = gpu_report.read(tmp_path / "measurements.csv")
    parts = set(gpu.PARTS) - {"compiled"}
    assert {r["part"] for r in rows} == parts and "failed" not in {r["metric"] for r in rows}
    assert all(r["commit"] and r["torch"] == torch.__version__ for r in rows)
    with (tmp_path / "progress.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert sum(line[2] == STARTED for line in lines) == sum(line[2] == PASSED for line in lines)


def test_the_tests_of_a_gpu_pass_on_the_cpu() -> None:
    """Those that do not depend on the device, so that what fails on a GPU is the GPU's."""
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py"))
    selected = "not compiled and not environment and not Numbers or layouts"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", selected],
        cwd=ROOT,
        env={**os.environ, "FASTSN_TEST_DEVICE": "cpu", "FASTSN_TEST_BACKENDS": "cpp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]
