"""Loads the compiled operators ``torch.ops.fastsn.*`` and teaches PyTorch their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from fastsn import _C
except ImportError as error:
    raise ImportError(
        f"fastsn's compiled extension cannot be loaded ({error}). It must be built against the "
        f"torch that is installed, here {torch.__version__}: "
        "pip install --no-build-isolation --force-reinstall --no-deps fastsn"
    ) from error

__all__ = [
    "_C",
    "estimate",
    "mean_bias",
    "normalize",
    "patch_mean",
    "patch_mean_backward",
    "power_",
    "present",
    "scale",
    "scale_backward",
    "states_of",
    "take",
]

power_ = torch.ops.fastsn.power_.default
estimate = torch.ops.fastsn.estimate.default
scale = torch.ops.fastsn.scale.default
scale_backward = torch.ops.fastsn.scale_backward.default
patch_mean = torch.ops.fastsn.patch_mean.default
patch_mean_backward = torch.ops.fastsn.patch_mean_backward.default
mean_bias = torch.ops.fastsn.mean_bias.default
normalize = _C.normalize
present = _C.present
states_of = _C.states_of
take = _C.take


def _check_device(device: torch.device, **arguments: Sequence[Tensor] | Tensor | None) -> None:
    """Compiled kernels say the same. One meta tensor suffices to get here instead."""
    for name, value in arguments.items():
        if value is None:
            continue
        is_list = not isinstance(value, Tensor)
        for k, x in enumerate(value if is_list else [value]):
            if x.device != device:
                own = f"{name}[{k}]" if is_list else name
                raise RuntimeError(f"fastsn: {own} must be on {device}, got {x.device}")


def _snapshot_like(weights: Sequence[Tensor], layers: Sequence[int], dims: Sequence[int]) -> Tensor:
    numel = len(layers)
    for layer, dim in zip(layers, dims, strict=True):
        shape = list(weights[layer].shape)
        numel += shape.pop(dim) + torch.Size(shape).numel()
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    return weights[0].new_empty(numel, dtype=dtype)


def _results_like(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


@torch.library.register_fake("fastsn::power_")
def _(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard):  # type: ignore[no-untyped-def]
    _check_device(weights[0].device, weights=weights, u=u, v=v)
    return _snapshot_like(weights, layers, dims)


@torch.library.register_fake("fastsn::estimate")
def _(weights, u, v, layers, dims):  # type: ignore[no-untyped-def]
    _check_device(weights[0].device, weights=weights, u=u, v=v)
    return _snapshot_like(weights, layers, dims)


@torch.library.register_fake("fastsn::scale")
def _(weights, snapshot, layers, dims, scales, bound, zero_guard, dtype=None):  # type: ignore[no-untyped-def]
    _check_device(weights[0].device, weights=weights, snapshot=snapshot)
    return _results_like(weights, dtype)


@torch.library.register_fake("fastsn::scale_backward")
def _(grads, weights, snapshot, layers, dims, scales, bound, zero_guard):  # type: ignore[no-untyped-def]
    _check_device(weights[0].device, weights=weights, grads=grads, snapshot=snapshot)
    return _results_like(weights)


@torch.library.register_fake("fastsn::patch_mean")
def _(input, kernel_size, stride, padding, dilation, output_size, transposed, average):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty((input.shape[1], *kernel_size), dtype=wide)


@torch.library.register_fake("fastsn::patch_mean_backward")
def _(  # type: ignore[no-untyped-def]
    grad, input_size, stride, padding, dilation, output_size, transposed, average, dtype,
    channels_last,
):  # fmt: skip
    _, channels, *size = input_size
    if channels_last:
        return grad.new_empty((*size, channels), dtype=dtype).movedim(-1, 0)
    return grad.new_empty((channels, *size), dtype=dtype)


@torch.library.register_fake("fastsn::mean_bias")
def _(weight, patches, gain, beta, groups, transposed):  # type: ignore[no-untyped-def]
    _check_device(weight.device, patches=patches, gain=gain, beta=beta)
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(out), weight.new_empty(out, dtype=wide)
