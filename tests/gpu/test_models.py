"""Models on a GPU: normalized by fastsn and by torch, step by step; copies, devices, fall-backs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsn
from benchmarks import networks
from fastsn import backends, reference
from fastsn.functional import init_vectors, spectral_norm
from helpers import gpu_fixtures
from helpers.calls import make_call, random
from helpers.gpu_fixtures import (
    DEVICE,
    IS_GPU,
    KERNELS,
    contents,
    critic,
    device_gradients,
    double,
    each_torch_form,
    moved,
    needs_gpu,
    operators,
    twin_models,
)
from helpers.torch_peers import FASTSN_PARAMETRIZED, LAYERS, TORCH_PARAMETRIZED, each_pair, twins

gpu_fixtures.skip_without_gpu()
pytestmark = gpu_fixtures.pytestmark
backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products

# Gradients through models


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
        cwd=Path(__file__).parents[2],
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
