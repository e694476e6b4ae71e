"""Which implementation of the operators serves a call.

Every back-end is a module with the functions of :mod:`fastsn.reference`, the same names and the
same arguments. ``"auto"`` takes the first that can serve; :func:`use_backend` or the environment
variable ``FASTSN_BACKEND`` forces one, and then a call that it cannot serve raises.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsn import ops, reference

NAMES = ("cpp", "cuda", "triton", "reference")

_forced = "auto"


def why_not(name: str) -> str | None:
    """Why the back-end cannot run in this process at all, or None if it can."""
    if name == "cuda":
        return f"CUDA kernels were not built: {ops._C.cuda_reason}"
    if name == "triton":
        return "this version of fastsn has no Triton kernels"
    return None


def _why_not_for(name: str, weight: Tensor) -> str | None:
    if name != "cpp":
        return why_not(name)
    if weight.is_complex():
        return f"it has no kernels for {weight.dtype}"
    if weight.device.type not in ("cpu", "meta"):
        return f"it runs on the CPU, the weights are on {weight.device}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms and forward-mode differentiation need the reference"
    return None


def select(weights: Sequence[Tensor]) -> ModuleType:
    """The back-end for these weights, which share device and kind of dtype.

    Raises:
        RuntimeError: the forced back-end cannot serve them.
    """
    # Only complex numbers, devices and transforms decide, and a call does not mix those.
    if _forced == "auto":
        return reference if _why_not_for("cpp", weights[0]) else ops
    reason = _why_not_for(_forced, weights[0])
    if reason:
        possible = [name for name in NAMES if _why_not_for(name, weights[0]) is None]
        raise RuntimeError(
            f"fastsn back-end {_forced!r} was asked for, but {reason}; these can serve: {possible}"
        )
    return reference if _forced == "reference" else ops


def _check(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    reason = None if name == "auto" else why_not(name)
    if reason:
        possible = [other for other in NAMES if why_not(other) is None]
        raise RuntimeError(
            f"fastsn back-end {name!r} cannot run here: {reason}; these can: {possible}"
        )
    return name


class use_backend:
    """Makes one back-end serve every call, from now on or within a ``with`` block.

    Args:
        name: ``"cpp"`` (compiled CPU kernels), ``"cuda"``, ``"triton"``, ``"reference"`` (plain
            PyTorch, the specification), or ``"auto"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the back-end cannot run here; the message says why and lists those that can.

    Example::

        >>> fastsn.use_backend("reference")            # from now on
        >>> with fastsn.use_backend("cpp"):            # for a while
        ...     model(x)
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._previous = _forced
        _forced = _check(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._previous


def current_backend() -> str:
    """The name given to :func:`use_backend`, or ``"auto"``."""
    return _forced


_forced = _check(os.environ.get("FASTSN_BACKEND") or "auto")
