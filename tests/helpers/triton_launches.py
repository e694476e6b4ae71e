"""What the tests of the Triton kernels share: processes, and what has been launched."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from helpers import emulated


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=emulated.ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def variants():
    """The kernels and constants that the tests of this file have launched so far."""
    from fastsn.triton import operators

    seen = set()

    def record(kernel, count, *args, **constants):
        if count:
            seen.add(name_of(kernel, constants))
        launch(kernel, count, *args, **constants)

    launch = operators._launch
    with mock.patch.object(operators, "_launch", record):
        yield seen


def name_of(kernel, constants) -> str:
    return f"{kernel.__name__} {sorted((name, str(value)) for name, value in constants.items())}"
