"""The plugin of pytest that notes the tests of a GPU session."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_progress import FAILED, LEFT, LOST, PASSED, Progress

ROOT = Path(__file__).parents[2]
TESTS = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.parametrize("x", ["a, b"])
def test_last(x): {last}
"""


class Pytest:
    """A folder with a file of tests, and pytest with the plugin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress = Progress(str(folder / "progress.csv"), "tests")

    def run(self, *arguments: str, last: str = "pass", **options: float) -> int:
        (self.folder / "test_it.py").write_text(TESTS.format(last=last))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_pytest", *arguments]
        progress = Progress(**{**vars(self.progress), **options})
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **progress.environment()}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        return subprocess.run(command, cwd=self.folder, env=environment).returncode

    def outcomes(self) -> dict[str, str]:
        settled = self.progress.settled()
        return {name.removeprefix("test_it.py::test_"): x for name, x in settled.items()}


@pytest.fixture
def tests(tmp_path: Path) -> Pytest:
    return Pytest(tmp_path)


ALL = {"passes": PASSED, "fails": FAILED, "skipped": "skipped", "error": FAILED}


def test_every_test_is_noted_and_not_repeated(tests: Pytest) -> None:
    assert tests.run() == 1
    assert tests.outcomes() == {**ALL, "last[a, b]": PASSED}
    before = list(tests.progress.lines())
    assert tests.run() == 0 and list(tests.progress.lines()) == before


def test_shares_have_each_test_once(tests: Pytest) -> None:
    assert tests.run("--share", "2/2") == 1
    assert tests.outcomes() == {"fails": FAILED, "error": FAILED}
    assert tests.run("--share", "1/2") == 0
    assert len(tests.outcomes()) == 5
    assert tests.run("--share", "3/2") == pytest.ExitCode.USAGE_ERROR


def test_shares_are_those_of_what_is_selected(tests: Pytest) -> None:
    assert tests.run("--share", "1/2", "-k", "not passes") == 1
    assert set(tests.outcomes()) == {"fails", "error"}


def test_no_test_begins_when_time_is_up(tests: Pytest) -> None:
    assert tests.run(deadline=time.time() - 1) == LEFT
    assert list(tests.progress.lines()) == []


def test_a_test_that_takes_the_process_with_it_is_known(tests: Pytest) -> None:
    assert tests.run(last="os._exit(9)") == 9
    assert tests.outcomes() == ALL
    assert [line.item for line in tests.progress.begun()] == ["test_it.py::test_last[a, b]"]


def test_a_test_that_hangs_ends_the_process(tests: Pytest) -> None:
    (tests.folder / "conftest.py").write_text(
        "from benchmarks import gpu_pytest\ngpu_pytest.LIMIT = 2.0\n"
    )
    assert tests.run(last="time.sleep(60)") == 1
    assert tests.outcomes() == ALL
    assert [line.item for line in tests.progress.begun()] == ["test_it.py::test_last[a, b]"]


def test_after_a_lost_device_no_test_runs_in_this_process(tests: Pytest) -> None:
    (tests.folder / "conftest.py").write_text(
        "from benchmarks import gpu_pytest\ngpu_pytest.device_is_alive = lambda: False\n"
    )
    assert tests.run() == LOST
    assert tests.outcomes() == {"passes": PASSED, "fails": FAILED}
