"""Calls of patch_mean, patch_mean_backward and mean_bias: geometries of convolutions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CONVS = [F.linear, F.conv1d, F.conv2d, F.conv3d]
TRANSPOSED = [None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Geometry:
    """A convolution (a linear layer, where the lists are empty) and the size of its input."""

    input_size: list[int]
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    out_channels: int
    groups: int
    transposed: bool

    @property
    def output_size(self) -> list[int]:
        """The spatial sizes of the convolution's output."""
        sizes = zip(
            self.input_size[2:], self.kernel_size, self.stride, self.padding, self.dilation,
            self.output_padding, strict=True,
        )  # fmt: skip
        if self.transposed:
            return [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in sizes]
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in sizes]

    @property
    def weight_shape(self) -> list[int]:
        channels = self.input_size[1], self.out_channels
        rows, cols = channels if self.transposed else reversed(channels)
        return [rows, cols // self.groups, *self.kernel_size]

    def lists(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.output_size, self.transposed

    def mean_args(self, input: Tensor, average: bool = True) -> tuple:
        """The arguments of patch_mean."""
        return input, self.kernel_size, *self.lists(), average

    def backward_args(
        self, grad: Tensor, dtype: torch.dtype, channels_last: bool = False, average: bool = True
    ) -> tuple:
        """The arguments of patch_mean_backward."""
        return grad, self.input_size, *self.lists(), average, dtype, channels_last

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """What torch makes of it."""
        if not self.kernel_size:
            return F.linear(input, weight)
        dims = len(self.kernel_size)
        if self.transposed:
            own = {"output_padding": self.output_padding, "groups": self.groups}
            convolve = TRANSPOSED[dims]
        else:
            own, convolve = {"groups": self.groups}, CONVS[dims]
        return convolve(
            input, weight, stride=self.stride, padding=self.padding, dilation=self.dilation, **own
        )


def random_geometry(rng: random.Random) -> Geometry:
    """Any convolution that torch accepts, of up to three dimensions and up to a few channels."""
    while True:
        dims = rng.choice([0, 1, 1, 2, 2, 2, 3])
        groups = rng.choice([1, 1, 1, 2, 3]) if dims else 1
        widest = 4 if dims == 3 else 9
        stride = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
        dilation = [rng.choice([1, 1, 1, 2, 3]) for _ in range(dims)]
        kernel_size = [rng.choice([1, 2, 3, 3, 4, 5]) for _ in range(dims)]
        transposed = dims > 0 and rng.random() < 0.4
        geometry = Geometry(
            input_size=[
                rng.choice([1, 1, 2, 3, 9]),
                groups * rng.choice([1, 2, 3, 5, 17]),
                *(rng.choice([1, rng.randint(1, widest), rng.randint(1, 2 * widest)])
                  for _ in range(dims)),
            ],
            kernel_size=kernel_size,
            stride=stride,
            padding=[rng.randint(0, k) for k in kernel_size],
            dilation=dilation,
            output_padding=[
                rng.randrange(max(s, d)) if transposed else 0
                for s, d in zip(stride, dilation, strict=True)
            ],
            out_channels=groups * rng.randint(1, 6),
            groups=groups,
            transposed=transposed,
        )  # fmt: skip
        if all(size >= 1 for size in geometry.output_size):
            return geometry


def linear(*shape: int) -> Geometry:
    """A linear layer of this input."""
    return Geometry([*shape], [], [], [], [], [], 3, 1, False)


def conv(
    input_size,
    kernel=1,
    stride=1,
    padding=0,
    dilation=1,
    out_channels=4,
    groups=1,
    transposed=False,
) -> Geometry:
    """A convolution that is the same along all dimensions; its kernel need not be."""
    dims = len(input_size) - 2
    kernel_size = [kernel] * dims if isinstance(kernel, int) else [*kernel]
    lists = ([x] * dims for x in (stride, padding, dilation, 0))
    return Geometry([*input_size], kernel_size, *lists, out_channels, groups, transposed)


def make_channels_last(x: Tensor) -> Tensor:
    """(N, C, *size) with C innermost in memory, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": make_channels_last,
    "slice-of-samples": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "slice-of-channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "slice-of-channels-last": lambda x: make_channels_last(torch.cat([x, x], 1))[:, : x.shape[1]],
    "every-other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(
        *reversed(range(x.dim()))
    ),
    "expanded": lambda x: x[:1].expand(x.shape),
    "negative-bit": torch._neg_view,
}  # fmt: skip
