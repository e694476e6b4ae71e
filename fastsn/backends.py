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
import threading
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from types import ModuleType

import torch
from torch import Tensor

from fastsn import cuda, ops, reference
from fastsn import triton as triton_kernels
from fastsn.torch_internals import devices, modes

NAMES = ("cpp", "cuda", "triton", "reference")


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
    if weight.is_complex():
        return f"it has no kernels for {weight.dtype}"
    if name == "cpp" and not (weight.is_cpu or weight.is_meta):
        return f"it runs on the CPU, the weights are on {weight.device}"
    if name == "cuda" and not weight.is_cuda:
        return f"it runs on CUDA devices, the weights are on {weight.device}"
    if name == "cuda" and (reason := cuda.why_not_on(weight.device)):
        return reason
    if name == "triton":
        if not triton_kernels.serves(weight.device):
            return why_not(name) or f"it does not run on {weight.device}, where the weights are"
        if current_backend() == "auto" and weight.is_cuda and cuda.are_mixed():
            return "compiled kernels serve other GPUs"
    if modes.is_transformed():
        return "torch.func transforms and forward-mode differentiation need the reference"
    if modes.is_recorded() and torch.onnx.is_in_onnx_export():  # the flag alone costs more
        return "ONNX has none of its operators"
    return None


def choose(weight: Tensor) -> str:
    """The name of the back-end for this weight.

    Raises:
        RuntimeError: the forced back-end cannot serve it.
    """
    forced = current_backend()
    if forced == "auto":
        usual = "cuda" if weight.is_cuda else "cpp"  # what nearly every call gets
        if _why_not_for(usual, weight) is None:
            return usual
        return next(name for name in NAMES if _why_not_for(name, weight) is None)
    reason = _why_not_for(forced, weight)
    if reason:
        possible = [name for name in NAMES if _why_not_for(name, weight) is None]
        raise RuntimeError(
            f"fastsn back-end {forced!r} was asked for, but {reason}; these can serve: {possible}"
        )
    return forced


def select(weights: Sequence[Tensor]) -> ModuleType:
    """The functions that serve these weights, which share device and kind of dtype.

    Raises:
        RuntimeError: the forced back-end cannot serve them.
    """
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
devices.when_cuda_starts(_cuda_starts)


# Who has said what: from now on, the last one counting, and within open `with` blocks. Each takes
# itself out and nobody else, so that threads never bring back what another one has said.
_settings: list[use_backend] = []
_contexts: list[use_backend] = []
_default = "auto"
_here: ContextVar[str | None] = ContextVar("fastsn_backend", default=None)
# What a trace goes by, which knows no contexts: that of the thread which spoke last.
_traced = "auto"
_lock = threading.Lock()


def _heed() -> None:
    """Does what follows from what has been said."""
    global _default, _traced, _overriding
    with _lock:
        _default = _settings[-1].name if _settings else "auto"
        _traced = _here.get() or _default
        # The dispatcher knows no threads: Triton serves all of them while one asks for it.
        if _default != "triton" and all(context.name != "triton" for context in _contexts):
            _overriding = None
        elif _overriding is None:
            _overriding = _TritonKernels("CPU", "CUDA")


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
    """Makes one back-end serve every call: from now on, or within a ``with`` block.

    As a call it is for all threads. As a ``with`` block it is for the thread (the context) that
    enters it, and threads may be in different ones at a time. One exception: ``"triton"`` stands
    under the operators of the whole process, so that within such a block the calls of every thread
    that go to compiled kernels are served by Triton's.

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
        self.name = _check(name)
        self._tokens: list[Token[str | None]] = []
        _settings.append(self)
        _heed()

    def __enter__(self) -> use_backend:
        if self in _settings:
            _settings.remove(self)
        _contexts.append(self)
        self._tokens.append(_here.set(self.name))
        _heed()
        return self

    def __exit__(self, *exc_info: object) -> None:
        _contexts.remove(self)
        _here.reset(self._tokens.pop())
        _heed()


def current_backend() -> str:
    """The name given to :func:`use_backend` for this thread, or ``"auto"``."""
    if modes.is_read_by_dynamo():
        return _traced
    return _here.get() or _default


use_backend(os.environ.get("FASTSN_BACKEND") or "auto")
