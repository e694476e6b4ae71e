"""MSN layers against their definition in two steps: convolve, subtract the mean, add the bias."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastsn
from fastsn import means
from fastsn.nn import msn
from helpers.msn_cases import (
    KINDS,
    Case,
    TwoStep,
    random_case,
    small,
    small_input,
    step,
    weights_of,
)
from helpers.tolerances import assert_sum_no_worse

double = pytest.mark.usefixtures("double")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_seed = pytest.mark.parametrize("seed", range(8))


@pytest.fixture(params=["folded", "direct", "chosen"])
def form(request, monkeypatch):
    """The mean comes from the input, from the output (where a layer can), or as the shape says."""
    threshold = {"folded": math.inf, "direct": 0.0}.get(request.param, msn._DIRECT)
    monkeypatch.setattr(msn, "_DIRECT", threshold)
    return request.param


both_forms = pytest.mark.parametrize("form", ["folded", "direct"], indirect=True)


# The definition


@double
@each_seed
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_random_layers_follow_the_definition(seed, form):
    """Outputs, running means, counts, u and v, and all gradients."""
    rng = random.Random(seed)
    for _ in range(40):
        case = random_case(rng)
        definition = TwoStep(case.layer)
        for training in (True, False, True):
            case.layer.train(training), definition.train(training)
            expected = step(definition.layer, definition, case)
            torch.testing.assert_close(
                step(case.layer, case.layer, case), expected, rtol=1e-9, atol=1e-11,
                msg=lambda text, at=(training, case): f"{text}\ntraining={at[0]}, {at[1]}",
            )  # fmt: skip


@each_kind
def test_the_form_follows_from_the_shape(kind, monkeypatch):
    """The input of a layer is read for its mean unless it is much larger than the output."""
    taken = []
    for name in ("center", "mean_bias"):
        call = getattr(means, name)
        monkeypatch.setattr(
            means, name, lambda *args, name=name, call=call: taken.append(name) or call(*args)
        )
    small(kind)(small_input(kind))
    assert taken == ["mean_bias"]
    taken.clear()
    make, size = getattr(fastsn.nn, f"MSN{kind}"), [9] * (kind != "Linear" and int(kind[-2]))
    options = {"stride": 3} if kind.startswith("Conv") and "Transpose" not in kind else {}
    layer = make(*(16, 2) if kind == "Linear" else (16, 2, 1), **options)
    layer(torch.randn(3, 16, *size))
    assert taken == ["center"]
    layer.eval()(torch.randn(3, 16, *size))
    assert taken == ["center"]


@double
@each_kind
def test_the_mean_of_the_output_is_the_bias(kind, form):
    layer = small(kind)
    y = layer(small_input(kind))
    torch.testing.assert_close(y.movedim(1, 0).flatten(1).mean(1), layer.bias)


@double
def test_borders_count(form):
    """Most of what each output sees are zeros of the padding; the mean knows."""
    layer = fastsn.nn.MSNConv2d(1, 2, 5, padding=4, bias=False)
    y = layer(torch.full((2, 1, 2, 2), 3.0))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2))
    assert y.std() > 0.1


@double
def test_the_mean_is_that_of_the_weight_that_is_used(form):
    """After one iteration from random vectors sigma is still far from the norm."""
    layer = small("Conv2d", scale=0.3, momentum=1)
    norm = layer.parametrizations.weight[0]
    with torch.no_grad():
        norm._u.copy_(nn.functional.normalize(torch.randn(3), dim=0))
        norm._v.copy_(nn.functional.normalize(torch.randn(8), dim=0))
    x = small_input("Conv2d")
    layer(x)
    y = nn.functional.conv2d(x, layer.eval().weight, None, 2, 1)
    torch.testing.assert_close(layer.running_mean, y.mean((0, 2, 3)))


@double
@pytest.mark.parametrize("momentum", [None, 0.1, 0, 1])
def test_running_means_of_several_batches(momentum, form):
    layer = small("Conv1d", momentum=momentum)
    layer.parametrizations.weight[0].eval()  # the weight stays what it is
    batch_means = []
    for _ in range(4):
        x = small_input("Conv1d")
        y = nn.functional.conv1d(x, layer.weight, None, 2, 1)
        batch_means.append(y.mean((0, 2)))
        layer(x)
    expected = torch.zeros(3)
    for i, mean in enumerate(batch_means, 1):
        expected = expected.lerp(mean, 1 / i if momentum is None else momentum)
    torch.testing.assert_close(layer.running_mean, expected.detach())
    assert layer.num_batches_tracked == 4 and not layer.running_mean.requires_grad
    expected = (y - expected.view(-1, 1)) * layer.gain.view(-1, 1) + layer.bias.view(-1, 1)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.num_batches_tracked == 4


@double
def test_without_running_mean_eval_takes_that_of_the_batch(form):
    layer = small("Conv2d", track_running_stats=False)
    x = small_input("Conv2d")
    expected = layer(x)
    torch.testing.assert_close(layer.eval()(x), expected)
    alone = layer(x[:1])
    torch.testing.assert_close(alone.mean((0, 2, 3)), layer.bias)


# Gradients


@double
@each_kind
@both_forms
def test_gradcheck(kind, form):
    """The mean of the batch, and a weight that does not iterate, are those of eval mode here."""
    layer = small(kind, track_running_stats=False).eval()
    x = small_input(kind)[:2].requires_grad_()
    inputs = (x, *layer.parameters())
    assert len(inputs) == 4
    # gradcheck moves the parameters themselves.
    assert gradcheck(lambda *_: layer(x), inputs)
    if not kind.endswith("3d"):
        assert gradgradcheck(lambda *_: layer(x), inputs)


@double
@both_forms
def test_gradcheck_of_groups_and_borders(form):
    options = {"groups": 2, "padding": 2, "padding_mode": "circular", "dilation": 2}
    layer = fastsn.nn.MSNConv1d(4, 2, 3, norm="bidirectional", track_running_stats=False, **options)
    x = torch.randn(2, 4, 3, requires_grad=True)
    inputs = (x, *layer.eval().parameters())
    assert gradcheck(lambda *_: layer(x), inputs)
    assert gradgradcheck(lambda *_: layer(x), inputs)


@double
@both_forms
def test_gradient_penalty(form):
    """The double backward in training, against the definition."""
    layers = [small("Conv2d"), small("Conv2d", stride=1)]
    x = 1 + torch.randn(2, 2, 5, 5)
    results = []
    for first, second in (layers, [TwoStep(layer) for layer in layers]):
        real = x.clone().requires_grad_()
        y = second(first(real).tanh()[:, :2])
        (slope,) = torch.autograd.grad((y * weights_of(y)).sum(), real, create_graph=True)
        penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        parameters = [*first.parameters(), *second.parameters()]
        # The last bias has no part in the slope.
        results.append(torch.autograd.grad(penalty, parameters, materialize_grads=True))
        assert sum(bool(grad.any()) for grad in results[-1]) == len(parameters) - 1
    torch.testing.assert_close(*results)


@double
@both_forms
def test_the_gradient_of_the_input_sums_to_zero_over_the_batch(form):
    """A constant added to the output of f goes away with its mean."""
    layer = fastsn.nn.MSNLinear(5, 4)
    x = torch.randn(6, 5, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, weights_of(y))
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5))


# Precision


def precision_of(case: Case, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, layer, two steps, exact) of all results of a step in this type."""
    layer = copy.deepcopy(case.layer).to(dtype)
    case = case._replace(input=case.input.to(dtype))
    exact = TwoStep(layer).double()
    peer = TwoStep(layer)
    wide = case._replace(input=case.input.double())
    results = (
        step(layer, layer, case),
        step(peer.layer, peer, case),
        step(exact.layer, exact, wide),
    )
    names = [name for name in results[0] if name.endswith(("output", "grad", "running_mean"))]
    return [(name, *(result[name] for result in results)) for name in names]


