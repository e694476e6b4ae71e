"""Training steps and inference of MSN's networks: bare, batch norm, SN, MSN in two steps, MSN.

A training step is forward, loss, backward and Adam, on one fixed batch. The classifiers' loss is
cross-entropy; SNDCGAN's discriminator takes the hinge loss of a real and a generated half batch.
Inference is eval mode without gradients. ``fold(msn)`` is what ``fastsn.fold`` makes of the model
for that; a batch norm behind a convolution can be folded as well, so ``none`` stands for both.

Left out: DenseNet-BC at batch 128, whose steps take too long.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastsn
from benchmarks.bench_training import discriminator_loss
from benchmarks.harness import (
    QUICK_PLAN,
    REPLAY,
    ROUNDING,
    Plan,
    Result,
    Work,
    check,
    gradient_of,
    measure,
    torch_threads,
)
from benchmarks.msn_networks import (
    VARIANTS,
    Network,
    build,
    cnn,
    count_parameters,
    densenet,
    matrices,
    reference_of,
    sndcgan,
    vectors,
    vgg7,
)

pytestmark = pytest.mark.benchmark(timer=REPLAY.read)

TRAINING, INFERENCE = "training step", "inference"
PUBLISHED, MSN, FOLDED = "bn + conv bias", "msn", "fold(msn)"
GATE_BATCH = 8


def classifier_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Cross-entropy; the labels are 0 ... 9 in turn."""
    labels = torch.arange(len(images), device=images.device) % 10
    return F.cross_entropy(model(images), labels)


def hinge_loss(model: nn.Module, images: Tensor) -> Tensor:
    return discriminator_loss(model, *images.chunk(2))


class Job(NamedTuple):
    """A network and what it is trained on.

    Attributes:
        conv_bias: whether it was published with a bias before its batch norms.
        slow: whether its larger batch is left out.
    """

    network: Network
    image: tuple[int, int, int] = (3, 32, 32)
    loss: Callable[[nn.Module, Tensor], Tensor] = classifier_loss
    conv_bias: bool = False
    slow: bool = False

    def images(self, count: int) -> Tensor:
        return torch.randn(count, *self.image, generator=torch.Generator().manual_seed(1))


JOBS = {
    "3-layer CNN": Job(cnn, (1, 28, 28), conv_bias=True),
    "VGG7": Job(vgg7, conv_bias=True),
    "DenseNet-BC": Job(densenet, slow=True),
    "SNDCGAN D": Job(sndcgan, loss=hinge_loss),
}
QUICK_JOBS = {
    "small 3-layer CNN": Job(partial(cnn, width=1 / 8), (1, 28, 28), conv_bias=True),
    "small VGG7": Job(partial(vgg7, width=1 / 16), conv_bias=True),
    "small DenseNet-BC": Job(partial(densenet, blocks=(2, 1), growth=4)),
    "small SNDCGAN D": Job(partial(sndcgan, width=1 / 16), loss=hinge_loss),
}


class Contest(NamedTuple):
    """What is the same for all variants that are sampled side by side."""

    name: str
    job: Job
    mode: str
    batch: int
    threads: int
    plan: Plan

    def variants(self) -> list[str]:
        names = [name for name in VARIANTS if name != PUBLISHED or self.job.conv_bias]
        return names if self.mode == TRAINING else [*names, FOLDED]

    def __str__(self) -> str:
        return f"{self.name}, {self.mode}, batch {self.batch}, threads: {self.threads}"


def contests(quick: bool) -> list[Contest]:
    if quick:
        settings = [(4, 1)]
        jobs, plan = QUICK_JOBS, QUICK_PLAN
    else:
        settings = [(32, 1), (32, 2), (128, 1), (128, 2)]
        jobs, plan = JOBS, Plan(seconds=20, least=7, most=100)
    return [
        Contest(name, job, mode, batch, threads, plan)
        for name, job in jobs.items()
        for mode in (TRAINING, INFERENCE)
        for batch, threads in settings
        if not (job.slow and batch == 128)
    ]


