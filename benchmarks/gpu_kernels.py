"""Kernel by kernel: how long each takes and how many bytes it moves, and what launches cost.

Three tasks of :mod:`benchmarks.gpu`:

- ``kernels``: the device time of every kernel of a forward and of a backward, by the profiler, with
  the L2 cache cold and warm, and the bytes per second of what it has to read and write.
- ``overlap``: the device time of whole forwards and backwards, issued and replayed, cold and warm.
  ``FASTSN_CUDA_PDL=1`` lets a kernel come onto the device while the one before it ends; that holds
  for a process, so the two are measured by two.
- ``empty``: a launch that does nothing, the yardstick.

``python -m benchmarks.gpu_kernels NETWORK`` runs one forward and backward, for ``ncu``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_device import Cuda, Device
from benchmarks.gpu_sampling import Recorder, Row, time_columns
from benchmarks.gpu_tools import short
from benchmarks.gpu_weights import FASTSN, MODES, Mode, Subject, weight_bytes
from benchmarks.harness import Plan
from benchmarks.networks import NETWORKS, QUICK_NETWORKS

#: How often the bytes of all weights pass: W read; W read, the result written; G and W read; G
#: read, the gradient written. Vectors and partial sums come on top. Other kernels move little.
PASSES = {"multiply": 1, "scale": 2, "product": 2, "gradient": 2}
#: Seconds that the host needs at most to issue what is timed.
HOST = 1e-3
#: What is timed: a backward on its own is that of weights computed before.
TIMED = ("forward", "backward")


def built(network: Callable[[], nn.Module], device: Device) -> Subject:
    """The network, accelerated, by the first of the back-ends."""
    torch.manual_seed(0)
    with torch.device(device.kind):
        plain = network()
    gradients = [torch.randn_like(p) for p in plain.parameters() if p.ndim > 1]
    return Subject(replace(FASTSN, backend=device.backends[0]), plain, gradients)


def variant_of(device: Device) -> str:
    overlaps = os.environ.get("FASTSN_CUDA_PDL") == "1"
    return f"fastsn {device.backends[0]}" + ", PDL" * overlaps


def record_kernels(
    network: str, build: Callable[[], nn.Module], recorder: Recorder, rounds: int
) -> None:
    """A row for each kernel of each mode, cold and warm."""
    device = recorder.device
    subject = built(build, device)
    moved = weight_bytes(subject.model)
    for mode_name in TIMED:
        mode = MODES[mode_name]
        for cache in ("cold", "warm"):
            taken: dict[str, list[float]] = {}
            for _ in range(rounds):
                for name, seconds in kernels_once(subject, mode, device, cache == "cold"):
                    taken.setdefault(name, []).append(seconds)
            where: Row = {"part": "kernels", "network": network, "mode": f"{mode_name}, {cache}"}
            where |= {"variant": variant_of(device), "metric": "kernel"}
            if not taken:
                recorder.record([{**where, "note": "the profiler saw nothing"}])
            for name, samples in taken.items():
                row: Row = {**where, **time_columns(samples), "note": short(name)}
                passes = PASSES.get(short(name))
                if passes is not None:
                    row["gb_per_second"] = passes * moved / (row["median_us"] * 1e3)
                recorder.record([row])


def kernels_once(
    subject: Subject, mode: Mode, device: Device, cold: bool
) -> list[tuple[str, float]]:
    """The kernels of one call, those of the same name added up: a large network takes several."""
    with subject.context():
        subject.reset()
        mode.run(subject, mode.prepare(subject))
        subject.reset()
        given = mode.prepare(subject)
        if cold:
            device.leave_the_cache()
        device.synchronize()
        seen = device.kernel_seconds(lambda: mode.run(subject, given))
        subject.reset()
    total: dict[str, float] = {}
    for name, seconds in seen:
        total[name] = total.get(name, 0.0) + seconds
    return list(total.items())


def record_overlap(
    network: str, build: Callable[[], nn.Module], recorder: Recorder, plan: Plan
) -> None:
    """A row for each mode, cache, and way of issuing the launches."""
    device = recorder.device
    subject = built(build, device)
    moved = weight_bytes(subject.model)
    rounds = plan.rounds(2e-3)
    where: Row = {"part": "overlap", "network": network, "variant": variant_of(device)}
    with subject.context():
        for mode_name, mode in MODES.items():
            for cache in ("cold", "warm"):
                samples = [one_call(subject, mode, device, cache == "cold") for _ in range(rounds)]
                row = {**where, "mode": f"{mode_name}, {cache}", "metric": "device"}
                recorder.record([row | with_speed(samples[2:] or samples, mode.passes * moved)])
        for mode_name in ("forward", "forward + backward"):
            mode = MODES[mode_name]
            replay, _ = device.capture(partial(mode.run, subject, None), subject.reset)
            for cache in ("cold", "warm"):
                samples = []
                for _ in range(rounds):
                    replay()
                    samples.append(device.device_seconds(replay, HOST, cache == "cold"))
                row = {**where, "mode": f"{mode_name}, {cache}", "metric": "graph"}
                recorder.record([row | with_speed(samples, mode.passes * moved)])


def one_call(subject: Subject, mode: Mode, device: Device, cold: bool) -> float:
    mode.run(subject, mode.prepare(subject))
    subject.reset()
    given = mode.prepare(subject)
    device.synchronize()
    seconds = device.device_seconds(lambda: mode.run(subject, given), HOST, cold)
    subject.reset()
    return seconds


def with_speed(samples: list[float], moved: float) -> Row:
    row = time_columns(samples)
    return row | {"gb_per_second": moved / (row["median_us"] * 1e3)}


def record_empty(recorder: Recorder, plan: Plan) -> None:
    """What one more launch costs, by the difference of many and few: the host, the device, and a
    device that replays them."""
    device, few, many = recorder.device, 1, 101
    rounds = plan.rounds(2e-3)

    def launches(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                device.empty_launch()

        return run

    def host(run: Callable[[], Any]) -> float:
        device.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    replays = {count: device.capture(launches(count), lambda: None)[0] for count in (few, many)}
    ways: dict[str, Callable[[int], float]] = {
        "host": lambda count: host(launches(count)),
        "device": lambda count: device.device_seconds(launches(count), HOST, cold=False),
        "graph": lambda count: device.device_seconds(replays[count], HOST, cold=False),
    }
    for metric, way in ways.items():
        pairs = [(way(few), way(many)) for _ in range(rounds)]
        samples = [(b - a) / (many - few) for a, b in pairs]
        recorder.record([{"part": "empty", "metric": metric, **time_columns(samples)}])


def main(arguments: list[str] | None = None) -> int:
    """One forward and backward between the marks that ``ncu --profile-from-start off`` obeys."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels")
    networks = {**NETWORKS, **QUICK_NETWORKS}
    parser.add_argument("network", choices=networks)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    device: Device = Cuda() if options.device == "cuda" else Device()
    subject = built(networks[options.network], device)
    with device.session(), subject.context():
        for _ in range(2):
            subject.forward_backward()
            subject.reset()
        device.synchronize()
        with device.marked():
            subject.forward_backward()
            device.synchronize()
    print(f"one forward and backward of {options.network} by {device.backends[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
