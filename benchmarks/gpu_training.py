"""A whole GAN training step on a GPU with the discriminator normalized: what a user feels.

One step updates the discriminator on the hinge loss of a real and a generated batch, then the
generator, with Adam, as in ``bench_training.py``. The overhead over the same step with no
normalization is the figure, in fp32 and under bf16 autocast, eager and captured whole in a CUDA
graph. fp32 convolutions use what torch uses by default (TF32 on GPUs that have it), except in the
gate. Adam is fused, so that nothing else in the step is slow for no reason.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsn
from benchmarks import bench_training
from benchmarks.gpu_device import Device
from benchmarks.gpu_sampling import (
    DeviceLost,
    Recorder,
    Row,
    Times,
    quartiles,
    take_turns,
    time_columns,
)
from benchmarks.harness import Plan
from benchmarks.networks import (
    BigGANDiscriminator,
    ResNetDiscriminator,
    SNDCGANDiscriminator,
    SNDCGANGenerator,
)

LATENT = 128
#: Steps of one sample: as in training, nothing waits for the device between them.
STEPS = 4
#: No normalization: what the others are compared with.
BASELINE = "none"


@dataclass(frozen=True)
class Job:
    """What is trained. There is one generator for all: it is not what is measured."""

    discriminator: Callable[[], nn.Module]
    batch: int
    size: int = 32
    classes: int = 0
    generator_width: float = 1.0


JOBS = {
    "SNDCGAN": Job(SNDCGANDiscriminator, batch=64),
    "SN-ResNet": Job(ResNetDiscriminator, batch=64),
    "BigGAN-128 D": Job(BigGANDiscriminator, batch=8, size=128, classes=1000),
}
QUICK_JOBS = {
    "small SNDCGAN": Job(
        partial(SNDCGANDiscriminator, width=1 / 16), batch=4, generator_width=1 / 16
    ),
    "small BigGAN D": Job(
        partial(BigGANDiscriminator, classes=10, width=1 / 16),
        batch=2,
        size=32,
        classes=10,
        generator_width=1 / 16,
    ),
}
NORMALIZERS = {
    "none": bench_training.unchanged,
    "torch": bench_training.with_torch,
    "fastsn": bench_training.with_fastsn,
}
PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}


def autocast(device: Device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class Batch:
    """Real images, latents, and the arguments of the discriminator besides images."""

    def __init__(self, job: Job, count: int, device: Device, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(1)
        real = torch.rand(count, 3, job.size, job.size, generator=draw) * 2 - 1
        latents = torch.randn(count, LATENT, generator=draw)
        self.real, self.latents = (x.to(device.kind, dtype) for x in (real, latents))
        labels = torch.randint(job.classes or 1, (count,), generator=draw).to(device.kind)
        self.labels: tuple[Tensor, ...] = (labels,) if job.classes else ()


def discriminator_loss(
    discriminator: nn.Module, real: Tensor, fake: Tensor, labels: tuple[Tensor, ...]
) -> Tensor:
    of_real = F.relu(1 - discriminator(real, *labels)).mean()
    return of_real + F.relu(1 + discriminator(fake, *labels)).mean()


class Training:
    """A discriminator, its generator, their optimizers, and one fixed batch for every step."""

    def __init__(
        self,
        job: Job,
        discriminator: nn.Module,
        generator: nn.Module,
        device: Device,
        precision: torch.dtype | None,
    ) -> None:
        self.discriminator = discriminator
        self.generator = generator
        self.batch = Batch(job, job.batch, device, torch.float32)
        options: dict[str, Any] = {"betas": (0.5, 0.999), **device.adam}
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), 2e-4, **options)
        self.optimizer_g = torch.optim.Adam(generator.parameters(), 2e-4, **options)
        self.autocast = partial(autocast, device, precision)

    def step(self) -> None:
        batch = self.batch
        self.optimizer_d.zero_grad()
        with self.autocast():
            fake = self.generator(batch.latents).detach()
            loss = discriminator_loss(self.discriminator, batch.real, fake, batch.labels)
        loss.backward()
        self.optimizer_d.step()

        self.optimizer_g.zero_grad()
        with self.autocast():
            loss = -self.discriminator(self.generator(batch.latents), *batch.labels).mean()
        loss.backward()
        self.optimizer_g.step()


def first_gradients(
    job: Job, discriminator: nn.Module, device: Device, precision: torch.dtype | None
) -> Tensor:
    """The discriminator's loss and its gradients, in one vector; two images real, two fake."""
    discriminator.zero_grad()
    dtype = next(discriminator.parameters()).dtype
    batch = Batch(job, 2, device, dtype)
    with autocast(device, precision):
        loss = discriminator_loss(discriminator, batch.real, batch.real.flip(0, 3), batch.labels)
    loss.backward()
    gradients = [p.grad for p in discriminator.parameters() if p.grad is not None]
    assert len(gradients) == len(list(discriminator.parameters())), "a gradient is missing"
    discriminator.zero_grad()
    return torch.cat([x.detach().double().flatten() for x in (loss, *gradients)])


def exact_convolutions(device: Device) -> contextlib.AbstractContextManager[None]:
    """No TF32: what is compared with fp64 must be fp32."""
    if device.kind == "cpu":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


#: What an error may exceed twice that of torch by: roundings, and activations that fall on the
#: other side of a kink.
SLACK = {"fp32": 1e-4, "bf16 autocast": 1e-2}