def smooth(network: Network) -> Network:
    """The network with smooth activations and poolings in place of its own.

    A unit within a rounding of the kink of a ReLU, or two of a maximum's, makes of one rounding
    another gradient, which says nothing about what computed it.
    """

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            return nn.Softplus()
        if isinstance(module, nn.MaxPool2d):
            return nn.AvgPool2d(module.kernel_size)
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    return lambda variant: replaced(network(variant))


def first_gradients(job: Job, model: nn.Module, images: Tensor) -> list[Tensor]:
    """The loss of a first training step, and its gradients."""
    loss = job.loss(model, images)
    loss.backward()
    return [loss.detach(), *map(gradient_of, [*matrices(model), *vectors(model)])]


def joined(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """All as one, each in units of its largest exact entry, so that a small tensor counts as well.

    Some gradients are zero but for rounding (of a bias before batch norm): units are at least a
    thousandth of the largest of all.
    """
    largest = [tensor.abs().max().item() for tensor in exact]
    units = [max(unit, max(largest) / 1e3) for unit in largest]
    return [torch.cat([(t / unit).flatten() for t, unit in zip(tensors, units, strict=True)])]


def gate(job: Job, variant: str) -> float:
    """Check a training step, then eval mode, against torch alone in fp64, from the same state.

    Returns the largest relative error.
    """
    network = smooth(job.network)
    base = MSN if variant == FOLDED else variant
    model = build(network, base)
    rounded = reference_of(network, base, model)
    exact = copy.deepcopy(rounded).double()
    images = job.images(GATE_BATCH)
    rounding = ROUNDING * len(matrices(model))  # every layer adds its own

    truth = first_gradients(job, exact, images.double())
    trained = [joined(first_gradients(job, m, images), truth) for m in (model, rounded)]
    error = check(trained[0], trained[1], joined(truth, truth), rounding)

    tested = fastsn.fold(model) if variant == FOLDED else model
    with torch.no_grad():
        output, other = (m.eval()(images) for m in (tested, rounded))
        truth = [exact.eval()(images.double())]
    return max(error, check([output], [other], truth, rounding))


def training_work(job: Job, model: nn.Module, images: Tensor) -> Work:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        job.loss(model, images).backward()
        optimizer.step()

    return Work(step)


def inference_work(model: nn.Module, images: Tensor) -> Work:
    @torch.no_grad()
    def evaluate() -> Tensor:
        return model(images)

    model.eval()
    return Work(evaluate)


class Timed(NamedTuple):
    """The result of a variant, and how many parameters it trains."""

    result: Result
    parameters: int


def compete(contest: Contest, variants: Sequence[str]) -> dict[str, Timed]:
    """Gate every variant, then time them side by side; a failing gate: time nothing."""
    job = contest.job
    errors = {variant: gate(job, variant) for variant in variants}
    images = job.images(contest.batch)
    works, parameters = {}, {}
    for variant in variants:
        model = build(job.network, MSN if variant == FOLDED else variant)
        parameters[variant] = count_parameters(model)
        if contest.mode == TRAINING:
            works[variant] = training_work(job, model, images)
        else:
            model = fastsn.fold(model) if variant == FOLDED else model
            works[variant] = inference_work(model, images)
    samples = measure(works, contest.plan)
    return {
        variant: Timed(Result(samples[variant], errors[variant]), parameters[variant])
        for variant in variants
    }


@lru_cache(maxsize=1)
def results(contest: Contest) -> dict[str, Timed]:
    with torch_threads(contest.threads):
        return compete(contest, contest.variants())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" in metafunc.fixturenames:
        pairs = [
            (contest, variant)
            for contest in contests(metafunc.config.getoption("quick"))
            for variant in contest.variants()
        ]
        metafunc.parametrize(
            ("contest", "variant"),
            pairs,
            ids=[f"{contest}, {variant}" for contest, variant in pairs],
        )


def test_msn(benchmark: BenchmarkFixture, contest: Contest, variant: str) -> None:
    timed = results(contest)[variant]
    benchmark.group = str(contest)
    REPLAY.record(
        benchmark,
        timed.result.samples,
        network=contest.name,
        mode=f"{contest.mode}, batch {contest.batch}",
        threads=contest.threads,
        variant=variant,
        parameters=timed.parameters,
        error=timed.result.error,
    )
