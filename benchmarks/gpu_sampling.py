"""How the GPU benchmarks sample, what they record, and what happens when something fails."""

from __future__ import annotations

import csv
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_device import Device
from benchmarks.harness import Plan

Times = dict[str, float]
Row = dict[str, Any]

#: The columns of the CSV file; those of :meth:`Recorder.origin` follow.
COLUMNS = (
    *("part", "network", "mode", "variant", "metric", "median_us", "p25_us", "p75_us", "iqr_us"),
    *("rounds", "floor_us", "times_floor", "gb_per_second", "baseline", "faster_than_baseline"),
    *("overhead_us", "overhead_percent", "value", "error", "note"),
)


class DeviceLost(Exception):
    """The device is unusable to this process from now on: ``variant`` was running."""

    def __init__(self, variant: str) -> None:
        super().__init__(f"the device was lost while {variant!r} ran")
        self.variant = variant


class TimeUp(Exception):
    """There was no time to go on with a task."""


@dataclass
class Recorder:
    """Writes rows into a CSV file as they come, so that what was measured survives a crash."""

    path: Path
    origin: Mapping[str, str]
    device: Device
    deadline: float = float("inf")
    without: Sequence[str] = ()
    failures: list[str] = field(default_factory=list)

    def start(self, append: bool) -> None:
        if not (append and self.path.exists()):
            with self.path.open("w", newline="") as file:
                self._writer(file).writeheader()

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, [*COLUMNS, *self.origin], restval="", lineterminator="\n")

    def record(self, rows: Sequence[Row]) -> None:
        with self.path.open("a", newline="") as file:
            writer = self._writer(file)
            for row in rows:
                writer.writerow({k: shown(v) for k, v in (row | dict(self.origin)).items()})

    def fail(self, what: str, error: BaseException, **row: object) -> None:
        """Note that ``what`` failed, in the log and in the CSV file; the rest goes on."""
        note = f"{type(error).__name__}: {error}"
        self.failures.append(f"{what}: {note}"[:300])
        print(f"FAILED {what}: {note}", flush=True)
        traceback.print_exception(error)
        self.record([{"metric": "failed", "note": " ".join(note.split())[:300], **row}])

    def guard(self, what: str, variant: str, call: Callable[[], Any], **row: object) -> bool:
        """Whether ``call`` succeeded. A variant that fails is left out, the others go on.

        Raises:
            DeviceLost: nothing can go on in this process.
        """
        try:
            call()
            self.device.synchronize()
            return True
        except Exception as error:
            self.fail(f"{what}, {variant}", error, variant=variant, **row)
            if not self.device.is_alive():
                raise DeviceLost(variant) from error
            return False

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def require_time(self) -> None:
        """Raise TimeUp if nothing is to be begun any more."""
        if self.is_late:
            raise TimeUp


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def take_turns(
    samplers: Mapping[str, Callable[[], Times]], plan: Plan, recorder: Recorder, what: str
) -> dict[str, list[Times]]:
    """Samples of every variant side by side, in an order shuffled anew for each round.

    A variant that fails drops out. The first rounds are dropped, and tell how many there can be.
    """
    samples: dict[str, list[Times]] = {name: [] for name in samplers}
    shuffle = random.Random(0).shuffle

    def take(name: str) -> None:
        samples[name].append(samplers[name]())

    def one_round() -> None:
        order = list(samples)
        shuffle(order)
        for name in order:
            if not recorder.guard(what, name, lambda name=name: take(name)):  # type: ignore[misc]
                del samples[name]

    gc.collect()
    gc.disable()
    try:
        for _ in range(plan.warmup):
            start = time.perf_counter()
            one_round()
            seconds = time.perf_counter() - start
        for taken in samples.values():
            taken.clear()
        for _ in range(plan.rounds(seconds)):
            one_round()
            if recorder.is_late:
                break
    finally:
        gc.enable()
    return samples


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p25, p50, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return p25, p50, p75


def time_columns(samples: Sequence[float], floor: float | None = None) -> Row:
    """The columns of times in seconds, and their ratio to a floor."""
    p25, p50, p75 = (1e6 * x for x in quartiles(samples))
    row: Row = {
        "median_us": p50,
        "p25_us": p25,
        "p75_us": p75,
        "iqr_us": p75 - p25,
        "rounds": len(samples),
    }
    if floor is not None:
        row |= {"floor_us": 1e6 * floor, "times_floor": p50 / (1e6 * floor)}
    return row
