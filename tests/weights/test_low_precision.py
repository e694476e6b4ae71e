"""u, v, sigma and the iteration are in fp32 or wider, whatever the weight is in.

torch iterates in the weight's type, and under CUDA's autocast in half precision
(pytorch#125544); in fp16 its sigma overflows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsn
from helpers.accelerated import weights_left
from helpers.answers import FASTSN, TORCH, answers
from helpers.torch_peers import as_matrix

HALF = (torch.float16, torch.bfloat16)
each_half = pytest.mark.parametrize("dtype", HALF)
FORMS = {"hook": FASTSN.hook, "parametrization": FASTSN.parametrization}
each_form = pytest.mark.parametrize("normalize", FORMS.values(), ids=FORMS)


def converged(normalize, dtype):
    """A layer that was made narrower and has gone on iterating, and its true sigma."""
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 40, 3)
    with torch.no_grad():  # one direction stands out, so that the iteration is fast
        layer.weight.addcmul_(torch.randn(40, 1, 1, 1), torch.randn(24, 3, 3), value=0.1)
    layer = normalize(layer).to(dtype)
    x = torch.zeros(1, 24, 3, 3, dtype=dtype)
    for _ in range(20):
        layer(x)
    (original,) = (p for p in layer.parameters() if p.ndim > 1)
    matrix = as_matrix(original.detach().double(), 0)
    return layer, x, torch.linalg.matrix_norm(matrix, 2)


def sigma_used(layer):
    """What the weight was divided by, as far as its type shows."""
    (original,) = (p for p in layer.parameters() if p.ndim > 1)
    normalized = layer.weight.detach().double()
    return original.detach().double().norm() / normalized.norm()


@each_half
@answers("keras#20309", "open-mmlab/mmgeneration#76")
@pytest.mark.parametrize("training", [True, False])
def test_sigma_is_accurate(normalize, dtype, training):
    """The rounding of many elements averages out of a norm, a wrong sigma does not."""
    layer, x, true = converged(normalize, dtype)
    layer.train(training)(x)
    error = abs(sigma_used(layer) / true - 1)
    assert error < torch.finfo(dtype).eps / 16, error


@each_half
@each_form
def test_state_is_in_fp32_and_goes_to_torch_and_back(normalize, dtype):
    layer, x, _ = converged(normalize, dtype)
    state = layer.state_dict()
    assert {v.dtype for k, v in state.items() if k.endswith(("_u", "_v"))} == {torch.float32}
    name = next(name for name, form in FORMS.items() if form is normalize)
    torchs = TORCH.form(name)(nn.Conv2d(24, 40, 3)).to(dtype)
    torchs.load_state_dict(state)
    back = normalize(nn.Conv2d(24, 40, 3)).to(dtype)
    back.load_state_dict(torchs.state_dict())
    original = [p for p in layer.parameters() if p.ndim > 1][0]
    for other in (torchs, back):
        other.eval()(x)
        error = (other.weight - layer.weight).detach().double().norm() / layer.weight.norm()
        assert error < 4 * torch.finfo(dtype).eps and original.dtype == dtype


@answers("tensorflow/addons#2398")
@pytest.mark.parametrize("training", [True, False])
def test_a_sigma_beyond_the_range_of_fp16(normalize, training):
    layer = nn.Linear(64, 64).half()
    nn.init.constant_(layer.weight, 3e4)  # sigma = 64 * 3e4
    layer.weight.data += 1e3 * torch.randn(64, 64)
    layer = normalize(layer)
    x = torch.randn(2, 64, dtype=torch.float16)
    for _ in range(5):
        layer(x)
    layer.train(training)(x).sum().backward()
    assert layer.weight.isfinite().all()
    norm = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
    assert abs(norm - 1) < 1e-3
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@each_half
@each_form
@pytest.mark.parametrize("grouped", [False, True])
def test_autocast_does_not_reach_the_iteration(normalize, dtype, grouped):
    torch.manual_seed(1)
    model = nn.Sequential(normalize(nn.Linear(30, 20)), nn.ReLU(), normalize(nn.Linear(20, 10)))
    if grouped:
        fastsn.accelerate(model)
    other = copy.deepcopy(model)
    x = torch.randn(4, 30)
    for _ in range(3):
        model(x)
        with torch.autocast("cpu", dtype=dtype):
            assert other(x).dtype == dtype
    torch.testing.assert_close(list(other.buffers()), list(model.buffers()), rtol=0, atol=0)


@each_half
def test_the_normalized_weight_comes_in_autocasts_type(dtype):
    """Written by the kernel, not cast by autocast afterwards."""
    torch.manual_seed(1)
    model = fastsn.accelerate(
        nn.Sequential(fastsn.nn.SNConv2d(3, 8, 3), fastsn.nn.SNConv2d(8, 4, 3))
    )
    with weights_left(model) as left, torch.autocast("cpu", dtype=dtype):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert [weight.dtype for _, weight in left] == [dtype, dtype]
    gradients = [layer.parametrizations.weight.original.grad for layer in model]
    assert all(grad.dtype == torch.float32 and grad.any() for grad in gradients)


@each_half
@pytest.mark.parametrize("convert", ["half then fp32", "to", "swap"])
def test_casts_round_weights_only(dtype, convert):
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(7, 5))
    before = [buffer.clone() for buffer in layer.buffers()]
    if convert == "swap":
        torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if convert == "half then fp32":
        layer.float()
    torch.testing.assert_close(list(layer.buffers()), before, rtol=0, atol=0)
    layer.double()
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float64}


@each_half
def test_models_of_torch_that_were_narrow_before(dtype):
    model = nn.Sequential(TORCH.parametrization(nn.Linear(7, 5)), TORCH.hook(nn.Linear(5, 3))).to(
        dtype
    )
    fastsn.accelerate(model)(torch.randn(2, 7, dtype=dtype)).sum().backward()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
