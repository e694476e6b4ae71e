"""The memory accesses of the CUDA kernels, recorded in the emulator, and a device's caches.

`backend()` has the operators of spectral normalization, for CPU tensors. What their kernels do is
in `launches()` until `clear()`; `Caches` says what of it a device would fetch from memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from helpers import emulated

SOURCES = emulated.TESTS / "emulator" / "traffic"
RECORDER_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
# Each access calls the recorder. Without `-fno-tree-sra`, GCC would load a pack as four numbers.
COMPILE_FLAGS = [
    "-O2", "-g1", "-Wno-unknown-pragmas", "-fvisibility=hidden", "-fno-strict-aliasing",
    "-fsanitize=thread", "-fno-tree-sra", "-DFASTSN_EMULATOR_RECORDS",
]  # fmt: skip

SECTOR = 32
GLOBAL, SHARED = range(2)
LOAD, LOAD_PAST_FIRST_LEVEL, STORE, ATOMIC = range(4)


class Site(ctypes.Structure):
    """An instruction of a launch as all warps executed it: TrafficSite in trace.h."""

    _fields_ = [
        ("instruction", ctypes.c_size_t), ("size", ctypes.c_uint32), ("space", ctypes.c_uint8),
        ("kind", ctypes.c_uint8), ("accesses", ctypes.c_uint64), ("asked", ctypes.c_uint64),
        ("distinct", ctypes.c_uint64), ("sectors", ctypes.c_uint64), ("needed", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64), ("least_wavefronts", ctypes.c_uint64),
    ]  # fmt: skip

    @property
    def loads(self) -> bool:
        return self.space == GLOBAL and self.kind in (LOAD, LOAD_PAST_FIRST_LEVEL)

    @property
    def stores(self) -> bool:
        return self.space == GLOBAL and self.kind == STORE


class Phase(ctypes.Structure):
    """What a block does between two barriers: TrafficPhase in trace.h."""

    _fields_ = [
        ("block", ctypes.c_uint32), ("wide_loads", ctypes.c_uint32),
        ("narrow_loads", ctypes.c_uint32), ("atomics", ctypes.c_uint32),
        ("wavefronts", ctypes.c_uint64), ("stored", ctypes.c_uint64),
        ("first_level", ctypes.c_uint64), ("second_level", ctypes.c_uint64),
        ("memory", ctypes.c_uint64),
    ]  # fmt: skip


class Totals(ctypes.Structure):
    """What the caches did, in sectors: TrafficTotals in trace.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "loaded", "first_level", "second_level", "memory", "stored", "atomics", "filled",
            "written",
        )
    ]  # fmt: skip

    @property
    def memory_bytes(self) -> int:
        """Both ways."""
        return SECTOR * (self.memory + self.filled + self.written)


@dataclass(frozen=True)
class Launch:
    """A recorded launch. Addresses of instructions count from the start of the library.

    Attributes:
        symbol: the mangled name of the kernel.
    """

    index: int
    library: Path
    symbol: str
    blocks: int
    threads: int
    dynamic_shared: int
    sites: list[Site]

    @property
    def kernel(self) -> str:
        """The short name: of `fastsn::cuda::multiply_kernel<float, 3840>`, `multiply`."""
        name, at = self.symbol, len("_ZN")
        while found := re.match(r"\d+", self.symbol[at:]):
            start = at + found.end()
            at = start + int(found[0])
            name = self.symbol[start:at]
        return name.removesuffix("_kernel")

    @property
    def phases(self) -> ctypes.Array[Phase]:
        """In the order in which blocks ran; where data came from as of the last `Caches.run`."""
        count = recorder().traffic_phase_count(self.index)
        return (Phase * count).from_address(recorder().traffic_phases(self.index) or 0)


@functools.cache
def recorder() -> ctypes.CDLL:
    """The library that is told of every access."""
    library = ctypes.CDLL(str(recorder_path()))
    for name in ("launches", "blocks", "dynamic_shared", "site_count", "phase_count"):
        getattr(library, f"traffic_{name}").restype = ctypes.c_size_t
    for name in ("kernel", "base", "sites", "phases"):
        getattr(library, f"traffic_{name}").restype = ctypes.c_void_p
    library.traffic_library.restype = ctypes.c_char_p
    return library


