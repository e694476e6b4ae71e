"""The benchmarks measure what they claim: gates, interleaving, report, and a short run of all."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import bench_training, bench_weights, harness, networks, report
from benchmarks.bench_weights import MODES, Variant
from benchmarks.harness import Plan, Replay, Work

ROOT = Path(__file__).parents[2]


# Networks


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("SNDCGAN D", 8, 2_935_873),
        ("SN-ResNet D", 11, 1_053_825),
        ("BigGAN-128 D", 23, 87_982_370),
        ("48 x 64x64", 48, 199_680),
        ("4096x4096", 1, 16_781_312),
    ],
)
def test_networks_have_the_published_sizes(name: str, layers: int, count: int) -> None:
    with torch.device("meta"):
        model = networks.NETWORKS[name]()
    assert len(networks.layers(model)) == layers
    assert parameters(model) == count


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 16), (3, 32)])
def test_sndcgan_fits_the_image_size(channels: int, size: int) -> None:
    generator = networks.SNDCGANGenerator(16, channels, size, width=1 / 16)
    discriminator = networks.SNDCGANDiscriminator(channels, size, width=1 / 16)
    images = generator(torch.randn(2, 16))
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)


def test_residual_networks_give_one_logit_per_image() -> None:
    resnet = networks.ResNetDiscriminator(width=1 / 16)
    assert resnet(torch.randn(2, 3, 32, 32)).shape == (2, 1)
    biggan = networks.BigGANDiscriminator(classes=10, width=1 / 16)
    assert biggan(torch.randn(2, 3, 128, 128), torch.tensor([0, 9])).shape == (2, 1)


def test_normalize_with_reaches_every_layer() -> None:
    seen: list[nn.Module] = []
    model = networks.BigGANDiscriminator(classes=10, width=1 / 16)
    assert networks.normalize_with(model, seen.append) is model
    assert len(seen) == 23
    assert {type(layer) for layer in seen} == {nn.Conv2d, nn.Linear, nn.Embedding}


# Sampling


class Diary:
    """Works that write down what happens, and a clock that moves only while they do."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.events: list[str] = []
        self.now = 0.0
        self.works = {name: self.work(name, seconds[name]) for name in seconds}

    def work(self, name: str, seconds: float) -> Work:
        def happen(event: str, duration: float) -> None:
            self.events.append(event)
            self.now += duration

        return Work(lambda: happen(name, seconds), lambda: happen(f"reset {name}", 100.0))

    def clock(self) -> float:
        return self.now


