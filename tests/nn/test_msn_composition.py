"""MSN layers inside the rest of fastsn and torch: grouped, under autocast, transformed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import fastsn
from fastsn import backends
from fastsn.nn import msn
from helpers.accelerated import assert_same_steps, calls_of, fused, pair
from helpers.msn_cases import (
    KINDS,
    Case,
    TwoStep,
    image,
    network,
    small,
    small_input,
    step,
    weights_of,
)

double = pytest.mark.usefixtures("double")
each_kind = pytest.mark.parametrize("kind", KINDS)
low_types = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=[1e9, 0.0], ids=["folded", "direct"])
def form(request, monkeypatch):
    monkeypatch.setattr(msn, "_DIRECT", request.param)


# Grouped


@double
def test_one_call_serves_a_network(form):
    plain, fast = pair(network)
    assert_same_steps(plain, fast, image(), steps=3)
    x = image()
    plain(x)
    calls = calls_of(lambda: fast(x))
    assert [call for call in calls if call[0] in ("power_", "scale")] == fused(3)
    plain.eval(), fast.eval()
    assert_same_steps(plain, fast, x)


@double
def test_sigmas_and_weights_of_a_network():
    model = network()
    names = [f"{i}.weight" for i in (0, 2, 5)]
    model.eval()
    assert list(fastsn.sigmas(model)) == names
    for name, weight in fastsn.refresh(model).items():
        layer = model[int(name[0])]
        torch.testing.assert_close(weight, layer.weight)
        sigma = fastsn.sigmas(model)[name]
        torch.testing.assert_close(weight * sigma, layer.parametrizations.weight.original)


def test_apply_leaves_them_alone():
    model = nn.Sequential(
        fastsn.nn.MSNConv2d(2, 3, 3), fastsn.nn.MeanOnlyBatchNorm2d(3), nn.Conv2d(3, 2, 1)
    )
    before = copy.deepcopy(model[:2].state_dict())
    report = fastsn.apply(model)
    assert report.touched == ["2.weight"]
    assert report.skipped == {
        "0": "its weight is normalized or parametrized already",
        "1": "MeanOnlyBatchNorm2d is no convolution, linear or embedding layer",
    }
    torch.testing.assert_close(model[:2].state_dict(), before, rtol=0, atol=0)


# Autocast


@low_types
@each_kind
@pytest.mark.parametrize("grouped", [False, True])
def test_autocast(kind, low, grouped, form):
    """No less exact than two steps under autocast; means and statistics in fp32."""
    layer = small(kind, momentum=1)
    peer, exact = TwoStep(layer), TwoStep(layer).double()
    forward = fastsn.accelerate(nn.Sequential(layer)) if grouped else layer
    case = Case(layer, small_input(kind))
    with torch.autocast("cpu", low):
        actual, expected = step(layer, forward, case), step(peer.layer, peer, case)
    true = step(exact.layer, exact, case._replace(input=case.input.double()))
    assert actual["output"].dtype == low
    for name, value in actual.items():
        if name != "output":
            assert value.dtype == expected[name].dtype, name
    names = [name for name in actual if name.endswith(("output", "grad", "mean"))]
    assert len(names) == 6 and actual["running_mean"].dtype == torch.float32
    for name in names:
        # Two roundings to the low type, also of what is in another at last.
        band = 2 * torch.finfo(low).eps * true[name].abs().max()
        error, other = ((x[name] - true[name]).abs().max() for x in (actual, expected))
        assert error <= 2 * other + band, name


@low_types
@each_kind
def test_autocast_takes_the_mean_of_what_the_layer_sees(kind, low, form):
    """Input and weight as they are rounded for the layer: their rounding leaves no mean."""
    layer = small(kind, bias=False, gain=False, momentum=1)
    x = 20 + 4 * torch.randn_like(small_input(kind))
    with torch.autocast("cpu", low):
        layer(x)
        weight = layer.eval().weight.to(low)
    y = TwoStep(layer).double().plain({"weight": weight.double()}, (x.to(low).double(),))
    mean = y.movedim(1, 0).flatten(1).mean(1)
    # The direct form knows the output in the low type alone.
    eps = torch.finfo(low).eps if msn._DIRECT == 0 else 20 * torch.finfo(torch.float32).eps
    assert (layer.running_mean - mean).abs().max() <= eps * y.abs().max()


@low_types
def test_autocast_in_eval_is_that_of_the_folded_layer(low):
    layer = small("Conv2d", gain=False)
    layer(small_input("Conv2d"))
    x = small_input("Conv2d")
    plain = fastsn.fold(layer)
    with torch.autocast("cpu", low):
        actual, expected = layer.eval()(x), plain(x)
    assert actual.dtype == expected.dtype == low
    torch.testing.assert_close(actual, expected)


def test_autocast_turned_off_in_between():
    """A weight computed ahead in the low type is not used where autocast is off."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = small("Conv2d"), small("Linear")

        def forward(self, x):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                return y, self.second(x.flatten(1)[:, :5])

    model = fastsn.accelerate(Net())
    alone = copy.deepcopy(model.second)
    x = small_input("Conv2d")
    with torch.autocast("cpu", torch.bfloat16):
        first, second = model(x)
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(second, alone(x.flatten(1)[:, :5]))
    torch.testing.assert_close(model.second.state_dict(), alone.state_dict())


