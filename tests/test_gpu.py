"""fastsn on a GPU: every back-end that runs there, against fp64 on the CPU and against torch.

`FASTSN_TEST_BACKENDS=cuda,triton` names the back-ends, which then must be able to run; without it
all that can run are tested. `FASTSN_TEST_DEVICE=cpu` runs what does not depend on the device on the
CPU instead.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import test_ops
import torch
import torch.nn.functional as F
from accelerated import chain, chain_input
from gpu_tensors import call_on_device, on_device
from test_ops import (
    ALL_TYPES,
    Call,
    Results,
    assert_same,
    each_order,
    gradients_for,
    make_call,
    random,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch_peers import (
    FASTSN_PARAMETRIZED,
    LAYERS,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    each_pair,
    twins,
)

import fastsn
from benchmarks import networks
from benchmarks.gpu_device import count_launches
from fastsn import backends, ops, reference
from fastsn.functional import init_vectors, spectral_norm

DEVICE = torch.device(os.environ.get("FASTSN_TEST_DEVICE", "cuda"))
IS_GPU = DEVICE.type == "cuda"
if IS_GPU and not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

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


def synchronize():
    if IS_GPU:
        torch.cuda.synchronize()


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


# The numbers

poisoned_memory = test_ops.poisoned_memory


class TestNumbers(test_ops.TestNumbers):
    """All that the CPU's kernels are held to: sizes, types, orders, strides, methods, NaN in
    fresh memory."""

    test_capability_is_the_one_asked_for = None

    @pytest.fixture(autouse=True)
    def backend_on_device(self, monkeypatch, backend, many_threads):
        monkeypatch.setattr(test_ops, "ops", OnDevice(backend))

    def test_vectors_that_are_not_contiguous(self, backend):
        call = moved(make_call([random(9, 70), random(7, 3)]))
        strided = call.copy()
        strided.u, strided.v = (
            [torch.stack([x, x], dim=1)[:, 0] for x in side] for side in (call.u, call.v)
        )
        own = operators(backend)
        torch.testing.assert_close(strided.power(own), call.power(own))
        for a, b in zip(strided.u + strided.v, call.u + call.v, strict=True):
            assert a.stride() == (2,)
            torch.testing.assert_close(a, b)

    @each_order
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    @pytest.mark.parametrize("name", ["SNDCGAN D", "SN-ResNet D", "48 x 64x64"])
    def test_networks(self, name, norm, dtype, v_first):
        weights = [layer.weight.detach() for layer in networks.layers(networks.NETWORKS[name]())]
        call = make_call([w.to(dtype) for w in weights], norm=norm)
        test_ops.check(replace(call, v_first=v_first))

    @pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
    def test_a_quarter_of_biggan(self, norm):
        with torch.device("meta"):
            plain = networks.BigGANDiscriminator(width=1 / 2)
        weights = [random(*layer.weight.shape) for layer in networks.layers(plain)]
        test_ops.check(make_call(weights, norm=norm, scales=[1.5] * len(weights)))

    @each_order
    def test_hundreds_of_layers(self, v_first):
        shapes = [(3, 5), (8, 8), (1, 17), (33, 2), (4, 3, 3), (16, 4, 1, 1)]
        weights = [random(*shapes[i % 6], dtype=ALL_TYPES[1 + i % 3]) for i in range(700)]
        iterations = [i % 3 for i in range(700)]
        call = make_call(weights, 0, "bidirectional", iterations)
        test_ops.check(replace(call, v_first=v_first))

    @each_order
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2, 3_000_001), (3_000_001, 2)], ids=str)
    def test_large_matrices(self, shape, dim, v_first):
        test_ops.check(make_call([random(*shape)], dim, v_first=v_first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_in_the_type_asked_for(backend, dtype):
    """As under autocast: rounded once, gradients in the weight's own type."""
    shapes = [(64, 3, 3, 3), (9, 70), (3, 5)]
    weights = [random(*shape, dtype=t) for shape, t in zip(shapes, ALL_TYPES[1:], strict=True)]
    call, own = moved(make_call(weights)), operators(backend)
    snapshot = call.power(own)
    arguments = (call.weights, snapshot, *call.constraint())
    results = own.scale(*arguments, dtype)
    wide = own.scale(*arguments, torch.float32)
    assert [r.dtype for r in results] == [dtype] * 3
    for result, other in zip(results, wide, strict=True):
        assert torch.equal(result, other.to(dtype))
    grads = [torch.randn_like(r) for r in results]
    actual = call.scale_backward(grads, snapshot, own)
    expected = call.scale_backward([g.float() for g in grads], snapshot, reference)
    for a, e, weight in zip(actual, expected, call.weights, strict=True):
        assert a.dtype == weight.dtype and a.shape == weight.shape
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", test_ops.LAYOUTS.values(), ids=test_ops.LAYOUTS.keys())
def test_results_have_the_strides_of_a_quotient(backend, layout):
    weight = on_device(layout(random(6, 5, 3, 4)), DEVICE)
    call, own = moved(make_call([layout(random(6, 5, 3, 4))])), operators(backend)
    snapshot = call.power(own)
    results = call.scale(snapshot, own), call.scale_backward([weight.clone()], snapshot, own)
    for (result,) in results:
        assert result.stride() == (weight / 2.0).stride()


