"""The GPU benchmarks, on the CPU: gates, failures, device, report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import (
    gpu,
    gpu_device,
    gpu_report,
    gpu_tools,
    gpu_training,
    gpu_weights,
    networks,
)
from benchmarks.gpu_device import Cuda, Device
from benchmarks.gpu_progress import LEFT, PASSED, Progress
from benchmarks.gpu_sampling import COLUMNS, DeviceLost, Recorder, take_turns, time_columns
from benchmarks.gpu_weights import BSN, FASTSN, HOOK, MODES, TORCH, Contest, Contestant, Subject
from benchmarks.harness import Plan
from helpers import session_records
from helpers.session_records import ORIGIN, SHORT, build, rows_of

recorder = session_records.recorder

# Gates


def subject(variant: gpu_weights.Variant) -> Subject:
    torch.manual_seed(0)
    plain = build()
    return Subject(variant, plain, [torch.randn_like(p) for p in plain.parameters() if p.ndim > 1])


VARIANTS = {
    **gpu_weights.main_variants(Device()),
    "BSN": BSN,
    "BSN by the reference": replace(BSN, backend="reference"),
    "as in a forward": replace(FASTSN, reader=gpu_weights.read_as_forward),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_gate_passes_every_variant_eager_and_captured(name: str, mode: str) -> None:
    contestant = Contestant(subject(VARIANTS[name]), MODES[mode], Device())
    assert contestant.error < 1e-6
    contestant.capture()
    assert contestant.error < 1e-6
    times = contestant.sample()
    assert set(times) == {"host", "wall", "device", "graph", "graph wall"}
    assert all(seconds > 0 for seconds in times.values()) and times["wall"] >= times["host"]


def wrong_reader(model: nn.Module) -> Callable[[], list[torch.Tensor]]:
    read = gpu_weights.bench_weights.read_layers(model)
    return lambda: [weight * (1 + 1e-4) for weight in read()]


def detached_reader(model: nn.Module) -> Callable[[], list[torch.Tensor]]:
    originals = gpu_weights.originals(model)
    read = gpu_weights.bench_weights.read_layers(model)
    return lambda: [o * (w / o).detach() for o, w in zip(originals, read(), strict=True)]


def stale_reader(model: nn.Module) -> Callable[[], list[torch.Tensor]]:
    read = gpu_weights.bench_weights.read_layers(model)
    kept = read()
    return lambda: kept


@pytest.mark.parametrize(
    "reader, mode",
    [(wrong_reader, "forward"), (detached_reader, "backward"), (stale_reader, "forward")],
)
def test_wrong_variant_is_recorded_and_not_timed(
    recorder: Recorder, reader: Callable, mode: str
) -> None:
    variants = {"torch": TORCH, "wrong": replace(TORCH, reader=reader), "fastsn cpp": FASTSN}
    contest = Contest("weights", "small", build, variants, {mode: MODES[mode]})
    contest.hold(recorder, SHORT, bandwidth=1e9)
    assert len(recorder.failures) == 1 and "small, " + mode in recorder.failures[0]
    rows = rows_of(recorder)
    assert {row["variant"] for row in rows if row["metric"] != "failed"} == {"torch", "fastsn cpp"}
    (failed,) = [row for row in rows if row["metric"] == "failed"]
    assert failed["variant"] == "wrong" and "AssertionError" in failed["note"]


def test_a_result_of_another_type_than_autocast_asks_for_fails() -> None:
    variant = replace(HOOK, reader=wrong_reader, autocast=torch.bfloat16)
    with pytest.raises(AssertionError, match="float32"):
        Contestant(subject(variant), MODES["forward"], Device())


def test_gate_of_a_captured_run_sees_what_the_replay_computes() -> None:
    class Broken(Device):
        def capture(self, run: Callable, reset: Callable) -> tuple:
            run()
            return (lambda: None), run()

    contestant = Contestant(subject(FASTSN), MODES["forward"], Broken())
    with pytest.raises(AssertionError, match="error"):
        contestant.capture()
    assert contestant.replay is None


def test_rows_hold_floors_and_ratios(recorder: Recorder) -> None:
    contest = Contest("weights", "small", build, {"torch": TORCH, "torch hook": HOOK}, MODES)
    contest.hold(recorder, SHORT, bandwidth=1e9)
    weight_bytes = 4 * (8 * 27 + 32 + 1200)
    rows = rows_of(recorder)
    assert len(rows) == 2 * (5 + 3 + 5)
    for row in rows:
        assert float(row["median_us"]) > 0 and row["rounds"] == "2" and row["gpu"] == "A GPU"
        if row["variant"] == "torch":
            assert float(row["faster_than_baseline"]) == 1
        if row["metric"] in ("device", "graph"):
            passes = {"forward": 2, "backward": 3, "forward + backward": 5}[row["mode"]]
            assert float(row["floor_us"]) == pytest.approx(passes * weight_bytes / 1e3, rel=1e-4)
            expected = float(row["median_us"]) / float(row["floor_us"])
            assert float(row["times_floor"]) == pytest.approx(expected, rel=1e-4)


def test_training_gate_passes_and_fails_as_it_should(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = gpu_training.QUICK_JOBS["small SNDCGAN"]

    class Halved(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = gpu_training.bench_training.with_torch(model)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) / 2

        def state_dict(self, *args: object, **kwargs: object) -> dict:
            return self.model.state_dict(*args, **kwargs)

    monkeypatch.setitem(gpu_training.NORMALIZERS, "fastsn", Halved)
    gpu_training.hold("small", job, "fp32", recorder, SHORT)
    rows = rows_of(recorder)
    assert {r["variant"] for r in rows if r["metric"] == "wall"} == {"none", "torch"}
    assert [r["variant"] for r in rows if r["metric"] == "failed"] == ["fastsn", "fastsn"]
    assert len(recorder.failures) == 2


def test_overheads_are_taken_within_rounds() -> None:
    samples = {
        "none": [{"wall": x} for x in (1.0, 2.0, 3.0)],
        "torch": [{"wall": x} for x in (1.25, 2.25, 4.0)],
    }
    rows = gpu_training.overheads(samples)
    assert rows["none"]["overhead_us"] == 0
    assert rows["torch"]["overhead_us"] == pytest.approx(250_000)
    assert rows["torch"]["overhead_percent"] == pytest.approx(12.5)


# Sampling and failures


def test_a_variant_that_fails_drops_out_and_the_others_go_on(recorder: Recorder) -> None:
    calls: list[str] = []

    def good() -> dict[str, float]:
        calls.append("good")
        return {"wall": 1.0}

    def bad() -> dict[str, float]:
        calls.append("bad")
        if calls.count("bad") == 3:
            raise ValueError("no more")
        return {"wall": 2.0}

    plan = Plan(seconds=1e-9, least=5, most=5, warmup=1)
    samples = take_turns({"good": good, "bad": bad}, plan, recorder, "here")
    assert samples == {"good": [{"wall": 1.0}] * 5}
    assert recorder.failures == ["here, bad: ValueError: no more"]


def test_a_lost_device_ends_the_process_and_a_new_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Contestant, *args: object) -> None:
        raise RuntimeError("illegal memory access")

    class Executed(Exception):
        pass

    def execute(path: str, command: list[str]) -> None:
        commands.append(command)
        raise Executed

    commands: list[list[str]] = []
    monkeypatch.setattr(Contestant, "__init__", crash)
    monkeypatch.setattr(Device, "is_alive", lambda self: False)
    monkeypatch.setattr(os, "execv", execute)
    only = ["weights small SNDCGAN D", "weights small BigGAN D"]
    with pytest.raises(Executed):
        gpu.main(["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", *only])
    (command,) = commands
    text = " ".join(command)
    assert "--append --only weights small BigGAN D --without torch --failed" in text
    assert "illegal memory access" in text and "--quick" in command


def test_a_lost_device_names_the_backend(recorder: Recorder) -> None:
    recorder.device.is_alive = lambda: False  # type: ignore[method-assign]
    with pytest.raises(DeviceLost) as caught:
        recorder.guard("x", "fastsn cuda", lambda: 1 / 0)
    assert caught.value.variant == "fastsn cuda"


def test_what_is_left_when_time_is_up_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--seconds", "0"]
    assert gpu.main([*arguments, "--only", "bsn"]) == LEFT
    words = "left: bsn small SNDCGAN D\nleft: bsn small BigGAN D\n"
    assert capsys.readouterr().out.endswith(words)
    assert not gpu_report.failures(gpu_report.read(tmp_path / "measurements.csv"))


@pytest.fixture
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """What the session tells the program."""
    progress = Progress(str(tmp_path / "progress.csv"), "timings")
    for name, value in progress.environment().items():
        monkeypatch.setenv(name, value)
    return progress


def test_tasks_are_noted_in_the_order_of_their_names_and_not_repeated(
    tmp_path: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Tasks(gpu.Benchmarks):
        def tasks(self) -> dict[str, gpu.Task]:
            names = ("copy", "bsn one", "bsn two", "empty")
            return {name: (lambda name=name: done.append(name)) for name in names}  # type: ignore[misc]

    monkeypatch.setattr(gpu, "Benchmarks", Tasks)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--append", "--only"]
    assert gpu.main([*arguments, "empty", "bsn two"]) == 0
    assert gpu.main([*arguments, "bsn", "empty", "copy"]) == 0
    assert done == ["empty", "bsn two", "bsn one", "copy"]
    assert progress.settled() == dict.fromkeys(done, PASSED)


def test_a_task_that_is_cut_short_is_left(
    recorder: Recorder, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two modes time is up: what was measured stays, and the task is to be repeated."""
    hold_one = Contest._hold_one

    def slow(self: Contest, *args: object) -> None:
        hold_one(self, *args)
        args[3].deadline = 0.0

    monkeypatch.setattr(Contest, "_hold_one", slow)
    arguments = ["--out", str(recorder.path.parent), "--quick", "--device", "cpu", "--append"]
    assert gpu.main([*arguments, "--only", "bsn small SNDCGAN D"]) == LEFT
    assert not progress.settled() and [line.item for line in progress.begun()] == [
        "bsn small SNDCGAN D"
    ]
    assert {row["mode"] for row in rows_of(recorder) if row["part"] == "bsn"} == {"forward"}


