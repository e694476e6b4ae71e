"""Shapes, types and the snapshot: what every implementation of the operators agrees on."""

from __future__ import annotations

from collections.abc import Sequence
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


def sigmas_of(snapshot: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The sigma of every layer, a 0-d tensor each: the mean over its estimates."""
    per_estimate = snapshot[snapshot.numel() - len(layers) :].unbind()
    sigmas: list[list[Tensor]] = [[] for _ in range(layers[-1] + 1)]
    for layer, sigma in zip(layers, per_estimate, strict=True):
        sigmas[layer].append(sigma)
    return [own[0] if len(own) == 1 else torch.stack(own).mean() for own in sigmas]
