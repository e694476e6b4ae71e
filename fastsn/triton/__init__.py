"""The operators in Triton, for GPUs.

It serves NVIDIA GPUs where the compiled ones cannot run, AMD GPUs and, in Triton's interpreter
(``TRITON_INTERPRET=1`` before Triton is imported), tensors on the CPU. The functions are those of
:mod:`fastsn.reference`, below autograd. Triton itself is imported by the first of them in use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastsn.triton.means import mean_bias, patch_mean, patch_mean_backward
    from fastsn.triton.operators import estimate, power_, scale, scale_backward

__all__ = [
    "OPERATORS",
    "estimate",
    "mean_bias",
    "patch_mean",
    "patch_mean_backward",
    "power_",
    "scale",
    "scale_backward",
    "serves",
    "why_not",
]

# Which file has which operator.
OPERATORS = {
    "estimate": "operators",
    "mean_bias": "means",
    "patch_mean": "means",
    "patch_mean_backward": "means",
    "power_": "operators",
    "scale": "operators",
    "scale_backward": "operators",
}


def __getattr__(name: str) -> object:
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{OPERATORS[name]}")
    function = globals()[name] = getattr(module, name)
    return function


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed (pip install triton): {error}"
    return None


def why_not() -> str | None:
    """Why no kernel can run in this process, or None if they can."""
    if not (is_interpreted() or torch.cuda.is_available()):
        return _missing() or "no GPU was found, and TRITON_INTERPRET is not 1"
    return _missing()


def serves(device: torch.device) -> bool:
    """Whether tensors on this device can be served: GPUs, or the CPU under the interpreter."""
    return device.type == ("cpu" if is_interpreted() else "cuda") and _missing() is None
