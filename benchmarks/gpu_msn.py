"""MSN on a GPU: training steps of VGG7, bare, with batch norm, SN, MSN in two steps, and MSN.

Forward, cross-entropy, backward and Adam on one fixed batch, in fp32 and under bf16 autocast, eager
and captured whole in a CUDA graph, as in :mod:`benchmarks.gpu_training`, whose rows these are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsn
from benchmarks.bench_msn import GATE_BATCH, Job, first_gradients, smooth
from benchmarks.gpu_device import Device
from benchmarks.gpu_sampling import Recorder, Times
from benchmarks.gpu_training import (
    PRECISIONS,
    autocast,
    backend_of,
    compete,
    exact_convolutions,
    judge,
    sample_steps,
)
from benchmarks.harness import Plan
from benchmarks.msn_networks import build, reference_of, vgg7

VARIANTS = ("none", "bn", "sn", "msn two-step", "msn")
OWN = ("sn", "msn two-step", "msn")
JOBS = {"VGG7": Job(vgg7)}
QUICK_JOBS = {"small VGG7": Job(partial(vgg7, width=1 / 16))}
BATCH, QUICK_BATCH = 128, 4


def built(job: Job, variant: str, device: Device) -> nn.Module:
    with torch.device(device.kind):
        return build(job.network, variant)


def gate(job: Job, variant: str, device: Device, precision: str) -> float:
    """Check loss and gradients of a first step against torch's in fp64, from the same state.

    Returns the error, relative in the Euclidean norm. Activations are smooth ones.
    """
    even = job._replace(network=smooth(job.network))
    model = built(even, variant, device)
    with torch.device(device.kind):
        rounded = reference_of(even.network, variant, model)
    exact = copy.deepcopy(rounded).double()
    images = job.images(GATE_BATCH).to(device.kind)

    def first(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
        with autocast(device, dtype):
            found = first_gradients(even, model, images)
        return torch.cat([x.double().flatten() for x in found])

    with exact_convolutions(device):
        wanted = first(exact, images.double(), None)
        actual, peer = (first(m, images, PRECISIONS[precision]) for m in (model, rounded))
    return judge(actual, peer, wanted, precision)


class Contestant:
    """The training of one variant: gated, perhaps captured, and ready to be sampled."""

    def __init__(
        self,
        job: Job,
        variant: str,
        batch: int,
        device: Device,
        precision: str,
        is_captured: bool,
        backend: str,
    ) -> None:
        self.device = device
        self.backend = backend
        with fastsn.use_backend(backend):
            self.error = gate(job, variant, device, precision)
            self.run: Callable[[], Any] = self._step(job, variant, batch, precision)
            if is_captured:
                self.run, _ = device.capture(self.run, lambda: None)

    def _step(self, job: Job, variant: str, batch: int, precision: str) -> Callable[[], None]:
        model = built(job, variant, self.device)
        images = job.images(batch).to(self.device.kind)
        labels = torch.arange(batch, device=self.device.kind) % 10
        settings: dict[str, Any] = self.device.adam
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, **settings)

        def step() -> None:
            optimizer.zero_grad()
            with autocast(self.device, PRECISIONS[precision]):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

        return step

    def sample(self) -> Times:
        return sample_steps(self.run, self.device, self.backend)


def hold(name: str, job: Job, batch: int, precision: str, recorder: Recorder, plan: Plan) -> None:
    """Gate, then sample all variants side by side, and record the rows."""
    backend = backend_of(recorder)

    def enter(variant: str, is_captured: bool) -> Contestant:
        device = recorder.device
        return Contestant(job, variant, batch, device, precision, is_captured, backend)

    compete("msn", name, precision, VARIANTS, OWN, enter, recorder, plan)
