"""MeanOnlyBatchNorm1d, 2d and 3d: what batch norm does to the mean, and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastsn
from helpers.msn_cases import drawn, weights_of

double = pytest.mark.usefixtures("double")
SHAPES = {
    "1d-flat": (1, (6, 3)),
    "1d": (1, (4, 3, 5)),
    "2d": (2, (2, 3, 4, 5)),
    "3d": (3, (2, 3, 2, 3, 2)),
}
each_shape = pytest.mark.parametrize("dims, shape", SHAPES.values(), ids=SHAPES.keys())


def make(dims: int, channels: int = 3, **options) -> nn.Module:
    return drawn(getattr(fastsn.nn, f"MeanOnlyBatchNorm{dims}d")(channels, **options))


def batch_norm(dims: int, channels: int = 3, **options) -> nn.Module:
    return getattr(nn, f"BatchNorm{dims}d")(channels, affine=False, **options)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (like.ndim - 2))


def two_step(layer: nn.Module, x: Tensor, mean: Tensor | None = None) -> Tensor:
    """The definition."""
    if mean is None:
        mean = x.mean([0, *range(2, x.ndim)])
    y = x - per_channel(mean, x)
    if layer.gain is not None:
        y = y * per_channel(layer.gain, x)
    return y if layer.bias is None else y + per_channel(layer.bias, x)


# Numbers


@double
@each_shape
@pytest.mark.parametrize("momentum", [0.1, None, 0, 1])
def test_the_mean_is_that_of_batch_norm(dims, shape, momentum):
    layer, norm = make(dims, momentum=momentum, affine=False), batch_norm(dims, momentum=momentum)
    for training in (True, True, False, True, False):
        x = 2 + torch.randn(shape)
        y, normalized = layer.train(training)(x), norm.train(training)(x)
        others = [0, *range(2, x.ndim)]
        var = x.var(others, correction=0) if training else norm.running_var
        torch.testing.assert_close(y, normalized * per_channel(var + norm.eps, x).sqrt())
        torch.testing.assert_close(layer.running_mean, norm.running_mean)
        assert layer.num_batches_tracked == norm.num_batches_tracked


@double
@each_shape
@pytest.mark.parametrize("options", [{}, {"gain": True}, {"affine": False}], ids=str)
def test_outputs_and_gradients_follow_the_definition(dims, shape, options):
    layer = make(dims, **options)
    for training in (True, False):
        layer.train(training)
        x = (2 + torch.randn(shape)).requires_grad_()
        expected = two_step(layer, x, None if training else layer.running_mean.clone())
        y = layer(x)
        torch.testing.assert_close(y, expected)
        assert not layer.running_mean.requires_grad
        inputs = [x, *layer.parameters()]
        grads = [torch.autograd.grad(z, inputs, weights_of(z)) for z in (y, expected)]
        torch.testing.assert_close(*grads)


@double
@each_shape
def test_gradcheck(dims, shape):
    layer = make(dims, gain=True)
    inputs = (torch.randn(shape, requires_grad=True), *layer.parameters())
    assert gradcheck(lambda *_: layer(inputs[0]), inputs)
    assert gradgradcheck(lambda *_: layer(inputs[0]), inputs)


@each_shape
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dims, shape, gain, dtype):
    """Also where the mean is huge: sums, the mean and the difference are in fp32."""
    layer = make(dims, gain=gain).to(dtype)
    assert layer.running_mean.dtype == torch.float32
    x = (200 + torch.randn(shape)).to(dtype)
    y, exact = layer(x), two_step(copy.deepcopy(layer).double(), x.double())
    assert y.dtype == dtype
    allowed = 0.5 * torch.finfo(dtype).eps * exact.abs() + 2e-4
    assert ((y - exact).abs() <= allowed).all()
    torch.testing.assert_close(
        layer.running_mean, 0.1 * x.float().mean([0, *range(2, x.ndim)]), rtol=1e-6, atol=0
    )
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.dtype == dtype and layer.bias.grad.dtype == dtype


def test_memory_format():
    layer = make(2, gain=True)
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous()))
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_autocast_leaves_the_type_of_the_input():
    layer = make(2)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert layer(torch.randn(2, 3, 4, 5).to(dtype)).dtype == dtype
    assert layer.running_mean.dtype == torch.float32


@double
def test_without_running_mean_eval_takes_that_of_the_batch():
    layer = make(2, track_running_stats=False)
    assert layer.running_mean is None and list(layer.state_dict()) == ["bias"]
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(layer.eval()(x), two_step(layer, x))


@double
def test_a_batch_of_one():
    """Its positions are enough for a mean."""
    layer, x = make(2, momentum=1), torch.randn(1, 3, 1, 2)
    torch.testing.assert_close(layer(x), two_step(layer, x))
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


@double
def test_after_a_spectrally_normalized_layer_it_is_msn():
    folded = fastsn.nn.MSNConv2d(4, 3, 3, gain=True)
    steps = nn.Sequential(fastsn.nn.SNConv2d(4, 3, 3, bias=False), make(2, gain=True))
    drawn(folded)
    steps[0].load_state_dict(
        {k: v for k, v in folded.state_dict().items() if k.startswith("parametrizations")}
    )
    steps[1].load_state_dict(
        {k: v for k, v in folded.state_dict().items() if not k.startswith("parametrizations")}
    )
    for training in (True, True, False):
        x = 1 + torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(steps.train(training)(x), folded.train(training)(x))
    torch.testing.assert_close(steps[1].running_mean, folded.running_mean)


@double
def test_two_forwards_and_a_change_in_place_before_one_backward():
    layer, x = make(2, gain=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    results = []
    for norm in (layer, lambda x: two_step(layer, x)):
        y = torch.relu_(norm(x)) + norm(torch.relu_(x * 2))
        results.append(torch.autograd.grad(y, [x, *layer.parameters()], weights_of(y)))
    torch.testing.assert_close(*results)


@double
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled():
    layer = make(2, gain=True)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (2, 3, 5):
        x = torch.randn(size, 3, 4, 5)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


# The module


@each_shape
def test_arguments_and_state(dims, shape):
    layer = getattr(fastsn.nn, f"MeanOnlyBatchNorm{dims}d")(
        3, 0.3, True, True, "cpu", torch.float64, gain=True
    )
    state = layer.state_dict()
    assert sorted(state) == ["bias", "gain", "num_batches_tracked", "running_mean"]
    assert not layer.bias.any() and (layer.gain == 1).all() and layer.momentum == 0.3
    assert {value.dtype for value in state.values()} == {torch.float64, torch.long}
    plain = make(dims, affine=False, gain=True)
    assert not list(plain.parameters())
    layer(torch.randn(shape, dtype=torch.float64))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)
    layer.reset_running_stats()
    assert not layer.running_mean.any() and layer.num_batches_tracked == 0
    assert layer.half().running_mean.dtype == torch.float32
    assert make(dims, device="meta")(torch.empty(shape, device="meta")).shape == shape


def test_repr():
    assert repr(make(2)) == "MeanOnlyBatchNorm2d(3, momentum=0.1)"
    assert repr(make(1, affine=False, momentum=None, track_running_stats=False)) == (
        "MeanOnlyBatchNorm1d(3, affine=False, momentum=None, track_running_stats=False)"
    )
    assert repr(make(3, gain=True)) == "MeanOnlyBatchNorm3d(3, momentum=0.1, gain=True)"


ONE_VALUE = "Expected more than 1 value per channel when training, got input size"


@pytest.mark.parametrize(
    "dims, shape, text",
    [
        (1, (1, 3), ONE_VALUE),
        (2, (1, 3, 1, 1), ONE_VALUE),
        (3, (0, 3, 2, 2, 2), ONE_VALUE),
        (1, (3,), r"expected 2D or 3D input \(got 1D input\)"),
        (1, (2, 3, 4, 4), r"expected 2D or 3D input \(got 4D input\)"),
        (2, (2, 3, 4), r"expected 4D input \(got 3D input\)"),
        (3, (2, 3, 4, 4), r"expected 5D input \(got 4D input\)"),
        (2, (2, 4, 3, 3), "expected an input with 3 channels, got 4 of them"),
    ],
)
def test_bad_inputs_change_nothing(dims, shape, text):
    layer = make(dims)
    layer.running_mean.normal_()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=text):
        layer(x)
    if text is ONE_VALUE:
        if len(x):  # as batch norm, which lets an empty batch pass
            with pytest.raises(ValueError, match=ONE_VALUE):
                batch_norm(dims)(x)
        assert torch.equal(layer.eval()(x), two_step(layer, x, layer.running_mean))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_running_means_outlive_nan(momentum, bad):
    layer = make(2, momentum=momentum)
    layer(torch.randn(2, 3, 4, 5))
    mean = layer.running_mean.clone()
    x = torch.randn(2, 3, 4, 5)
    x[0, 1, 2, 3] = bad
    y = layer(x)
    assert not y[:, 1].isfinite().any() and y[:, ::2].isfinite().all()
    assert (layer.running_mean == mean).tolist() == [False, True, False]
    assert layer.num_batches_tracked == 2