def test_unknown_part(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown: .'weigths'.*launches"):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--only", "weigths"])


def test_quartiles_of_few_samples() -> None:
    assert time_columns([2e-6])["median_us"] == pytest.approx(2)
    columns = time_columns([1e-6, 2e-6, 3e-6, 4e-6, 5e-6], floor=2e-6)
    assert columns["median_us"] == pytest.approx(3) and columns["iqr_us"] == pytest.approx(2)
    assert columns["times_floor"] == pytest.approx(1.5)


# The device


class Events:
    """What a GPU would have done, in order; its clock ticks once per thing recorded."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        made = SimpleNamespace(at=0)

        def record() -> None:
            self.log.append("record")
            made.at = len(self.log)

        made.record = record
        made.synchronize = lambda: self.log.append("wait")
        made.elapsed_time = lambda end: float(end.at - made.at)
        return made

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object):
        self.log.append("begin")
        yield
        self.log.append("end")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    events = Events()
    cuda = {
        "current_device": lambda: 0,
        "get_device_properties": lambda i: SimpleNamespace(name="A GPU", L2_cache_size=1000),
        "Stream": lambda: "stream",
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: events.log.append("synchronize"),
        "Event": events.event,
        "_sleep": lambda cycles: events.log.append("busy"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.log.append("replay")),
        "graph": events.graph,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Cuda, "kind", "cpu")
    return events


def test_device_time_lies_between_two_events_behind_a_busy_device(events: Events) -> None:
    device = Cuda()
    with device.session():
        seconds = device.device_seconds(lambda: events.log.append("run"), 1e-3)
    assert events.log == ["synchronize", "busy", "record", "run", "record", "wait", "synchronize"]
    assert seconds == pytest.approx(2e-3)


def test_capture_comes_after_runs_that_are_reset(events: Events) -> None:
    device = Cuda()
    replay, result = device.capture(
        lambda: events.log.append("run") or ["out"], lambda: events.log.append("reset")
    )
    replay()
    assert events.log == ["run", "reset"] * 3 + ["begin", "run", "end", "replay"]
    assert result == ["out"]


def test_versions_without_a_driver(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {"nvidia-smi": "580.1\n", "nvcc": "release 13.0, V13.0.88\n"}
    monkeypatch.setattr(gpu_device, "output_of", lambda name, *a: printed[name])
    versions = Cuda().versions()
    assert (versions["gpu"], versions["driver"], versions["nvcc"]) == ("A GPU", "580.1", "13.0")
    monkeypatch.setattr(gpu_device, "output_of", lambda name, *a: "")
    versions = Cuda().versions()
    assert (versions["driver"], versions["nvcc"]) == ("unknown", "unknown")


def test_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSN_COMMIT", "abc-dirty")
    assert gpu_tools.commit() == ("abc", "true")
    monkeypatch.setenv("FASTSN_COMMIT", "abc")
    assert gpu_tools.commit() == ("abc", "false")


# Report


def made_up_rows() -> list[dict[str, str]]:
    """A row for every target, the values 1, 2, 3, ... in the order of the rows."""
    found = []

    def add(part: str, network: str, mode: str, variant: str, metric: str, **values: float) -> None:
        row = dict.fromkeys((*COLUMNS, *ORIGIN), "") | ORIGIN
        where = {"part": part, "network": network, "mode": mode, "variant": variant}
        found.append(row | where | {"metric": metric} | {k: str(v) for k, v in values.items()})

    variants = ["torch", "torch hook", "fastsn cuda", "fastsn triton", "fastsn reference"]
    add("copy", "", "", "", "copy", gb_per_second=3000)
    for i, network in enumerate(networks.NETWORKS):
        for mode in MODES:
            for j, variant in enumerate(variants):
                for metric in ("host", "wall", "device", "graph"):
                    speed = 1 + j * (i + 1)
                    add(
                        *("weights", network, mode, variant, metric),
                        median_us=100 / speed,
                        faster_than_baseline=speed,
                        times_floor=30 / speed,
                    )
    add("weights", "SN-ResNet D", "forward", "operators", "host", median_us=12.5)
    for network in ("SNDCGAN D", "BigGAN-128 D"):
        add("autocast", network, "forward", "fastsn bf16", "device", faster_than_baseline=1.25)
    for i, network in enumerate(gpu_training.JOBS):
        for precision in gpu_training.PRECISIONS:
            for way in ("eager", "captured"):
                for j, variant in enumerate(("none", "torch", "fastsn")):
                    overhead = [0.0, 40.0 - 10 * i, 2.0 + 3 * i][j]
                    mode = f"{precision}, {way}"
                    add("training", network, mode, variant, "wall", overhead_percent=overhead)
    for precision in gpu_training.PRECISIONS:
        for way in ("eager", "captured"):
            for variant, time in (("bn", 130), ("msn", 100 if way == "eager" else 120)):
                add("msn", "VGG7", f"{precision}, {way}", variant, "wall", median_us=time)
    add("launches", "SNDCGAN D", "forward", "fastsn cuda", "launches", value=3)
    add("training", "SNDCGAN", "fp32, eager", "fastsn", "failed")
    return found


def test_targets_are_met_or_missed() -> None:
    rows = made_up_rows()
    targets = gpu_report.targets("cuda", list(gpu_training.JOBS), list(gpu_training.PRECISIONS))
    lines = [" ".join(target.line(rows).split()) for target in targets]
    assert len(lines) == 9 + 2 + 12 + 4
    assert lines[0] == "SNDCGAN, forward, eager wall, vs torch >= 30x 3x MISSED"
    assert lines[4].endswith("over one read + one write <= 1.6 floor 4.29 floor MISSED")
    assert lines[5].endswith("device time, vs torch >= 1.6x 7x met")
    assert lines[7] == "host time, 11 layers, forward: the operators <= 20 us 12.5 us met"
    assert lines[11] == "SNDCGAN step, fp32, eager: overhead <= 5 % 2 % met"
    assert lines[22].endswith("bf16 autocast, captured: overhead <= 5 % 8 % MISSED")
    assert lines[23] == "VGG7 step with MSN, fp32, eager, vs bn >= 1.16x 1.3x met"
    assert lines[24] == "VGG7 step with MSN, fp32, captured, vs bn >= 1.16x 1.08x MISSED"
    empty = [target.line([]) for target in targets]
    assert all(line.endswith("not measured") for line in empty)


def test_summary_names_where_the_numbers_come_from() -> None:
    rows = made_up_rows()
    summary = gpu_report.summary(rows, [], ["x: broke"])
    assert "A GPU, driver 1.2; torch 2.11.0, triton 3.6.0, nvcc 13.0" in summary
    assert "commit 0123456789ab (with changes), 2026-01-02" in summary
    assert "3000 GB/s" in summary and summary.endswith("FAILED x: broke")
    assert "launches, SNDCGAN D, forward, fastsn cuda: 3" in summary
    assert gpu_report.summary([], [], []) == "nothing was measured"


@pytest.mark.parametrize("rows", [made_up_rows(), []], ids=["rows", "none"])
def test_charts_are_drawn(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    gpu_report.draw_weights(tmp_path / "weights.png", rows)
    gpu_report.draw_training(tmp_path / "training.png", rows)
    for name in ("weights", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_that_cannot_be_drawn_does_not_hide_the_numbers(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path, rows: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setitem(gpu_report.CHARTS, "weights.png", broken)
    recorder.record([{"part": "copy", "metric": "copy", "gb_per_second": 123.0}])
    assert gpu_report.main([str(recorder.path.parent), "--backend", "none"]) == 1
    summary = capsys.readouterr().out
    assert "123 GB/s" in summary and "FAILED weights.png: ImportError: no matplotlib" in summary
    assert (recorder.path.parent / "training.png").exists()


def test_what_was_measured_after_it_failed_has_not_failed(recorder: Recorder) -> None:
    where = {"part": "weights", "network": "n", "mode": "forward"}
    for variant in ("a", "b"):
        recorder.record([{**where, "variant": variant, "metric": "failed", "note": "broke"}])
    recorder.record([{**where, "variant": "a", "metric": "device", "median_us": 1.0}])
    assert gpu_report.failures(rows_of(recorder)) == ["weights, n, forward, b, broke"]


# All of it


def test_quick_training_measures_every_variant(tmp_path: Path) -> None:
    task = "training small SNDCGAN, bf16 autocast"
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", task]
    assert gpu.main(arguments) == 0
    rows = [r for r in gpu_report.read(tmp_path / "measurements.csv") if r["part"] == "training"]
    assert [(r["mode"], r["variant"]) for r in rows] == [
        (f"bf16 autocast, {way}", variant)
        for way in ("eager", "captured")
        for variant in ("none", "torch", "fastsn")
    ]
    assert all(float(r["median_us"]) > 0 and r["overhead_percent"] for r in rows)
