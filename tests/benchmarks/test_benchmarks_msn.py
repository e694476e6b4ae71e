"""MSN's networks, benchmark and training study: sizes, gates, report, what the study records."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsn
from benchmarks import (
    bench_msn,
    gpu,
    gpu_msn,
    gpu_report,
    gpu_training,
    msn_networks,
    msn_study,
    report,
)
from benchmarks.bench_msn import FOLDED, QUICK_JOBS
from benchmarks.gpu_device import Device
from benchmarks.harness import QUICK_PLAN
from benchmarks.msn_networks import (
    REFERENCES,
    VARIANTS,
    build,
    cnn,
    count_parameters,
    densenet,
    matrices,
    sndcgan,
    vgg7,
)
from fastsn import means

ROOT = Path(__file__).parents[2]


# Networks


@pytest.mark.parametrize(
    ("network", "bn", "msn"),
    [(cnn, 103_562, 103_482), (vgg7, 438_314, 437_738), (densenet, 1_009_730, 994_251)],
    ids=["cnn", "vgg7", "densenet"],
)
def test_published_sizes(network: msn_networks.Network, bn: int, msn: int) -> None:
    """The first two with the biases that a normalization takes away again."""
    biased = network is not densenet
    names = ("bn", "msn two-step")
    counts = [count_parameters(network(replace(VARIANTS[n], conv_bias=biased))) for n in names]
    assert counts == [bn, msn]


@pytest.mark.parametrize(
    ("network", "counts"),
    [
        (cnn, [103_402, 103_482, 103_562, 103_402, 103_402, 103_402]),
        (vgg7, [437_162, 437_738, 438_314, 437_162, 437_162, 437_162]),
        (densenet, [982_139, 1_009_730, 1_013_097, 982_139, 994_251, 994_251]),
        (sndcgan, [2_935_873, 2_936_769, 2_937_665, 2_935_873, 2_935_873, 2_935_873]),
    ],
    ids=["cnn", "vgg7", "densenet", "sndcgan"],
)
def test_sizes(network: msn_networks.Network, counts: list[int]) -> None:
    assert [count_parameters(network(variant)) for variant in VARIANTS.values()] == counts


@pytest.mark.parametrize("job", QUICK_JOBS)
def test_all_variants_start_from_the_same_weights(job: str) -> None:
    plain = matrices(build(QUICK_JOBS[job].network, "none"))
    for variant in VARIANTS:
        model = build(QUICK_JOBS[job].network, variant)
        assert all(map(torch.equal, matrices(model), plain))
        if variant in REFERENCES:
            # u and v belong to these weights, not to those that the layers were made with. Only the
            # last layer may be without.
            sigmas = fastsn.sigmas(model).values()
            assert len(plain) - len(sigmas) <= 1
            for sigma, weight in zip(sigmas, plain, strict=False):
                largest = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
                assert 0.8 * largest < sigma < 1.0001 * largest
    other = matrices(build(QUICK_JOBS[job].network, "none", seed=1))
    assert not any(map(torch.equal, other, plain))


def test_sndcgan_normalizes_where_it_is_told() -> None:
    def places(model: nn.Module) -> list[bool]:
        return [isinstance(m, fastsn.nn.MSNConv2d) for m in model if isinstance(m, nn.Conv2d)]

    assert places(sndcgan(VARIANTS["msn"], 1 / 16)) == [False] * 3 + [True, False, True, True]
    assert places(sndcgan(VARIANTS["msn"], 1 / 16, where=tuple(range(1, 8)))) == [True] * 7


# The gate

ALL = [*VARIANTS, FOLDED]


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("job", QUICK_JOBS)
def test_gate_passes_every_variant(job: str, variant: str) -> None:
    # The gradient of a bias before batch norm is rounding alone.
    assert bench_msn.gate(QUICK_JOBS[job], variant) < (1e-2 if "bias" in variant else 2e-4)


class Wrong(fastsn.nn.SNConv2d):
    """MSN with a mistake."""

    def __init__(self, *args: object, bias: bool = True, **kwargs: object) -> None:
        super().__init__(*args, **kwargs, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)
        self.running_mean = torch.zeros(self.out_channels)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding)

    def mean(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.mean((0, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.output(x)
        mean = self.mean(x, y) if self.training else self.running_mean
        if self.training:
            self.running_mean = self.running_mean.lerp(mean.detach(), 0.1)
        y = y - mean[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


class MeanWithoutGradient(Wrong):
    def mean(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.mean((0, 2, 3)).detach()


class MeanWithoutBorders(Wrong):
    """Every tap meets the whole image."""

    def mean(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kernel = torch.linalg.vector_norm(y, dim=(0, 2, 3)).sign()  # ones, of the outputs' size
        return (
            kernel
            * F.conv2d(
                x.mean((0, 2, 3))[:, None, None].expand(-1, *self.kernel_size), self.weights
            ).flatten()
        )

    def output(self, x: torch.Tensor) -> torch.Tensor:
        self.weights = self.weight
        return F.conv2d(x, self.weights, None, self.stride, self.padding)


class NoRunningMean(Wrong):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.running_mean = torch.zeros(self.out_channels)
        return y


@pytest.mark.parametrize("mistake", [None, MeanWithoutGradient, MeanWithoutBorders, NoRunningMean])
@pytest.mark.parametrize("job", QUICK_JOBS)
def test_a_failing_gate_times_nothing(
    monkeypatch: pytest.MonkeyPatch, job: str, mistake: type[Wrong] | None
) -> None:
    variant = replace(VARIANTS["msn"], normalized=mistake or Wrong)
    monkeypatch.setitem(msn_networks.VARIANTS, "msn", variant)
    contest = bench_msn.Contest(job, QUICK_JOBS[job], bench_msn.TRAINING, 4, 1, QUICK_PLAN)
    monkeypatch.setattr(bench_msn, "measure", lambda works, plan: dict.fromkeys(works, [1.0]))
    if mistake is None:
        assert bench_msn.compete(contest, ["msn"])["msn"].result.samples == [1.0]
        return
    monkeypatch.setattr(bench_msn, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="expected an error"):
        bench_msn.compete(contest, ["msn"])


def test_contests() -> None:
    contests = bench_msn.contests(quick=False)
    settings = {name: [] for name in bench_msn.JOBS}
    for contest in contests:
        if contest.mode == bench_msn.TRAINING:
            settings[contest.name].append((contest.batch, contest.threads))
            assert FOLDED not in contest.variants()
        else:
            assert contest.variants()[-1] == FOLDED
    every = [(32, 1), (32, 2), (128, 1), (128, 2)]
    assert list(settings.values()) == [every, every, every[:2], every]
    assert len(contests) == 2 * 14


# Report

COLUMNS = [
    *("network", "mode", "threads", "variant", "parameters", "rounds", "p20_ms", "p50_ms"),
    *("p80_ms", "faster_than_bn", "times_bare_p20", "times_bare_p50", "times_bare_p80", "error"),
]


def recorded(mode: str, variant: str, parameters: int, samples: list[float]) -> dict:
    info = {"network": "VGG7", "mode": mode, "threads": 1, "variant": variant, "error": 1e-7}
    return {"extra_info": info | {"parameters": parameters}, "stats": {"data": samples}}


RUN = {
    "machine_info": {
        "machine": "x86_64",
        "cpu": {"brand_raw": "A CPU"},
        "cores": 4,
        "fastsn": "1.2.3",
        "torch": "2.13.0",
        "python_version": "3.11.7",
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2026-01-02T03:04:05+00:00",
    "benchmarks": [
        recorded("training step, batch 32", "none", 1000, [0.010, 0.020, 0.040]),
        recorded("training step, batch 32", "bn", 1020, [0.015, 0.030, 0.050]),
        recorded("training step, batch 32", "msn", 1010, [0.010, 0.024, 0.040]),
        recorded("inference, batch 32", "none", 1000, [0.001] * 3),
        recorded("inference, batch 32", "bn", 1020, [0.002] * 3),
        recorded("inference, batch 32", "fold(msn)", 1010, [0.001] * 3),
    ],
}


def test_report_takes_ratios_within_rounds() -> None:
    (name, rows), *others = report.tables(RUN).items()
    assert (name, others) == ("msn", [])
    assert [row["times_bare_p50"] for row in rows[:3]] == pytest.approx([1, 1.5, 1])
    # Between medians of whole samples it would be 1.2.
    assert rows[2]["times_bare_p80"] == pytest.approx(1.12)
    assert rows[2]["faster_than_bn"] == pytest.approx(1.25)
    assert rows[2]["p50_ms"] == pytest.approx(24)
    assert [row["parameters"] for row in rows[:3]] == [1000, 1020, 1010]


def test_report_writes_csv_and_picture_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    out = tmp_path / "cpu"
    report.main([str(tmp_path / "run.json"), "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["msn.csv", "msn.png"]
    rows = list(csv.DictReader((out / "msn.csv").read_text().splitlines()))
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert rows[2]["commit"] == "0123456789ab"
    assert (out / "msn.png").read_bytes().startswith(b"\x89PNG")
    assert "A CPU, 4 cores" in capsys.readouterr().out

    report.main([str(tmp_path / "run.json"), "--out", str(out), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert "| network | mode | threads | none | bn | msn | fold(msn) |" in lines
    assert "| VGG7 | trainable parameters |  | 1000 | 1020 | 1010 | 1010 |" in lines
    assert (
        "| VGG7 | inference, batch 32 | 1 | 1 ms (2.00x, 1.00) | 2 ms (1.00x, 2.00) |  "
        "| 1 ms (2.00x, 1.00) |"
    ) in lines


# The study


def test_watch_sees_means_before_activations_and_zeros_of_gradients() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), fastsn.nn.SNConv2d(2, 3, 1), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([4.0, -50.0]))
    x = torch.arange(8.0).view(2, 1, 2, 2)
    with msn_study.Watch() as seen:
        loss = model(x).square().sum()
    loss.backward()
    # The second channel is negative everywhere: the ReLU lets no gradient through, nor an input to
    # the second layer, where the gradient by W has a zero nowhere, as sigma depends on all of it.
    assert seen.means[0].tolist() == [7.5, -57]
    assert seen.variances[0].tolist() == pytest.approx([5.25, 21])
    assert seen.zeros == [0.5, 0.5, 0]
    assert (model[2].parametrizations.weight.original.grad != 0).all()
    assert len(seen.means) == 2
    assert not any(weight._backward_hooks for weight in matrices(model))


def test_drift_is_since_the_first_step() -> None:
    first, *steps = (msn_study.Watch() for _ in range(3))
    for watch, mean in zip((first, *steps), ([1.0, -1.0], [2.0, -1.0], [4.0, 1.0]), strict=True):
        watch.means, watch.zeros = [torch.tensor(mean)], [0.5, 0.25]
        watch.variances = [torch.tensor([3.0, 5.0])]
    conv, dense = msn_study.layer_rows(steps, first)
    assert conv == {"layer": "conv1", "mean": 1.5, "drift": 1.5, "std": 2, "sparsity": 0.5}
    assert dense == {"layer": "dense", "sparsity": 0.25}


def test_digits_are_split_without_overlap() -> None:
    data = msn_study.digits(28)
    assert data.images.shape == (1438, 1, 28, 28)
    assert data.held_out_images.shape == (359, 1, 28, 28)
    both = torch.cat([data.images, data.held_out_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797
    assert torch.equal(data.images, msn_study.digits(28).images)
    assert set(data.held_out_labels.tolist()) == set(range(10))
    std, mean = torch.std_mean(data.standardized().images)
    assert (std.item(), mean.item()) == (pytest.approx(1, abs=1e-4), pytest.approx(0, abs=1e-4))


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = torch.randint(256, (8, 3072), dtype=torch.uint8, generator=random).numpy()
        batch = {b"data": data, b"labels": list(range(8)), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch))
    return folder


def test_cifar10_is_read_and_trains(cifar10: Path) -> None:
    data = msn_study.cifar10(cifar10)
    assert data.images.shape == (40, 3, 32, 32)
    assert data.held_out_images.shape == (8, 3, 32, 32)
    assert data.labels.tolist() == list(range(8)) * 5
    third = pickle.loads((cifar10 / "data_batch_3").read_bytes())[b"data"]
    assert data.images[17, 2, 5, 7] == third[1, 2 * 1024 + 5 * 32 + 7]
    for network in msn_study.NETWORKS:
        settings = msn_study.Settings(epochs=1, cifar10=cifar10, width=1 / 8)
        epochs, layers = msn_study.train(msn_study.Task(network, "msn", 0, settings))
        assert 0 <= epochs[0]["accuracy"] <= 1
        assert len(layers) == (4 if network == msn_study.CNN else 7)


def test_training_learns() -> None:
    """Three epochs of a narrow CNN, MSN: far more than a tenth of the held-out digits is right."""
    settings = msn_study.Settings(epochs=3, width=1 / 4)
    task = msn_study.Task(msn_study.CNN, "msn", 0, settings)
    epochs, layers = msn_study.train(task)
    assert epochs[-1]["accuracy"] > 0.5
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert layers[-4]["drift"] > layers[0]["drift"] > 0
    assert msn_study.train(task) == (epochs, layers)


def test_a_quick_study(tmp_path: Path) -> None:
    msn_study.main(["--quick", "--processes", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("3-layer-cnn.png", "epochs.csv", "layers.csv", "summary.json", "table.txt", "vgg7.png")
    ]
    rows = list(csv.DictReader((tmp_path / "epochs.csv").read_text().splitlines()))
    keys = [(row["network"], row["variant"], row["seed"], row["epoch"]) for row in rows]
    assert keys == [
        (network, variant, seed, epoch)
        for network in msn_study.NETWORKS
        for variant in ("none", "bn", "sn", "msn")
        for seed in "01"
        for epoch in "12"
    ]
    layers = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert len(layers) == (4 + 7) * 4 * 2 * 2
    assert {row["drift"] == "" for row in layers if row["layer"] == "dense"} == {True}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["rows"]) == 8
    assert "VGG7" in (tmp_path / "table.txt").read_text(encoding="utf-8")


# All of it


def test_a_quick_run_reports_every_variant(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_msn.py", "--quick", "-q"]
    finished = subprocess.run(
        [*command, "--benchmark-quiet", f"--benchmark-json={tmp_path / 'run.json'}"],
        cwd=ROOT,
        # It is alone, whatever runs beside these tests.
        env={name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = report.tables(json.loads((tmp_path / "run.json").read_text()))["msn"]
    assert [(row["network"], row["mode"], row["variant"]) for row in rows] == [
        (contest.name, f"{contest.mode}, batch 4", variant)
        for contest in bench_msn.contests(quick=True)
        for variant in contest.variants()
    ]
    assert all(row["rounds"] == 3 and row["p20_ms"] > 0 for row in rows)


# On a GPU; here on the CPU, which stands in


@pytest.mark.parametrize("precision", gpu_training.PRECISIONS)
def test_quick_msn_measures_every_variant(tmp_path: Path, precision: str) -> None:
    task = f"msn small VGG7, {precision}"
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", task]
    assert gpu.main(arguments) == 0
    rows = [r for r in gpu_report.read(tmp_path / "measurements.csv") if r["part"] == "msn"]
    assert [(r["mode"], r["variant"]) for r in rows] == [
        (f"{precision}, {way}", variant)
        for way in ("eager", "captured")
        for variant in gpu_msn.VARIANTS
    ]
    assert all(float(r["median_us"]) > 0 and r["overhead_percent"] and r["error"] for r in rows)


@pytest.mark.parametrize("precision", gpu_training.PRECISIONS)
def test_msn_gate_fails_where_the_mean_is_wrong(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = gpu_msn.QUICK_JOBS["small VGG7"]
    assert gpu_msn.gate(job, "msn", Device(), precision) < 0.1
    patch_mean = means.patch_mean
    monkeypatch.setattr(means, "patch_mean", lambda *args: patch_mean(*args) * 0.9)
    with pytest.raises(AssertionError, match="expected an error"):
        gpu_msn.gate(job, "msn", Device(), precision)
