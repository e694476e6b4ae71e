"""What the GPU benchmarks need of a device: clocks, CUDA graphs, and the names of things.

:class:`Device` is the CPU in the part of a GPU: it proves that the benchmarks run, and its times
mean nothing. :class:`Cuda` is the real one. Nothing else in the benchmarks knows which it has.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

#: Runs before a capture: what is set up at first use must be there by then.
WARM_UP = 3


class Device:
    """The CPU: its clock is that of the host, and a captured run is the run itself."""

    kind = "cpu"
    name = "CPU, a stand-in for a GPU"
    #: Of the large copy that measures bandwidth.
    copy_bytes = 1 << 22
    #: What makes Adam as cheap as it gets, and fit for capture.
    adam: dict[str, bool] = {}
    #: fastsn's back-ends that are compared, the first one being the one that "auto" should choose.
    backends: tuple[str, ...] = ("cpp", "reference")

    @contextmanager
    def session(self) -> Iterator[None]:
        """All that is measured happens within."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def synchronize(self) -> None:
        """Wait for the device."""

    def is_alive(self) -> bool:
        """Whether it still works: a kernel that ran astray leaves a GPU unusable to the process."""
        return True

    def device_seconds(self, run: Run, host_seconds: float) -> float:
        """How long the device works on ``run``, which the host needs about that long to issue."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def capture(self, run: Run, reset: Run) -> tuple[Run, Any]:
        """A replay of ``run``, and what it returns anew each time. ``reset`` comes after each
        of the runs before the capture, which are real ones."""
        for _ in range(WARM_UP):
            run()
            reset()
        result: list[Any] = []

        def replay() -> None:
            result[:] = run() or []

        return replay, result

    def launches(self, run: Run) -> dict[str, int] | None:
        """How often each kernel, copy or fill is launched in ``run``; None: cannot be told."""
        return None

    def versions(self) -> dict[str, str]:
        """GPU, driver and compilers."""
        return {"gpu": self.name, "driver": "none", "triton": "none", "nvcc": "none"}


class Cuda(Device):
    """The current CUDA device.

    Everything happens on one stream of our own, because a graph cannot be captured on the default
    one, and because the gradients of a captured backward must be accumulated on the stream that
    the capture is on.
    """

    kind = "cuda"
    copy_bytes = 1 << 32
    adam = {"fused": True, "capturable": True}
    backends = ("cuda", "triton", "reference")

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = properties.name
        self.stream = torch.cuda.Stream()
        # Four times the L2 cache: reading it leaves nothing else there, and nothing to write back.
        self.others = torch.ones(properties.L2_cache_size, device=self.kind)
        self.cycles_per_second = 2e9

    @contextmanager
    def session(self) -> Iterator[None]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def is_alive(self) -> bool:
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.kind).item() == 1)
        except RuntimeError:
            return False

    def device_seconds(self, run: Run, host_seconds: float) -> float:
        """From the first kernel to the last, the weights not in the cache at first.

        The device is kept busy until the host has issued everything, so that it never waits for
        the host in between. More launches than the queue of the driver holds (about a thousand)
        cannot be issued ahead, and then the time has the waits in it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.others.sum()
        wait = min(0.05, 2 * host_seconds + 50e-6)
        torch.cuda._sleep(int(wait * self.cycles_per_second))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Run, reset: Run) -> tuple[Run, Any]:
        for _ in range(WARM_UP):
            run()
            reset()
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = run()
        return graph.replay, result

    def launches(self, run: Run) -> dict[str, int] | None:
        return count_launches(run)

    def versions(self) -> dict[str, str]:
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = "none"
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        release = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
        return {
            "gpu": self.name,
            "driver": driver.splitlines()[0].strip() if driver.strip() else "unknown",
            "triton": triton_version,
            "nvcc": release.group(1) if release else "unknown",
        }


def count_launches(run: Run) -> dict[str, int] | None:
    """How often each kernel, copy or fill runs on the GPU in ``run``; None: the profiler saw none.

    The profiler may slow down what comes after it in the same process.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts or None


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, which is not always on PATH."""
    places = [os.environ.get("PATH", "")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        places += [str(Path(home) / "bin"), str(Path(home) / "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join(places))


def output_of(name: str, *arguments: str) -> str:
    """What a program prints; nothing if there is no such program or it fails."""
    path = find_tool(name)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def commit() -> tuple[str, str]:
    """The commit (FASTSN_COMMIT, else git's, else "unknown") and whether the tree differs from it.

    FASTSN_COMMIT speaks for a copy of the tree that has no repository; "-dirty" at its end says
    that the copy differs from the commit.
    """
    named = os.environ.get("FASTSN_COMMIT", "")
    if named:
        return named.removesuffix("-dirty"), str(named.endswith("-dirty")).lower()
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        # Results are made from the tree, and are no part of what is measured.
        what = ["status", "--porcelain", "--", ".", ":!benchmarks/results"]
        status = subprocess.run([*git, *what], capture_output=True, text=True)
    except OSError:
        return "unknown", "unknown"
    if head.returncode or status.returncode:
        return "unknown", "unknown"
    return head.stdout.strip()[:12], str(bool(status.stdout.strip())).lower()
