"""The specification: spectral normalization in plain PyTorch, written for reading.

Every other back-end has the same functions with the same arguments, and is tested against these.
They work in fp32 or wider, on any device and for complex weights, and PyTorch differentiates
through :func:`scale` as often as asked.

A call handles many weights. Estimate ``e`` matricizes ``weights[layers[e]]`` along ``dims[e]``
into a matrix M of shape (rows, cols), with vectors ``u[e]`` of shape (rows,) and ``v[e]`` of shape
(cols,). A layer's sigma is the mean over its estimates: one for SN, two for BSN. Its first estimate
iterates in the order that ``v_first`` says, the others in the opposite order.

A *snapshot* is a flat tensor: u and v of every estimate in turn, then one sigma per estimate. It
holds what :func:`scale` needs, so that u and v may move on before the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulate_type(weight: Tensor) -> torch.dtype:
    """The type of u, v and sigma in a snapshot: fp32 for everything narrower than fp32."""
    return torch.promote_types(weight.dtype, torch.float32)


def full_precision(weight: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast from computing in half precision what is done with ``weight``."""
    device = weight.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def matrix_shape(shape: torch.Size, dim: int) -> tuple[int, int]:
    """(rows, cols) of the matrix whose rows are the slices along ``dim`` of a weight."""
    return shape[dim], shape[:dim].numel() * shape[dim + 1 :].numel()


def to_matrix(weight: Tensor, dim: int) -> Tensor:
    """The matrix whose rows are the slices of ``weight`` along ``dim``."""
    return weight.movedim(dim, 0).reshape(matrix_shape(weight.shape, dim))


def from_matrix(matrix: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The inverse of :func:`to_matrix`."""
    moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
    return matrix.reshape(moved).movedim(0, dim)


def iterate(
    matrix: Tensor, u: Tensor, v: Tensor, eps: float, v_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One power iteration: (u, v, sigma) with sigma = u^H M v.

    u = M v / max(|M v|, eps), then v = M^H u / max(|M^H u|, eps); ``v_first``: v, then u.
    """

    def normalize(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x).clamp_min(eps)

    if v_first:
        v = normalize(matrix.mH @ u)
        u = normalize(matrix @ v)
    else:
        u = normalize(matrix @ v)
        v = normalize(matrix.mH @ u)
    return u, v, torch.vdot(u, matrix @ v)


def unit(x: Tensor) -> Tensor:
    """x / |x|, however large or small the elements of x are; zeros where x is 0."""
    if x.numel() == 0:
        return x
    smallest = torch.finfo(x.dtype).tiny
    # After this the squares of the elements neither overflow nor vanish.
    x = x / x.abs().max().clamp_min(smallest)
    return x / torch.linalg.vector_norm(x).clamp_min(smallest)


def power_(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: float,
    v_first: bool,
    zero_guard: bool,
) -> Tensor:
    """Iterates, writes u and v back in place, and returns the snapshot.

    Layer ``l`` iterates ``n_power_iterations[l]`` times. With ``zero_guard`` the u and v of a
    matrix whose sigma comes out as 0 stay as they were (without it they turn to 0 and can never
    recover).

    Where a layer does not iterate, u and v are directions of any length, such as averages of unit
    vectors: sigma = u^H M v / (|u| |v|). The snapshot has the unit vectors; u and v stay as
    they are. ``eps`` plays no part in this.
    """
    vectors: list[Tensor] = []
    sigmas: list[Tensor] = []
    with torch.no_grad(), full_precision(weights[0]):
        for e, (layer, dim) in enumerate(zip(layers, dims, strict=True)):
            weight = weights[layer].detach()  # forward-mode derivatives heed no no_grad()
            matrix = to_matrix(weight, dim).to(accumulate_type(weight))
            new_u, new_v = u[e].to(matrix.dtype), v[e].to(matrix.dtype)
            if n_power_iterations[layer] == 0:
                new_u, new_v = unit(new_u), unit(new_v)
            sigma = torch.vdot(new_u, matrix @ new_v)
            first = e == 0 or layers[e - 1] != layer
            for _ in range(n_power_iterations[layer]):
                old_u, old_v = new_u, new_v
                new_u, new_v, sigma = iterate(matrix, old_u, old_v, eps, v_first == first)
                if zero_guard:
                    new_u = torch.where(sigma == 0, old_u, new_u)
                    new_v = torch.where(sigma == 0, old_v, new_v)
            if n_power_iterations[layer] > 0:
                u[e].copy_(new_u)
                v[e].copy_(new_v)
            vectors += [new_u, new_v]
            sigmas.append(sigma)
        return torch.cat([*vectors, torch.stack(sigmas)])


def estimate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
) -> Tensor:
    """The snapshot for the directions of u and v as they are: :func:`power_` at rest."""
    none = [0] * len(weights)
    return power_(weights, u, v, layers, dims, none, 0.0, False, False)