@needs_gpu
def test_more_elements_than_32_bits_count(backend):
    """Against fp64, a block of rows at a time: u, v, sigma, the weight and its gradient."""
    rows, cols, block = 65_537, 32_768, 4096
    assert rows * cols > 2**31
    if backend == "reference":
        pytest.skip("the reference makes several copies in fp32, which is too much")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 32e9:
        pytest.skip(f"needs 32 GB of GPU memory, {free / 1e9:.0f} GB are free")
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE).normal_()
    gradient = torch.empty_like(weight).normal_()
    blocks = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
    v0 = F.normalize(torch.randn(cols, dtype=torch.float64, device=DEVICE), dim=0)

    s = torch.cat([weight[b].double() @ v0 for b in blocks])
    u = s / s.norm()
    t = sum(weight[b].double().T @ u[b] for b in blocks)
    v, sigma = t / t.norm(), t.norm()
    along = sum((gradient[b].double() * weight[b]).sum() for b in blocks)

    live_u = torch.zeros(rows, device=DEVICE)
    live_v = v0.float()
    call = Call([weight], [live_u], [live_v], [0], [0], [1], [1.0])
    snapshot = call.power()
    (result,) = call.scale(snapshot)
    (change,) = call.scale_backward([gradient], snapshot)
    torch.testing.assert_close(live_u.double(), u, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(live_v.double(), v, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(snapshot[-1].double(), sigma, rtol=1e-5, atol=0)
    for b in blocks:
        wanted = weight[b].double() / sigma
        torch.testing.assert_close(result[b].double(), wanted, rtol=1e-2, atol=0)
        exact = (gradient[b] - along / sigma * torch.outer(u[b], v)) / sigma
        torch.testing.assert_close(change[b].double(), exact, rtol=1e-2, atol=1e-6)


# The same bits


def mixed_call(v_first: bool) -> Call:
    weights = [random(700, 300), random(64, 3, 3, 3), random(20, 300, 40), random(3, 5)]
    weights += [random(129, 1000, dtype=torch.bfloat16), random(2, 70_000)]
    dims, iterations = [0, 0, 1, 0, 1, 0], [1, 2, 1, 0, 3, 1]
    return moved(make_call(weights, dims, "bidirectional", iterations, v_first=v_first))


def device_gradients(call: Call) -> list[Tensor]:
    return [on_device(g, DEVICE) for g in gradients_for(call)]


@each_order
def test_same_bits_at_every_run_wherever_memory_lies(backend, v_first):
    call, own = mixed_call(v_first), operators(backend)
    grads = device_gradients(call)
    expected = call.run(grads, own)
    noise = []
    for i in range(20):
        # What is free, and where, differs from run to run, and holds other numbers.
        noise.append(torch.randn(1 + 4099 * i, device=DEVICE))
        if i % 5 == 4:
            del noise[::2]
        assert_same(call.run(grads, own), expected)


@each_order
def test_same_bits_alone_or_among_others(backend, v_first):
    together, own = mixed_call(v_first), operators(backend)
    result = together.run(together.weights, own)
    alone: list[Results] = []
    for layer, weight in enumerate(together.weights):
        e = [e for e, other in enumerate(together.layers) if other == layer]
        u, v, dims = ([side[i] for i in e] for side in (together.u, together.v, together.dims))
        iterations = [together.iterations[layer]]
        call = Call([weight], u, v, [0] * len(e), dims, iterations, [1.0], v_first=v_first)
        alone.append(call.run([weight], own))
    for name in ("normalized", "gradients", "sigmas"):
        expected = [x for own in alone for x in getattr(own, name)]
        assert all(map(torch.equal, getattr(result, name), expected))


# Gradients


@double
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
@pytest.mark.parametrize("bound", [False, True])
def test_gradients_and_their_gradients(norm, bound):
    weights = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 2, 2), (2, 3))]
    u, v = [], []
    for weight in weights:
        for side, drawn in zip((u, v), init_vectors(weight, norm=norm), strict=True):
            side += drawn

    def normalize(*weights):
        # Without iterations u and v are constants, as the gradient takes them to be.
        arguments = (list(weights), u, v)
        options = {"norm": norm, "scale": 0.7, "bound": bound, "n_power_iterations": 0}
        return tuple(spectral_norm(*arguments, **options)[0])

    assert gradcheck(normalize, weights)
    assert gradgradcheck(normalize, weights)


