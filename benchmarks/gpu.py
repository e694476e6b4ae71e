"""Benchmarks on a GPU: ``python -m benchmarks.gpu --out DIR``.

Every row is gated by a comparison with fp64 before anything is timed; variants are sampled side by
side. Rows are written as they come; a part that fails is recorded and the others go on.

Parts: ``copy`` (the bandwidth that the floors use), ``weights`` (all normalized weights of a
network), ``backends`` (the same by each back-end), ``training`` (whole steps of GANs), ``msn``
(whole steps of VGG7 with MSN or batch norm), ``kernels``, ``overlap`` and ``empty`` (kernel by
kernel, see :mod:`benchmarks.gpu_kernels`), ``autocast`` (bf16 results against fp32), ``bsn`` (BSN
against SN), ``compiled`` (torch.compile, which takes long), ``launches`` (by the profiler: it may
slow down what comes after it, and so does ``kernels``).

Tasks run in the order in which ``--only`` names them. ``--quick`` runs them on tiny networks, a
proof that they run. Without a GPU the CPU is taken for one. The exit status is not 0 if something
failed, and 75 if time was up before all was done.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_kernels, gpu_msn, gpu_training
from benchmarks.gpu_device import Cuda, Device
from benchmarks.gpu_progress import FAILED, LEFT, PASSED, STARTED, Progress
from benchmarks.gpu_sampling import DeviceLost, Recorder, TimeUp, time_columns
from benchmarks.gpu_tools import commit
from benchmarks.gpu_training import JOBS, PRECISIONS, QUICK_JOBS
from benchmarks.gpu_weights import (
    BSN,
    COMPILED,
    FASTSN,
    MODES,
    TORCH,
    Contest,
    backend_variants,
    main_variants,
    read_as_forward,
    record_launches,
)
from benchmarks.harness import Plan
from benchmarks.networks import NETWORKS, QUICK_NETWORKS

PARTS = (
    *("copy", "weights", "training", "msn", "kernels", "empty", "overlap", "backends", "autocast"),
    *("bsn", "compiled", "launches"),
)
QUICK = Plan(least=2, most=2, warmup=1)

Task = Callable[[], None]


def measure_copy(device: Device) -> tuple[list[float], int]:
    """Seconds of large copies on the device, and the bytes that each reads and writes."""
    source = torch.randint(0, 255, (device.copy_bytes,), dtype=torch.uint8, device=device.kind)
    target = torch.empty_like(source)
    samples = [device.device_seconds(lambda: target.copy_(source), 0.0) for _ in range(12)]
    assert torch.equal(source, target)
    return samples[2:], 2 * device.copy_bytes


class Benchmarks:
    """All tasks, by name: a part, and within it what it measures."""

    def __init__(self, device: Device, recorder: Recorder, quick: bool) -> None:
        self.device = device
        self.recorder = recorder
        self.quick = quick
        self.bandwidth = 0.0

    def measure_bandwidth(self) -> None:
        samples, bytes_moved = measure_copy(self.device)
        columns = time_columns(samples)
        self.bandwidth = bytes_moved / (columns["median_us"] / 1e6)
        speed = self.bandwidth / 1e9
        self.recorder.record(
            [{"part": "copy", "metric": "copy", "gb_per_second": speed, **columns}]
        )

    def plan(self, seconds: float, least: int = 10, most: int = 60) -> Plan:
        return QUICK if self.quick else Plan(seconds=seconds, least=least, most=most)

    def tasks(self) -> dict[str, Task]:
        networks = QUICK_NETWORKS if self.quick else NETWORKS
        jobs = QUICK_JOBS if self.quick else JOBS
        first = self.device.backends[0]
        own = replace(FASTSN, backend=first)
        bsn = replace(BSN, backend=first)
        tasks: dict[str, Task] = {"copy": lambda: None}  # measured at the start of every process

        def hold(contest: Contest, plan: Plan) -> Task:
            return lambda: contest.hold(self.recorder, plan, self.bandwidth)

        variants = main_variants(self.device)
        # The small ones first: they have most of the targets.
        for name, build in networks.items():
            contest = Contest("weights", name, build, variants, MODES)
            tasks[f"weights {name}"] = hold(contest, self.plan(2.0))
            by_each = Contest("backends", name, build, backend_variants(self.device), MODES)
            tasks[f"backends {name}"] = hold(by_each, self.plan(1.0))
            tasks[f"kernels {name}"] = partial(
                gpu_kernels.record_kernels, name, build, self.recorder, 2 if self.quick else 6
            )
            tasks[f"overlap {name}"] = partial(
                gpu_kernels.record_overlap, name, build, self.recorder, self.plan(0.1, 10, 60)
            )
        tasks["empty"] = partial(gpu_kernels.record_empty, self.recorder, self.plan(0.1, 10, 60))
        for name, job in jobs.items():
            for precision in PRECISIONS:
                tasks[f"training {name}, {precision}"] = partial(
                    gpu_training.hold, name, job, precision, self.recorder, self.plan(2.5, 12, 80)
                )
        for name, network in (gpu_msn.QUICK_JOBS if self.quick else gpu_msn.JOBS).items():
            batch = gpu_msn.QUICK_BATCH if self.quick else gpu_msn.BATCH
            for precision in PRECISIONS:
                tasks[f"msn {name}, {precision}"] = partial(
                    gpu_msn.hold, name, network, batch, precision, self.recorder,
                    self.plan(2.5, 12, 80),
                )  # fmt: skip
        small, large = list(networks)[0], list(networks)[1 if self.quick else 2]
        read = replace(own, reader=read_as_forward)
        narrow = {"fastsn fp32": read, "fastsn bf16": replace(read, autocast=torch.bfloat16)}
        for name in (small, large):
            forward = {"forward": MODES["forward"]}
            contest = Contest("autocast", name, networks[name], narrow, forward, "fastsn fp32")
            tasks[f"autocast {name}"] = hold(contest, self.plan(1.0))
            both = {"SN": own, "BSN": bsn}
            contest = Contest("bsn", name, networks[name], both, MODES, "SN")
            tasks[f"bsn {name}"] = hold(contest, self.plan(1.0))
        compiled = {"torch": TORCH, "torch.compile": COMPILED, f"fastsn {first}": own}
        modes = {name: MODES[name] for name in ("forward", "forward + backward")}
        contest = Contest("compiled", small, networks[small], compiled, modes)
        tasks[f"compiled {small}"] = hold(contest, self.plan(2.0))
        for name in dict.fromkeys((small, list(networks)[1])):
            tasks[f"launches {name}"] = partial(
                record_launches, name, networks[name], variants, self.recorder
            )
        return tasks


def run(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Run the tasks that were asked for; return what failed, and what there was no time for."""
    use_gpu = torch.cuda.is_available() and options.device != "cpu"
    device: Device = Cuda() if use_gpu else Device()
    identity, dirty = commit()
    origin = {
        "commit": identity,
        "dirty": dirty,
        **device.versions(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    progress = Progress.of_environment()
    seconds = progress.deadline - time.time() if progress else options.seconds
    deadline = time.monotonic() + seconds
    recorder = Recorder(options.out / "measurements.csv", origin, device, deadline, options.without)
    recorder.start(options.append)
    with device.session():
        benchmarks = Benchmarks(device, recorder, options.quick)
        benchmarks.measure_bandwidth()
        tasks = benchmarks.tasks()
        unknown = [name for name in options.only if name not in (*tasks, *PARTS)]
        if unknown:
            raise SystemExit(f"unknown: {unknown}; parts: {PARTS}; tasks: {list(tasks)}")
        settled = progress.settled() if progress else {}
        left = [name for name in wanted(options.only, list(tasks)) if name not in settled]
        while left and not recorder.is_late:
            name = left[0]
            start = time.monotonic()
            failures = len(recorder.failures)
            if progress:
                progress.add(name, STARTED)
            lost = None
            try:
                tasks[name]()
            except TimeUp:
                break
            except DeviceLost as error:
                lost = error.variant
            except Exception as error:
                recorder.fail(name, error, part=name.split()[0])
                lost = None if device.is_alive() else ""
            seconds = time.monotonic() - start
            left.pop(0)
            if progress:
                failed = len(recorder.failures) > failures
                progress.add(name, FAILED if failed else PASSED, seconds)
            print(f"{seconds:6.1f} s  {name}", flush=True)
            if lost is not None:
                begin_again(options, left, lost, recorder)
    return recorder.failures, left


def wanted(only: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The tasks that are named, or belong to a part that is, in the order of the names."""
    found = [task for name in only for task in tasks if name in (task, task.split()[0])]
    return list(dict.fromkeys(found))


def begin_again(
    options: argparse.Namespace, left: Sequence[str], variant: str, recorder: Recorder
) -> None:
    """Go on in a new process, without what made the device unusable to this one."""
    without = [*options.without, *([variant.removeprefix("fastsn ")] if variant else [])]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), "--append"]
    command += ["--only", *(left or ["copy"]), "--without", *without, "--failed"]
    command += [*options.failed, *recorder.failures]
    command += ["--seconds", str(max(1.0, recorder.deadline - time.monotonic()))]
    command += ["--quick"] if options.quick else []
    sys.stdout.flush()
    os.execv(sys.executable, command)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--quick", action="store_true", help="tiny networks: proves that it runs")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--only", nargs="+", default=list(PARTS), help="parts, or single tasks")
    parser.add_argument(
        "--without", nargs="*", default=[], help="variants or back-ends to leave out"
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="begin nothing after that")
    parser.add_argument("--failed", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    failures, left = run(options)
    failures = [*options.failed, *failures]
    print(
        "\n".join([*(f"FAILED {failure}" for failure in failures), *(f"left: {x}" for x in left)])
    )
    return LEFT if left else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
