"""Random MSN layers with inputs for them, and their definition in two steps."""

from __future__ import annotations

import copy
import math
import random
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastsn

KINDS = ("Linear", *(f"{name}{n}d" for name in ("Conv", "ConvTranspose") for n in (1, 2, 3)))


def plain_of(layer: nn.Module) -> nn.Module:
    """torch's layer for the same arguments, without a bias, and without memory."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode"] + ["output_padding"] * layer.transposed
    arguments = {name: getattr(layer, name) for name in names}
    return layer.plain(**arguments, bias=False, device="meta")


class TwoStep(nn.Module):
    """What an MSN layer is by definition; it works with a copy of that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        # Not a module of this one: its weight is the layer's.
        self.plain = partial(functional_call, plain_of(layer))
        self.channel = -1 - len(getattr(layer, "kernel_size", ()))

    def forward(self, x: Tensor, *args: object) -> Tensor:
        layer = self.layer
        y = self.plain({"weight": layer.weight}, (x, *args))
        mean = layer.running_mean
        if layer.training or mean is None:
            mean = y.mean([d for d in range(-y.ndim, 0) if d != self.channel])
        if layer.training and layer.running_mean is not None:
            layer.num_batches_tracked += 1
            step = layer.momentum
            step = 1 / int(layer.num_batches_tracked) if step is None else step
            layer.running_mean = (1 - step) * layer.running_mean + step * mean.detach()
        shape = (-1, *(1,) * (-1 - self.channel))
        y = y - mean.to(y.dtype).view(shape)
        if layer.gain is not None:
            y = y * layer.gain.to(y.dtype).view(shape)
        return y if layer.bias is None else y + layer.bias.to(y.dtype).view(shape)


class Case(NamedTuple):
    """A layer, an input for it, and further arguments of its forward."""

    layer: nn.Module
    input: Tensor
    args: tuple[list[int], ...] = ()

    def __repr__(self) -> str:
        strides = self.input.stride()
        return f"{self.layer} of {tuple(self.input.shape)} with {strides=} and {self.args}"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(
        dict(module.state_dict()), dict(state), rtol=0, atol=0, equal_nan=True
    )


@torch.no_grad()
def drawn(layer: nn.Module) -> nn.Module:
    """The layer, with bias and gain at random."""
    for parameter in (layer.bias, layer.gain):
        if parameter is not None:
            parameter.normal_()
    return layer


def small(kind: str, **options) -> nn.Module:
    """A layer with a gain, and no parameter at its initial value."""
    sizes = (5, 4) if kind == "Linear" else (2, 3, 2)
    if "Conv" in kind:
        options = {"stride": 2, "padding": 1, **options}
    return drawn(getattr(fastsn.nn, f"MSN{kind}")(*sizes, **{"gain": True, **options}))


def small_input(kind: str, **options) -> Tensor:
    size = (5,) if kind == "Linear" else (2, *[4] * int(kind[-2]))
    return 1 + torch.randn(3, *size, **options)


def network(**options) -> nn.Module:
    """Every kind of form a layer can be in; smooth, because kinks amplify rounding."""
    return nn.Sequential(
        fastsn.nn.MSNConv2d(3, 8, 3, padding=1, gain=True, **options),
        nn.Tanh(),
        fastsn.nn.MSNConvTranspose2d(8, 4, 2, stride=2, norm="bidirectional", **options),
        nn.Tanh(),
        nn.Flatten(),
        fastsn.nn.MSNLinear(4 * 64, 5, bias=False, **options),
    )


def image(batch: int = 5) -> Tensor:
    return 0.5 + torch.randn(batch, 3, 4, 4)


def weights_of(output: Tensor) -> Tensor:
    """What makes a loss out of an output: no symmetry, and the same for all."""
    return torch.arange(1.0, output.numel() + 1).sin().view(output.shape).to(output.dtype)


