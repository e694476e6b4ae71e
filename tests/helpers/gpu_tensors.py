"""Calls of the operators, moved to a device as they lie in memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helpers.calls import Call


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy there: strides, gaps and the offset in its storage included.

    Memory is copied as it is, and no kernel runs.
    """
    base = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    moved = base.to(device, copy=True).as_strided(x.size(), x.stride(), x.storage_offset())
    return torch._neg_view(moved) if x.is_neg() else moved


def call_on_device(call: Call, device: torch.device | str) -> Call:
    sides = {
        name: [on_device(x, device) for x in getattr(call, name)] for name in ("weights", "u", "v")
    }
    return replace(call, **sides)
