"""Which implementation of the operators serves a call.

Every back-end has the functions of :mod:`fastsn.reference`, the same names and the same arguments.
The compiled ones stand behind the operators :mod:`fastsn.ops`, one for each kind of device. The
Triton kernels take the place of a compiled one when they are asked for, and on GPUs where there is
none that can run on any of them; beside GPUs that it serves, the reference serves the others.
``"auto"`` takes the first of ``NAMES`` that can serve; :func:`use_backend` or the environment
variable ``FASTSN_BACKEND`` forces one, and then a call that it cannot serve raises.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsn import cuda, ops, reference
from fastsn import triton as triton_kernels

NAMES = ("cpp", "cuda", "triton", "reference")

_forced = "auto"


def why_not(name: str) -> str | None:
    """Why the back-end cannot run in this process at all, or None if it can."""
    if name == "cuda":
        reason = cuda.why_not()
        if reason is None and not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no CUDA device"
        return reason
    if name == "triton":
        return triton_kernels.why_not()
    return None


def _why_not_for(name: str, weight: Tensor) -> str | None:
    if name == "reference":
        return None
    device = weight.device.type
    if weight.is_complex():
        return f"it has no kernels for {weight.dtype}"
    if name == "cpp" and device not in ("cpu", "meta"):
        return f"it runs on the CPU, the weights are on {weight.device}"
    if name == "cuda" and device != "cuda":
        return f"it runs on CUDA devices, the weights are on {weight.device}"
    if name == "cuda" and (reason := cuda.why_not_on(weight.device)):
        return reason
    if name == "triton":
        if not triton_kernels.serves(weight.device):
            return why_not(name) or f"it does not run on {weight.device}, where the weights are"
        if _forced == "auto" and device == "cuda" and cuda.are_mixed():
            return "compiled kernels serve other GPUs"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms and forward-mode differentiation need the reference"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the flag alone costs more
        if torch.onnx.is_in_onnx_export():
            return "ONNX has none of its operators"
    return None


def choose(weight: Tensor) -> str:
    """The name of the back-end for this weight.

    Raises:
        RuntimeError: the forced back-end cannot serve it.
    """
    if _forced == "auto":
        return next(name for name in NAMES if _why_not_for(name, weight) is None)
    reason = _why_not_for(_forced, weight)
    if reason:
        possible = [name for name in NAMES if _why_not_for(name, weight) is None]
        raise RuntimeError(
            f"fastsn back-end {_forced!r} was asked for, but {reason}; these can serve: {possible}"
        )
    return _forced


def is_distributed(weight: Tensor) -> bool:
    """Whether the weight is a DTensor, whose parts are on several ranks."""
    if type(weight) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def select(weights: Sequence[Tensor]) -> ModuleType:
    """The functions that serve these weights, which share device and kind of dtype.

    Raises:
        RuntimeError: the forced back-end cannot serve them.
    """
    if is_distributed(weights[0]):
        from fastsn import sharded  # not for everybody: it imports torch.distributed.tensor

        return sharded
    # Only complex numbers, devices and transforms decide, and a call does not mix those.
    return reference if choose(weights[0]) == "reference" else ops


def _triton_kernel(name: str) -> Callable[..., object]:
    def call(*args: object) -> object:
        return getattr(triton_kernels, name)(*args)

    return call


class _TritonKernels:
    """While this lives, Triton kernels serve the operators for these dispatch keys."""

    def __init__(self, *keys: str) -> None:
        self.library = torch.library.Library("fastsn", "IMPL")
        with warnings.catch_warnings():
            # That a compiled kernel is overridden: it is meant to be.
            warnings.simplefilter("ignore")
            for name in triton_kernels.OPERATORS:
                for key in keys:
                    self.library.impl(name, _triton_kernel(name), key, allow_override=True)


# Where no compiled ones serve GPUs. Nothing of Triton is imported until they are called.
_standing_in: _TritonKernels | None = None
_overriding: _TritonKernels | None = None


def _cuda_starts() -> None:
    global _standing_in
    cuda.ask()
    if cuda.why_not():
        _standing_in = _TritonKernels("CUDA")


# Before the first tensor is on a GPU: the choice costs its calls nothing, whoever makes them.
torch.cuda._lazy_call(_cuda_starts)


def _force(name: str) -> None:
    global _forced, _overriding
    _forced = name
    _overriding = _TritonKernels("CPU", "CUDA") if name == "triton" else None


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
        name: ``"cpp"`` (compiled CPU kernels), ``"cuda"`` (compiled kernels for NVIDIA GPUs),
            ``"triton"`` (kernels compiled at first use, for NVIDIA and AMD GPUs, and with
            ``TRITON_INTERPRET=1`` slowly for the CPU), ``"reference"`` (plain PyTorch, the
            specification), or ``"auto"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the back-end cannot run here; the message says why and lists those that can.

    Example::

        >>> fastsn.use_backend("reference")            # from now on
        >>> with fastsn.use_backend("cpp"):            # for a while
        ...     model(x)
    """

    def __init__(self, name: str) -> None:
        self._previous = _forced
        _force(_check(name))

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _force(self._previous)


def current_backend() -> str:
    """The name given to :func:`use_backend`, or ``"auto"``."""
    return _forced


_force(_check(os.environ.get("FASTSN_BACKEND") or "auto"))
