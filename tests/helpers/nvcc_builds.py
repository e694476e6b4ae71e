"""The CUDA kernels as nvcc compiles them, and what the assembler reports of each."""

from __future__ import annotations

import fcntl
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"

TYPES = ("f", "d", "13__nv_bfloat16", "6__half")  # as the compiler writes them
BYTES = dict(zip(TYPES, (4, 8, 2, 2), strict=True))


def setup_module_of_project():
    spec = importlib.util.spec_from_file_location("fastsn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = setup_module_of_project()
nvcc = build.find_nvcc()
ARCHITECTURES = build.cuda_architectures(None, nvcc)
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="needs nvcc, under CUDA_HOME or on PATH")


@dataclass(frozen=True)
class Kernel:
    """One that was compiled: its name, its types, how many threads it is for, if it comes for
    several, and how many bytes of items it takes, if many."""

    name: str
    types: tuple[str, ...]
    threads: int
    item_bytes: int

    @classmethod
    def parse(cls, symbol: str) -> Kernel:
        found = re.search(r"\d([a-z_]+)_kernelI(\w+?)(?:Li(\d{3})E)?(?:Li(\d{4,})E)?EEv", symbol)
        assert found, symbol
        # A name that occurs for the second time is a reference to the first.
        types = tuple(re.findall(r"13__nv_bfloat16|6__half|[fd]|S\w*_", found[2]))
        types = tuple(types[0] if t.startswith("S") else t for t in types)
        return cls(found[1], types, int(found[3] or 0), int(found[4] or 0))


def command() -> list[str]:
    """That of the last build, as far as it goes: so that it need not be done again."""
    known = [path.read_text() for path in build.CUDA_OBJECTS.glob("*.ptxas")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSN_WERROR", "1" if any(" -Werror " in x for x in known) else "0")
        return build.nvcc_command(nvcc, ARCHITECTURES)


@contextmanager
def built_alone() -> Iterator[None]:
    """What is built is built by one process at a time, the others find it."""
    build.CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
    with open(build.CUDA_OBJECTS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def objects() -> list[Path]:
    """The object files of the kernels, up to date."""
    with built_alone():
        return [Path(path) for path in build.compile_cuda(command())]


def intermediate_code() -> list[str]:
    """That of every source, for the oldest architecture, up to date."""
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    found = []
    with built_alone():
        for source in sorted(SOURCES.glob("*.cu")):
            result = build.CUDA_OBJECTS / f"{source.stem}.{ARCHITECTURES[0]}.ptx"
            if not result.exists() or result.stat().st_mtime <= newest:
                new = result.with_suffix(".new")
                wanted = ["--ptx", f"-arch=compute_{ARCHITECTURES[0]}"]
                subprocess.run([nvcc, "-std=c++17", "-O3", *wanted, source, "-o", new], check=True)
                new.rename(result)
            found.append(result.read_text())
    return found


def output_of(*words: str | Path) -> str:
    if shutil.which(words[0]) is None:
        pytest.skip(f"needs {words[0]}")
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def cuobjdump() -> Path:
    """That of CUDA, or Triton's."""
    places = [Path(nvcc).parent] if nvcc else []
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return place / "cuobjdump"
    pytest.skip("cuobjdump is neither beside nvcc nor in Triton")