def step(layer: nn.Module, forward: nn.Module, case: Case) -> dict[str, Tensor]:
    """The output of `forward`, the gradients of the input and of all parameters, and the state."""
    x = case.input.clone().requires_grad_()
    output = forward(x, *case.args)
    named = {"input": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(output, list(named.values()), weights_of(output))
    gradients = {f"{name}.grad": grad for name, grad in zip(named, grads, strict=True)}
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    return {"output": output.detach(), **gradients, **state}


def random_case(rng: random.Random) -> Case:
    """All that a layer can be told, and an input that it can take, with two values per channel."""
    options = {
        "bias": rng.random() < 0.8,
        "gain": rng.random() < 0.4,
        "momentum": rng.choice([0.1, None, 0, 1]),
        "norm": rng.choice(["matrix", "bidirectional"]),
        "scale": rng.choice([1.0, 1.7]),
        "n_power_iterations": rng.randint(1, 2),
    }
    kind = rng.choice(KINDS)
    make = {"L": _linear, "C": _transposed if "Transpose" in kind else _convolution}[kind[0]]
    case = make(rng, kind, options)
    return case._replace(layer=drawn(case.layer))


def _linear(rng: random.Random, kind: str, options: dict) -> Case:
    inputs, outputs = rng.randint(1, 9), rng.randint(1, 9)
    x = torch.randn(*rng.choice([(2,), (5,), (2, 3), (1, 2, 2)]), inputs)
    return Case(fastsn.nn.MSNLinear(inputs, outputs, **options), x + rng.choice([0, 3]))


class _Shape:
    """What the layers of one kind have in common, drawn at random."""

    def __init__(self, rng: random.Random, kind: str) -> None:
        self.rng = rng
        self.dims = int(kind[-2])
        self.groups = rng.choice([1, 1, 2, 3])
        self.channels = [self.groups * rng.randint(1, 3) for _ in range(2)]
        self.kernel, self.stride = self.each(1, 4), self.each(1, 3)
        self.padding, self.dilation = self.each(0, 2), self.each(1, 2)
        self.spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]

    def each(self, low: int, high: int) -> tuple[int, ...]:
        return tuple(self.rng.randint(low, high) for _ in range(self.dims))

    def input(self, size: list[int], outputs: int) -> Tensor:
        """With or without a batch, or with one of one, of any memory format."""
        batch = self.rng.choice([(), (1,), (2,), (3,)])
        if math.prod(batch) * outputs < 2:
            batch = (2,)
        x = torch.randn(*batch, self.channels[0], *size) + self.rng.choice([0, 3])
        if batch and self.dims > 1 and self.rng.random() < 0.4:
            formats = {2: torch.channels_last, 3: torch.channels_last_3d}
            return x.to(memory_format=formats[self.dims])
        return x


def _convolution(rng: random.Random, kind: str, options: dict) -> Case:
    shape = _Shape(rng, kind)
    mode = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    padding, stride = shape.padding, shape.stride
    pads = [(p, p) for p in padding]
    named = rng.choice([None, None, None, "same", "valid"])
    if named == "same":
        padding, stride = named, (1,) * shape.dims
        pads = [((span - 1) // 2, span // 2) for span in shape.spans]
    elif named == "valid":
        padding, pads = named, [(0, 0)] * shape.dims
    least = [max(span - sum(p), max(p) + 1) for span, p in zip(shape.spans, pads, strict=True)]
    room = rng.choice([0, 3, 6])
    size = [length + rng.randint(0, room) for length in least]
    outputs = math.prod(
        (n + sum(p) - span) // s + 1
        for n, p, span, s in zip(size, pads, shape.spans, stride, strict=True)
    )
    layer = getattr(fastsn.nn, f"MSN{kind}")(
        *shape.channels, shape.kernel, stride, padding, shape.dilation, shape.groups,
        padding_mode=mode, **options,
    )  # fmt: skip
    return Case(layer, shape.input(size, outputs))


def _transposed(rng: random.Random, kind: str, options: dict) -> Case:
    shape = _Shape(rng, kind)
    steps = map(max, shape.stride, shape.dilation)
    extra = [rng.randint(0, step - 1) for step in steps]
    offsets = [span - 2 * p for span, p in zip(shape.spans, shape.padding, strict=True)]
    least = [1 + max(0, -((o - 1) // s)) for o, s in zip(offsets, shape.stride, strict=True)]
    size = [length + rng.randint(0, 3) for length in least]
    smallest = [(n - 1) * s + o for n, s, o in zip(size, shape.stride, offsets, strict=True)]
    args: tuple[list[int], ...] = ()
    output = [n + e for n, e in zip(smallest, extra, strict=True)]
    if rng.random() < 0.4:
        output = [n + rng.randint(0, s - 1) for n, s in zip(smallest, shape.stride, strict=True)]
        args = (output,)
    layer = getattr(fastsn.nn, f"MSN{kind}")(
        *shape.channels, shape.kernel, shape.stride, shape.padding, tuple(extra), shape.groups,
        dilation=shape.dilation, **options,
    )  # fmt: skip
    return Case(layer, shape.input(size, math.prod(output)), args)
