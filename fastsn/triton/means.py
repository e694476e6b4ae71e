"""The host side of the means, for arguments that :mod:`fastsn.reference` explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn.triton import configs, mean_kernels, operators
from fastsn.triton.plan import MAX_LENGTH, VECTOR_TYPES, cdiv, check, check_storage, is_dense


class Axis(NamedTuple):
    """One spatial dimension of an input, and of the kernel of a convolution.

    Tap k meets position p where ``p * scale`` is one of
    ``begin + k * slope + {0, step, ..., span}``.
    """

    size: int
    taps: int
    scale: int
    step: int
    begin: int
    slope: int
    span: int


def axes_of(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_size: Sequence[int],
    transposed: bool,
) -> list[Axis]:
    """Always three of them; those in front may be of size 1."""
    check(len(size) <= 3, f"expected at most 3 spatial dimensions, got {len(size)}")
    lists = (kernel_size, stride, padding, dilation, output_size)
    for entries in lists:
        check(
            len(entries) == len(size),
            f"expected {len(size)} entries, one per spatial dimension, got {len(entries)}",
        )
    axes = [Axis(1, 1, 1, 1, 0, 1, 0)] * (3 - len(size))
    for length, taps, step, pad, dilate, outputs in zip(size, *lists, strict=True):
        check(
            taps > 0 and step > 0 and dilate > 0 and outputs >= 0,
            "expected a positive kernel_size, stride and dilation and an output_size of at least "
            f"0, got {taps}, {step}, {dilate} and {outputs}",
        )
        if transposed:  # position p is added to output p * step + k * dilate - pad
            axis = Axis(length, taps, step, 1, pad, -dilate, outputs - 1)
        else:  # output o reads position o * step + k * dilate - pad
            axis = Axis(length, taps, 1, step, -pad, dilate, (outputs - 1) * step)
        reach = length * axis.scale + taps * dilate + abs(pad) + abs(axis.span) + axis.step
        check(reach <= MAX_LENGTH, f"a dimension spans {reach} positions, more than {MAX_LENGTH}")
        axes.append(axis)
    return axes


def _check_type(name: str, dtype: torch.dtype) -> None:
    check(
        dtype in configs.TYPES,
        f"{name} must be float64, float32, bfloat16 or float16, got {dtype}",
    )


def _check_tensor(name: str, x: Tensor) -> None:
    _check_type(name, x.dtype)
    check(x.layout == torch.strided, f"{name} must be strided (dense), got {x.layout}")
    check_storage(x, name)


class Tiling(NamedTuple):
    """Rows and columns of what a kernel goes through, and the tiles along each."""

    sizes: tuple[int, int]
    tiles: tuple[int, int]


def _tiling(channels: int, positions: int, positions_inner: bool) -> Tiling:
    check(
        max(channels, positions) <= MAX_LENGTH,
        f"{channels} channels of {positions} positions are more than {MAX_LENGTH}",
    )
    rows, cols = (channels, positions) if positions_inner else (positions, channels)
    tiles = cdiv(rows, configs.MEAN_TILE["ROWS"]), cdiv(cols, configs.MEAN_TILE["COLS"])
    return Tiling((rows, cols), tiles)


class Rows(NamedTuple):
    """An input as kernels read it: samples of contiguous rows."""

    data: Tensor
    positions_inner: bool
    samples: int  # each may be several of the batch, one behind the other
    positions: int  # of such a sample
    sample_stride: int
    row_stride: int
    vector: int


def _as_rows(input: Tensor) -> Rows:
    """The input itself where channels or positions lie innermost, else a copy."""
    samples, channels, *size = input.shape
    positions = math.prod(size)
    x = input.resolve_neg().reshape(samples, channels, positions)
    positions_inner = positions > 1 and x.stride(2) == 1
    if not (positions_inner or channels == 1 or x.stride(1) == 1):
        x = x.contiguous()
        positions_inner = positions > 1
    vector = 1
    if is_dense(x.shape, x.stride()):
        vector = configs.vector_of(positions if positions_inner else channels, x.dtype)
        if vector > 1 and x.data_ptr() % 16:
            x = torch.empty_like(x).copy_(x)  # sums do not depend on where it lies
    sample_stride, row_stride, position_stride = x.stride()
    if not positions_inner:
        row_stride = position_stride if positions > 1 else sample_stride
        if positions and sample_stride == positions * row_stride:
            # All samples are one run of rows; join as many as fill a tile.
            joined = cdiv(configs.MEAN_TILE["ROWS"], positions)
            samples = cdiv(samples, joined)
            positions *= joined
            sample_stride *= joined
    return Rows(x, positions_inner, samples, positions, sample_stride, row_stride, vector)


def patch_mean(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_size: Sequence[int],
    transposed: bool,
    average: bool,
) -> Tensor:
    """What each tap of a convolution is multiplied with, averaged over batch and output positions.

    See :func:`fastsn.reference.patch_mean`. The input is read once.
    """
    _check_tensor("input", input)
    check(
        input.dim() == len(kernel_size) + 2,
        f"expected an input of {len(kernel_size) + 2} dimensions (N, C, *size) for kernel_size "
        f"{list(kernel_size)}, got shape {list(input.shape)}",
    )
    batch, channels, *size = input.shape
    axes = axes_of(size, kernel_size, stride, padding, dilation, output_size, transposed)
    accumulate = configs.accumulate_type(input.dtype)
    with torch.cuda.device_of(input):
        held = _as_rows(input)
        sizes, tiles = _tiling(channels, held.positions, held.positions_inner)
        each = max(1, cdiv(held.samples * math.prod(tiles), configs.MEAN_PROGRAMS))
        chunks = cdiv(held.samples, each)
        n_parts = chunks * tiles[held.positions_inner]
        result = input.new_empty((channels, *kernel_size), dtype=accumulate)
        parts = result.new_empty(result.numel() * n_parts)
        operators._launch(
            mean_kernels.patch_sums, chunks * math.prod(tiles), held.data.data_ptr(), parts,
            *sizes, held.samples, each, n_parts, batch * math.prod(size), held.sample_stride,
            held.row_stride, *chain.from_iterable(axes),
            **configs.sum_constants(input.dtype, held.positions_inner, held.vector),
        )  # fmt: skip
        count = batch * math.prod(output_size) if average else 1
        operators._launch(
            mean_kernels.patch_means, cdiv(result.numel(), configs.PARTS_TILE["ROWS"]), parts,
            result, result.numel(), n_parts, count, **configs.part_constants(accumulate),
        )  # fmt: skip
    return result


def patch_mean_backward(
    grad: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_size: Sequence[int],
    transposed: bool,
    average: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The gradient of :func:`patch_mean` with respect to one sample, which all samples share.

    See :func:`fastsn.reference.patch_mean_backward`.
    """
    _check_type("dtype", dtype)
    _check_tensor("grad", grad)
    check(len(input_size) >= 2, f"expected an input_size (N, C, *size), got {list(input_size)}")
    batch, channels, *size = input_size
    check(
        grad.dim() == len(size) + 1 and grad.shape[0] == channels,
        f"expected a gradient of shape (C, *kernel_size) for input_size {list(input_size)}, "
        f"got {list(grad.shape)}",
    )
    axes = axes_of(size, grad.shape[1:], stride, padding, dilation, output_size, transposed)
    count = batch * math.prod(output_size) if average else 1
    with torch.cuda.device_of(grad):
        held = grad.to(configs.accumulate_type(dtype)).resolve_neg().contiguous()
        shape = (*size, channels) if channels_last else (channels, *size)
        result = grad.new_empty(shape, dtype=dtype)
        sizes, tiles = _tiling(channels, math.prod(size), not channels_last)
        operators._launch(
            mean_kernels.patch_gradient, math.prod(tiles), held, result, *sizes, count,
            *chain.from_iterable(axes), **configs.tile_constants(dtype, not channels_last),
        )  # fmt: skip
    return result.movedim(-1, 0) if channels_last else result


