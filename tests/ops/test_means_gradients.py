"""patch_mean and mean_bias under autograd and torch.compile, and what PyTorch checks of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastsn import ops, reference
from helpers.calls import each_type
from helpers.compiled import quiet
from helpers.means_calls import Geometry, conv, linear, make_channels_last
from helpers.sweeps import sweep
from helpers.tolerances import assert_sum_no_worse


def mean_of(geometry: Geometry):
    return lambda input: ops.patch_mean(*geometry.mean_args(input))


def arguments(geometry: Geometry, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input, weight, gain and beta, all with gradients."""
    shapes = [geometry.input_size, geometry.weight_shape, *2 * [[geometry.out_channels]]]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


GRADIENTS = {
    "linear": linear(3, 4),
    "conv1d": conv([2, 4, 6], 3, stride=2, padding=1, groups=2),
    "conv2d": conv([2, 2, 4, 3], 2, padding=1, dilation=2),
    "conv3d": conv([2, 1, 3, 2, 2], 2, out_channels=2),
    "transposed": conv([2, 4, 3, 2], 2, stride=2, padding=1, groups=2, transposed=True),
}
each_gradient = pytest.mark.parametrize("geometry", GRADIENTS.values(), ids=GRADIENTS.keys())


def whole(geometry: Geometry, backend=ops):
    """The bias as a function of input, weight, gain and beta."""

    def bias(input: Tensor, weight: Tensor, gain: Tensor | None, beta: Tensor | None) -> Tensor:
        patches = backend.patch_mean(*geometry.mean_args(input))
        shape = geometry.groups, geometry.transposed
        return backend.mean_bias(weight, patches, gain, beta, *shape)[0]

    return bias


@each_gradient
def test_gradients_and_their_gradients(geometry):
    leaves = arguments(geometry)
    assert gradcheck(whole(geometry), leaves)
    assert gradgradcheck(whole(geometry), leaves)
    assert gradcheck(mean_of(geometry), leaves[:1])
    assert gradgradcheck(mean_of(geometry), leaves[:1])
    grad = torch.randn(geometry.input_size[1], *geometry.kernel_size).double().requires_grad_()
    for average in (False, True):
        args = geometry.backward_args(grad, torch.float64, average=average)[1:]
        assert gradcheck(lambda g, args=args: ops.patch_mean_backward(g, *args), [grad])
        assert gradgradcheck(lambda g, args=args: ops.patch_mean_backward(g, *args), [grad])


@each_gradient
@pytest.mark.parametrize("used", range(1, 16))
def test_only_the_gradients_asked_for(geometry, used):
    """Any of input, weight, gain and beta may be frozen, gain and beta absent instead."""
    for absent in (False, True):
        leaves = arguments(geometry)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(used >> i & 1))
        given = [x if x.requires_grad or i < 2 or not absent else None
                 for i, x in enumerate(leaves)]  # fmt: skip
        wanted = [x for x in leaves if x.requires_grad]
        direction = torch.randn(geometry.out_channels, dtype=torch.float64)
        expected = torch.autograd.grad(whole(geometry, reference)(*given), wanted, direction)
        for create_graph in (False, True):
            out = whole(geometry)(*given)
            actual = torch.autograd.grad(out, wanted, direction, create_graph=create_graph)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@each_type
@each_gradient
def test_gradients_in_every_type(geometry, dtype):
    """Gradients have the types of what they belong to, and are about as exact as their peers."""
    leaves = arguments(geometry, dtype)
    leaves[2:] = [x.detach().float().requires_grad_() for x in leaves[2:]]
    direction = torch.randn(geometry.out_channels).to(dtype)
    actual, peer = (
        torch.autograd.grad(whole(geometry, backend)(*leaves), leaves, direction)
        for backend in (ops, reference)
    )
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(whole(geometry, reference)(*wide), wide, direction.double())
    for triple in zip(actual, peer, exact, strict=True):
        assert_sum_no_worse(
            *triple, length=64, computed_in=reference.accumulate_type(leaves[0]), largest_term=1.0
        )


def test_gradient_has_the_input_s_layout():
    for last in (False, True):
        geometry = conv([4, 3, 5, 6], 3, padding=1)
        input = torch.randn(geometry.input_size)
        input = (make_channels_last(input) if last else input).requires_grad_()
        out = mean_of(geometry)(input)
        (grad,) = torch.autograd.grad(out.sum(), input)
        strides = (0, *input.stride()[1:])  # one map, shared by all samples
        assert grad.stride() == strides


def test_input_may_be_overwritten_and_the_mean_has_no_gradient():
    geometry = conv([4, 3, 5, 6], 3, padding=1)
    leaves = arguments(geometry)
    input = leaves[0] * 1
    patches = ops.patch_mean(*geometry.mean_args(input))
    input.relu_()
    bias, mean = ops.mean_bias(leaves[1], patches, *leaves[2:], 1, False)
    assert bias.requires_grad and not mean.requires_grad
    mean.add_(1)
    bias.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_autocast_leaves_the_backward_alone():
    geometry = conv([4, 3, 5, 6], 3, padding=1)
    leaves = arguments(geometry, torch.float32)
    out = whole(geometry)(*leaves)
    plain = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(out.sum(), leaves)
        assert torch.equal(whole(geometry)(*leaves), out)
    assert all(map(torch.equal, plain, again))


def test_inference_mode():
    geometry = conv([4, 3, 5, 6], 3, padding=1)
    leaves = arguments(geometry)
    with torch.inference_mode():
        out = whole(geometry)(*leaves)
    assert out.is_inference() and torch.equal(out, whole(geometry)(*leaves))


# torch.compile, and PyTorch's own checks


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("last", [False, True])
@each_gradient
def test_compile_with_any_batch(geometry, last):
    """Forward and backward in one graph; another batch size brings no second one."""
    _, weight, gain, beta = arguments(geometry, torch.float32)
    graphs = 0

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def step(input: Tensor, weight: Tensor, gain: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        shape = geometry.groups, geometry.transposed
        patches = ops.patch_mean(*geometry.mean_args(input * 2))
        return ops.mean_bias(weight, patches, gain, beta, *shape)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for batch in (23, 19, 29):
        input = torch.randn(batch, *geometry.input_size[1:])
        input = (make_channels_last(input) if last else input).requires_grad_()
        torch._dynamo.mark_dynamic(input, 0)  # an error where the batch size is taken as constant
        leaves = [input, weight, gain, beta]
        results = []
        for run in (step, compiled):
            out, mean = run(*leaves)
            results.append([out, mean, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(*results)
    assert graphs == 1


@sweep
@each_gradient
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@quiet
def test_opcheck(geometry, dtype, last):
    input, weight, gain, beta = arguments(geometry, dtype)
    input = (make_channels_last(input.detach()) if last else input.detach()).requires_grad_()
    wide = reference.accumulate_type(input)
    patches = torch.randn(geometry.input_size[1], *geometry.kernel_size, dtype=wide)
    patches.requires_grad_()
    shape = geometry.groups, geometry.transposed
    for op, args in [
        (ops.patch_mean, geometry.mean_args(input)),
        (ops.patch_mean_backward, geometry.backward_args(patches, dtype, last)),
        (ops.mean_bias, (weight, patches, gain, beta, *shape)),
        (ops.mean_bias, (weight, patches, None, None, *shape)),
    ]:
        torch.library.opcheck(op, args)