def test_a_subclass_with_its_own_forward_gets_the_full_type():
    """It may do anything with its weight, even where autocast would cast it in torch's forward."""
    types = []

    class Own(fastsn.nn.MSNLinear):
        def forward(self, x):
            types.append(self.weight.dtype)
            return super().forward(x)

    model = fastsn.accelerate(nn.Sequential(Own(5, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        model(small_input("Linear"))
    assert types == [torch.float32]


def test_double_layers_stay_double_under_autocast():
    layer = small("Conv2d").double()
    x = small_input("Conv2d").double()
    alone = copy.deepcopy(layer)
    expected = alone(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected)


# Autograd


@double
@each_kind
def test_two_forwards_before_one_backward(kind, form):
    layer = small(kind)
    definition = TwoStep(layer)
    x, z = small_input(kind), small_input(kind)
    results = []
    for forward, owner in ((layer, layer), (definition, definition.layer)):
        y = forward(x) - forward(z).square()
        results.append(torch.autograd.grad(y, list(owner.parameters()), weights_of(y)))
    torch.testing.assert_close(*results)


@double
@each_kind
def test_changes_in_place_around_a_layer(kind, form):
    """Of what went in before and of what came out, as with torch's layers."""
    layer = small(kind)
    definition = TwoStep(layer)
    x = small_input(kind)
    results = []
    for forward, owner in ((layer, layer), (definition, definition.layer)):
        leaf = x.clone().requires_grad_()
        y = torch.relu_(forward(torch.relu_(1.5 * leaf)))
        results.append(torch.autograd.grad(y, [leaf, *owner.parameters()], weights_of(y)))
    torch.testing.assert_close(*results)


@double
@pytest.mark.parametrize("frozen", ["parametrizations.weight.original", "bias", "gain"])
def test_frozen_parameters(frozen, form):
    layer, full = small("Conv2d"), small("Conv2d")
    full.load_state_dict(layer.state_dict())
    layer.get_parameter(frozen).requires_grad_(False)
    for module in (layer, full):
        y = module(small_input("Conv2d").fill_(0.7).cumsum(3))
        (y * weights_of(y)).sum().backward()
    for (name, parameter), other in zip(layer.named_parameters(), full.parameters(), strict=True):
        if name == frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, other.grad)


@double
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode, form):
    model = network()
    alone = copy.deepcopy(model)
    for training in (True, False, True):
        x = image()
        expected = alone.train(training)(x)
        with mode():
            torch.testing.assert_close(model.train(training)(x), expected)
    torch.testing.assert_close(model.state_dict(), alone.state_dict())
    model(x).sum().backward()


# Stateless calls and transforms


@double
def test_functional_call(form):
    layer, other = small("Conv2d"), small("Conv2d")
    before = copy.deepcopy(layer.state_dict())
    x = small_input("Conv2d")
    values = {name: value.clone() for name, value in other.state_dict().items()}
    expected = other(x)
    torch.testing.assert_close(functional_call(layer, values, x), expected)
    torch.testing.assert_close(values, dict(other.state_dict()))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def loss_of(layer: nn.Module):
    """A function of parameters and input; buffers are copies, which nothing sees."""

    def loss(parameters, x):
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        y = functional_call(layer, {**parameters, **buffers}, (x,))
        return (y * weights_of(y)).sum()

    return loss, {name: p.detach() for name, p in layer.named_parameters()}


@double
@each_kind
@pytest.mark.parametrize("training", [True, False])
# Forward mode itself uses torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
def test_func_grad_and_jvp(kind, training, form):
    layer = small(kind).train(training)
    loss, parameters = loss_of(layer)
    x = small_input(kind)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
    actual = grad(loss)(parameters, x)
    torch.testing.assert_close(list(actual.values()), list(expected))
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, slope = jvp(lambda p: loss(p, x), (parameters,), (tangents,))
    torch.testing.assert_close(slope, sum((tangents[n] * g).sum() for n, g in actual.items()))


@double
@each_kind
def test_vmap(kind, form):
    """Over batches, of which none may move the running mean, and over ensembles."""
    layer = small(kind, track_running_stats=False)
    loss, parameters = loss_of(layer)
    batches = torch.stack([small_input(kind) for _ in range(2)])
    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, batches)
    for i, batch in enumerate(batches):
        expected = grad(loss)(parameters, batch)
        torch.testing.assert_close({name: g[i] for name, g in actual.items()}, expected)
    for stateful in (layer.eval(), small(kind).eval()):
        loss, parameters = loss_of(stateful)
        ensemble = {name: torch.stack([p, 2 * p + 1]) for name, p in parameters.items()}
        losses = vmap(loss)(ensemble, batches)
        for i, batch in enumerate(batches):
            member = {name: p[i] for name, p in ensemble.items()}
            torch.testing.assert_close(losses[i], loss(member, batch))


@double
def test_back_ends_agree(form):
    layer = small("Conv2d")
    alone = copy.deepcopy(layer)
    case = Case(layer, small_input("Conv2d"))
    actual = step(layer, layer, case)
    with backends.use_backend("reference"):
        torch.testing.assert_close(actual, step(alone, alone, case._replace(layer=alone)))
