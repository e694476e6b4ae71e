"""What all GPU tests share: the device, the back-ends that serve them, and what they are run on.

`FASTSN_TEST_BACKENDS=cuda,triton` names the back-ends, which then must be able to run; without it
all that can run are tested. `FASTSN_TEST_DEVICE=cpu` runs what does not depend on the device on the
CPU instead.

A module of tests calls `skip_without_gpu()` and takes over `pytestmark` and the fixtures:
``backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products``.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import fastsn
from benchmarks import networks
from fastsn import backends, ops, reference
from helpers.calls import Call, gradients_for, make_call, random
from helpers.gpu_tensors import call_on_device, on_device
from helpers.torch_peers import TORCH_HOOK, TORCH_PARAMETRIZED

DEVICE = torch.device(os.environ.get("FASTSN_TEST_DEVICE", "cuda"))
IS_GPU = DEVICE.type == "cuda"

# torch's own products are deterministic only with this, and say so with an error.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

KERNELS = ("cuda", "triton") if IS_GPU else ("cpp",)
named = os.environ.get("FASTSN_TEST_BACKENDS")
BACKENDS = (
    named.split(",")
    if named
    else [name for name in (*KERNELS, "reference") if backends.why_not(name) is None]
)

# On a GPU torch warns of what it does itself: of contexts, streams and plans of cuBLAS and cuDNN.
pytestmark = pytest.mark.filterwarnings("default")
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
double = pytest.mark.usefixtures("double")
each_torch_form = pytest.mark.parametrize(
    "form", [TORCH_HOOK, TORCH_PARAMETRIZED], ids=["hook", "parametrized"]
)


def skip_without_gpu() -> None:
    """Skip the module that calls this."""
    __tracebackhide__ = True
    if IS_GPU and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU", allow_module_level=True)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """Serves all calls of a test."""
    with fastsn.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 means fp32, in convolutions too."""
    if IS_GPU:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


@pytest.fixture
def many_threads(one_thread):
    """fp64 results of large weights are computed on the CPU."""
    torch.set_num_threads(min(6, os.cpu_count() or 1))


class OnDevice:
    """The functions of a back-end for tensors on the CPU: computes on the device."""

    _C = ops._C

    def __init__(self, name: str) -> None:
        self.backend = reference if name == "reference" else ops

    def _call(self, name, *arguments):
        def move(x):
            if isinstance(x, list) and all(isinstance(y, Tensor) for y in x):
                return [on_device(y, DEVICE) for y in x]
            return on_device(x, DEVICE) if isinstance(x, Tensor) else x

        return getattr(self.backend, name)(*map(move, arguments))

    def power_(self, weights, u, v, *constants):
        there = [[on_device(x, DEVICE) for x in side] for side in (weights, u, v)]
        snapshot = self.backend.power_(*there, *constants)
        assert snapshot.device.type == DEVICE.type
        for own, new in zip([*u, *v], [*there[1], *there[2]], strict=True):
            own.copy_(new)
        return snapshot.cpu()

    def estimate(self, *arguments):
        return self._call("estimate", *arguments).cpu()

    def scale(self, *arguments):
        return [x.cpu() for x in self._call("scale", *arguments)]

    def scale_backward(self, *arguments):
        return [x.cpu() for x in self._call("scale_backward", *arguments)]


def moved(call: Call) -> Call:
    return call_on_device(call, DEVICE)


def operators(name: str):
    return reference if name == "reference" else ops


def mixed_call(v_first: bool) -> Call:
    weights = [random(700, 300), random(64, 3, 3, 3), random(20, 300, 40), random(3, 5)]
    weights += [random(129, 1000, dtype=torch.bfloat16), random(2, 70_000)]
    dims, iterations = [0, 0, 1, 0, 1, 0], [1, 2, 1, 0, 3, 1]
    return moved(make_call(weights, dims, "bidirectional", iterations, v_first=v_first))


def device_gradients(call: Call) -> list[Tensor]:
    return [on_device(g, DEVICE) for g in gradients_for(call)]


def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(4 * 5 * 5, 16), nn.Tanh(), nn.Linear(16, 1),
    )  # fmt: skip


def twin_models(form, build=critic):
    """The same model normalized by torch twice, the second one accelerated; on the device."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        with DEVICE:
            models.append(networks.normalize_with(build(), form.spectral_norm))
    return models[0], fastsn.accelerate(models[1])


def contents(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: x.clone() for name, x in {**model.state_dict(), **gradients}.items()}
