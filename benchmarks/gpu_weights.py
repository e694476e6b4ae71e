"""All normalized weights of a network on a GPU: forward, backward, both; eager and captured.

Every variant of one (network, mode) is checked against the reference in fp64 and then sampled side
by side with the others. Metrics, all of them per call:

- ``host``: until the call returns, the device idle before it. Nothing waits for the device.
- ``wall``: until the device has done it, too.
- ``device``: from the first kernel to the last, everything issued ahead, the caches cold.
- ``graph``: the same for the replay of a CUDA graph of the call.
- ``graph wall``: from issuing that replay until the device has done it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsn
import fastsn.parametrizations
from benchmarks import bench_weights
from benchmarks.bench_weights import originals
from benchmarks.gpu_device import Device
from benchmarks.gpu_sampling import Recorder, Row, Times, take_turns, time_columns
from benchmarks.harness import ROUNDING, Plan, check, gradient_of
from benchmarks.networks import layers, normalize_with
from fastsn import engine

Weights = Sequence[Tensor]
Vectors = tuple[list[Tensor], list[Tensor]]

#: The one that all others are compared with.
BASELINE = "torch"


@dataclass(frozen=True)
class Variant:
    """One way to normalize.

    Attributes:
        normalize: takes a plain network, in place.
        reader: given the normalized network, the function that computes all its weights.
        vectors: all u and all v of one of its layers.
        v_first: which of them an iteration computes first.
        backend: fastsn's, while it runs.
        norm: "matrix" (SN) or "bidirectional" (BSN).
        autocast: the type of a surrounding ``torch.autocast``.
        rounding: what the gate allows beyond the reference's own error, in units of the last place.
        is_captured: whether a CUDA graph of it is timed too.
    """

    normalize: Callable[[nn.Module], nn.Module]
    reader: Callable[[nn.Module], Callable[[], Weights]]
    vectors: Callable[[Any], Vectors]
    v_first: bool = False
    backend: str = "auto"
    norm: str = "matrix"
    autocast: torch.dtype | None = None
    rounding: int = ROUNDING
    is_captured: bool = True


def hook_vectors(layer: Any) -> Vectors:
    return [layer.weight_u], [layer.weight_v]


def parametrization_vectors(layer: Any) -> Vectors:
    buffers = layer.parametrizations.weight[0]._buffers
    u, v = ([buffers[name] for name in (f"_{x}", f"_{x}2") if name in buffers] for x in "uv")
    return u, v


def read_operators(model: nn.Module) -> Callable[[], Weights]:
    """The operators alone, for weights, u and v that were listed before."""
    modules = layers(model)
    weights = originals(model)
    u, v = ([x for m in modules for x in parametrization_vectors(m)[i]] for i in (0, 1))
    count = len(weights)
    call = engine.make_call([(0,)] * count, engine.SN, 1e-12, v_first=False)
    work = engine.Pass(call, weights, u, v, [1] * count)
    return lambda: engine.normalize(work)[0]


def read_as_forward(model: nn.Module) -> Callable[[], Weights]:
    """The weights that the layers get in a forward of an accelerated model, and nothing else of it:
    under autocast those are not what a read at any other time returns."""
    modules = layers(model)
    before, after = (
        list(hooks.values()) for hooks in (model._forward_pre_hooks, model._forward_hooks)
    )

    def read() -> Weights:
        for hook in before:
            hook(model, ())
        weights = [module.weight for module in modules]
        for hook in after:
            hook(model, (), None)
        return weights

    return read


def accelerated(model: nn.Module, norm: str = "matrix") -> nn.Module:
    form = partial(fastsn.parametrizations.spectral_norm, norm=norm)
    return fastsn.accelerate(normalize_with(model, form))


FASTSN = Variant(accelerated, bench_weights.read_grouped, parametrization_vectors)
# torch's sums are not ours to judge: their gate only has to show that they compute the same.
TORCH = Variant(
    bench_weights.torch_parametrization,
    bench_weights.read_layers,
    parametrization_vectors,
    rounding=128,
)
COMPILED = replace(TORCH, reader=bench_weights.read_compiled, rounding=1024, is_captured=False)
HOOK = Variant(
    bench_weights.torch_hook, bench_weights.read_hooks, hook_vectors, v_first=True, rounding=128
)
BSN = replace(FASTSN, normalize=partial(accelerated, norm="bidirectional"), norm="bidirectional")


def main_variants(device: Device) -> dict[str, Variant]:
    """torch's two forms, and fastsn and its operators alone by the first of the back-ends."""
    first = device.backends[0]
    return {
        "torch": TORCH,
        "torch hook": HOOK,
        f"fastsn {first}": replace(FASTSN, backend=first),
        "operators": replace(FASTSN, reader=read_operators, backend=first, is_captured=False),
    }


