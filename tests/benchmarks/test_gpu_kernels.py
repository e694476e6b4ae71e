"""The GPU benchmarks kernel by kernel, and the hardware's counters, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastsn
from benchmarks import gpu_kernels, gpu_ncu, gpu_report
from benchmarks.gpu_device import Device
from benchmarks.gpu_sampling import Recorder
from helpers import session_records
from helpers.session_records import SHORT, build, rows_of

recorder = session_records.recorder


def test_kernels_are_timed_one_by_one(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes per second are those of what a kernel has to move; launches of one kernel add up."""
    seen = [
        ("void fastsn::cuda::multiply_kernel<float, 3840>(Batch)", 1e-6),
        ("void fastsn::cuda::multiply_kernel<float, 3840>(Batch)", 3e-6),
        ("void at::native::vectorized_elementwise_kernel<4, at>(int)", 5e-6),
    ]
    caches: list[str] = []
    monkeypatch.setattr(Device, "kernel_seconds", lambda self, run: run() and seen)
    monkeypatch.setattr(Device, "leave_the_cache", lambda self: caches.append("left"))
    gpu_kernels.record_kernels("small", build, recorder, rounds=2)
    rows = rows_of(recorder)
    assert [row["mode"] for row in rows[::2]] == [
        *("forward, cold", "forward, warm", "backward, cold", "backward, warm")
    ]
    assert len(caches) == 4 and {row["rounds"] for row in rows} == {"2"}
    assert [row["note"] for row in rows[:2]] == ["multiply", "vectorized_elementwise"]
    weight_bytes = 4 * (8 * 27 + 32 + 1200)
    assert float(rows[0]["median_us"]) == pytest.approx(4)
    assert float(rows[0]["gb_per_second"]) == pytest.approx(weight_bytes / 4e-6 / 1e9, rel=1e-4)
    assert not rows[1]["gb_per_second"]
    (line, *_) = gpu_report.kernels(rows)
    assert line.startswith("kernels, small, forward, cold, fastsn cpp: multiply 4 us (1 GB/s), vec")


def test_the_profiler_sees_every_operator() -> None:
    a = torch.ones(3)
    seen = Device().kernel_seconds(lambda: fastsn.functional.spectral_norm(
        [torch.ones(3, 3)], [a.clone()], [a.clone()]
    ))  # fmt: skip
    assert [name.split("::")[1] for name, _ in seen] == ["power_", "scale"]
    assert all(seconds > 0 for _, seconds in seen)


@pytest.mark.parametrize("overlaps", [False, True])
def test_launches_apart_and_overlapped(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    monkeypatch.setenv("FASTSN_CUDA_PDL", "1" if overlaps else "0")
    gpu_kernels.record_overlap("small", build, recorder, SHORT)
    rows = rows_of(recorder)
    assert {row["variant"] for row in rows} == {"fastsn cpp, PDL" if overlaps else "fastsn cpp"}
    ways = [(row["metric"], row["mode"]) for row in rows]
    assert len(set(ways)) == len(ways) == 2 * (3 + 2)
    assert all(float(row["gb_per_second"]) > 0 for row in rows)


def test_an_empty_launch_is_what_one_more_costs(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    monkeypatch.setattr(Device, "empty_launch", lambda self: launched.append(1))

    def seconds(self: Device, run: Callable, host: float, cold: bool = True) -> float:
        launched.clear()
        run()
        return 1e-5 + 2e-6 * len(launched)

    monkeypatch.setattr(Device, "device_seconds", seconds)
    gpu_kernels.record_empty(recorder, SHORT)
    rows = {row["metric"]: float(row["median_us"]) for row in rows_of(recorder)}
    assert rows.keys() == {"host", "device", "graph"}
    assert rows["device"] == pytest.approx(2) and rows["graph"] == pytest.approx(2)


#: As `ncu --csv --page raw` prints, most columns left out.
COUNTED = """\
==PROF== Connected to process 12
"ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","Mbyte","us","register/thread"
"0","multiply_kernel","11.7","5.1","96"
"1","void fastsn::cuda::scale_kernel<float>(Batch)","2.5","6.0","40"
"""


def test_counters_are_shown_for_each_kernel() -> None:
    assert [" ".join(line.split()) for line in gpu_ncu.table(COUNTED)] == [
        "multiply time 5.1 us, read 11.7 Mbyte, registers 96 register/thread",
        "scale time 6.0 us, read 2.5 Mbyte, registers 40 register/thread",
    ]
    assert gpu_ncu.table("==ERROR== no counters\n") == gpu_ncu.table("") == []


@pytest.mark.parametrize("text, status", [(COUNTED, 0), ("==ERROR== refused\n", 1)])
def test_ncu_is_asked_and_its_numbers_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str,
    status: int,
) -> None:
    ncu, path = tmp_path / "ncu", tmp_path / "ncu.csv"
    (tmp_path / "text").write_text(text)
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/text > {path}\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_ncu.main(["SNDCGAN D", str(path)]) == status
    output = capfd.readouterr().out
    assert ("2 kernels counted" in output) == (status == 0)
    assert "refused" in output or status == 0
    asked = (tmp_path / "asked").read_text()
    assert f"--log-file {path} --clock-control none --profile-from-start off" in asked
    assert asked.endswith("-m benchmarks.gpu_kernels SNDCGAN D\n") and path.read_text() == text
