"""A whole training step of SNDCGAN with the discriminator normalized: what a user feels.

One step updates the discriminator on the hinge loss of a real and a generated batch, then the
generator, with Adam (setting C of Miyato et al., 2018). The overhead over the same step with no
normalization is the figure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastsn
import fastsn.parametrizations
from benchmarks.harness import (
    QUICK_PLAN,
    REPLAY,
    Plan,
    Result,
    Work,
    check,
    gradient_of,
    measure,
    torch_threads,
)
from benchmarks.networks import SNDCGANDiscriminator, SNDCGANGenerator, normalize_with

pytestmark = pytest.mark.benchmark(timer=REPLAY.read)

LATENT = 128


class Setup(NamedTuple):
    """The size of the job: images of the batch, and the width of both networks."""

    batch: int = 64
    width: float = 1.0


QUICK_SETUP = Setup(batch=4, width=1 / 16)


def unchanged(model: nn.Module) -> nn.Module:
    return model


def with_torch(model: nn.Module) -> nn.Module:
    return normalize_with(model, parametrizations.spectral_norm)


def with_fastsn(model: nn.Module) -> nn.Module:
    return fastsn.accelerate(normalize_with(model, fastsn.parametrizations.spectral_norm))


@dataclass(frozen=True)
class Variant:
    """``normalize`` takes the discriminator in place, ``reference`` is torch's way to the same."""

    normalize: Callable[[nn.Module], nn.Module]
    reference: Callable[[nn.Module], nn.Module]


VARIANTS = {
    "none": Variant(unchanged, unchanged),
    "torch": Variant(with_torch, with_torch),
    "fastsn": Variant(with_fastsn, with_torch),
}


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()


def generator_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    return -discriminator(fake).mean()


class Training:
    """A discriminator, its generator, their optimizers, and one fixed batch for every step."""

    def __init__(self, discriminator: nn.Module, generator: nn.Module, batch: int) -> None:
        self.discriminator = discriminator
        self.generator = generator
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
        self.optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
        draw = torch.Generator().manual_seed(1)
        self.real = torch.rand(batch, 3, 32, 32, generator=draw) * 2 - 1
        self.latents = torch.randn(batch, LATENT, generator=draw)

    def step(self) -> None:
        self.optimizer_d.zero_grad()
        fake = self.generator(self.latents).detach()
        discriminator_loss(self.discriminator, self.real, fake).backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad()
        generator_loss(self.discriminator, self.generator(self.latents)).backward()
        self.optimizer_g.step()


def first_gradients(discriminator: nn.Module, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The discriminator's loss, half of ``images`` real and half fake, and its gradients."""
    discriminator.zero_grad()
    real, fake = images.to(dtype).chunk(2)
    loss = discriminator_loss(discriminator, real, fake)
    loss.backward()
    return [loss.detach(), *map(gradient_of, discriminator.parameters())]


def gate(variant: Variant, plain: nn.Module, normalized: nn.Module) -> float:
    """Check the loss and gradients of a discriminator update against torch's in fp64, same state.

    Two forwards come before the backward. Returns the largest relative error. ``normalized`` takes
    two iterations, as after one update.
    """
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    rounded = variant.reference(copy.deepcopy(plain))
    rounded.load_state_dict(normalized.state_dict())
    exact = copy.deepcopy(rounded).double()
    return check(
        first_gradients(normalized, images, torch.float32),
        first_gradients(rounded, images, torch.float32),
        first_gradients(exact, images, torch.float64),
    )


def compete(setup: Setup, plan: Plan, variants: Mapping[str, Variant]) -> dict[str, Result]:
    """Gate every variant, then time their steps side by side; a failing gate: time nothing."""
    torch.manual_seed(0)
    plain = SNDCGANDiscriminator(width=setup.width)
    generator = SNDCGANGenerator(LATENT, width=setup.width)
    works = {}
    errors = {}
    for name, variant in variants.items():
        discriminator = variant.normalize(copy.deepcopy(plain))
        errors[name] = gate(variant, plain, discriminator)
        training = Training(discriminator, copy.deepcopy(generator), setup.batch)
        works[name] = Work(training.step)
    samples = measure(works, plan)
    return {name: Result(samples[name], errors[name]) for name in variants}


@lru_cache(maxsize=1)
def results(threads: int, quick: bool) -> dict[str, Result]:
    with torch_threads(threads):
        if quick:
            return compete(QUICK_SETUP, QUICK_PLAN, VARIANTS)
        # The overhead is a small difference of long times: it takes many rounds to show.
        return compete(Setup(), Plan(seconds=90, least=20), VARIANTS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize("threads", [1] if quick else [1, 2])
    metafunc.parametrize("variant", VARIANTS)


def test_training_step(
    benchmark: BenchmarkFixture, quick: bool, threads: int, variant: str
) -> None:
    result = results(threads, quick)[variant]
    benchmark.group = f"SNDCGAN, training step, threads: {threads}"
    REPLAY.record(
        benchmark,
        result.samples,
        network="SNDCGAN",
        mode="training step",
        threads=threads,
        variant=variant,
        error=result.error,
    )
