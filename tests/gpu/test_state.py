"""u and v on a GPU: policies, evaluation, checkpoints, precision, logging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastsn
from benchmarks.networks import normalize_with
from helpers import gpu_fixtures
from helpers.gpu_fixtures import DEVICE, IS_GPU, critic, each_torch_form, needs_gpu
from helpers.torch_peers import as_matrix

gpu_fixtures.skip_without_gpu()
pytestmark = gpu_fixtures.pytestmark
backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products


def made(form, accelerated=True):
    torch.manual_seed(0)
    model = normalize_with(critic(), form.spectral_norm).to(DEVICE)
    fastsn.accelerate(model) if accelerated else fastsn.grouping.take_over(model)
    return model


def images(count=4):
    return torch.randn(count, 3, 8, 8, device=DEVICE)


def vectors(model):
    return [buffer.clone() for buffer in model.buffers()]


def moves(model):
    before = vectors(model)
    model(images())
    return not all(torch.equal(x, y) for x, y in zip(before, vectors(model), strict=True))


@each_torch_form
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_once_per_step(form, options):
    model = fastsn.set_update_policy(made(form), "step")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, **options)
    for _ in range(2):
        assert [moves(model), moves(model)] == [True, False]
        x = images()
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        model(x).sum().backward()
        optimizer.step()
    with fastsn.frozen(model):
        assert not moves(model)


@each_torch_form
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(form, reentrant):
    found = []
    for repeats in (False, True):
        model = made(form)
        torch.manual_seed(1)
        inputs = [images().requires_grad_() for _ in range(2)]
        outputs = [
            checkpoint(model, x, use_reentrant=reentrant) if repeats else model(x) for x in inputs
        ]
        sum(y.square().sum() for y in outputs).backward()
        found.append([*(p.grad for p in model.parameters()), *vectors(model)])
    torch.testing.assert_close(found[1], found[0])


@each_torch_form
@torch.no_grad()
def test_evaluation_sees_every_write(form):
    model, x = made(form).eval(), images()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    for change in (
        lambda w: w.mul_(-1),
        lambda w: w.copy_(torch.randn_like(w)),
        lambda w: setattr(w, "data", torch.randn_like(w)),
        lambda w: w.data.copy_(torch.randn_like(w)),
    ):
        change(max(model.parameters(), key=lambda p: p.ndim))
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    model.load_state_dict(made(form).state_dict())
    torch.testing.assert_close(model(x), made(form).eval()(x))


@needs_gpu
def test_a_step_waits_for_nothing():
    """Forward, backward, optimizer and logging, also where the weight was not changed."""
    model = fastsn.set_update_policy(made(gpu_fixtures.TORCH_PARAMETRIZED), "step")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    written = []
    x = images()
    with fastsn.SigmaLogger(lambda values, step: written.append((step, values))) as log:
        for step in range(4):
            if step:  # what is made once may wait
                torch.cuda.set_sync_debug_mode("error")
            try:
                (model(x).mean() - model(-x).mean()).backward()
                optimizer.step()
                log(model, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert [step for step, _ in written] == [0, 1, 2, 3]
    last = {f"sigma/{name}": float(sigma) for name, sigma in fastsn.sigmas(model).items()}
    assert written[-1][1] == pytest.approx(last)


@each_torch_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_under_autocast(form, dtype):
    """torch iterates in half precision there (pytorch#125544)."""
    model, exact = made(form), made(form)
    x = images()
    for _ in range(5):
        exact(x)
        with torch.autocast(DEVICE.type, dtype=dtype):
            assert model(x).dtype == dtype
    torch.testing.assert_close(vectors(model), vectors(exact), rtol=0, atol=0)


@each_torch_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_keep_wide_vectors(form, dtype):
    model = made(form).to(dtype)
    for _ in range(3):
        model(images().to(dtype)).sum().backward()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    layer = nn.Linear(64, 64, device=DEVICE, dtype=torch.float16)
    nn.init.constant_(layer.weight, 3e4)  # sigma = 64 * 3e4
    fastsn.parametrizations.spectral_norm(layer)
    assert layer.weight.isfinite().all()


@each_torch_form
def test_averages_keep_their_norm(form):
    model = made(form)
    average = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(10):
        model(images()).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        fastsn.converge(average.eval())
        used = fastsn.refresh(average.module)
    for name, weight in used.items():
        matrix = as_matrix(weight.double(), int(name == "2.weight"))  # the transposed convolution
        norm = torch.linalg.matrix_norm(matrix, 2)
        assert 0.9 < norm < 1.1


@each_torch_form
def test_deferred_initialization(form):
    with torch.device("meta"):
        model = fastsn.accelerate(normalize_with(critic(), form.spectral_norm))
    model = model.to_empty(device=DEVICE)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
        for parameter in model.parameters():
            parameter.normal_()
    assert model(images()).isfinite().all()
    generator = torch.Generator(DEVICE)
    first = vectors(fastsn.reset_parameters(model, generator.manual_seed(1)))
    fastsn.reset_parameters(model, generator.manual_seed(1))
    torch.testing.assert_close(vectors(model), first, rtol=0, atol=0)


@pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
def test_reduce_overhead():
    """CUDA graphs record the iteration: u and v move once per replay."""
    plain, fast = made(gpu_fixtures.TORCH_PARAMETRIZED), made(gpu_fixtures.TORCH_PARAMETRIZED)
    compiled = torch.compile(fast, mode="reduce-overhead")
    x = images()
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        for model in (plain, compiled):
            model.zero_grad()
            model(x).square().sum().backward()
        torch.testing.assert_close(vectors(fast), vectors(plain), rtol=1e-4, atol=1e-5)
        for actual, expected in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-4)