def backend_variants(device: Device) -> dict[str, Variant]:
    """torch, and fastsn by each back-end."""
    own = {f"fastsn {name}": replace(FASTSN, backend=name) for name in device.backends}
    return {"torch": TORCH, **own}


class Subject:
    """A network normalized by one variant, and the gradients of its normalized weights."""

    def __init__(self, variant: Variant, plain: nn.Module, gradients: Weights) -> None:
        self.variant = variant
        self.gradients = gradients
        with self.context():
            self.model = variant.normalize(copy.deepcopy(plain))
            self.read = variant.reader(self.model)

    @contextmanager
    def context(self) -> Iterator[None]:
        """What the variant runs in; entered off the clock."""
        kind = self.gradients[0].device.type
        dtype = self.variant.autocast
        with (
            fastsn.use_backend(self.variant.backend),
            torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            yield

    def forward(self, given: Any = None) -> Weights:
        return self.read()

    def backward(self, weights: Weights) -> Weights:
        torch.autograd.backward(weights, self.gradients)
        return weights

    def forward_backward(self, given: Any = None) -> Weights:
        return self.backward(self.read())

    def reset(self) -> None:
        self.model.zero_grad()


@dataclass(frozen=True)
class Mode:
    """What is timed: ``run`` of what ``prepare`` has returned.

    ``passes`` over the weights is the least that memory has to move, as so many bytes of fp32: the
    forward reads W and writes the normalized weight, the backward reads its gradient and W and
    writes the gradient of W.
    """

    prepare: Callable[[Subject], Any]
    run: Callable[[Subject, Any], Weights]
    passes: float
    backward: bool
    is_captured: bool = True


def nothing(subject: Subject) -> None:
    """Prepare nothing."""


MODES = {
    "forward": Mode(nothing, Subject.forward, passes=2, backward=False),
    # A backward cannot be captured without the forward that it belongs to.
    "backward": Mode(Subject.forward, Subject.backward, passes=3, backward=True, is_captured=False),
    "forward + backward": Mode(nothing, Subject.forward_backward, passes=5, backward=True),
}


def expected(
    parameter: Tensor,
    vectors: Vectors,
    gradient: Tensor | None,
    variant: Variant,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The normalized weight, (its gradient,) u and v by fastsn's reference in ``dtype``."""
    weight = parameter.detach().to(dtype).requires_grad_(gradient is not None)
    u, v = ([x.to(dtype, copy=True) for x in side] for side in vectors)
    with (
        fastsn.use_backend("reference"),
        torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=False),
    ):
        (normalized,), _ = fastsn.functional.spectral_norm(
            [weight], u, v, v_first=variant.v_first, norm=variant.norm
        )
    results = [normalized.detach()]
    if gradient is not None:
        results += torch.autograd.grad(normalized, weight, gradient.to(dtype))
    return [*results, *u, *v]


def gate(subject: Subject, mode: Mode, compute: Callable[[], Weights]) -> float:
    """Check one run against the reference in fp64; return the largest relative error.

    u and v are part of it: where they have converged, sigma does not show whether they moved.
    """
    variant = subject.variant
    parameters = originals(subject.model)
    before = [copy.deepcopy(variant.vectors(layer)) for layer in layers(subject.model)]
    subject.reset()
    weights = compute()
    after = [variant.vectors(layer) for layer in layers(subject.model)]
    errors = []
    dtypes = {weight.dtype for weight in weights}
    # Layers that autocast leaves alone, such as embeddings, may keep their type.
    assert variant.autocast is None or variant.autocast in dtypes, f"got {dtypes}"
    for weight, parameter, vectors, (u, v), gradient in zip(
        weights, parameters, before, after, subject.gradients, strict=True
    ):
        assert weight.dtype in (variant.autocast, parameter.dtype), f"got {weight.dtype}"
        actual = [weight.detach(), *([gradient_of(parameter)] if mode.backward else []), *u, *v]
        rounded, exact = (
            expected(parameter, vectors, gradient if mode.backward else None, variant, dtype)
            for dtype in (torch.float32, torch.float64)
        )
        rounded = [r.to(a.dtype) for r, a in zip(rounded, actual, strict=True)]
        errors.append(check(actual, rounded, exact, variant.rounding))
    subject.reset()
    return max(errors)


class Contestant:
    """A subject in one mode: gated, captured, and ready to be sampled."""

    def __init__(self, subject: Subject, mode: Mode, device: Device) -> None:
        self.subject = subject
        self.mode = mode
        self.device = device
        self.replay: Callable[[], Any] | None = None
        with subject.context():
            self.error = gate(subject, mode, self.run)

    def run(self) -> Weights:
        return self.mode.run(self.subject, self.mode.prepare(self.subject))

    def capture(self) -> None:
        """Capture the run in a CUDA graph, and check what a replay computes."""
        with self.subject.context():
            replay, result = self.device.capture(self.run, self.subject.reset)
            # The gradients of a replay are where those of the capture were.
            gradients = [p.grad for p in originals(self.subject.model)]

            def compute() -> Weights:
                for p, gradient in zip(originals(self.subject.model), gradients, strict=True):
                    p.grad = gradient
                replay()
                return result

            self.error = max(self.error, gate(self.subject, self.mode, compute))
        self.replay = replay

    def sample(self) -> Times:
        subject, mode, device = self.subject, self.mode, self.device
        with subject.context():
            self.run()  # settles what the others have driven out of the caches of the host
            subject.reset()
            given = mode.prepare(subject)
            device.synchronize()
            start = time.perf_counter()
            result = mode.run(subject, given)
            returned = time.perf_counter()
            device.synchronize()
            done = time.perf_counter()
            del result
            subject.reset()
            given = mode.prepare(subject)
            host = returned - start
            seconds = device.device_seconds(lambda: mode.run(subject, given), host)
            subject.reset()
        times = {"host": host, "wall": done - start, "device": seconds}
        if self.replay is not None:
            device.synchronize()
            start = time.perf_counter()
            self.replay()
            returned = time.perf_counter()
            device.synchronize()
            times["graph wall"] = time.perf_counter() - start
            times["graph"] = device.device_seconds(self.replay, returned - start)
        return times


def weight_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in originals(model))