@functools.cache
def recorder_path() -> Path:
    """The recorder's library, up to date."""
    sources = [SOURCES / name for name in ("recorder.cpp", "caches.cpp")]
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    path = emulated.BUILDS / "libtraffic.so"
    emulated.BUILDS.mkdir(parents=True, exist_ok=True)
    with open(emulated.BUILDS / "recorder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_mtime < newest:
            new = path.with_suffix(".new")
            command = [*emulated.compiler().split(), *RECORDER_FLAGS, *map(str, sources)]
            subprocess.run([*command, "-o", str(new)], check=True)
            new.rename(path)
    return path


@functools.cache
def library() -> Path:
    """The operators with recorded kernels, loaded."""
    recorder()
    own = emulated.Library(
        "fastsn_recorded",
        [*emulated.OPERATORS, SOURCES / "module.cpp"],
        COMPILE_FLAGS,
        tuple(SOURCES.glob("*.h")),
        (str(recorder_path()),),
    )
    return Path(own.load()._name)


def backend():
    """The operators with recorded kernels, for CPU tensors."""
    library()
    return torch.ops.fastsn_recorded


@contextmanager
def device_memory() -> Iterator[None]:
    """New tensors start where they would on a GPU: at multiples of 512 bytes."""
    ops = backend()
    ops.align(True)
    try:
        yield
    finally:
        ops.align(False)


def clear() -> None:
    """Forgets all launches."""
    recorder().traffic_clear()


def launches() -> list[Launch]:
    """All since the last `clear`."""
    own = recorder()
    found = []
    for k in range(own.traffic_launches()):
        path, base = Path(own.traffic_library(k).decode()), own.traffic_base(k)
        recorded = (Site * own.traffic_site_count(k)).from_address(own.traffic_sites(k) or 0)
        sites = [Site.from_buffer_copy(site) for site in recorded]
        for site in sites:
            site.instruction -= base
        found.append(
            Launch(
                index=k,
                library=path,
                symbol=symbols(path)[own.traffic_kernel(k) - base],
                blocks=own.traffic_blocks(k),
                threads=own.traffic_threads(k),
                dynamic_shared=own.traffic_dynamic_shared(k),
                sites=sites,
            )
        )
    return found


@functools.cache
def symbols(library: Path) -> dict[int, str]:
    """The functions of a library by their address."""
    done = subprocess.run(["nm", str(library)], check=True, capture_output=True, text=True)
    words = [line.split() for line in done.stdout.splitlines()]
    return {int(w[0], 16): w[2] for w in words if len(w) == 3 and w[1] in "tTwW"}


def lines(launch: Launch, sites: list[Site]) -> list[str]:
    """Where the instructions are in the sources: `file:line`, the innermost call first."""
    if not sites:
        return []
    command = ["addr2line", "-e", str(launch.library), "-i", "-a"]
    # A return address is behind its call.
    command += [hex(site.instruction - 1) for site in sites]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = [part.split("\n")[1:] for part in done.stdout.strip().split("\n0x")]
    return [" < ".join(Path(line).name for line in part) for part in found]


class Caches:
    """The caches of a device: a second level that stays from launch to launch, `write_back` last.

    Args:
        multiprocessors: of the device, each with a first-level cache of its own.
        second_level: bytes. The line that was not used for the longest time makes room.
    """

    def __init__(self, multiprocessors: int, second_level: int) -> None:
        self.multiprocessors = multiprocessors
        recorder().traffic_reset_second_level(ctypes.c_uint64(second_level))

    def warm(self, tensor: Tensor) -> None:
        """Has a tensor in the second level before anything runs."""
        size = tensor.untyped_storage().nbytes()
        start = tensor.untyped_storage().data_ptr()
        recorder().traffic_warm(ctypes.c_size_t(start), ctypes.c_uint64(size))

    def run(self, launch: Launch, resident: int, first_level: int) -> Totals:
        """A launch, so many of its blocks at a time on a multiprocessor, which has `first_level`
        bytes of first-level cache."""
        totals = Totals()
        recorder().traffic_run(
            ctypes.c_size_t(launch.index),
            self.multiprocessors,
            resident,
            ctypes.c_uint64(first_level),
            ctypes.byref(totals),
        )
        return totals

    def write_back(self) -> Totals:
        """What is left to be written to memory."""
        totals = Totals()
        recorder().traffic_write_back(ctypes.byref(totals))
        return totals