def vectors_of(
    weights: Sequence[Tensor], snapshot: Tensor, layers: Sequence[int], dims: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (u, v) of every estimate, as views of the snapshot."""
    offset = 0
    for layer, dim in zip(layers, dims, strict=True):
        rows, cols = to_matrix(weights[layer].detach(), dim).shape
        yield snapshot[offset : offset + rows], snapshot[offset + rows : offset + rows + cols]
        offset += rows + cols


def sigmas_of(snapshot: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The sigma of every layer, a 0-d tensor each: the mean over its estimates."""
    per_estimate = snapshot[snapshot.numel() - len(layers) :].unbind()
    sigmas: list[list[Tensor]] = [[] for _ in range(layers[-1] + 1)]
    for layer, sigma in zip(layers, per_estimate, strict=True):
        sigmas[layer].append(sigma)
    return [own[0] if len(own) == 1 else torch.stack(own).mean() for own in sigmas]


def _slopes(
    weights: Sequence[Tensor], snapshot: Tensor, layers: Sequence[int], dims: Sequence[int]
) -> list[Tensor]:
    """d sigma / d W of every layer, in its shape: the mean over its estimates of ``u v^H``."""
    found: list[list[Tensor]] = [[] for _ in weights]
    uv = vectors_of(weights, snapshot, layers, dims)
    for layer, dim, (u, v) in zip(layers, dims, uv, strict=True):
        found[layer].append(from_matrix(torch.outer(u, v.conj()), weights[layer].shape, dim))
    return [torch.stack(own).mean(0) for own in found]


def scale(
    weights: Sequence[Tensor],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
    bound: bool,
    zero_guard: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The normalized weights ``scale * W / sigma``, sigma = mean of u^H M v with u, v constant.

    ``bound``: ``min(1, scale / sigma) * W``. ``zero_guard``: where sigma is 0, ``scale * W``.
    ``dtype``: the type of the results, if not each weight's own; there is one rounding to it.
    """
    normalized = []
    with full_precision(weights[0]):
        slopes = _slopes(weights, snapshot, layers, dims)
        for weight, slope, factor in zip(weights, slopes, scales, strict=True):
            wide = weight.to(snapshot.dtype)
            sigma = (slope.conj() * wide).sum()
            # The branch that torch.where leaves out must not divide by zero: its gradient would be
            # NaN.
            is_guarded = bound or zero_guard
            divisor = (
                torch.where(sigma == 0, torch.ones_like(sigma), sigma) if is_guarded else sigma
            )
            result = wide * factor / divisor
            if bound:
                result = torch.where(sigma.real <= factor, wide, result)
            if zero_guard:
                result = torch.where(sigma == 0, wide * factor, result)
            normalized.append(result.to(dtype or weight.dtype))
    return normalized


def scale_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
    bound: bool,
    zero_guard: bool,
) -> list[Tensor]:
    """The gradients of :func:`scale` with respect to the weights, in their types, written out.

    ``dW = (s G - <s G, W> / sigma * S) / sigma``, with S = d sigma / d W the mean over estimates of
    ``u v^T``; where a bound is slack ``dW = G``, where zero_guard steps in ``dW = s G``.
    Real weights only.
    """
    slopes = _slopes(weights, snapshot, layers, dims)
    result = []
    sigmas = sigmas_of(snapshot, layers)
    for grad, weight, slope, sigma, s in zip(grads, weights, slopes, sigmas, scales, strict=True):
        g, w = grad.to(snapshot.dtype), weight.to(snapshot.dtype)
        change = (s * g - (s * g * w).sum() / sigma * slope) / sigma
        if bound:
            change = torch.where(sigma <= s, g, change)
        if zero_guard:
            change = torch.where(sigma == 0, s * g, change)
        result.append(change.to(weight.dtype))
    return result


def _meets(size: int, axis: Sequence[int], transposed: bool) -> Tensor:
    """(kernel_size, size): 1 where a tap of the kernel meets a position of the input."""
    kernel_size, stride, padding, dilation, output_size = axis
    meets = torch.zeros(kernel_size, size)
    for tap in range(kernel_size):
        shift = tap * dilation - padding
        if transposed:
            output = torch.arange(size) * stride + shift
            meets[tap] = (output >= 0) & (output < output_size)
        else:
            input = torch.arange(output_size) * stride + shift
            meets[tap, input[(input >= 0) & (input < size)]] = 1
    return meets


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

    Input (N, C, *size); result (C, *kernel_size) in fp32 or wider. The mean over batch and
    positions of the convolution with a weight W is then the sum over i and k of
    ``W[o, i, k] * patch_mean[i, k]``, exactly, for every stride, padding (given as what stands in
    front of each dimension), dilation and output size. Without ``average`` it is the sum.
    """
    wide = accumulate_type(input)
    geometry = (kernel_size, stride, padding, dilation, output_size)
    with full_precision(input):
        result = input.to(wide).sum(0)
        for size, *axis in zip(input.shape[2:], *geometry, strict=True):
            meets = _meets(size, axis, transposed).to(result)
            result = torch.tensordot(result, meets, ([1], [1]))
        return result / (input.shape[0] * math.prod(output_size)) if average else result


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

    Of shape (C, *size), in ``dtype``; with ``channels_last`` C lies innermost in memory.
    """
    count, _, *size = input_size
    geometry = (grad.shape[1:], stride, padding, dilation, output_size)
    with full_precision(grad):
        result = grad / (count * math.prod(output_size)) if average else grad
        for length, *axis in zip(size, *geometry, strict=True):
            meets = _meets(length, axis, transposed).to(result)
            result = torch.tensordot(result, meets, ([1], [0]))
    result = result.to(dtype)
    return result.movedim(0, -1).contiguous().movedim(-1, 0) if channels_last else result


def mean_bias(
    weight: Tensor,
    patches: Tensor,
    gain: Tensor | None,
    beta: Tensor | None,
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The bias ``beta - gain * mean`` that takes the mean of a convolution away, and that mean.

    ``patches`` (C_in, *kernel_size) is :func:`patch_mean` of the convolution's input. The mean
    (C_out,) is in fp32 or wider and has no gradient; the bias is in the weight's type.
    """
    wide = accumulate_type(weight)
    with full_precision(weight):
        split = weight.to(wide).unflatten(0, (groups, weight.shape[0] // groups))
        if transposed:  # (groups, in, out, *kernel_size)
            split = split.transpose(1, 2)
        per_group = patches.to(wide).unflatten(0, (groups, patches.shape[0] // groups)).flatten(1)
        mean = torch.einsum("gox,gx->go", split.flatten(2), per_group).flatten()
        bias = -mean if gain is None else -mean * gain.to(wide)
        if beta is not None:
            bias = bias + beta.to(wide)
    return bias.to(weight.dtype), mean.detach()
