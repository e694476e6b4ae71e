"""The Makefile: which commands it runs, in which order, and which ones it does not run twice.

A recorder stands in for Python, so that nothing is installed or compiled here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

ROOT = Path(__file__).parents[2]
TARGETS = [
    "help", "demo", "test", "test-torch", "lint", "format", "bench", "bench-msn", "bench-quick",
    "study-msn", "gpu", "build", "clean",
]  # fmt: skip

# Writes its arguments down. `-m venv DIR` leaves a copy of it there, `-m pip freeze` a torch.
RECORDER = """\
#!/bin/sh
echo "$*" >> {log}
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip freeze") echo "torch==0.0" ;;
esac
"""


class Checkout:
    """A small copy of what the Makefile looks at, and the recorder beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.log = folder / "log"
        self.python = folder / "python"
        (self.folder / "csrc" / "cpu").mkdir(parents=True)
        for name in ("Makefile", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        self.kernel = self.folder / "csrc" / "cpu" / "power.cpp"
        self.kernel.touch()
        self.python.write_text(RECORDER.format(log=self.log))
        self.python.chmod(0o755)

    def make(self, *arguments: str) -> list[str]:
        """The calls of Python that `make` with these arguments leads to."""
        self.log.write_text("")
        run_make(self.folder, f"PYTHON={self.python}", *arguments)
        # Which torch an existing environment has is asked each time.
        return [
            line
            for line in self.log.read_text().splitlines()
            if not line.startswith("-c import sys, importlib")
        ]

    def change(self, path: Path) -> None:
        """Make `path` newer than everything that was built."""
        later = max(p.stat().st_mtime for p in self.folder.rglob("*")) + 2
        os.utime(path, (later, later))


def run_make(folder: Path, *arguments: str) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        # Those of a make that these tests run under.
        if name
        not in (
            "MAKEFLAGS",
            "MFLAGS",
            "MAKELEVEL",
            "MAKEOVERRIDES",
            "VENV",
            "PYTHON",
            "TORCH",
            "WORKERS",
        )
    }
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_help_lists_every_target() -> None:
    listed = [line.split()[1] for line in run_make(ROOT, "help").splitlines()]
    assert listed == TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("venv", [[], ["VENV="]], ids=["venv", "existing"])
def test_targets_parse(checkout: Checkout, target: str, venv: list[str]) -> None:
    assert run_make(checkout.folder, "-n", target, *venv)


def test_fresh_machine(checkout: Checkout) -> None:
    calls = checkout.make("test")
    assert calls[:3] == [
        "-m venv .venv",
        "-m pip install torch==2.13.0",
        "-m pip install setuptools>=77 wheel ninja pybind11",
    ]
    assert calls[-1] == "-m pytest -n 2 --dist worksteal"
    package = next(i for i, call in enumerate(calls) if "-e .[test,companions,demo,dev]" in call)
    assert "--no-build-isolation -c .venv/constraints.txt" in calls[package]
    assert (checkout.folder / ".venv" / "constraints.txt").read_text() == "torch==0.0\n"
    lint = [
        i
        for i, call in enumerate(calls)
        if "ruff" in call or "clang_format" in call or "mypy" in call
    ]
    assert len(lint) == 4
    assert package < min(lint)


def test_torch_can_be_chosen(checkout: Checkout) -> None:
    assert "-m pip install torch>=2.12" in checkout.make("build", "TORCH=torch>=2.12")


def test_tests_with_another_torch_leave_the_environment_alone(checkout: Checkout) -> None:
    checkout.make("build")
    calls = checkout.make("test-torch", "TORCH=torch==0.1")
    assert calls[:2] == ["-m venv build/venv-0.1", "-m pip install torch==0.1"]
    assert calls[-1].startswith(
        "-m pytest -n 2 --dist worksteal tests/integration/test_torch_internals*.py "
    )
    assert checkout.make("test-torch", "TORCH=torch==0.1", "ARGS=tests/test_a.py") == [
        "-m pytest -n 2 --dist worksteal tests/test_a.py"
    ]
    assert (checkout.folder / ".venv" / "constraints.txt").exists()


def test_number_of_processes(checkout: Checkout) -> None:
    assert checkout.make("test", "WORKERS=0")[-1] == "-m pytest -n 0 --dist worksteal"


def test_what_is_run_with_another_torch_exists() -> None:
    command = run_make(ROOT, "-n", "test-torch", "TORCH=torch==0.1").splitlines()[-1]
    patterns = command.split(" --dist worksteal ")[1].split()
    assert patterns and all(any(ROOT.glob(pattern)) for pattern in patterns)


def test_existing_environment_installs_nothing(checkout: Checkout) -> None:
    calls = checkout.make("test", "VENV=")
    assert calls[0] == "setup.py build_ext --inplace --force"
    assert calls[-1] == "-m pytest -n 2 --dist worksteal"
    assert not any("pip" in call or "venv" in call for call in calls)


@pytest.mark.parametrize("venv", [[], ["VENV="]], ids=["venv", "existing"])
def test_nothing_is_built_twice(checkout: Checkout, venv: list[str]) -> None:
    assert checkout.make("build", *venv)
    assert checkout.make("build", *venv) == []


@pytest.mark.parametrize("venv", [[], ["VENV="]], ids=["venv", "existing"])
def test_changed_kernel_is_compiled_alone(checkout: Checkout, venv: list[str]) -> None:
    checkout.make("build", *venv)
    checkout.change(checkout.kernel)
    assert checkout.make("build", *venv) == ["setup.py build_ext --inplace --force"]


def test_changed_requirements_are_installed(checkout: Checkout) -> None:
    checkout.make("build")
    checkout.change(checkout.folder / "pyproject.toml")
    calls = checkout.make("build")
    assert any("-e .[test,companions,demo,dev]" in call for call in calls)
    assert "-m venv .venv" not in calls


def test_other_environment_builds_again(checkout: Checkout) -> None:
    checkout.make("build")
    assert checkout.make("build", "VENV=") == ["setup.py build_ext --inplace --force"]
