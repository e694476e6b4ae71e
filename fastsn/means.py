"""The batch mean of a layer's output, out of its input.

The mean over batch and positions of a convolution is the convolution of the mean over batch and
positions of its input's patches, exactly:

    mean_o = sum over i, k of W[o, i, k] * m[i, k],  m = patch_mean(input).

So a layer that takes the mean of its output away is one convolution with the bias
``beta - gain * mean``, and never reads what it has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastsn import backends, layout

#: A process group, ``"world"`` for the default one, or None: the means of this process alone.
Group = Any


class Geometry(NamedTuple):
    """What decides which inputs each tap of a kernel meets; one entry per spatial dimension.

    ``padding`` is what stands in front of each dimension; what stands behind follows from
    ``output_size``. All empty for a linear layer.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_size: tuple[int, ...] = ()
    transposed: bool = False


def of_channels(size: Sequence[int]) -> Geometry:
    """The geometry of the plain mean of every channel of an input with this spatial size."""
    ones, zeros = (1,) * len(size), (0,) * len(size)
    return Geometry(ones, ones, zeros, ones, tuple(size), False)


class _AllReduce(torch.autograd.Function):
    """The sum over the processes of a group; a sum is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _AllReduce.apply(grads[0], ctx.group), None


def resolve(group: Group) -> Any:
    """The process group to synchronize with, or None where there is nobody else.

    Raises:
        RuntimeError: a group was asked for, and ``torch.distributed`` is not initialized.
    """
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"expected an initialized process group for process_group={group!r}: call "
            "torch.distributed.init_process_group first, or use process_group=None for the means "
            "of each process alone"
        )
    found = dist.group.WORLD if group == "world" else group
    return found if dist.get_world_size(found) > 1 else None


def patch_mean(input: Tensor, geometry: Geometry, group: Any = None) -> Tensor:
    """The mean patch of an input (N, C, *size): (C, *kernel_size), in fp32 or wider.

    With a process ``group`` the mean over the batches of all its processes, each with its own
    weight: what is summed over the processes is the small patch, and the count.
    """
    backend: Any = backends.select([input])
    if group is None:
        return backend.patch_mean(input, *geometry, True)
    own = backend.patch_mean(input, *geometry, False)
    count = input.shape[0] * torch.Size(geometry.output_size).numel()
    total = _AllReduce.apply(torch.cat([own.flatten(), own.new_full((1,), count)]), group)
    return (total[:-1] / total[-1]).view(own.shape)


def mean_bias(
    weight: Tensor,
    patches: Tensor,
    gain: Tensor | None,
    beta: Tensor | None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The bias ``beta - gain * mean`` (in the weight's type), and the mean (without gradient)."""
    return backends.select([weight]).mean_bias(weight, patches, gain, beta, groups, transposed)


def shift(mean: Tensor, gain: Tensor | None, beta: Tensor | None) -> Tensor:
    """``beta - gain * mean``, in fp32 or wider."""
    with layout.full_precision(mean):
        shift = -mean if gain is None else -mean * gain
        return shift if beta is None else shift + beta


def center(
    input: Tensor, gain: Tensor | None, beta: Tensor | None, mean: Tensor | None, group: Any = None
) -> tuple[Tensor, Tensor]:
    """``(input - mean) * gain + beta`` per channel, and the mean; None: that of the batch."""
    if mean is None:
        mean = patch_mean(input, of_channels(input.shape[2:]), group).flatten()
    shape = (-1, *(1,) * (input.ndim - 2))
    bias = shift(mean, gain, beta).view(shape)
    with layout.full_precision(input):
        centered = input + bias if gain is None else torch.addcmul(bias, input, gain.view(shape))
    return centered.to(input.dtype), mean.detach()