def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(4 * 5 * 5, 16), nn.Tanh(), nn.Linear(16, 1),
    )  # fmt: skip


def twin_models(form, build=critic, **options):
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


each_torch_form = pytest.mark.parametrize(
    "form", [TORCH_HOOK, TORCH_PARAMETRIZED], ids=["hook", "parametrized"]
)


@double
@each_torch_form
def test_gradient_penalty(form):
    plain, fast = twin_models(form)
    for _ in range(3):
        images = torch.randn(4, 3, 8, 8, device=DEVICE)
        for model in (plain, fast):
            x = images.clone().requires_grad_()
            model.zero_grad()
            score = model(x)
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            (slope.square().sum() + score.mean()).backward()
        torch.testing.assert_close(contents(fast), contents(plain))


@double
def test_two_forwards_before_one_backward():
    plain, fast = twin_models(TORCH_PARAMETRIZED)
    real, fake = torch.randn(2, 4, 3, 8, 8, device=DEVICE)
    for model in (plain, fast):
        (model(real) - model(fake)).mean().backward()
    torch.testing.assert_close(contents(fast), contents(plain))


# torch and fastsn step by step


@double
@each_pair
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lstm"])
def test_drop_ins_step_by_step(peer, ours, name):
    layer = LAYERS[name]
    with DEVICE:
        plain, fast = twins(layer.build, peer, ours, layer.name)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (plain, fast)]
    torch.testing.assert_close(contents(fast), contents(plain))
    for step in range(4):
        inputs = tuple(x.to(DEVICE) for x in layer.example())
        for module, optimizer in zip((plain, fast), optimizers, strict=True):
            module.train(step != 2)
            optimizer.zero_grad()
            layer.call(module, inputs).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(contents(fast), contents(plain))


@double
def test_same_random_numbers_as_torch():
    with DEVICE:
        weight = torch.randn(6, 5, 3)
        states = []
        for form in (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED):
            torch.manual_seed(5)
            layer = nn.Conv1d(5, 6, 3)
            with torch.no_grad():
                layer.weight.copy_(weight)
            states.append(form.spectral_norm(layer).state_dict())
    torch.testing.assert_close(states[1], states[0])


