"""What torch is doing with the code that runs: tracing, transforming, differentiating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def _find(owner: Any, name: str) -> Callable[[], Any]:
    """A function of torch's, or one that says no."""
    return getattr(owner, name, lambda: False)


_are_transforms_active = _find(torch._C, "_are_functorch_transforms_active")
_tracing_state = _find(torch._C, "_get_tracing_state")
_dispatch_modes = _find(torch._C, "_len_torch_dispatch_stack")


#: Whether Dynamo reads the code that runs. It knows no threads, no versions and no backward; what
#: does know those asks this, which costs a fraction of ``torch.compiler.is_compiling``.
is_read_by_dynamo = torch.compiler.is_dynamo_compiling


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation sees through tensors here."""
    return _are_transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0


def is_recorded() -> bool:
    """Whether a graph is made of what runs here."""
    return torch.compiler.is_compiling() or bool(_tracing_state())


def is_eager() -> bool:
    """Whether tensors are what they seem: nothing is traced, transformed or compiled here."""
    return not (
        torch.compiler.is_compiling()
        or _are_transforms_active()
        or _tracing_state()
        or _dispatch_modes()
    )
