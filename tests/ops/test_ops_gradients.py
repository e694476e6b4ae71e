"""The operators under autograd, and what PyTorch itself checks of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastsn import ops, reference
from helpers.calls import LAYOUTS, Call, each_layout, gradients_for, make_call, random
from helpers.compiled import quiet


def normalizer(call: Call, backend=ops):
    """The normalized weights as a function of the weights, u and v constant."""

    def normalize(*weights: Tensor) -> tuple[Tensor, ...]:
        at = replace(call, weights=list(weights))
        return tuple(at.scale(at.estimate(backend), backend))

    return normalize


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


METHODS = {
    "sn": ("matrix", {}),
    "bsn": ("bidirectional", {}),
    "scaled": ("bidirectional", {"scales": [0.7, 1.3]}),
    "bound": ("bidirectional", {"scales": [0.3, 30.0], "bound": True}),
    "zero_guard": ("matrix", {"zero_guard": True}),
}
each_method = pytest.mark.parametrize("norm, constraint", METHODS.values(), ids=METHODS.keys())


@each_method
def test_gradients_and_their_gradients(norm, constraint):
    weights = parameters((3, 2, 2), (2, 3))
    call = make_call([w.detach() for w in weights], [0, 1], norm, **constraint)
    assert gradcheck(normalizer(call), weights)
    assert gradgradcheck(normalizer(call), weights)


@each_method
def test_gradients_agree_with_and_without_create_graph(norm, constraint):
    weights = parameters((3, 2, 2), (2, 3))
    call = make_call([w.detach() for w in weights], [0, 1], norm, **constraint)
    outputs = normalizer(call)(*weights)
    directions = [torch.randn_like(w) for w in weights]
    first, graph, again = (
        torch.autograd.grad(outputs, weights, directions, retain_graph=True, create_graph=create)
        for create in (False, True, False)
    )
    assert_close(first, graph)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("constraint", [{"zero_guard": True}, {"bound": True}], ids=str)
def test_second_gradient_of_a_zero_weight(constraint):
    weight, direction = parameters((3, 2), (3, 2))
    call = make_call([weight.detach().clone()], **constraint)
    with torch.no_grad():
        weight.zero_()
    (out,) = normalizer(call)(weight)
    (first,) = torch.autograd.grad(out, weight, direction, create_graph=True)
    assert torch.equal(first, direction)
    second, through = torch.autograd.grad(
        first.square().sum(), (weight, direction), materialize_grads=True
    )
    assert not second.any() and torch.equal(through, 2 * direction)


@pytest.mark.parametrize("create_graph", [False, True])
def test_layers_that_take_no_part(create_graph):
    used, unused, frozen = weights = parameters((4, 3), (4, 3), (4, 3))
    frozen.requires_grad_(False)
    call = make_call([w.detach() for w in weights])
    outputs = normalizer(call)(*weights)
    gradients = torch.autograd.grad(
        outputs[0], [used, unused], outputs[2], create_graph=create_graph, allow_unused=True
    )
    expected = normalizer(call, reference)(*weights)
    assert gradients[1] is None
    assert_close(gradients[0], *torch.autograd.grad(expected[0], used, expected[2]))


@each_layout
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_any_layout(layout, create_graph):
    direction = layout(random(6, 5, 3, 4, dtype=torch.float64))
    for weight_layout in (lambda w: w, LAYOUTS["channels_last"], LAYOUTS["every-other"]):
        weight = weight_layout(random(6, 5, 3, 4, dtype=torch.float64)).requires_grad_()
        (out,) = normalizer(make_call([weight.detach()]))(weight)
        actual, expected = (
            torch.autograd.grad(out, weight, g, retain_graph=True, create_graph=create_graph)[0]
            for g in (direction, direction.resolve_neg().contiguous())
        )
        assert_close(actual, expected)


# PyTorch's own checks: schema, autograd registration, fake kernels, tracing

SAMPLES = {
    "sn": lambda: make_call([random(4, 3), random(2, 5)], [0, 1], iterations=[1, 2]),
    "bsn": lambda: make_call([random(4, 3, 2, 2), random(3, 4, 1, 1)], [0, 1], "bidirectional"),
    "narrow": lambda: make_call([random(4, 3, dtype=torch.bfloat16), random(7)], bound=True),
    "fp64": lambda: make_call([random(4, 3, dtype=torch.float64)], zero_guard=True, v_first=True),
    "empty": lambda: make_call([random(0, 3)]),
    "channels_last": lambda: make_call([LAYOUTS["channels_last"](random(4, 3, 2, 2))]),
    "not-dense": lambda: make_call([LAYOUTS["every-other-exchanged"](random(4, 3, 2, 2))]),
}


@quiet
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_opcheck(sample):
    call = sample()
    grads = gradients_for(call)
    snapshot = call.estimate()
    detached = [w.detach() for w in call.weights]
    for weight in call.weights:
        weight.requires_grad_()
    for op, args in [
        (ops.power_, (*call.estimates(), *call.options())),
        (ops.estimate, call.estimates()),
        (ops.scale, (call.weights, snapshot, *call.constraint())),
        (ops.scale_backward, (grads, detached, snapshot, *call.constraint())),
    ]:
        torch.library.opcheck(op, args)
