"""All normalized weights of a network: forward, forward + backward, and eval.

Every variant of one (network, mode, threads) is sampled side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import fastsn
import fastsn.parametrizations
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
from benchmarks.networks import NETWORKS, QUICK_NETWORKS, layers, normalize_with

pytestmark = [
    pytest.mark.benchmark(timer=REPLAY.read),
    # torch.compile runs into this in torch itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

Weights = Sequence[Tensor]


class State(NamedTuple):
    """Where the power iteration of a layer stands, and which vector it computes first."""

    u: Tensor
    v: Tensor
    v_first: bool


@dataclass(frozen=True)
class Variant:
    """One way to normalize.

    Attributes:
        normalize: takes a plain network, in place.
        reader: given the normalized network, the function that computes all its weights.
        state: where the power iteration of one of its layers stands; None if there is none.
        rounding: what the gate allows beyond the reference's own error, in units of the last place.
    """

    normalize: Callable[[nn.Module], nn.Module]
    reader: Callable[[nn.Module], Callable[[], Weights]]
    state: Callable[[Any], State | None]
    rounding: int = ROUNDING


def no_state(layer: Any) -> None:
    return None


def hook_state(layer: Any) -> State:
    return State(layer.weight_u.clone(), layer.weight_v.clone(), v_first=True)


def parametrization_state(layer: Any) -> State:
    normalization = layer.parametrizations.weight[0]
    return State(normalization._u.clone(), normalization._v.clone(), v_first=False)


def read_layers(model: nn.Module) -> Callable[[], Weights]:
    modules = layers(model)
    return lambda: [module.weight for module in modules]


def read_copies(model: nn.Module) -> Callable[[], Weights]:
    modules = layers(model)
    return lambda: [torch.clone(module.weight) for module in modules]


def read_compiled(model: nn.Module) -> Callable[[], Weights]:
    # The recompilation limit counts all networks together: they share the code that is compiled.
    torch.compiler.reset()
    return torch.compile(read_layers(model), fullgraph=True)


def read_hooks(model: nn.Module) -> Callable[[], Weights]:
    hooked = [(layer, *layer._forward_pre_hooks.values()) for layer in layers(model)]

    def read() -> Weights:
        for layer, hook in hooked:
            hook(layer, ())
        return [layer.weight for layer, _ in hooked]

    return read


def read_grouped(model: nn.Module) -> Callable[[], Weights]:
    return lambda: list(fastsn.refresh(model).values())


def torch_hook(model: nn.Module) -> nn.Module:
    return normalize_with(model, spectral_norm)


def torch_parametrization(model: nn.Module) -> nn.Module:
    return normalize_with(model, parametrizations.spectral_norm)


def fastsn_parametrization(model: nn.Module) -> nn.Module:
    return normalize_with(model, fastsn.parametrizations.spectral_norm)


def fastsn_accelerated(model: nn.Module) -> nn.Module:
    return fastsn.accelerate(fastsn_parametrization(model))


VARIANTS = {
    "torch": Variant(torch_parametrization, read_layers, parametrization_state),
    "torch hook": Variant(torch_hook, read_hooks, hook_state),
    # Its gradients of large weights were off by 6e-5 on one thread: see NOTES.md.
    "torch.compile": Variant(
        torch_parametrization, read_compiled, parametrization_state, rounding=1024
    ),
    "fastsn": Variant(fastsn_accelerated, read_grouped, parametrization_state),
    "fastsn ungrouped": Variant(fastsn_parametrization, read_layers, parametrization_state),
    "copy": Variant(lambda model: model, read_copies, no_state),
}
# The compiler takes longer than everything else together.
QUICK_VARIANTS = {name: VARIANTS[name] for name in VARIANTS if name != "torch.compile"}


@dataclass(frozen=True)
class Mode:
    """What is timed: ``run``, on a network in training mode or not.

    ``passes`` over the weights is the least that memory has to move: the forward reads W and writes
    the normalized weight, the backward reads its gradient and W and writes the gradient of W.
    """

    run: Callable[[Normalized], Weights]
    train: bool
    backward: bool
    passes: int


class Normalized:
    """A network normalized by one variant: what it computes in each mode, and what it should."""

    def __init__(self, variant: Variant, plain: nn.Module, gradients: Weights) -> None:
        self.model = variant.normalize(copy.deepcopy(plain))
        self.read = variant.reader(self.model)
        self.state = variant.state
        self.rounding = variant.rounding
        self.gradients = gradients

    def forward(self) -> Weights:
        return self.read()

    def forward_backward(self) -> Weights:
        weights = self.read()
        torch.autograd.backward(weights, self.gradients)
        return weights

    def evaluate(self) -> Weights:
        with torch.no_grad():
            return self.read()

    def work(self, mode: Mode) -> Work:
        """The work of ``mode``; the network is put into its training or evaluation mode."""
        self.model.train(mode.train)
        return Work(lambda: mode.run(self), reset=self.model.zero_grad)

    def gate(self, mode: Mode) -> float:
        """Check one run of ``mode`` against the reference in fp64; return the relative error."""
        parameters = originals(self.model)
        states = [self.state(layer) for layer in layers(self.model)]
        work = self.work(mode)
        weights = mode.run(self)
        errors = []
        try:
            for weight, parameter, state, gradient in zip(
                weights, parameters, states, self.gradients, strict=True
            ):
                actual = [weight, gradient_of(parameter)] if mode.backward else [weight]
                rounded = expected(parameter, state, gradient, mode, torch.float32)
                exact = expected(parameter, state, gradient, mode, torch.float64)
                errors.append(check(actual, rounded, exact, self.rounding))
        finally:
            work.reset()
        return max(errors)


def originals(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are normalized, whatever their name, in the order of ``layers``."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def expected(
    parameter: Tensor, state: State | None, gradient: Tensor, mode: Mode, dtype: torch.dtype
) -> list[Tensor]:
    """The normalized weight (and its gradient) by fastsn's reference in ``dtype``."""
    weight = parameter.detach().to(dtype).requires_grad_()
    if state is None:
        normalized = weight.clone()
    else:
        u, v = state.u.to(dtype, copy=True), state.v.to(dtype, copy=True)
        iterations = 1 if mode.train else 0
        with fastsn.use_backend("reference"):
            (normalized,), _ = fastsn.functional.spectral_norm(
                [weight], u, v, n_power_iterations=iterations, v_first=state.v_first
            )
    if not mode.backward:
        return [normalized.detach()]
    return [normalized.detach(), *torch.autograd.grad(normalized, weight, gradient.to(dtype))]


