"""What the GPU benchmarks need of a device: clocks, CUDA graphs, and the names of kernels.

:class:`Device` is the CPU in the part of a GPU: it proves that the benchmarks run, and its times
mean nothing. :class:`Cuda` is the real one. Nothing else in the benchmarks knows which it has.
"""

from __future__ import annotations

import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_tools import output_of

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

    def device_seconds(self, run: Run, host_seconds: float, cold: bool = True) -> float:
        """How long the device works on ``run``, which the host needs about that long to issue; with
        nothing of it in the L2 cache if ``cold``."""
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

    @contextmanager
    def marked(self) -> Iterator[None]:
        """What happens within is what ``ncu --profile-from-start off`` looks at."""
        yield

    def empty_launch(self) -> None:
        """Launch a kernel that does nothing."""

    def leave_the_cache(self) -> None:
        """Fill the L2 cache with other things."""

    def kernel_seconds(self, run: Run) -> list[tuple[str, float]]:
        """Each kernel that ``run`` launches, in order, with its time; here, of the operators."""
        return profiled(run, self.synchronize, is_cuda=False)

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

    def device_seconds(self, run: Run, host_seconds: float, cold: bool = True) -> float:
        """From the first kernel to the last, if ``cold`` the weights not in the cache at first.

        The device is kept busy until the host has issued everything, so that it never waits for
        the host in between. More launches than the queue of the driver holds (about a thousand)
        cannot be issued ahead, and then the time has the waits in it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.leave_the_cache()
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

    @contextmanager
    def marked(self) -> Iterator[None]:
        with torch.cuda.profiler.profile():
            yield

    def empty_launch(self) -> None:
        torch.cuda._sleep(0)

    def leave_the_cache(self) -> None:
        self.others.sum()

    def kernel_seconds(self, run: Run) -> list[tuple[str, float]]:
        return profiled(run, self.synchronize, is_cuda=True)

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


def profiled(run: Run, synchronize: Run, is_cuda: bool) -> list[tuple[str, float]]:
    """Name and seconds of each thing that the device does in ``run``, in order, by the profiler; of
    each of fastsn's operators if not ``is_cuda``.

    The profiler may slow down what comes after it in the same process.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    with profile(activities=activities) as profiler:
        run()
        synchronize()
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == kind
        and not event.is_user_annotation
        and (is_cuda or event.name.startswith("fastsn::"))
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def count_launches(run: Run) -> dict[str, int] | None:
    """How often each kernel, copy or fill runs on the GPU; None: the profiler saw none."""
    return dict(Counter(name for name, _ in profiled(run, torch.cuda.synchronize, True))) or None