@dataclass(frozen=True)
class Contest:
    """What is compared side by side: ``variants`` of one network in the same mode."""

    part: str
    network: str
    build: Callable[[], nn.Module]
    variants: Mapping[str, Variant]
    modes: Mapping[str, Mode]
    baseline: str = BASELINE

    def subjects(self, recorder: Recorder) -> dict[str, Subject]:
        torch.manual_seed(0)
        with torch.device(recorder.device.kind):
            plain = self.build()
        gradients = [torch.randn_like(parameter) for parameter in originals(plain)]
        found: dict[str, Subject] = {}

        def make(name: str, variant: Variant) -> None:
            found[name] = Subject(variant, plain, gradients)

        for name, variant in self.variants.items():
            if name not in recorder.without and variant.backend not in recorder.without:
                recorder.guard(self.network, name, partial(make, name, variant), part=self.part)
        return found

    def hold(self, recorder: Recorder, plan: Plan, bandwidth: float) -> None:
        """Gate, capture and sample every variant in every mode, and record the rows."""
        subjects = self.subjects(recorder)
        for name, mode in self.modes.items():
            recorder.require_time()
            self._hold_one(subjects, name, mode, recorder, plan, bandwidth)

    def _hold_one(
        self,
        subjects: Mapping[str, Subject],
        mode_name: str,
        mode: Mode,
        recorder: Recorder,
        plan: Plan,
        bandwidth: float,
    ) -> None:
        where = {"part": self.part, "network": self.network, "mode": mode_name}
        what = f"{self.network}, {mode_name}"
        ready: dict[str, Contestant] = {}

        def enter(name: str) -> None:
            ready[name] = Contestant(subjects[name], mode, recorder.device)

        for name, subject in subjects.items():
            if not recorder.guard(f"gate of {what}", name, partial(enter, name), **where):
                continue
            if mode.is_captured and subject.variant.is_captured:
                capture = ready[name].capture
                recorder.guard(f"capture of {what}", name, capture, **where)
        samples = take_turns({n: c.sample for n, c in ready.items()}, plan, recorder, what)
        # A variant may have failed after it was gated.
        samples = {name: taken for name, taken in samples.items() if taken}
        medians = {name: typical(taken) for name, taken in samples.items()}
        for name, taken in samples.items():
            floor = passes_of(subjects[name].variant, mode) * weight_bytes(subjects[name].model)
            rows = []
            for metric in taken[0]:
                row: Row = {**where, "variant": name, "metric": metric}
                is_device = metric in ("device", "graph")
                row |= time_columns(
                    [times[metric] for times in taken], floor / bandwidth if is_device else None
                )
                if is_device:
                    row["gb_per_second"] = floor / (row["median_us"] * 1e3)
                base = medians.get(self.baseline, {}).get(metric)
                if base is not None:
                    row["baseline"] = self.baseline
                    row["faster_than_baseline"] = base / medians[name][metric]
                rows.append(row | {"error": ready[name].error})
            recorder.record(rows)