def test_every_round_runs_every_work_once() -> None:
    diary = Diary({"a": 1.0, "b": 2.0, "c": 3.0})
    samples = harness.interleave(diary.works, rounds=20, clock=diary.clock)
    assert samples == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [3.0] * 20}
    runs = diary.events[::2]
    assert diary.events[1::2] == [f"reset {name}" for name in runs]
    rounds = [tuple(runs[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_a_work_settles_off_the_clock_before_each_sample() -> None:
    diary = Diary({"a": 1.0, "b": 2.0})
    samples = harness.interleave(diary.works, rounds=3, settle=2, clock=diary.clock)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}
    turns = [tuple(diary.events[i : i + 6]) for i in range(0, 36, 6)]
    assert sorted(turns) == [(name, f"reset {name}") * 3 for name in "aaabbb"]


def test_measure_warms_up_and_stays_within_its_plan() -> None:
    assert Plan(least=5, most=10, seconds=1.0).rounds(0.001) == 10
    assert Plan(least=5, most=10, seconds=1.0).rounds(0.125) == 8
    assert Plan(least=5, most=10, seconds=1.0).rounds(60.0) == 5
    diary = Diary({"a": 1.0, "b": 2.0})
    samples = harness.measure(diary.works, Plan(warmup=2, least=3, most=3))
    assert [len(runs) for runs in samples.values()] == [3, 3]
    assert diary.events.count("a") == 5


def test_replay_gives_the_samples_as_durations() -> None:
    replay = Replay()
    durations: list[float] = []

    def pedantic(target, rounds: int) -> None:
        for _ in range(rounds):
            start = replay.read()
            target()
            durations.append(replay.read() - start)

    benchmark = SimpleNamespace(extra_info={}, pedantic=pedantic)
    replay.record(benchmark, [0.5, 0.25, 4.0], variant="torch")
    assert durations == [0.5, 0.25, 4.0]
    assert benchmark.extra_info == {"variant": "torch"}


# Gates


def test_check_allows_twice_the_error_of_the_same_dtype_and_no_more() -> None:
    exact = [torch.ones(3, dtype=torch.float64)]
    rounded = [torch.full((3,), 1 + 1e-3)]
    assert harness.check([torch.full((3,), 1 - 2e-3)], rounded, exact) == pytest.approx(
        2e-3, rel=1e-3
    )
    for wrong in (torch.full((3,), 1 - 2.1e-3), torch.full((3,), torch.nan), torch.ones(1, 3)):
        with pytest.raises(AssertionError):
            harness.check([wrong], rounded, exact)
    with pytest.raises(ValueError):
        harness.check([], rounded, exact)


def read_scaled(model: nn.Module):
    read = bench_weights.read_hooks(model)
    return lambda: [weight * (1 + 1e-5) for weight in read()]


def read_without_iterating(model: nn.Module):
    read = bench_weights.read_hooks(model)

    def stale():
        model.eval()
        return read()

    return stale


def read_with_sigma_detached(model: nn.Module):
    read = bench_weights.read_hooks(model)
    originals = bench_weights.originals(model)

    def detached():
        pairs = zip(originals, read(), strict=True)
        return [original * (weight / original).detach() for original, weight in pairs]

    return detached


def contest(variants: dict[str, Variant]) -> dict[str, bench_weights.Normalized]:
    torch.manual_seed(0)
    return bench_weights.normalize_all(networks.ManyLinear(3, 16), variants)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", bench_weights.QUICK_VARIANTS)
def test_gate_passes_every_variant(name: str, mode: str) -> None:
    (normalized,) = contest({name: bench_weights.VARIANTS[name]}).values()
    for _ in range(2):
        assert normalized.gate(MODES[mode]) < 1e-6


@pytest.mark.parametrize(
    ("reader", "mode"),
    [
        (read_scaled, "forward"),
        (read_scaled, "eval"),
        (read_without_iterating, "forward"),
        (read_with_sigma_detached, "forward + backward"),
    ],
)
def test_a_failing_gate_times_nothing(monkeypatch: pytest.MonkeyPatch, reader, mode: str) -> None:
    monkeypatch.setattr(bench_weights, "measure", lambda *_: pytest.fail("timed"))
    hook = bench_weights.VARIANTS["torch hook"]
    wrong = Variant(hook.normalize, reader, hook.state)
    with pytest.raises(AssertionError, match="expected an error"):
        bench_weights.compete(contest({"torch hook": hook, "wrong": wrong}), MODES[mode], Plan())


def test_training_gate_passes_and_a_failing_one_times_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup, plan = bench_training.QUICK_SETUP, harness.QUICK_PLAN
    monkeypatch.setattr(bench_training, "measure", lambda works, plan: dict.fromkeys(works, [1.0]))
    results = bench_training.compete(setup, plan, bench_training.VARIANTS)
    assert [result.error < 1e-4 for result in results.values()] == [True] * 3

    def halved(model: nn.Module) -> nn.Module:
        return networks.normalize_with(
            model, lambda layer: nn.utils.parametrizations.spectral_norm(layer, eps=2.0)
        )

    monkeypatch.setattr(bench_training, "measure", lambda *_: pytest.fail("timed"))
    wrong = bench_training.Variant(halved, bench_training.with_torch)
    with pytest.raises(AssertionError, match="expected an error"):
        bench_training.compete(setup, plan, {"wrong": wrong})


# Report

PROVENANCE = ["commit", "date", "device", "cores", "fastsn", "torch", "python"]
WEIGHTS = [
    *("network", "mode", "threads", "variant", "rounds", "p20_us", "p50_us", "p80_us"),
    *("faster_than_torch", "times_a_copy", "floor_bytes", "gb_per_s", "error"),
]
TRAINING = [
    *("network", "mode", "threads", "variant", "rounds", "p20_ms", "p50_ms", "p80_ms"),
    *("overhead_p20_ms", "overhead_p50_ms", "overhead_p80_ms", "overhead_percent", "error"),
]


def recorded(network: str, mode: str, variant: str, samples: list[float]) -> dict:
    info = {"network": network, "mode": mode, "threads": 1, "variant": variant, "error": 1e-7}
    return {"extra_info": info | {"floor_bytes": 8_000_000}, "stats": {"data": samples}}


RUN = {
    "machine_info": {
        "machine": "x86_64",
        "cpu": {"brand_raw": "A CPU"},
        "cores": 4,
        "fastsn": "1.2.3",
        "torch": "2.13.0",
        "python_version": "3.11.7",
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-01-02T03:04:05+00:00",
    "benchmarks": [
        recorded("D", "forward", "torch", [0.004, 0.005, 0.006, 0.007, 0.008, 0.009]),
        recorded("D", "forward", "fastsn", [0.002] * 6),
        recorded("D", "forward", "copy", [0.001] * 6),
        recorded("GAN", "training step", "none", [1.0, 2.0, 3.0]),
        recorded("GAN", "training step", "fastsn", [1.25, 2.25, 4.0]),
    ],
}


def test_report_computes_percentiles_ratios_and_bandwidth() -> None:
    torch_row, fastsn_row, copy_row = report.tables(RUN)["weights"]
    assert [torch_row[p] for p in ("p20_us", "p50_us", "p80_us")] == pytest.approx(
        [5e3, 6.5e3, 8e3]
    )
    assert fastsn_row["faster_than_torch"] == pytest.approx(3.25)
    assert fastsn_row["times_a_copy"] == pytest.approx(2)
    assert copy_row["gb_per_s"] == pytest.approx(8)


def test_report_takes_overheads_within_rounds() -> None:
    none, fastsn = report.tables(RUN)["training"]
    assert none["overhead_p50_ms"] == 0
    # Between medians of whole samples it would be the same 250 ms, but not at the 80th percentile.
    assert fastsn["overhead_p50_ms"] == pytest.approx(250)
    assert fastsn["overhead_p80_ms"] == pytest.approx(700)
    assert fastsn["overhead_percent"] == pytest.approx(12.5)


def test_report_writes_csv_and_chart_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    out = tmp_path / "cpu"
    report.main([str(tmp_path / "run.json"), "--out", str(out)])
    for name, columns in (("weights", WEIGHTS), ("training", TRAINING)):
        rows = list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
        assert list(rows[0]) == [*columns, *PROVENANCE]
        assert [rows[0][name] for name in PROVENANCE] == [
            *("0123456789ab-dirty", "2026-01-02", "A CPU", "4", "1.2.3", "2.13.0", "3.11.7")
        ]
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "A CPU, 4 cores" in capsys.readouterr().out

    report.main([str(tmp_path / "run.json"), "--out", str(out), "--markdown"])
    printed = capsys.readouterr().out
    assert "| D | forward | 1 | 6.5 ms (1.0x) | 2.0 ms (3.2x) | 1.0 ms (6.5x) |" in printed
    assert "| GAN | training step | 1 | 2000 ms (+0.0 ms) | 2250 ms (+250.0 ms) |" in printed


# All of it


def test_a_quick_run_reports_every_variant(tmp_path: Path) -> None:
    files = [ROOT / "benchmarks" / f"bench_{name}.py" for name in ("weights", "training")]
    command = [sys.executable, "-m", "pytest", *files, "--quick", "--benchmark-quiet", "-q"]
    finished = subprocess.run(
        [*command, f"--benchmark-json={tmp_path / 'run.json'}"],
        cwd=ROOT,
        # It is alone, whatever runs beside these tests.
        env={name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    run = json.loads((tmp_path / "run.json").read_text())
    assert "node" not in run["machine_info"]
    tables = report.tables(run)
    measured = {(row["network"], row["mode"], row["variant"]) for row in tables["weights"]}
    assert measured == {
        (network, mode, variant)
        for network in networks.QUICK_NETWORKS
        for mode in MODES
        for variant in bench_weights.QUICK_VARIANTS
    }
    assert [row["variant"] for row in tables["training"]] == list(bench_training.VARIANTS)
    assert all(row["rounds"] == 3 for rows in tables.values() for row in rows)
    assert all(row["p20_us"] > 0 for row in tables["weights"])