WIDE = [
    ("Linear", (48, 40), {}, (32, 48)),
    ("Conv2d", (16, 24, 3), {"padding": 1}, (4, 16, 12, 12)),
    ("Conv2d", (16, 24, 4), {"stride": 2, "groups": 2}, (4, 16, 12, 12)),
    ("ConvTranspose2d", (16, 8, 4), {"stride": 2, "padding": 1}, (4, 16, 6, 6)),
]
each_wide = pytest.mark.parametrize("kind, args, options, shape", WIDE)


@each_wide
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(kind, args, options, shape, dtype, form):
    """In every type the error is about that of two steps in the same type."""
    layer = getattr(fastsn.nn, f"MSN{kind}")(*args, gain=True, **options)
    case = Case(layer, torch.randn(shape))
    for name, actual, peer, true in precision_of(case, dtype):
        # As many terms as the longest sum has, of an output, a gradient or a mean.
        length = math.prod(shape) if name != "output" else math.prod(shape[1:])
        assert_sum_no_worse(
            actual, peer.to(actual.dtype), true, length=length, computed_in=torch.float32
        )


@each_wide
@both_forms
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, 1e4), (torch.bfloat16, 1e2), (torch.bfloat16, 1e4)], ids=str
)
def test_huge_means(kind, args, options, shape, dtype, ratio, form):
    """What cancels is lost: the error of the result is that of the output before, mean and all.

    So it is in two steps. Of the output before, each value is a sum in fp32, rounded to its type.
    """
    options = {"bias": False, "momentum": 1, **options}
    layer = getattr(fastsn.nn, f"MSN{kind}")(*args, **options).to(dtype)
    exact = TwoStep(layer).double()
    x = (ratio + torch.randn(shape)).to(dtype)
    y, true = layer(x), exact(x.double())
    mean, true_mean = layer.running_mean, exact.layer.running_mean
    largest = (true + true_mean.view(1, -1, *(1,) * (true.ndim - 2))).abs().max()
    assert largest > 0.2 * ratio
    terms = layer.parametrizations.weight.original[0].numel()
    unit = terms**0.5 * torch.finfo(torch.float32).eps
    assert (mean - true_mean).abs().max() <= (unit + torch.finfo(dtype).eps) * largest
    low = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (y - true).abs().max() <= (unit + low) * largest


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_means_of_inputs_and_gradients(dtype, form):
    """The gradient of the weight is the difference of two terms of the size |sum g| |mean x|.

    In two steps each gradient loses its mean first, so that less cancels.
    """
    layer = fastsn.nn.MSNConv2d(16, 24, 3, padding=1).to(dtype)
    exact = TwoStep(layer).double()
    x = (10 + torch.randn(4, 16, 12, 12)).to(dtype)
    grad = (1 + torch.randn(4, 24, 12, 12)).to(dtype)
    layer(x).backward(grad)
    exact(x.double()).backward(grad.double())
    actual, true = (
        one.parametrizations.weight.original.grad.double() for one in (layer, exact.layer)
    )
    terms = grad.numel() / grad.shape[1]
    largest = grad.double().sum((0, 2, 3)).abs().max() * 10
    assert true.abs().max() < largest / 3
    unit = terms**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    sigma = fastsn.sigmas(exact)["layer.weight"]
    assert (actual - true).abs().max() <= 2 * unit * largest / sigma


@each_wide
@both_forms
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_inputs_of_every_size(kind, args, options, shape, factor, form):
    """A power of two goes through exactly."""
    layer = getattr(fastsn.nn, f"MSN{kind}")(*args, bias=False, momentum=1, **options)
    layer.parametrizations.weight[0].eval()
    x = 1 + torch.randn(shape)
    y, mean = layer(x), layer.running_mean.clone()
    assert torch.equal(layer(factor * x), factor * y)
    assert torch.equal(layer.running_mean, factor * mean)
