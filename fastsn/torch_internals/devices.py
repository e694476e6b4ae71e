"""The moment when torch starts CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch


def when_cuda_starts(function: Callable[[], None]) -> None:
    """Calls a function once torch has started CUDA; at once, if it has.

    Where torch has no such queue it is called now if CUDA runs already, and else not at all: what
    is not asked of a GPU is answered by what the extension was built for.
    """
    queue = getattr(torch.cuda, "_lazy_call", None)
    if queue is not None:
        queue(function)
    elif torch.cuda.is_initialized():
        function()
