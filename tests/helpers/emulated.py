"""The CUDA back-end on the CPU: its kernels compiled for the emulator in tests/emulator.

`backend()` has the operators of `fastsn.ops` and takes CPU tensors. It is compiled at its first
use and again when its sources change; what was compiled stays in build/emulated.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
INCLUDE = TESTS / "emulator" / "include"
BUILDS = ROOT / "build" / "emulated"

# The kernels and the operators of spectral normalization.
OPERATORS = [
    TESTS / "emulator" / "kernels.cpp",
    ROOT / "csrc" / "cuda" / "plan.cpp",
    ROOT / "csrc" / "cuda" / "power.cpp",
    ROOT / "csrc" / "cuda" / "scale.cpp",
    ROOT / "csrc" / "cuda" / "weights.cpp",
    ROOT / "csrc" / "estimates.cpp",
]
SOURCES = [
    *OPERATORS,
    TESTS / "emulator" / "module.cpp",
    TESTS / "emulator" / "checks.cpp",
    TESTS / "emulator" / "controls.cpp",
    ROOT / "csrc" / "cuda" / "means.cpp",
    ROOT / "csrc" / "cuda" / "patches.cpp",
]

# The sanitizers' calls end in the emulator, which makes them errors of the launch.
COMPILE_FLAGS = [
    "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fvisibility=hidden",
    "-fno-strict-aliasing", "-fsanitize=alignment,bounds",
]  # fmt: skip


def compiler() -> str:
    """The C++ compiler, which must be GCC: as in setup.py, but without clang++."""
    return os.environ.get("CXX") or "g++"


@contextmanager
def built_alone() -> Iterator[None]:
    """What is built is built by one process at a time, the others find it."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Library:
    """Operators on CPU tensors, and how they are compiled: whatever of `inputs` changes, again."""

    name: str
    sources: list[Path]
    flags: list[str]
    inputs: tuple[Path, ...] = ()
    link_flags: tuple[str, ...] = ()

    def load(self) -> ctypes.CDLL:
        """The library, up to date and loaded."""
        folder = (
            BUILDS / f"{self.name}-python-{platform.python_version()}-torch-{torch.__version__}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        path, manifest = folder / f"{self.name}.so", folder / "digests.json"
        # Until the library is loaded, no other process may replace it.
        with built_alone():
            wanted = self._digests()
            known = json.loads(manifest.read_text()) if manifest.exists() and path.exists() else {}
            if wanted != known:
                changed = [Path(name) for name, own in wanted.items() if own != known.get(name)]
                built = path.stat().st_mtime if path.exists() else 0
                # ninja would take what changed, but has an old time, as unchanged.
                if any(file.is_file() and file.stat().st_mtime <= built for file in changed):
                    shutil.rmtree(folder)
                    folder.mkdir()
                manifest.unlink(missing_ok=True)
                self._compile(folder)
                manifest.write_text(json.dumps(wanted, indent=1))
            torch.ops.load_library(path)
            return ctypes.CDLL(str(path))

    def _digests(self) -> dict[str, str]:
        """A digest of everything that the library depends on, by path or name."""
        inputs = [*self.sources, ROOT / "csrc", ROOT / "csrc" / "cuda", INCLUDE, *self.inputs]
        files = {f for path in inputs for f in ([path] if path.is_file() else path.glob("*.*"))}
        digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        command = " ".join([compiler(), *self.flags, *self.link_flags])
        return {**dict(sorted(digests.items())), "command": command}

    def _compile(self, folder: Path) -> None:
        from torch.utils import cpp_extension

        # A process that was killed leaves torch's own lock behind, and all others would wait for
        # it.
        (folder / "lock").unlink(missing_ok=True)
        # ninja may be installed beside this Python, which need not be on PATH.
        before = {name: os.environ.get(name) for name in ("PATH", "CXX")}
        os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
        os.environ["CXX"] = compiler()
        try:
            with warnings.catch_warnings():
                # What torch's builder says about compilers concerns none of the tests.
                warnings.simplefilter("ignore")
                cpp_extension.load(
                    self.name,
                    [str(source) for source in self.sources],
                    extra_cflags=self.flags,
                    extra_ldflags=list(self.link_flags),
                    extra_include_paths=[str(INCLUDE)],
                    build_directory=str(folder),
                    is_python_module=False,
                )
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the emulated back-end, up to date and loaded."""
    result = Library("fastsn_emulated", SOURCES, COMPILE_FLAGS).load()
    result.emulator_launch_count.restype = ctypes.c_size_t
    return result


def backend():
    """The emulated operators, for CPU tensors."""
    library()
    return torch.ops.fastsn_emulated


@contextmanager
def order(text: str) -> Iterator[None]:
    """Runs blocks and threads in an order: `forward`, `reversed`, `random` or `random:SEED`.

    Two of them with a comma between are one for the blocks and one for the threads.
    """
    if library().emulator_set_order(text.encode()):
        raise ValueError(f"not an order: {text!r}")
    try:
        yield
    finally:
        library().emulator_set_order(b"forward")


def fail_next_launch(error: int) -> None:
    """The next launch returns this cudaError_t and does nothing."""
    library().emulator_fail_next_launch(error)


def launch_count() -> int:
    """How many kernels have been started."""
    return library().emulator_launch_count()
