"""What the tests of the GPU benchmarks share: where rows are recorded, and a small network."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks import gpu_report
from benchmarks.gpu_device import Device
from benchmarks.gpu_sampling import Recorder
from benchmarks.harness import Plan

SHORT = Plan(least=2, most=2, warmup=1)
ORIGIN = {
    "commit": "0123456789ab",
    "dirty": "true",
    "gpu": "A GPU",
    "driver": "1.2",
    "triton": "3.6.0",
    "nvcc": "13.0",
    "torch": "2.11.0",
    "date": "2026-01-02",
}


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder(tmp_path / "measurements.csv", ORIGIN, Device())
    recorder.start(append=False)
    return recorder


def rows_of(recorder: Recorder) -> list[dict[str, str]]:
    return gpu_report.read(recorder.path)


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(40, 30))