def gate(
    job: Job, variant: str, plain: nn.Module, normalized: nn.Module, device: Device, precision: str
) -> float:
    """Check the loss and gradients of a discriminator update against torch's in fp64, same state.

    Two forwards come before the backward. Returns the error, relative in the Euclidean norm. It may
    be twice that of torch in the same precision plus :data:`SLACK`.
    """
    reference = NORMALIZERS["torch" if variant == "fastsn" else variant]
    rounded = reference(copy.deepcopy(plain))
    rounded.load_state_dict(normalized.state_dict())
    exact = copy.deepcopy(rounded).double()
    dtype = PRECISIONS[precision]
    with exact_convolutions(device):
        wanted = first_gradients(job, exact, device, None)
        actual, peer = (first_gradients(job, m, device, dtype) for m in (normalized, rounded))
    return judge(actual, peer, wanted, precision)


def judge(actual: Tensor, peer: Tensor, wanted: Tensor, precision: str) -> float:
    """The relative error of ``actual``: at most twice that of ``peer`` plus :data:`SLACK`."""
    size = wanted.norm()
    error, of_peer = (((x - wanted).norm() / size).item() for x in (actual, peer))
    allowed = 2 * of_peer + SLACK[precision]
    # Written so that NaN fails.
    assert error <= allowed, f"expected an error <= {allowed:.3g}, got {error:.3g}"
    return error


class Contestant:
    """The training of one variant: gated, perhaps captured, and ready to be sampled."""

    def __init__(
        self,
        job: Job,
        variant: str,
        plain: nn.Module,
        generator: nn.Module,
        device: Device,
        precision: str,
        is_captured: bool,
        backend: str,
    ) -> None:
        self.backend = backend
        self.device = device
        with fastsn.use_backend(backend):
            discriminator = NORMALIZERS[variant](copy.deepcopy(plain))
            self.error = gate(job, variant, plain, discriminator, device, precision)
            self.training = Training(
                job, discriminator, copy.deepcopy(generator), device, PRECISIONS[precision]
            )
            self.run: Callable[[], Any] = self.training.step
            if is_captured:
                self.run, _ = device.capture(self.training.step, lambda: None)

    def sample(self) -> Times:
        return sample_steps(self.run, self.device, self.backend)


def sample_steps(run: Callable[[], Any], device: Device, backend: str) -> Times:
    """Seconds of a step, over several."""
    with fastsn.use_backend(backend):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        device.synchronize()
        return {"wall": (time.perf_counter() - start) / STEPS}


def hold(name: str, job: Job, precision: str, recorder: Recorder, plan: Plan) -> None:
    """Gate, then sample all variants of one training side by side, and record the rows."""
    device = recorder.device
    torch.manual_seed(0)
    with torch.device(device.kind):
        plain = job.discriminator()
        generator = SNDCGANGenerator(LATENT, size=job.size, width=job.generator_width)
    backend = backend_of(recorder)

    def enter(variant: str, is_captured: bool) -> Contestant:
        return Contestant(job, variant, plain, generator, device, precision, is_captured, backend)

    compete("training", name, precision, list(NORMALIZERS), ["fastsn"], enter, recorder, plan)


def backend_of(recorder: Recorder) -> str:
    """The one that trains: the first that works."""
    return next((b for b in recorder.device.backends if b not in recorder.without), "auto")


class Sampled(Protocol):
    """A training that is gated, perhaps captured, and ready."""

    error: float

    def sample(self) -> Times: ...


def compete(
    part: str,
    name: str,
    precision: str,
    variants: Sequence[str],
    own: Sequence[str],
    enter: Callable[[str, bool], Sampled],
    recorder: Recorder,
    plan: Plan,
) -> None:
    """Sample what ``enter`` makes of each variant, eager and captured, and record the rows.

    ``own``: the variants that stand or fall with fastsn's back-end.
    """
    for way in ("eager", "captured"):
        recorder.require_time()
        where = {"part": part, "network": name, "mode": f"{precision}, {way}"}
        what = f"{part} of {name}, {precision}, {way}"
        ready: dict[str, Sampled] = {}

        def gate_one(variant: str, way: str = way, ready: dict[str, Sampled] = ready) -> None:
            ready[variant] = enter(variant, way == "captured")

        try:
            for variant in variants:
                if variant not in recorder.without:
                    gate_call = partial(gate_one, variant)
                    recorder.guard(f"gate of {what}", variant, gate_call, **where)
            samples = take_turns({n: c.sample for n, c in ready.items()}, plan, recorder, what)
        except DeviceLost as lost:
            raise DeviceLost(
                backend_of(recorder) if lost.variant in own else lost.variant
            ) from lost
        recorder.record(
            [
                {**where, "variant": variant, "error": ready[variant].error, **columns}
                for variant, columns in overheads(samples).items()
            ]
        )


def overheads(samples: dict[str, list[Times]]) -> dict[str, Row]:
    """The columns of every variant; the overhead is taken between steps of the same round."""
    plain = [times["wall"] for times in samples.get(BASELINE, [])]
    rows: dict[str, Row] = {}
    for variant, taken in samples.items():
        walls = [times["wall"] for times in taken]
        if not walls:
            continue
        rows[variant] = {"metric": "wall", **time_columns(walls)}
        if len(walls) == len(plain):
            _, overhead, _ = quartiles(
                [step - base for step, base in zip(walls, plain, strict=True)]
            )
            rows[variant] |= {
                "baseline": BASELINE,
                "overhead_us": 1e6 * overhead,
                "overhead_percent": 100 * overhead / quartiles(plain)[1],
            }
    return rows