MODES = {
    "forward": Mode(Normalized.forward, train=True, backward=False, passes=2),
    "forward + backward": Mode(Normalized.forward_backward, train=True, backward=True, passes=5),
    "eval": Mode(Normalized.evaluate, train=False, backward=False, passes=2),
}


def normalize_all(plain: nn.Module, variants: Mapping[str, Variant]) -> dict[str, Normalized]:
    """The same network under every variant, and the same output gradients for all."""
    gradients = [torch.randn_like(parameter) for parameter in originals(plain)]
    return {name: Normalized(variant, plain, gradients) for name, variant in variants.items()}


def compete(contest: Mapping[str, Normalized], mode: Mode, plan: Plan) -> dict[str, Result]:
    """Gate every variant, then time them side by side; a failing gate: time nothing."""
    errors = {name: normalized.gate(mode) for name, normalized in contest.items()}
    works = {name: normalized.work(mode) for name, normalized in contest.items()}
    samples = measure(works, plan)
    return {name: Result(samples[name], errors[name]) for name in contest}


@lru_cache(maxsize=1)
def contest(network: str, quick: bool) -> dict[str, Normalized]:
    torch.manual_seed(0)
    plain = (QUICK_NETWORKS if quick else NETWORKS)[network]()
    return normalize_all(plain, QUICK_VARIANTS if quick else VARIANTS)


@lru_cache(maxsize=1)
def results(network: str, threads: int, mode: str, quick: bool) -> dict[str, Result]:
    with torch_threads(threads):
        return compete(
            contest(network, quick), MODES[mode], QUICK_PLAN if quick else Plan(settle=1)
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize("network", QUICK_NETWORKS if quick else NETWORKS)
    metafunc.parametrize("threads", [1] if quick else [1, 2])
    metafunc.parametrize("mode", MODES)
    metafunc.parametrize("variant", QUICK_VARIANTS if quick else VARIANTS)


def test_weights(
    benchmark: BenchmarkFixture, quick: bool, network: str, threads: int, mode: str, variant: str
) -> None:
    result = results(network, threads, mode, quick)[variant]
    weights = originals(contest(network, quick)[variant].model)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    benchmark.group = f"{network}, {mode}, threads: {threads}"
    REPLAY.record(
        benchmark,
        result.samples,
        network=network,
        mode=mode,
        threads=threads,
        variant=variant,
        error=result.error,
        floor_bytes=MODES[mode].passes * weight_bytes,
    )
