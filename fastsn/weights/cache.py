"""Normalized weights that the user has asked to remember, within ``fastsn.cached``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastsn.torch_internals import modes
from fastsn.weights import autocast

# A weight and its normalized one, by what that depends on besides.
Kept = dict[Any, tuple[Tensor, Tensor]]
# For each normalizer that is remembered: what has been read, by what it depends on besides the
# weight. Of this thread alone: another one has not asked.
_remembered: ContextVar[dict[Any, Kept] | None] = ContextVar("fastsn_remembered", default=None)


@contextmanager
def remembering(normalizers: Iterable[Any]) -> Iterator[None]:
    """Within this context each of these keeps what it has read first."""
    outer = _remembered.get() or {}
    token = _remembered.set({**{norm: {} for norm in normalizers}, **outer})
    try:
        yield
    finally:
        _remembered.reset(token)


#: What is remembered in this thread, or None: a call without a frame of Python's.
remembered = _remembered.get


def of(normalizer: Any) -> Kept | None:
    """What a normalizer has read since it began to remember; None where it does not."""
    found = remembered()
    # What a transform of torch.func or a graph has made is of no use outside of it.
    if found is None or torch.compiler.is_compiling() or modes.is_transformed():
        return None
    return found.get(normalizer)


def kind(weight: Tensor) -> tuple[Any, ...]:
    """What a normalized weight depends on besides the weight: whoever needs a graph gets one."""
    needs_graph = torch.is_grad_enabled() and weight.requires_grad
    return needs_graph, torch.is_inference_mode_enabled(), autocast.current(weight.device)
