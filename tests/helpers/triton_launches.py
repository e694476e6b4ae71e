"""What the tests of the Triton kernels share: processes, and what has been launched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def interpreted(path: str, share: str) -> str:
    """Runs a share, such as 1/4, of the tests in `path` that are for the interpreter: no output,
    or that of what failed."""
    command = ["-m", "pytest", "-qp", "no:cacheprovider", "-k", "TestInterpreter", path]
    done = run(*command, TRITON_INTERPRET="1", FASTSN_TEST_SHARE=share)
    return "" if done.returncode == 0 else done.stdout[-3000:]


@contextmanager
def patching_once() -> Iterator[None]:
    """The interpreter takes over Triton's language once a launch, not at each call of a function
    within it, which is half of its time. It leaves what these calls take over as it is then."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version, which does it otherwise
        yield
        return
    patch = interpreter._patch_lang
    within: list[set[int]] = []  # what is taken over now; at most one
    left: set[int] = set()  # and what has been left

    def patch_once(function):
        languages = (interpreter.tl, interpreter.tl.core)
        own = {id(x) for x in function.__globals__.values() if any(x is one for one in languages)}
        if within:
            if not own <= within[0] | left:
                patch(function)
                left.update(own)
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore
        within.append(own)

        def end():
            within.clear()
            restore()

        scope.restore = end
        return scope

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield


@pytest.fixture(scope="module")
def patched_once():
    with patching_once():
        yield


@contextmanager
def recording(runs: bool) -> Iterator[set[str]]:
    from fastsn.triton import operators

    seen = set()

    def record(kernel, count, *args, **constants):
        if count:
            seen.add(name_of(kernel, constants))
        if runs:
            launch(kernel, count, *args, **constants)

    launch = operators._launch
    with mock.patch.object(operators, "_launch", record):
        yield seen


@pytest.fixture
def variants():
    """The kernels and constants that a test has launched so far."""
    with recording(runs=True) as seen:
        yield seen


@pytest.fixture
def variants_only():
    """The same, and they are not run: no number is what it should be."""
    with recording(runs=False) as seen:
        yield seen


def name_of(kernel, constants) -> str:
    return f"{kernel.__name__} {sorted((name, str(value)) for name, value in constants.items())}"
