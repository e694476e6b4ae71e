"""Which weights autocast casts, and to what: those can be computed in that type at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Layers whose forward hands the weight to one function, one of those that autocast casts for.
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LOW = (torch.bfloat16, torch.float16)


def current(device: torch.device) -> torch.dtype | None:
    """The type that autocast casts weights on this device to, or None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype in _LOW else None


def casts(module: nn.Module, name: str) -> bool:
    """Whether autocast casts this weight in the module's forward, and nobody else reads it there.

    A class that overrides a part of torch's forward may do anything with its weight, unless the
    class that has the forward says ``casts_weight``.
    """
    if name != "weight":
        return False
    own = type(module)
    definer = next((cls for cls in own.__mro__ if "forward" in cls.__dict__), own)
    if definer.__dict__.get("casts_weight"):
        return True
    return any(
        issubclass(own, layer)
        and own.forward is layer.forward
        and getattr(own, "_conv_forward", None) is getattr(layer, "_conv_forward", None)
        for layer in LAYERS
    )


def fits(normalized: Tensor, original: Tensor) -> bool:
    """Whether a weight computed ahead has the type that it is to be used in at this moment."""
    dtype = normalized.dtype
    return dtype == original.dtype or dtype == current(normalized.device)
