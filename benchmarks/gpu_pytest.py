"""A plugin of pytest for the tests of a GPU session: ``pytest -p benchmarks.gpu_pytest``.

Takes its share of the tests, leaves out those that are settled, notes each one as it begins and
ends, stops when time is up or the device is lost, and ends the process when a test hangs.
``FASTSN_GPU_PROGRESS`` names where it notes them; without it the plugin does nothing.
"""

from __future__ import annotations

import faulthandler
import os
import sys

import pytest

from benchmarks.gpu_progress import FAILED, LEFT, LOST, PASSED, SKIPPED, STARTED, Progress

#: Of one test, after which the process ends.
LIMIT = 100.0
#: pytest captures the other one before the first test.
STDERR = os.dup(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", default="1/1", metavar="I/N", help="the I-th of N shares of the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    progress = Progress.of_environment()
    if progress is not None:
        own, shares = map(int, config.getoption("share").split("/"))
        if not 1 <= own <= shares:
            raise pytest.UsageError(f"--share must be I/N with 1 <= I <= N, got {own}/{shares}")
        config.pluginmanager.register(Noting(progress, own, shares), "fastsn-gpu-noting")


class Noting:
    """Notes what becomes of every test."""

    def __init__(self, progress: Progress, own: int, shares: int) -> None:
        self.progress = progress
        self.own = own
        self.shares = shares
        self.settled = 0
        self.outcome = PASSED
        self.seconds = 0.0
        self.stopped = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        mine = items[self.own - 1 :: self.shares]
        settled = self.progress.settled()
        left = [item for item in mine if item.nodeid not in settled]
        self.settled = len(mine) - len(left)
        kept = set(left)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = left

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.seconds = PASSED, 0.0
        self.progress.add(nodeid, STARTED)
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=STDERR)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            self.outcome = FAILED
        elif report.skipped and self.outcome == PASSED:
            self.outcome = SKIPPED

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.progress.add(nodeid, self.outcome, self.seconds)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True, which is to say that the test has been seen to, once time is up."""
        if not self.progress.is_late:
            return None
        self.stop(item.session, LEFT, "time is up")
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.excinfo is not None and not device_is_alive():
            self.stop(item.session, LOST, "the device is lost")

    def stop(self, session: pytest.Session, status: int, why: str) -> None:
        self.stopped = self.stopped or status
        session.shouldstop = why

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.stopped:
            session.exitstatus = self.stopped
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.settled:
            session.exitstatus = pytest.ExitCode.OK


def device_is_alive() -> bool:
    """A kernel that ran astray leaves a GPU unusable to the process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError as error:
        # An error that a test has asked for, such as of a capture, leaves the device in order.
        return "captur" in str(error)