def train(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Losses of one step for each of `images`."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for x in images:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.softplus(1 - model(x)).mean() + F.softplus(1 + model(x.flip(0))).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def small_discriminator() -> nn.Module:
    return networks.SNDCGANDiscriminator(width=1 / 8)


@each_torch_form
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-9), (torch.float32, 2e-3)],
    ids=str,
)
def test_accelerated_model_trains_like_torch(form, dtype, tolerance):
    plain, fast = (m.to(dtype) for m in twin_models(form, small_discriminator))
    images = torch.randn(10, 8, 3, 32, 32, device=DEVICE, dtype=dtype)
    expected, actual = train(plain, images), train(fast, images)
    assert expected.isfinite().all() and not expected[0].equal(expected[-1])
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    state, wanted = fast.state_dict(), plain.state_dict()
    torch.testing.assert_close(state, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype, memory_format):
    plain, fast = twin_models(TORCH_PARAMETRIZED, small_discriminator)
    exact = copy.deepcopy(plain).double()
    fast = fast.to(memory_format=memory_format)
    images = torch.randn(10, 8, 3, 32, 32, device=DEVICE)
    expected, actual = train(exact, images.double()), train(fast, images, dtype)
    peer = train(plain, images, dtype)
    error, peer_error = ((x.double() - expected).norm() / expected.norm() for x in (actual, peer))
    assert error <= 2 * peer_error + 2e-2
    assert all(p.grad.dtype == torch.float32 for p in fast.parameters())
    for name, buffer in fast.named_buffers():
        assert buffer.dtype == torch.float32 and buffer.isfinite().all(), name