def passes_of(variant: Variant, mode: Mode) -> float:
    """Of a 2-byte result half as much is written."""
    return mode.passes - (0.5 if variant.autocast is not None else 0.0)


def typical(taken: Sequence[Times]) -> Times:
    """The median of every metric, in seconds."""
    return {
        metric: time_columns([times[metric] for times in taken])["median_us"] / 1e6
        for metric in taken[0]
    }


def record_launches(
    network: str,
    build: Callable[[], nn.Module],
    variants: Mapping[str, Variant],
    recorder: Recorder,
) -> None:
    """How many kernels (and copies and fills) one call launches, by the profiler."""
    contest = Contest("launches", network, build, variants, MODES)
    for name, subject in contest.subjects(recorder).items():
        for mode_name in ("forward", "backward"):
            mode = MODES[mode_name]
            where = {"part": "launches", "network": network, "mode": mode_name}

            def count(
                subject: Subject = subject, mode: Mode = mode, name: str = name, where: Row = where
            ) -> None:
                with subject.context():
                    for _ in range(2):
                        given = mode.prepare(subject)
                        mode.run(subject, given)
                        subject.reset()
                    given = mode.prepare(subject)
                    counts = recorder.device.launches(lambda: mode.run(subject, given))
                    subject.reset()
                row: Row = {**where, "variant": name, "metric": "launches"}
                if counts is None:
                    row["note"] = "the profiler saw nothing"
                else:
                    names = sorted(f"{n} x {kernel[:60]}" for kernel, n in counts.items())
                    row["value"] = sum(counts.values())
                    row["note"] = "; ".join(names[:12])
                recorder.record([row])

            recorder.guard(f"launches of {network}, {mode_name}", name, count, **where)