def mean_bias(
    weight: Tensor,
    patches: Tensor,
    gain: Tensor | None,
    beta: Tensor | None,
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The bias ``beta - gain * mean`` that takes the mean of a convolution away, and that mean.

    See :func:`fastsn.reference.mean_bias`.
    """
    _check_tensor("weight", weight)
    check(
        weight.dim() >= 2,
        f"expected a weight of at least 2 dimensions, got shape {list(weight.shape)}",
    )
    first, second, *kernel_size = weight.shape
    check(
        groups > 0 and first % groups == 0,
        f"groups must divide the first dimension of the weight, {first}, got {groups}",
    )
    slices, taps = first // groups, math.prod(kernel_size)
    n_inputs, group_size = (slices, second) if transposed else (second, slices)
    n_outputs, length = groups * group_size, n_inputs * taps
    check(length <= MAX_LENGTH, f"an output has {length} weights, more than {MAX_LENGTH}")
    operands = [("patches", patches, [groups * n_inputs, *kernel_size])]
    operands += [
        (name, x, [n_outputs]) for name, x in (("gain", gain), ("beta", beta)) if x is not None
    ]
    for name, x, shape in operands:
        _check_tensor(name, x)
        check(
            list(x.shape) == shape and x.device == weight.device,
            f"expected {name} of shape {shape} on {weight.device} for a weight of shape "
            f"{list(weight.shape)} in {groups} groups, got {list(x.shape)} on {x.device}",
        )
    accumulate = configs.accumulate_type(weight.dtype)
    with torch.cuda.device_of(weight):
        held = weight.resolve_neg().reshape(first, second, taps)
        across, along, tap_stride = held.stride()
        row_stride, input_stride = (along, across) if transposed else (across, along)
        # Of the elements of an output: how many lie innermost; outer and inner strides in the
        # weight, then in patches.
        if tap_stride <= input_stride:
            order = taps, input_stride, tap_stride, taps, 1
        else:
            order = n_inputs, tap_stride, input_stride, 1, taps
        # Held until after the launch, which takes their addresses.
        vectors = [None if x is None else x.resolve_neg().contiguous() for x in (gain, beta)]
        addresses = [
            (0, -1) if x is None else (x.data_ptr(), VECTOR_TYPES.index(x.dtype)) for x in vectors
        ]
        bias = weight.new_empty(n_outputs)
        mean = weight.new_empty(n_outputs, dtype=accumulate)
        operators._launch(
            mean_kernels.mean_bias, n_outputs, held,
            patches.to(accumulate).resolve_neg().contiguous(), bias, mean,
            *chain.from_iterable(addresses), group_size, length, slices * across, row_stride,
            *order, **configs.bias_constants(weight.dtype),
        )  # fmt: skip
    return bias, mean