@double
@each_torch_form
def test_channels_last_models(form):
    plain, fast = (m.to(memory_format=torch.channels_last) for m in twin_models(form))
    for _ in range(3):
        images = torch.randn(4, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
        for model in (plain, fast):
            model.zero_grad()
            model(images).sum().backward()
        torch.testing.assert_close(contents(fast), contents(plain))


@double
@pytest.mark.parametrize("method", ["sn", "bsn"])
def test_same_model_as_by_the_reference(method, backend):
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(3)
        with fastsn.use_backend(name), DEVICE:
            model = critic()
            fastsn.apply(model, method)
            fastsn.accelerate(model)
            for _ in range(3):
                model.zero_grad()
                model(torch.randn(4, 3, 8, 8)).sum().backward()
            results.append({**contents(model), **fastsn.sigmas(model)})
    torch.testing.assert_close(*results)


# Copies, moves, devices, what the kernels cannot serve


@double
@each_torch_form
def test_copies_and_moves(form, backend):
    plain, fast = twin_models(form)
    images = torch.randn(4, 3, 8, 8, device=DEVICE)

    def step(device=DEVICE):
        for model in (plain, fast):
            model.zero_grad(set_to_none=True)
            model(images.to(device)).sum().backward()
        torch.testing.assert_close(contents(fast), contents(plain))

    step()
    # torch's hook form cannot be copied after a forward.
    plain.load_state_dict(fast.state_dict())
    if form is TORCH_PARAMETRIZED:
        plain = copy.deepcopy(plain)
    fast = copy.deepcopy(fast)
    step()
    with fastsn.use_backend("auto"):
        plain, fast = plain.cpu(), fast.cpu()
        step(torch.device("cpu"))
    plain, fast = plain.to(DEVICE), fast.to(DEVICE)
    step()


@needs_gpu
@double
def test_model_on_two_devices():
    """Grouped by device: one call for each."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)).cpu()
            self.second = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(DEVICE)

        def forward(self, x):
            return self.second(self.first(x).to(DEVICE))

    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(networks.normalize_with(Split(), TORCH_PARAMETRIZED.spectral_norm))
    plain, fast = models[0], fastsn.accelerate(models[1])
    with fastsn.use_backend("auto"):
        for _ in range(3):
            x = torch.randn(4, 5)
            for model in (plain, fast):
                model.zero_grad()
                model(x).sum().backward()
            torch.testing.assert_close(contents(fast), contents(plain))


@needs_gpu
@pytest.mark.parametrize("stranger", ["weight", "u", "v", "snapshot", "gradient"])
def test_devices_mixed_in_one_call(backend, stranger):
    call, own = moved(make_call([random(4, 3), random(2, 5)])), operators(backend)
    snapshot = call.copy().power(own)
    grads = device_gradients(call)
    before = call.copy()
    there = dict(zip(("weight", "u", "v"), (call.weights, call.u, call.v), strict=True))
    if stranger in there:
        there[stranger][1] = there[stranger][1].cpu()
    if stranger == "gradient":
        grads[1] = grads[1].cpu()
    elif stranger == "snapshot":
        snapshot = snapshot.cpu()
    with pytest.raises(RuntimeError, match="(?i)device|cpu|cuda"):
        if stranger in there:
            call.power(own)
        else:
            call.scale_backward(grads, snapshot, own)
    kept = [(a, b) for a, b in zip(before.u + before.v, call.u + call.v, strict=True)]
    if backend != "reference":  # which goes layer by layer
        assert all(torch.equal(a, b) for a, b in kept if b.device == a.device)


def test_devices_mixed_in_the_functional_form():
    weights = [torch.randn(4, 3, device=d) for d in (DEVICE, "cpu" if IS_GPU else "meta")]
    u, v = torch.randn(4), torch.randn(3)
    with pytest.raises(ValueError, match="device|cpu|cuda"):
        spectral_norm(weights, [u.to(w.device) for w in weights], [v.to(w.device) for w in weights])


def test_weight_that_is_not_dense():
    base = torch.randn(6, 10, device=DEVICE)
    models = []
    for weight in (base[:, ::2], base[:, ::2].clone()):
        torch.manual_seed(4)
        with DEVICE:
            layer = nn.Linear(5, 6)
            layer.weight = nn.Parameter(weight)
            models.append(
                fastsn.accelerate(nn.Sequential(fastsn.parametrizations.spectral_norm(layer)))
            )
    assert not models[0][0].parametrizations.weight.original.is_contiguous()
    x = torch.randn(3, 5, device=DEVICE)
    for _ in range(2):
        results = []
        for model in models:
            model.zero_grad()
            model(x).square().sum().backward()
            results.append(contents(model))
        torch.testing.assert_close(*results)


def test_complex_weights_fall_back_to_the_reference(backend):
    weight = torch.randn(4, 3, dtype=torch.complex64, device=DEVICE)
    u, v = init_vectors(weight)
    if backend in KERNELS:
        with pytest.raises(RuntimeError, match=f"'{backend}'.*complex64"):
            spectral_norm(weight, u, v)
    with fastsn.use_backend("auto"):
        for _ in range(100):
            normalized, _ = spectral_norm(weight, u, v)
    largest = torch.linalg.svdvals(normalized)[0]
    torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-3, atol=0)


def test_function_transforms_fall_back_to_the_reference():
    weight = torch.randn(4, 3, device=DEVICE)
    u, v = init_vectors(weight)

    def total(w):
        return spectral_norm(w, u, v, n_power_iterations=0)[0].sum()

    with fastsn.use_backend("auto"):
        actual = torch.func.grad(total)(weight)
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool], ids=str)
def test_types_that_cannot_be_normalized(dtype):
    weight = torch.ones(4, 3, device=DEVICE, dtype=dtype)
    vectors = [torch.ones(n, device=DEVICE) for n in (4, 3)]
    with pytest.raises(TypeError, match=str(dtype)):
        spectral_norm(weight, *vectors)


def test_environment_variable(backend):
    code = (
        "import torch, fastsn\n"
        f"w = torch.arange(12., device={str(DEVICE)!r}).view(3, 4)\n"
        "u, v = (torch.ones(n, device=w.device) for n in (3, 4))\n"
        "fastsn.functional.spectral_norm(w, u, v, n_power_iterations=50)\n"
        "n, sigma = fastsn.functional.spectral_norm(w, u, v)\n"
        "print(fastsn.current_backend(), float(sigma))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FASTSN_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, sigma = done.stdout.split()
    exact = torch.linalg.svdvals(torch.arange(12.0, dtype=torch.float64).view(3, 4))[0]
    assert name == backend and float(sigma) == pytest.approx(exact.item(), rel=1e-5)


def test_automatic_choice_prefers_compiled_kernels():
    with fastsn.use_backend("auto"):
        chosen = backends.select([torch.randn(4, 3, device=DEVICE)])
    can_run = [name for name in KERNELS if backends.why_not(name) is None]
    assert (chosen is reference) == (not can_run)


# Streams, graphs, and what is launched


@contextmanager
def one_stream():
    """All work on a new stream: a graph cannot be captured on the default one, and gradients must
    be accumulated on the stream of the capture."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def captured(run, stream) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def accelerated_discriminator(seed: int = 0, norm: str = "matrix") -> nn.Module:
    torch.manual_seed(seed)
    with DEVICE:
        model = networks.SNDCGANDiscriminator(width=1 / 4)

        def normalize(layer):
            fastsn.parametrizations.spectral_norm(layer, norm=norm)

        return fastsn.accelerate(networks.normalize_with(model, normalize))


def move_weights(model: nn.Module, step: int) -> None:
    """What an optimizer does between two forwards: in place, and the same for all copies."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * (step + 1))


@needs_gpu
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_graph_replays_what_eager_computes(norm):
    """Bit for bit: u and v advance, weights changed between replays are read anew."""
    eager = accelerated_discriminator(norm=norm)
    model = copy.deepcopy(eager)
    with one_stream() as stream:
        parameters = [p for p in model.parameters() if p.ndim > 1]
        gradients = [torch.randn_like(p) for p in parameters]
        outputs = []

        def run(model=model, outputs=outputs):
            model.zero_grad(set_to_none=True)
            outputs[:] = fastsn.refresh(model).values()
            torch.autograd.backward(outputs, gradients)

        expected = []
        for _ in range(3):
            run()
            run(eager, expected)
        outputs.clear()
        graph = captured(run, stream)
        for step in range(5):
            move_weights(model, step)
            move_weights(eager, step)
            for x in outputs:
                x.detach().fill_(torch.nan)
            graph.replay()
            run(eager, expected)
            torch.cuda.synchronize()
            assert all(map(torch.equal, outputs, expected))
            own, wanted = contents(model), contents(eager)
            assert own.keys() == wanted.keys() and len(own) > 24
            for name in own:
                assert torch.equal(own[name], wanted[name]), name


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_graph_of_a_whole_training_step(dtype):
    eager = accelerated_discriminator()
    model = copy.deepcopy(eager)
    images = torch.randn(8, 3, 32, 32, device=DEVICE)
    with one_stream() as stream:
        runs = []
        for one in (eager, model):
            optimizer = torch.optim.SGD(one.parameters(), 1e-2, momentum=0.9, foreach=True)

            def run(one=one, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=bool(dtype)):
                    loss = F.softplus(one(images)).mean() - one(images.flip(0)).mean()
                loss.backward()
                optimizer.step()

            runs.append(run)
        for run in runs:
            for _ in range(3):
                run()
        graph = captured(runs[1], stream)
        for step in range(5):
            images.normal_(generator=torch.Generator(DEVICE).manual_seed(step))
            runs[0]()
            graph.replay()
        torch.cuda.synchronize()
        # cuDNN may choose otherwise during a capture.
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is None else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), **tolerance)


@needs_gpu
@double
def test_graphed_callables():
    """torch wants no hooks on what it graphs, so the accelerated root sits inside a module."""
    eager = fastsn.accelerate(twin_models(TORCH_PARAMETRIZED)[0])
    model = copy.deepcopy(eager)
    before = copy.deepcopy(model.state_dict())
    sample = torch.randn(4, 3, 8, 8, device=DEVICE)
    with one_stream():
        graphed = torch.cuda.make_graphed_callables(nn.Sequential(model), (sample,))
        model.load_state_dict(before)  # what the warm-up did
        for step in range(4):
            x = torch.randn(4, 3, 8, 8, device=DEVICE)
            outputs = []
            for run, one in ((graphed, model), (eager, eager)):
                one.zero_grad(set_to_none=True)
                output = run(x)
                output.square().sum().backward()
                outputs.append(output.detach().clone())
                move_weights(one, step)
            torch.cuda.synchronize()
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(contents(model), contents(eager))


@needs_gpu
def test_two_streams_at_once(backend):
    """Each as if it were alone: nothing that calls keep for themselves is shared by accident."""
    own = operators(backend)
    calls = [mixed_call(v_first) for v_first in (False, True)]
    grads = [device_gradients(call) for call in calls]
    expected = [call.run(g, own) for call, g in zip(calls, grads, strict=True)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Results]] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # until all is issued, then both run side by side
    for _ in range(10):
        for call, g, stream, found in zip(calls, grads, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call.run(g, own))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        for result in found:
            assert_same(result, wanted)


@needs_gpu
def test_two_threads_with_a_stream_each():
    models = [accelerated_discriminator(seed) for seed in (1, 2)]
    copies = [copy.deepcopy(model) for model in models]

    def work(model):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            weights = list(fastsn.refresh(model).values())
            gradients = [torch.ones_like(w) for w in weights]
            for _ in range(10):
                model.zero_grad(set_to_none=True)
                weights = list(fastsn.refresh(model).values())
                torch.autograd.backward(weights, gradients)
            stream.synchronize()

    torch.cuda.synchronize()
    for model in models:
        work(model)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, copies))
    for model, copied in zip(models, copies, strict=True):
        own, wanted = contents(copied), contents(model)
        assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@needs_gpu
def test_work_is_on_the_current_stream():
    """What comes before on the stream has happened, however long it takes."""
    model = accelerated_discriminator()
    twin = copy.deepcopy(model)
    fastsn.refresh(copy.deepcopy(model))
    move_weights(twin, 7)
    expected = fastsn.refresh(twin)
    with one_stream():
        torch.cuda._sleep(50_000_000)
        move_weights(model, 7)
        weights = fastsn.refresh(model)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_nothing_waits_for_the_device(norm):
    model = accelerated_discriminator(norm=norm)
    images = torch.randn(4, 3, 32, 32, device=DEVICE)

    def work():
        loss = model(images).mean()
        loss.backward()
        fastsn.sigmas(model)
        with torch.no_grad():
            model.eval()(images)
            model.train()

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["SNDCGAN D", "SN-ResNet D", "48 x 64x64"])
def test_launches(backend, network, record_property):
    """Whatever the number of layers, as few as DESIGN.md plans."""
    with DEVICE:
        plain = networks.NETWORKS[network]()
    form = fastsn.parametrizations.spectral_norm
    model = fastsn.accelerate(networks.normalize_with(plain, form))
    weights = list(fastsn.refresh(model).values())
    gradients = [torch.randn_like(w) for w in weights]
    torch.autograd.backward(weights, gradients)
    model.zero_grad(set_to_none=True)
    weights = []

    forward = count_launches(lambda: weights.extend(fastsn.refresh(model).values()))
    backward = count_launches(lambda: torch.autograd.backward(weights, gradients))
    if forward is None or backward is None:
        pytest.skip("the profiler saw no kernels")
    record_property("forward", str(forward))
    record_property("backward", str(backward))
    print(f"{backend}, {network}: {forward=} {backward=}")
    own_forward, own_backward = (
        sum(n for name, n in counts.items() if not re.match("Mem|void at::", name))
        for counts in (forward, backward)
    )
    if backend == "cuda":
        assert 1 <= own_forward <= 3 and 1 <= own_backward <= 2, (forward, backward)
    else:
        assert own_forward > 0 and own_backward > 0, (forward, backward)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_of_shapes_never_seen(backend):
    """What a call needs is there, or a clear error says what to do; never a wrong number."""

    def new_call(rows):
        return moved(make_call([random(rows, 2 * rows), random(rows, 3, 3, 3)]))

    own = operators(backend)
    small, large = new_call(31), new_call(977)
    grads = device_gradients(large)
    small.run(device_gradients(small), own)
    expected = large.run(grads, own)
    fresh = new_call(983)
    fresh_grads = device_gradients(fresh)
    with one_stream() as stream:
        results = []

        def run():
            results.append(fresh.run(fresh_grads, own))

        try:
            graph = captured(run, stream)
        except RuntimeError as error:
            assert "captur" in str(error).lower()
        else:
            graph.replay()
            torch.cuda.synchronize()
            assert_same(results[0], fresh.run(fresh_grads, own))
    # And nothing is broken for what follows.
    assert_same(large.run(grads, own), expected)


# Last, as it takes longest


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_model(backend):
    if backend == "reference":
        backend = "auto"  # the compiler sees the operators, whoever is behind them
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        with DEVICE:
            models.append(fastsn.accelerate(chain(TORCH_PARAMETRIZED)))
    eager, twin = models
    with fastsn.use_backend(backend):
        compiled = torch.compile(twin, fullgraph=True)
        for _ in range(3):
            x = chain_input().to(DEVICE)
            outputs = []
            for model, run in ((eager, eager), (twin, compiled)):
                model.zero_grad()
                output = run(x)
                output.square().sum().backward()
                outputs.append(output.detach())
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(contents(twin), contents(eager), rtol=1e-4, atol=1e-5)
